"""Contrast of image regions, given by boxes, and the phrases that describe them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign.data.fields.regions import BOXES, MASK, NAMES, PHRASES, PHRASES_MASK
from bigalign.losses import temperature as scales
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.engine.pairwise import DEFAULT, Engine
from bigalign.losses.heads import masks
from bigalign.losses.heads.base import Head, Read
from bigalign.sphere import unit


def pooling(boxes: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """[..., N]: the share of a box that each patch covers, which add up to 1 over the N patches.

  Args:
    boxes: [..., 4], left, top, right, bottom as shares of the image's sides.
    grid: (rows, columns) of patches, N in all, row by row.
  """

  def overlap(low: jax.Array, high: jax.Array, count: int) -> jax.Array:
    """[..., count]: the length of a box in each row or column."""
    edges = jnp.arange(count + 1, dtype=boxes.dtype) / count
    first, last = (jnp.expand_dims(x, tuple(range(low.ndim))) for x in (edges[:-1], edges[1:]))
    length = jnp.minimum(high[..., None], last) - jnp.maximum(low[..., None], first)
    return jnp.maximum(length, 0)

  left, top, right, bottom = jnp.moveaxis(boxes, -1, 0)
  y, x = overlap(top, bottom, grid[0]), overlap(left, right, grid[1])
  areas = rearrange(y[..., :, None] * x[..., None, :], "... y x -> ... (y x)")
  return areas / jnp.maximum(areas.sum(-1, keepdims=True), 1e-12)


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

  InfoNCE over all real regions of the global batch. Where the paper does not define it, the
  definition is our own: phrases equal to the anchor's are not its negatives, and means are over
  real regions. The weight of the loss and the grounding head are left to the caller.

  Args:
    regions: [B, M, D], unit norm, at most M regions per image.
    phrases: [B, M, D], unit norm.
    mask: [B, M], nonzero for a real region.
    phrase_id: [B, M] integers, equal for equal phrases.
    scale: [], of the logits.
    engine: forms the logits.

  Returns:
    [], the loss of regions to phrases, and [], of phrases to regions; CLOC uses their mean.

  Example:
    >>> z, ids = jnp.eye(4)[:, None], jnp.arange(4)[:, None]  # one region per image
    >>> r2t, t2r = cloc_region(z, z, jnp.ones((4, 1)), ids, jnp.asarray(1.0))
    >>> round(float(r2t), 3)
    0.744
  """
  zr, zp = (rearrange(x, "b m d -> (b m) d") for x in (regions, phrases))
  real, ids = (rearrange(x, "b m -> (b m)") for x in (mask != 0, phrase_id))
  both = {"positive": engine.paired(zr, zp), "real": real, "id": ids}

  def tile(row, col, shared):
    z = engine.products(row["z"], col["z"])
    other = row["real"][:, None] & col["real"][None, :] & (row["id"][:, None] != col["id"][None, :])
    # Relative to the positive: absolute logits would lose the loss to rounding, in 100 - 100.
    i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
    scale = shared["scale"]
    return {k: jnp.where(other, scale * v, -jnp.inf) for k, v in (("r2t", i2t), ("t2r", t2i))}

  lse = engine.reduce(
    tile,
    {"z": zr, **both},
    {"z": zp, **both},
    {"scale": scale},
    outputs={"r2t": "row_lse", "t2r": "col_lse"},
  )
  count = jnp.maximum(real.sum(), 1)
  r2t, t2r = (jnp.where(real, jax.nn.softplus(lse[k]), 0).sum() / count for k in ("r2t", "t2r"))
  return r2t, t2r


def region_phrase(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """Region-phrase contrast by pooled boxes: after CLOC, https://arxiv.org/abs/2410.02746.

  A region is the mean of the projected patches that its box covers, weighted by the area. A phrase
  is embedded by the text tower. InfoNCE in both directions compares all real regions of the batch
  with all phrases; phrases equal to the anchor's are not its negatives. CLOC's Prompter, a block
  that reads a box as a prompt, finds regions better than pooling; it is not a part of this head.
  Its weight is 1 times the share of pictures with regions.

  The data holds boxes and phrases: config.data.regions.

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of that scale, as in `clip`.
  """
  scales.check("region_phrase", t_init, t_max)

  def apply_head(params: Any, averaged: Any, read: Read) -> dict[str, jax.Array]:
    ids = read.batch[PHRASES]
    count = ids.shape[1]
    flat = [rearrange(read.batch[name], "b m l -> (b m) l") for name in (PHRASES, PHRASES_MASK)]
    texts = read.project("text", read.text(*flat))
    patches = read.projected()
    whole = masks.patches(read.batch["image"].shape, read.sizes)
    side = math.isqrt(whole)
    if patches.shape[1] != whole:
      raise ValueError(
        f"config.loss.region_phrase: the image tower gives {patches.shape[1]} of {whole} patches;"
        " set config.model.image.patch_dropout=0"
      )
    weights = pooling(read.batch[BOXES].astype(jnp.float32), (side, side))
    regions = jnp.einsum("bmn,bnd->bmd", weights, patches)
    texts = rearrange(texts, "(b m) d -> b m d", m=count)[..., -patches.shape[-1] :]
    return {"regions": unit(regions), "phrases": unit(texts), "ids": _hashed(ids)}

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    scale = jnp.exp(params["t"])
    r2q, q2r = cloc_region(
      feats["regions"],
      feats["phrases"],
      batch[MASK],
      feats["ids"],
      scale,
      engine=context.engine,
    )
    value = (r2q + q2r) / 2
    logs = {"region_to_phrase": r2q, "phrase_to_region": q2r, "logit_scale": scale}
    return value, (state, {"loss": value, **logs})

  head = Head(
    lambda key, read: {},
    apply_head,
    fields=frozenset({"image", *NAMES}),
  )
  return Loss(
    frozenset(),
    lambda sizes: (scales.init(t_init), {}),
    apply,
    scales.clamped(t_max),
    pair=False,
    head=head,
  )


def _hashed(ids: jax.Array) -> jax.Array:
  """[B, M, L] -> [B, M] int32: equal for equal phrases, and rarely for others."""

  def add(total: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
    return total * jnp.uint32(2_654_435_761) + column.astype(jnp.uint32) + 1, None

  found, _ = jax.lax.scan(add, jnp.zeros(ids.shape[:-1], jnp.uint32), jnp.moveaxis(ids, -1, 0))
  return jax.lax.bitcast_convert_type(found, jnp.int32)
