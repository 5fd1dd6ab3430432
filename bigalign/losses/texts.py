"""Several texts of each image: flat columns of the logits, which stay with their image.

The columns are the texts of the first image, then those of the second, and so on, so that the owner
of a column is its position divided by the number M of texts of an image. Columns are sharded as the
images are, in every way to form the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign.data.text.kinds import ABSENT, NEGATIVE, POSITIVE
from bigalign.losses.engine import reductions
from bigalign.losses.engine.pairwise import Engine

PER_CLASS_TOKEN = "per_class_token"  # a value of the option texts of losses, see `class_tokens`


class Texts(NamedTuple):
  """The texts of a batch.

  Args:
    z: [B M, E], zeros where a text is absent.
    kind: [B, M] int32, or None for M = 1: every image then has its text.
    per_image: M.
  """

  z: jax.Array
  kind: jax.Array | None
  per_image: int

  @property
  def positive(self) -> jax.Array:
    """[B, M] bool: texts that belong to their image."""
    if self.kind is None:
      return jnp.ones((len(self.z), 1), bool)
    return self.kind == POSITIVE

  @property
  def present(self) -> jax.Array:
    """[B, M] bool: texts that exist: positives and hard negatives."""
    return jnp.ones((len(self.z), 1), bool) if self.kind is None else self.kind != ABSENT

  def number(self, chosen: jax.Array) -> Any:
    """How many of [B, M] are True, at least 1; a number of Python for M = 1."""
    return chosen.size if self.kind is None else jnp.maximum(chosen.sum(), 1)

  def columns(self, **more: jax.Array) -> dict[str, jax.Array]:
    """The columns of a matrix: "z", "kind" for M > 1, and `more` [B, M] of each text."""
    kinds = {} if self.kind is None else {"kind": self.kind}
    return {"z": self.z} | {k: flat(x) for k, x in {**kinds, **more}.items()}

  def cosines(self, zimg: jax.Array, engine: Engine) -> jax.Array:
    """[B, M]: of each image and its own texts, as the products of the engine."""
    return engine.paired(zimg[:, None], self.of_image(self.z))

  def of_image(self, x: jax.Array) -> jax.Array:
    """[B M, ...] -> [B, M, ...]."""
    return rearrange(x, "(b m) ... -> b m ...", m=self.per_image)

  def owned(self, row: Mapping[str, jax.Array], col: Mapping[str, jax.Array]) -> jax.Array:
    """[n, m] bool of a tile: the column is a text of the row's image."""
    return owned(row, col, self.per_image)


def flat(x: jax.Array) -> jax.Array:
  """[B, M, ...] -> [B M, ...]."""
  return rearrange(x, "b m ... -> (b m) ...")


def of_batch(feats: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> Texts:
  """The texts of features and batch.

  Args:
    feats: "ztxts" [B, M, E].
    batch: "texts_kind" [B, M]: 0 absent, 1 positive, 2 hard negative. Of a single text (M = 1) the
      kind is not read: it is a positive.
  """
  z = feats["ztxts"]
  if z.shape[1] == 1:
    return Texts(z[:, 0], None, 1)
  kind = batch["texts_kind"].astype(jnp.int32)
  # An absent text is some vector, even one that is not finite. Its gradient is zero.
  return Texts(flat(jnp.where((kind != ABSENT)[..., None], z, 0)), kind, z.shape[1])


def class_tokens(name: str, feats: Mapping[str, jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  """The embeddings of the first class token and first texts, and of the second ones, [B, E] each.

  TIPS, https://arxiv.org/abs/2410.16512, contrasts one class token with the alt text and the other
  with a synthetic caption.

  Args:
    name: of the loss.
    feats: "zimgs" [B, 2, E], of the class tokens; "ztxt" and "ztxt_second".

  Raises:
    ValueError: if there are not two class tokens.
  """
  zimgs = feats["zimgs"]
  if zimgs.shape[1] != 2:
    raise ValueError(
      f"config.loss.{name}.texts={PER_CLASS_TOKEN!r} compares two class tokens with two texts, but"
      f" config.model.image.class_tokens={zimgs.shape[1]}; set it to 2"
    )
  return [(zimgs[:, 0], feats["ztxt"]), (zimgs[:, 1], feats["ztxt_second"])]


def owned(row: Mapping[str, jax.Array], col: Mapping[str, jax.Array], count: int) -> jax.Array:
  """[n, m] bool of a tile: the column is one of the `count` texts of the row's image."""
  return row["batch_index"][:, None] == (col["batch_index"] // count)[None, :]


def negatives(row: Mapping[str, jax.Array], col: Mapping[str, jax.Array], count: int) -> jax.Array:
  """[n, m] bool of a tile: the column is a text that the row's image must not choose.

  These are the positives of other images, and the hard negatives of all images, its own included.
  """
  other = ~owned(row, col, count)
  if "kind" not in col:
    return other
  kind = col["kind"][None, :]
  return (kind == NEGATIVE) | (other & (kind == POSITIVE))


def masked_mean(x: jax.Array, chosen: jax.Array) -> jax.Array:
  """[]: the mean of the entries that are chosen; 0 if none is."""
  return jnp.where(chosen, x, 0).sum() / jnp.maximum(chosen.sum(), 1)


def row_mean(x: jax.Array, chosen: jax.Array) -> jax.Array:
  """[B]: the mean of the chosen entries of each row of [B, M]; 0 if none is."""
  return jnp.where(chosen, x, 0).sum(1) / jnp.maximum(chosen.sum(1), 1)


def row_lse(x: jax.Array, chosen: jax.Array) -> jax.Array:
  """[B]: the log-sum-exp of the chosen entries of each row of [B, M]; -inf if none is."""
  # Two wheres, since a gradient passes through both branches of one.
  safe = jnp.where(chosen, jnp.where(chosen, x, 0), -jnp.inf)
  return reductions.result("lse", reductions.of_tile("lse", safe, 1))
