"""GRAIN: learned queries find the regions of an image, and the phrases that describe them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.data.fields.regions import BOXES, MASK, NAMES
from bigalign.losses import temperature as scales
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.clip import contrast
from bigalign.losses.heads.base import Head, Params, Read
from bigalign.losses.heads.boxes import assignment, generalized_iou, of_centres, to_centres
from bigalign.losses.heads.caption_decoder import Decoder, options_of
from bigalign.losses.heads.layers import dense, dense_init
from bigalign.losses.heads.region_phrase import cloc_region, embedded_phrases
from bigalign.sphere import unit

COSTS = dict(l1=5.0, giou=2.0)  # of an assignment, as in DETR, https://arxiv.org/abs/2005.12872


def grain(
  *,
  queries: int = 5,
  depth: int = 6,
  width: int = 512,
  heads: int | None = None,
  mlp_ratio: float = 4.0,
  w_image: float = 1.0,
  w_region: float = 1.0,
  w_l1: float = 1.0,
  w_giou: float = 1.0,
  scan: bool = True,
  remat: str = "none",
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """Queries that find described regions: GRAIN, https://arxiv.org/abs/2412.04429.

  A decoder as of DETR reads the tokens of the image tower with learned queries. Each object query
  gives a box and an embedding. The assignment of an image's regions to its queries with the
  smallest cost, 5 times the distance of the boxes (L1 of centre and size) less 2 times their GIoU,
  decides which query stands for which region. The loss is the sum of four terms: the distance and
  1 - GIoU of the boxes; the cross-entropy of a query's embedding and the phrase of its region among
  all phrases of the batch; and CLIP's loss of one more query, for the image, and the caption.

  In the release, the phrases of one device are compared, and a phrase equal to a region's own is a
  negative of it. Here the phrases of the global batch are compared, without those equal ones. The
  release's decoder has ReLU and adds the queries to the tokens in every layer; here the queries are
  added once, as the first tokens, and the MLPs have GELU.

  In the release the query of the image is the model's embedding of an image. Here it is a part of
  the head, which evaluators, `embed` and exports do not read; add `clip` or `siglip` for the
  embedding of the image tower. The data holds boxes and phrases: config.data.regions.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(clip={}, grain=dict(depth=2))).terms]
  ['clip', 'grain']

  Args:
    queries: of objects, at least config.data.regions.count.
    depth: layers of the decoder.
    width: of its tokens.
    heads: of attention; None: one for 64 units of the width.
    mlp_ratio: hidden units of its MLPs per unit of width.
    w_image: weight of CLIP's loss of the image's query.
    w_region: weight of the cross-entropy of regions.
    w_l1: weight of the distance of boxes.
    w_giou: weight of 1 - GIoU.
    scan: whether its layers are one program with stacked parameters.
    remat: activations that are kept, as of the towers.
    t_init: first value of the logit scale of both contrasts, as in `clip`.
    t_max: upper bound of that scale, as in `clip`.

  Raises:
    ValueError: for a number out of range.
  """
  where = "config.loss.grain"
  scales.check("grain", t_init, t_max)
  checks.between(where, 1, queries=queries, depth=depth, width=width)
  checks.between(where, 0, w_image=w_image, w_region=w_region, w_l1=w_l1, w_giou=w_giou)

  def decoder(tokens: jax.Array) -> Decoder:
    options = options_of(
      tokens.dtype,
      width,
      width=width,
      heads=heads,
      depth=depth,
      mlp_ratio=mlp_ratio,
      scan=scan,
      remat=remat,
    )
    return Decoder(options)

  def visible(count: int) -> jax.Array:
    """Every query sees all of them."""
    return jnp.zeros((1, 1, count, count), jnp.float32)

  def init_head(key: jax.Array, read: Read) -> Params:
    tokens, embed = read.features["tokens_img"], read.sizes["embed"]
    keys = jax.random.split(key, 7)
    first = jax.random.normal(keys[0], (queries + 1, width), jnp.float32)
    variables = decoder(tokens).init(keys[1], first[None], tokens[:1], visible(queries + 1))
    layers = {f"box_{i}": dense_init(keys[2 + i], width, width) for i in range(2)}
    return {
      "queries": first,
      "decoder": variables["params"],
      **layers,
      "box": dense_init(keys[4], width, 4),
      "region": dense_init(keys[5], width, embed, bias=False),
      "image": dense_init(keys[6], width, embed, bias=False),
    }

  def decoded(params: Params, tokens: jax.Array) -> jax.Array:
    """[b, queries + 1, D] float32, the image's query last."""
    first = jnp.broadcast_to(params["queries"], (len(tokens), *params["queries"].shape))
    out: Any = decoder(tokens).apply(
      {"params": params["decoder"]}, first, tokens, visible(queries + 1)
    )
    return jnp.asarray(out).astype(jnp.promote_types(tokens.dtype, jnp.float32))

  def apply_head(params: Params, averaged: Any, read: Read) -> dict[str, jax.Array]:
    boxes, real = read.batch[BOXES].astype(jnp.float32), read.batch[MASK] != 0
    if boxes.shape[1] > queries:
      raise ValueError(
        f"{where}.queries={queries}: an image has config.data.regions.count={boxes.shape[1]}"
        " regions, and each needs a query; raise the one or lower the other"
      )
    tokens = decoded(params, read.features["tokens_img"])
    objects, image = tokens[:, :queries], tokens[:, queries]
    found = boxes_of(params, objects)
    chosen = matched(found, boxes, real)[..., None]
    own = jnp.take_along_axis(found, chosen, 1)
    errors = {
      "l1": jnp.abs(own - to_centres(boxes)).sum(-1),
      "giou": 1 - generalized_iou(of_centres(own), boxes),
    }
    feats = {name: jnp.where(real, x, 0).sum(1) for name, x in errors.items()}
    if w_image:
      feats["image"] = unit(dense(params["image"], image))
    if w_region:
      regions = dense(params["region"], jnp.take_along_axis(objects, chosen, 1))
      phrases, ids = embedded_phrases(read)
      feats |= {"regions": unit(regions), "phrases": unit(phrases), "ids": ids}
    return feats

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    scale, real = jnp.exp(params["t"]), batch[MASK] != 0
    terms = {name: feats[name].sum() / jnp.maximum(real.sum(), 1) for name in ("l1", "giou")}
    value = w_l1 * terms["l1"] + w_giou * terms["giou"]
    if w_region:
      terms["region_to_phrase"], _ = cloc_region(
        feats["regions"], feats["phrases"], real, feats["ids"], scale, engine=context.engine
      )
      value += w_region * terms["region_to_phrase"]
    if w_image:
      terms["image"] = contrast(feats["image"], feats["ztxt"], scale, engine=context.engine)
      value += w_image * terms["image"]
    return value, (state, {"loss": value, **terms, "logit_scale": scale})

  head = Head(
    init_head,
    apply_head,
    fields=frozenset({"image", *NAMES}),
    late=frozenset({"l1", "giou"}),
  )
  return Loss(
    frozenset(),
    lambda sizes: (scales.init(t_init), {}),
    apply,
    scales.clamped(t_max),
    pair=w_image > 0,
    head=head,
  )


def boxes_of(params: Params, objects: jax.Array) -> jax.Array:
  """[b, Q, D] -> [b, Q, 4]: centres and sizes of boxes, from 0 to 1, by three layers."""
  for i in range(2):
    objects = jax.nn.relu(dense(params[f"box_{i}"], objects))
  return jax.nn.sigmoid(dense(params["box"], objects))


def matched(found: jax.Array, boxes: jax.Array, real: jax.Array) -> jax.Array:
  """[b, M] int32: the query of each region, by the smallest sum of the costs of an image.

  Args:
    found: [b, Q, 4], centres and sizes.
    boxes: [b, M, 4] of the regions.
    real: [b, M] bool.
  """
  distance = jnp.abs(found[:, None] - to_centres(boxes)[:, :, None]).sum(-1)
  overlap = generalized_iou(of_centres(found)[:, None], boxes[:, :, None])
  return assignment(COSTS["l1"] * distance - COSTS["giou"] * overlap, real)
