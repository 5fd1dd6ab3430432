"""Tokens of the image tower approach those of a teacher: the frozen or averaged tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.losses.feature_distill import KINDS, distance
from bigalign.losses.heads import masks
from bigalign.losses.heads.base import Head, Params, Read, mean_loss
from bigalign.losses.heads.layers import dense, dense_init
from bigalign.towers.base import Block

HIDDEN_FROM = ("student", "teacher")


def regression(
  tokens: jax.Array, teacher: jax.Array, counts: jax.Array, kind: str
) -> dict[str, jax.Array]:
  """Regression of tokens to a teacher's tokens at the same places: "sum" and "count" [b].

  Args:
    tokens: [b, N, D].
    teacher: [b, N, D]; it gets no gradient.
    counts: [b, N] bool, which tokens count.
    kind: as of feature_distill.distance.
  """
  wide = jnp.promote_types(tokens.dtype, jnp.float32)
  each = distance(tokens.astype(wide), teacher.astype(wide), kind)
  return {"sum": jnp.where(counts, each, 0).sum(1), "count": counts.sum(1)}


def token_distill(
  *,
  hidden_from: str = "student",
  kind: str = "cosine",
  ratio: float = 0.4,
  decoder: int = 2,
  heads: int = 0,
) -> Loss:
  """Regression of tokens to those of a teacher, which is the averaged tower (config.twin).

  With config.twin.decay=1 the teacher is the tower that the run began with, such as CLIP's.

  hidden_from="student", as EVA, https://arxiv.org/abs/2211.07636: the tower sees a learned vector
  in place of some patches, and a linear map of its tokens there comes close to the tokens of the
  teacher, which sees the whole image. EVA trains a new tower; here it begins as its teacher.

  hidden_from="teacher", as locality alignment (MaskEmbed), https://arxiv.org/abs/2410.11087: the
  tower sees the whole image. Its tokens, of which some are then set to 0, go through a small
  decoder, which predicts all tokens of a teacher that does not see these patches. A random share of
  the patches is hidden; the same image also counts with the others hidden, and with none. The
  release takes the tokens before the teacher's last block and hides pixels; here they are the
  tower's output, and the embedding of hidden patches is 0.

  Args:
    hidden_from: "student" or "teacher".
    kind: "cosine", "mse" or "cosine+mse" as of `feature_distill`; EVA takes the cosine, locality
      alignment "mse".
    ratio: share of the patches that are hidden from the student, more than 0 and less than 1.
    decoder: blocks of the decoder of hidden_from="teacher".
    heads: attention heads of these blocks; 0: one for 64 units of the width.

  Raises:
    ValueError: for an unknown name, or a number out of range.
  """
  where = "config.loss.token_distill"
  checks.known(f"{where}.hidden_from", hidden_from, HIDDEN_FROM)
  checks.known(f"{where}.kind", kind, KINDS)
  if not 0 < ratio < 1:
    raise ValueError(f"{where}.ratio={ratio}: more than 0 and less than 1")
  checks.between(where, 1, decoder=decoder)
  checks.between(where, 0, heads=heads)

  def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    shape = shapes["image"]
    count = masks.patches(shape, sizes)
    if hidden_from == "student":
      return {"hidden": masks.uniform(key, shape[0], count, ratio)}
    # The share is uniform too: https://arxiv.org/abs/2410.11087.
    of_image, of_patch = jax.random.split(key)
    least = jax.random.uniform(of_image, (shape[0], 1))
    return {"hidden": jax.random.uniform(of_patch, (shape[0], count)) <= least}

  def block(width: int, dtype: Any) -> Block:
    return Block(heads or max(1, width // 64), 4 * width, dtype=dtype)

  def init_head(key: jax.Array, read: Read) -> Params:
    tokens = read.features["tokens_img"]
    _, count, width = tokens.shape
    keys = jax.random.split(key, decoder + 2)
    linear = dense_init(keys[0], width, width)
    noise = jax.random.normal(keys[1], (count, width), jnp.float32)
    if hidden_from == "student":
      return {"vector": 0.02 * noise[0], "out": linear}
    blocks = {
      f"block_{i}": block(width, jnp.float32).init(one, tokens.astype(jnp.float32))["params"]
      for i, one in enumerate(keys[2:])
    }
    return {"positions": 0.02 * noise, "out": linear, **blocks}

  def decoded(params: Params, x: jax.Array) -> jax.Array:
    x = x + params["positions"].astype(x.dtype)[None]
    for i in range(decoder):
      x, _ = block(x.shape[-1], x.dtype).apply({"params": params[f"block_{i}"]}, x)
    return dense(params["out"], x)

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    image, places = read.batch["image"], read.batch["hidden"]
    if hidden_from == "student":
      theirs = read.image(image, averaged=True).tokens
      own = read.image(image, hidden=(places, params["vector"])).tokens
      return regression(dense(params["out"], own), theirs, places, kind)
    # With these patches hidden, with the others, and with none: [3 b, N].
    three = jnp.concatenate([places, ~places, jnp.zeros_like(places)])
    tokens = jnp.concatenate([read.features["tokens_img"]] * 3)
    own = decoded(params, jnp.where(three[..., None], 0, tokens))
    zero = jnp.zeros((tokens.shape[-1],), jnp.float32)
    images = jnp.concatenate([image] * 3)
    theirs = read.image(images, averaged=True, hidden=(three, zero)).tokens
    found = regression(own, theirs, jnp.ones_like(three), kind)
    return {name: rearrange(x, "(m b) -> b m", m=3).sum(1) for name, x in found.items()}

  head = Head(init_head, apply_head, fields=frozenset({"image"}), draw=draw, averages=True)
  return Loss(frozenset(), lambda sizes: ({}, {}), mean_loss, pair=False, head=head)
