"""Losses as plain functions: what they read is not in the batches of a dual encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign.losses.engine.pairwise import DEFAULT, Engine


def cloc_region(
  regions: jax.Array,
  phrases: jax.Array,
  mask: jax.Array,
  phrase_id: jax.Array,
  scale: jax.Array,
  *,
  engine: Engine = DEFAULT,
) -> tuple[jax.Array, jax.Array]:
  """Contrast of image regions and their phrases, after CLOC (https://arxiv.org/abs/2410.02746).

  InfoNCE over all real regions of the global batch. The definition is our own where the paper is
  silent: phrases equal to the anchor's are not its negatives, means are over real regions, and
  weight and grounding head of the whole objective are left to the caller.

  Args:
    regions, phrases: [B, M, D], unit norm, M places for regions per image.
    mask: [B, M], nonzero where there is a region.
    phrase_id: [B, M] integers, equal for equal phrases.
    scale: [], of the logits.

  Returns:
    [] regions to phrases and [] phrases to regions; the loss is their mean.
  """
  zr, zp = (rearrange(x, "b m d -> (b m) d") for x in (regions, phrases))
  real, ids = (rearrange(x, "b m -> (b m)") for x in (mask != 0, phrase_id))
  both = {"positive": engine.paired(zr, zp), "real": real, "id": ids}

  def tile(row, col, shared):
    z = engine.products(row["z"], col["z"])
    seen = row["real"][:, None] & col["real"][None, :] & (row["id"][:, None] != col["id"][None, :])
    # Relative to the positive: at a scale of 100 the loss would be lost in 100 - 100.
    i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
    scale = shared["scale"]
    return {k: jnp.where(seen, scale * v, -jnp.inf) for k, v in (("r2t", i2t), ("t2r", t2i))}

  found = engine.reduce(
    tile,
    {"z": zr, **both},
    {"z": zp, **both},
    {"scale": scale},
    outputs={"r2t": "row_lse", "t2r": "col_lse"},
  )
  count = jnp.maximum(real.sum(), 1)
  r2t, t2r = (jnp.where(real, jax.nn.softplus(found[k]), 0).sum() / count for k in ("r2t", "t2r"))
  return r2t, t2r


def m3l_ratio(
  zimg: jax.Array,
  ztxt: jax.Array,
  neg_img: jax.Array,
  neg_txt: jax.Array,
  *,
  alpha1: float = 0.5,
  alpha2: float = 0.5,
  rho: float = 4.0,
) -> jax.Array:
  """Distance to the own image over distance to a negative, https://arxiv.org/abs/2012.05107.

  []: mean over texts a with image p, negative image n and negative text m of
  alpha1 (|a - p| / |a - n|)^rho + alpha2 (|a - p| / |a - m|)^rho. The formula is from memory and
  as such our own; how negatives are found is left to the caller.

  Args:
    zimg, ztxt: [B, E].
    neg_img, neg_txt: [B] integers, the places of each text's negatives in the batch.
    alpha1, alpha2, rho: weights of the two negatives, and the power.
  """

  def square(other: jax.Array) -> jax.Array:
    return jnp.sum((ztxt - other) ** 2, -1)

  own = square(zimg)

  def ratio(negative: jax.Array) -> jax.Array:
    return (own / jnp.maximum(square(negative), 1e-12)) ** (rho / 2)

  return (alpha1 * ratio(zimg[neg_img]) + alpha2 * ratio(ztxt[neg_txt])).mean()


def coca_caption(
  logits: jax.Array, labels: jax.Array, *, pad_id: int = 0, weight: float = 2.0
) -> jax.Array:
  """CoCa's captioning loss, https://arxiv.org/abs/2205.01917, on given logits: [].

  The mean over all real tokens of the global batch; open_clip takes the mean of its workers' means.

  Args:
    logits: [B, L, V]; those at place t predict the label at place t.
    labels: [B, L] integers; `pad_id` is no label.
    pad_id: the token of padding.
    weight: of this loss beside the contrastive one, which has 1.
  """
  own = jnp.take_along_axis(logits, labels[:, :, None], -1)[:, :, 0]
  each = jax.nn.logsumexp(logits - own[:, :, None], -1)  # [B, L]
  real = labels != pad_id
  return weight * jnp.where(real, each, 0).sum() / jnp.maximum(real.sum(), 1)
