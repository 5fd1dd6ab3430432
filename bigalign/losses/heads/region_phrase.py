"""Contrast of image regions, given by boxes, and the phrases that describe them: CLOC, FG-CLIP."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.data.fields.regions import (
  BOXES,
  MASK,
  NAMES,
  NEGATIVES,
  NEGATIVES_COUNT,
  NEGATIVES_MASK,
  OF_NEGATIVES,
  PHRASES,
  PHRASES_MASK,
)
from bigalign.losses import temperature as scales
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.engine.pairwise import DEFAULT, Engine
from bigalign.losses.heads import masks, prompter
from bigalign.losses.heads.base import Head, Read
from bigalign.losses.heads.base import Params as Layers
from bigalign.sphere import unit

POOLINGS = ("boxes", "prompter")


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
  text_filter: float | None = None,
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
    text_filter: phrases whose cosine with the anchor's phrase is larger are not its negatives, in
      both directions; None: all are. No gradient goes through it.
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
  texts = {} if text_filter is None else {"text": zp}

  def tile(row, col, shared):
    z = engine.products(row["z"], col["z"])
    other = row["real"][:, None] & col["real"][None, :] & (row["id"][:, None] != col["id"][None, :])
    if text_filter is not None:
      other &= engine.products(row["text"], jax.lax.stop_gradient(col["z"])) <= text_filter
    # Relative to the positive: absolute logits would lose the loss to rounding, in 100 - 100.
    i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
    scale = shared["scale"]
    return {k: jnp.where(other, scale * v, -jnp.inf) for k, v in (("r2t", i2t), ("t2r", t2i))}

  lse = engine.reduce(
    tile,
    {"z": zr, **both, **texts},
    {"z": zp, **both},
    {"scale": scale},
    outputs={"r2t": "row_lse", "t2r": "col_lse"},
    fixed=tuple(texts),
  )
  count = jnp.maximum(real.sum(), 1)
  r2t, t2r = (jnp.where(real, jax.nn.softplus(lse[k]), 0).sum() / count for k in ("r2t", "t2r"))
  return r2t, t2r


def own_phrase(differences: jax.Array, there: jax.Array, scale: jax.Array) -> jax.Array:
  """[]: each region's phrase among wrong ones of its own, FG-CLIP's hard fine-grained negatives.

  The cross-entropy of a softmax over a region's phrase and its negatives, as in FG-CLIP,
  https://arxiv.org/abs/2505.05071; the mean over the regions that have negatives.

  Args:
    differences: [B, M, K], the cosine of a region and a negative, less that of the region and its
      phrase.
    there: [B, M, K] bool, which negatives there are.
    scale: [], of the logits.

  Example:
    >>> there = jnp.asarray([[[True, True], [True, False], [False, False]]])
    >>> found = own_phrase(jnp.zeros((1, 3, 2)), there, jnp.asarray(5.0))
    >>> round(float(found), 3)  # (ln 3 + ln 2) / 2
    0.896
  """
  some = there.any(-1)
  # Regions without negatives take part with a logit of 0, so that their gradient is finite.
  logits = jnp.where(there, scale * differences, jnp.where(some[..., None], -jnp.inf, 0))
  each = jax.nn.softplus(jax.nn.logsumexp(logits, -1))
  return jnp.where(some, each, 0).sum() / jnp.maximum(some.sum(), 1)


def region_phrase(
  *,
  pooling: str = "boxes",
  text_filter: float | None = None,
  grounding: float = 0.0,
  own_negatives: float = 0.0,
  by_share: bool = False,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """Region-phrase contrast: CLOC, https://arxiv.org/abs/2410.02746, and FG-CLIP.

  InfoNCE in both directions compares all real regions of the batch with all phrases, which the text
  tower embeds; phrases equal to the anchor's are not its negatives. The defaults are a version
  without layers of its own. The paper's loss, except for equal phrases, is:

    region_phrase = dict(pooling="prompter", text_filter=0.9, grounding=1.0, by_share=True)

  The paper finds regions much better with its Prompter: 65.9 % of them among the first ten, and
  23.0 % with regions that are cut out of the patches. Its Prompter is a block with one head and the
  width of the image tower, which reads the encodings of a box's corners and the patches. The paper
  gives neither the waves of the encoding nor how the output is pooled: here half a period to 16
  periods across the image, and the mean of the tokens of the prompt.

  FG-CLIP, https://arxiv.org/abs/2505.05071, in its second stage adds to the losses of whole images
  0.1 of the contrast of regions and 0.5 of a contrast of each region with ten phrases of which an
  attribute is wrong. Both are

    region_phrase = dict(weight=0.1, own_negatives=5.0)

  with config.data.regions.negatives=10. In its release, patches are what the last block makes of
  them without attention, RoIAlign pools them, the regions of one device are compared, and a phrase
  equal to the anchor's is its negative too.

  The data holds boxes and phrases: config.data.regions.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(clip={}, region_phrase=dict(pooling="prompter"))).terms]
  ['clip', 'region_phrase']

  Args:
    pooling: what a region is. "boxes": the mean of the projected patches that its box covers,
      weighted by the area. "prompter": the output of the Prompter, projected.
    text_filter: phrases whose cosine with the anchor's is larger are not its negatives; CLOC 0.9.
      None: all others are.
    grounding: weight of a second loss, with pooling="prompter": the Prompter reads a phrase in
      place of a box, and a layer with GELU predicts the box; the mean squared error of the four
      sides, over real regions. CLOC 1.
    own_negatives: weight of a loss in which each region has a softmax of its own, over its phrase
      and the negatives that the data lists for it (config.data.regions.negatives). Its logit scale
      is another one. Regions without negatives do not count.
    by_share: whether all are multiplied by the share of the images of the batch that have regions,
      as in CLOC.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of that scale, as in `clip`.

  Raises:
    ValueError: for an unknown name, a number out of range, or grounding without the Prompter.
  """
  where = "config.loss.region_phrase"
  scales.check("region_phrase", t_init, t_max)
  checks.known(f"{where}.pooling", pooling, POOLINGS)
  checks.between(where, 0, grounding=grounding, own_negatives=own_negatives)
  if text_filter is not None:
    checks.between(where, -1, 1, text_filter=text_filter)
  prompted = pooling == "prompter"
  if grounding and not prompted:
    raise ValueError(
      f"{where}.grounding={grounding!r} trains the Prompter; set {where}.pooling='prompter', or"
      " grounding=0"
    )

  def init_head(key: jax.Array, read: Read) -> Layers:
    if not prompted:
      return {}
    tokens = read.features["tokens_img"]
    return prompter.init(key, tokens, read.sizes["embed"], grounds=grounding > 0)

  def apply_head(params: Layers, averaged: Any, read: Read) -> dict[str, jax.Array]:
    boxes = read.batch[BOXES].astype(jnp.float32)
    phrases, negatives, ids = _embedded(read, negatives=own_negatives > 0)
    found = {"ids": ids}
    if prompted:
      tokens = read.features["tokens_img"]
      regions = prompter.regions(params, tokens, boxes)
    else:
      regions = pooled(read, boxes)
    # With pooling="boxes", regions may have half the width of phrases: see Read.projected.
    regions = unit(regions)
    phrases, negatives = (unit(x[..., -regions.shape[-1] :]) for x in (phrases, negatives))
    if own_negatives:
      found["differences"] = jnp.einsum("bmd,bmkd->bmk", regions, negatives - phrases[:, :, None])
    if grounding:
      error = ((prompter.grounded(params, tokens, phrases) - boxes) ** 2).mean(-1)
      found["error"] = jnp.where(read.batch[MASK], error, 0).sum(1)
    return {"regions": regions, "phrases": phrases, **found}

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    scale, real = jnp.exp(params["t"]), batch[MASK] != 0
    r2q, q2r = cloc_region(
      feats["regions"],
      feats["phrases"],
      real,
      feats["ids"],
      scale,
      text_filter=text_filter,
      engine=context.engine,
    )
    value = (r2q + q2r) / 2
    logs = {"region_to_phrase": r2q, "phrase_to_region": q2r, "logit_scale": scale}
    if grounding:
      logs["grounding"] = feats["error"].sum() / jnp.maximum(real.sum(), 1)
      value += grounding * logs["grounding"]
    if own_negatives:
      own, most = jnp.exp(params["negatives"]["t"]), feats["differences"].shape[-1]
      there = jnp.arange(most)[None, None] < batch[NEGATIVES_COUNT][..., None]
      logs["own_negatives"] = own_phrase(feats["differences"], there, own)
      logs["own_negatives_logit_scale"] = own
      value += own_negatives * logs["own_negatives"]
    if by_share:
      logs["images_with_regions"] = real.any(1).mean(dtype=value.dtype)
      value *= logs["images_with_regions"]
    return value, (state, {"loss": value, **logs})

  head = Head(
    init_head,
    apply_head,
    fields=frozenset({"image", *NAMES, *(OF_NEGATIVES if own_negatives else ())}),
    late=frozenset({"error"}),
  )
  bounded = scales.clamped(t_max)

  def init(sizes: Any) -> tuple[Scalars, State]:
    one = scales.init(t_init)
    return (one | dict(negatives=scales.init(t_init)) if own_negatives else one), {}

  def constrain(params: Scalars, before: Scalars) -> Scalars:
    own = {k: bounded(x, before) for k, x in params.items() if k == "negatives"}
    return {**bounded(params, before), **own}

  return Loss(
    frozenset(),
    init,
    apply,
    constrain,
    pair=False,
    head=head,
  )


def pooled(read: Read, boxes: jax.Array) -> jax.Array:
  """[b, M, K]: the mean of the projected patches that each box [b, M, 4] covers.

  Raises:
    ValueError: if the image tower leaves patches out.
  """
  patches = read.projected()
  whole = masks.patches(read.batch["image"].shape, read.sizes)
  side = math.isqrt(whole)
  if patches.shape[1] != whole:
    raise ValueError(
      f"config.loss.region_phrase: the image tower gives {patches.shape[1]} of {whole} patches;"
      " set config.model.image.patch_dropout=0"
    )
  return jnp.einsum("bmn,bnd->bmd", pooling(boxes, (side, side)), patches)


def embedded_phrases(read: Read) -> tuple[jax.Array, jax.Array]:
  """[b, M, E] float32, the phrases of regions before the norm, and [b, M], equal for equal ones."""
  phrases, _, ids = _embedded(read, negatives=False)
  return phrases, ids


def _embedded(read: Read, *, negatives: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Phrases [b, M, E] and negatives [b, M, K, E] before the norm, and the ids of phrases [b, M].

  One call of the text tower embeds both. Without negatives, K is 0.
  """
  ids, mask = read.batch[PHRASES], read.batch[PHRASES_MASK]
  every = [x[:, :, None] for x in (ids, mask)]
  if negatives:
    wrong = read.batch[NEGATIVES], read.batch[NEGATIVES_MASK]
    every = [jnp.concatenate(both, 2) for both in zip(every, wrong)]
  flat = [rearrange(x, "b m k l -> (b m k) l") for x in every]
  texts = read.project("text", read.text(*flat))
  texts = rearrange(texts, "(b m k) d -> b m k d", m=ids.shape[1], k=every[0].shape[2])
  return texts[:, :, 0], texts[:, :, 1:], _hashed(ids)


def _hashed(ids: jax.Array) -> jax.Array:
  """[B, M, L] -> [B, M] int32: equal for equal phrases, and rarely for others."""

  def add(total: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
    return total * jnp.uint32(2_654_435_761) + column.astype(jnp.uint32) + 1, None

  found, _ = jax.lax.scan(add, jnp.zeros(ids.shape[:-1], jnp.uint32), jnp.moveaxis(ids, -1, 0))
  return jax.lax.bitcast_convert_type(found, jnp.int32)
