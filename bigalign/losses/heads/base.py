"""Heads: layers that belong to a loss, and what they may read of the towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bigalign.towers.base import TowerOutput

Params = dict[str, Any]  # a tree of arrays, as flax makes it
# Patches that the image tower does not see: places [B, N] bool, the vector [D] that is there.
Hidden = tuple[jax.Array, jax.Array]


class ImageTower(Protocol):
  """See Read.image."""

  def __call__(
    self,
    images: jax.Array,
    *,
    averaged: bool = False,
    hidden: Hidden | None = None,
    kept: jax.Array | None = None,
  ) -> TowerOutput: ...


class TeacherTower(Protocol):
  """See Read.teacher."""

  def __call__(
    self, images: jax.Array, *, hidden: jax.Array | None = None, projected: bool = False
  ) -> jax.Array: ...


class TextTower(Protocol):
  """See Read.text."""

  def __call__(self, ids: jax.Array, mask: jax.Array, *, averaged: bool = False) -> TowerOutput: ...


class TextSteps(Protocol):
  """See Read.text_steps."""

  def __call__(
    self, ids: jax.Array, position: jax.Array, cache: Any = None
  ) -> tuple[jax.Array, Any]: ...


class Projector(Protocol):
  """See Read.project."""

  def __call__(self, side: str, output: TowerOutput, *, averaged: bool = False) -> jax.Array: ...


class Patches(Protocol):
  """See Read.projected."""

  def __call__(self, output: TowerOutput | None = None, *, averaged: bool = False) -> jax.Array: ...


def not_read(*args: Any, **others: Any) -> Any:
  """Stands for a function that the caller of a head leaves out, since the head does not call it."""
  raise NotImplementedError("this head is called without a model")


class Read(NamedTuple):
  """What a head may read of some rows of the batch.

  Args:
    batch: text [b, L] int32, text_mask [b, L] bool; the fields that the head names, and its draws.
    features: of the towers: zimg, ztxt [b, E], unit norm; raw_img, raw_txt [b, E]; pooled_img
      [b, D], tokens_img [b, N, D] and tokens_txt [b, L, D] in the dtype of the towers; mask_txt
      [b, L] if the text tower masks padding; ztxts [b, M, E] of several texts.
    image: the image tower, of other images [b, S, S, 3] uint8, whose side its patch divides. With
      `averaged`, its averaged parameters are used, and no gradient is taken. With `hidden`, it sees
      a vector in place of some patches; with `kept`, [b, n] int32, these patches alone.
    text: the text tower, of other texts.
    project: (side, output of the tower) -> [b, E] float32, before the norm; side "image" or "text".
    sizes: as for Loss.init.
    state: of the loss before this step, such as the centre of a teacher's logits; no gradient.
    projected: (output of the image tower, or None: that of the batch) -> [b, N, K] float32, its
      tokens in the space of the embeddings: the projector of each patch, K = E; of `blocks`, what
      it makes of the patches, the second half of an embedding, K = E / 2.
    words: () -> [V, D] float32, the token table of the text tower; no gradient.
    teacher: the tokens [b, N, D] that config.teacher makes of images [b, S, S, 3] uint8; no
      gradient. With `hidden`, [b, N] bool, the embedding of these patches is 0; with `projected`,
      they are in the space of its embeddings, [b, N, E].
    text_steps: of a causal text tower, for heads that write: (ids [b] of the tokens at a position,
      position, cache) -> (their states [b, D], the cache with them). None is the empty cache.
  """

  batch: Mapping[str, jax.Array]
  features: Mapping[str, jax.Array]
  image: ImageTower
  text: TextTower
  project: Projector
  sizes: Mapping[str, Any]
  state: Mapping[str, jax.Array] = {}
  projected: Patches = not_read
  words: Callable[[], jax.Array] = not_read
  teacher: TeacherTower = not_read
  text_steps: TextSteps = not_read


class Writing(NamedTuple):
  """How a head writes texts, one token after the other.

  Args:
    step: (ids [b] of the tokens before a position, 0 before the first; the position; cache) ->
      (logits [b, V] of the token there, the next cache).
    cache: before the first token. A tree of arrays of a row for each text, on the second axis of
      arrays that stack layers (tree.is_stacked), on the first axis of the others.
  """

  step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
  cache: Any


def no_draws(
  key: jax.Array, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """A head that draws nothing."""
  return {}


class Head(NamedTuple):
  """Layers of a loss. Their parameters have the paths heads/<loss>/…; exports have them on demand.

  Rows are independent, since a batch may be computed in microbatches. What depends on the whole
  batch follows in `apply` of the loss: a mean over tokens is the sum of the rows' sums over the sum
  of their counts.

  Args:
    init: (key, read) -> parameters, a tree of float32 arrays; of one row.
    apply: (parameters, averaged parameters, read) -> {name: [b, …]}, features that `apply` of the
      loss finds under these names. No gradient is taken of averaged parameters.
    fields: names of the fields of the batch that it reads, besides text and text_mask.
    draw: (key of the step, {field: shape} of the batch, sizes) -> {name: [B, …]}, the random
      numbers of a step, which the head finds in read.batch. They depend on the seed, the step and
      the place in the batch alone.
    sums: names of features without the batch axis, which are added up over the batch; no gradient
      goes through them.
    averages: whether it reads averaged parameters, of itself or of the towers.
    teacher: whether it reads config.teacher.
    write: of a head that predicts texts: (parameters, read) -> how it writes them. It reads the
      image tokens, text_steps, and the shapes of text and tokens_txt. None: it does not.
    prompt: the beginning of each text that it writes, of which a caption is what follows.
    late: names of features in which the loss is affine, as in a sum that is divided by a count, or
      which are only logged. With microbatches, what they and `sums` alone need is computed once,
      not in both passes.
  """

  init: Callable[[jax.Array, Read], Params]
  apply: Callable[[Params, Params, Read], dict[str, jax.Array]]
  fields: frozenset[str] = frozenset()
  draw: Callable[
    [jax.Array, Mapping[str, tuple[int, ...]], Mapping[str, Any]], dict[str, jax.Array]
  ] = no_draws
  sums: frozenset[str] = frozenset()
  averages: bool = False
  teacher: bool = False
  write: Callable[[Params, Read], Writing] | None = None
  prompt: str = ""
  late: frozenset[str] = frozenset({"sum"})


def mean_loss(
  params: Any, state: Any, feats: Mapping[str, jax.Array], batch: Any, context: Any
) -> tuple[jax.Array, Any]:
  """Loss.apply of a head whose loss is `mean_over_batch`."""
  value = mean_over_batch(feats)
  return value, (state, {"loss": value})


def mean_over_batch(feats: Mapping[str, jax.Array]) -> jax.Array:
  """[]: the mean of what a head counts, over the whole batch: of "sum" and "count", both [B]."""
  return feats["sum"].sum() / jnp.maximum(feats["count"].sum(), 1)
