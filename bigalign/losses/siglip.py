"""The pairwise sigmoid loss (SigLIP)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import repeat

from bigalign import checks
from bigalign.data.text.kinds import ABSENT, POSITIVE
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.texts import PER_CLASS_TOKEN, Texts, class_tokens, of_batch, owned

DIVISORS = ("one", "texts", "images", "pairs")  # of the sum over several texts per image
TEXTS = (*DIVISORS, PER_CLASS_TOKEN)


def binary(
  zimg: jax.Array,
  ztxt: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  owners: tuple[jax.Array, jax.Array] | None = None,
  kind: jax.Array | None = None,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: the sigmoid loss, summed over all pairs of an image and a text.

  Args:
    zimg: [N, E], unit norm.
    ztxt: [M, E], unit norm.
    scale: [], of the logits.
    bias: [], of the logits.
    owners: the ids of the images, [N, 2], and of the texts' images, [M, 2]; a pair with equal ids
      is a positive. None: a pair with equal positions in the batch is.
    kind: [M] int32, of losses/texts: only a text of kind POSITIVE belongs to its image, and ABSENT
      ones take no part. M is then a multiple of N, with the texts of one image next to each other.
      None: all are positives.
    engine: forms the logits.
  """
  rows, columns = {"z": zimg}, {"z": ztxt}
  if owners:
    rows["id"], columns["id"] = owners
  if kind is not None:
    columns["kind"] = kind
  count = 1 if kind is None else len(ztxt) // len(zimg)

  def tile(row, col, shared):
    logits = shared["scale"] * engine.products(row["z"], col["z"]) + shared["bias"]
    if owners is not None:
      positive = (row["id"][:, None, :] == col["id"][None, :, :]).all(-1)
    else:
      positive = pairwise.same(row, col) if count == 1 else owned(row, col, count)
    if kind is not None:
      positive &= (col["kind"] == POSITIVE)[None, :]
    # The sign goes inside: 1 - sigmoid would round the loss of a confident positive to 0.
    loss = jax.nn.softplus(jnp.where(positive, -logits, logits))
    return {"loss": loss if kind is None else jnp.where(col["kind"][None, :] == ABSENT, 0, loss)}

  return engine.total(tile, rows, columns, {"scale": scale, "bias": bias})


def binary_texts(
  zimg: jax.Array,
  texts: Texts,
  scale: jax.Array,
  bias: jax.Array,
  divisor: str,
  ids: jax.Array | None = None,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: the sigmoid loss of images and several texts of each, see `siglip`.

  Args:
    zimg: [B, E], unit norm.
    texts: of the images.
    scale: [], of the logits.
    bias: [], of the logits.
    divisor: "texts", "images" or "pairs".
    ids: of the images, [B, 2]; a pair with equal ids is a positive. None: a pair with equal
      positions in the batch is.
    engine: forms the logits.
  """
  owners = None if ids is None else (ids, repeat(ids, "b w -> (b m) w", m=texts.per_image))
  kind = None if texts.kind is None else texts.columns()["kind"]
  total = binary(zimg, texts.z, scale, bias, owners, kind, engine=engine)
  number = texts.number(texts.present)
  divisors = {"images": len(zimg), "texts": number, "pairs": len(zimg) * number}
  loss: jax.Array = total / divisors[divisor]
  return loss


def siglip(
  *,
  t_init: float = 10.0,
  b_init: float = -10.0,
  t_max: float | None = None,
  positives: str = "pair",
  reduction: str = "row_sum",
  texts: str = "one",
) -> Loss:
  """Classifies each pair as matching or not: SigLIP, https://arxiv.org/abs/2303.15343.

  The loss is summed over texts and averaged over images, as in the paper. With several texts per
  image (ztxts [B, M, E] and texts_kind [B, M]; `texts`), every present text forms a pair with every
  image. Absent texts take no part; hard negatives belong to no image. With M = 1 the divisors
  "texts" and "images" are "one".

  Args:
    t_init: first value of the logit scale; the learned parameter "t" is its log.
    b_init: first logit bias; -10 from scratch. big_vision uses -2.71 for LiT on COCO.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: no bounds, as
      in the paper. open_clip uses 100.
    positives: "pair": image i belongs to text i. "ids": an image belongs to every text of the same
      image, so that several captions of an image, and images that occur twice in a batch, are not
      negatives. The batch then holds the images' ids, image_id [B, 2] uint32, and, if the texts are
      not in the order of the images, the ids of the texts' images, owner_id [M, 2].
    reduction: "row_sum" divides by the number of images, "mean_all" by the number of pairs; only
      for one text per image.
    texts: "one": an image has one text, ztxt. With several, the divisor of the sum over all pairs:
      "texts": the number of present texts, as in FLAME (https://arxiv.org/abs/2411.11927);
      "images": that of the images, so that the loss and its gradient grow with M; "pairs": that of
      all pairs. "per_class_token": the mean of the losses of the first class token and the first
      captions, and of the second class token and config.data.second_captions, as TIPS
      (https://arxiv.org/abs/2410.16512) with CLIP's loss; the image tower has class_tokens=2.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # aligned pairs, orthogonal to each other
    >>> metrics = apply_once(siglip(t_init=10.0, b_init=-5.0), {"zimg": z, "ztxt": z})
    >>> round(float(metrics["loss"]), 3)
    0.027
    >>> feats = {"zimg": z, "ztxts": jnp.stack([z, z[::-1]], 1)}  # a text that fits, and another
    >>> batch = {"texts_kind": jnp.asarray([[1, 2]] * 4)}
    >>> loss = siglip(t_init=10.0, b_init=-5.0, texts="images")
    >>> round(float(apply_once(loss, feats, batch)["loss"]), 3)
    5.054
  """
  temperature.check("siglip", t_init, t_max)
  checks.known("config.loss.siglip.positives", positives, ("pair", "ids"))
  checks.known("config.loss.siglip.reduction", reduction, ("row_sum", "mean_all"))
  checks.known("config.loss.siglip.texts", texts, TEXTS)
  if texts in DIVISORS[1:] and reduction != "row_sum":
    raise ValueError(
      f"config.loss.siglip.reduction={reduction!r} is for one text per image; of several,"
      f" texts={texts!r} names the divisor: {DIVISORS[1:]}"
    )

  def init(sizes):
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    zimg, scale, owners = feats["zimg"], jnp.exp(params["t"]), None
    if texts in DIVISORS[1:]:
      images = batch["image_id"] if positives == "ids" else None
      columns = of_batch(feats, batch)
      loss = binary_texts(zimg, columns, scale, params["b"], texts, images, engine=context.engine)
    else:
      pairs = [(zimg, feats["ztxt"])]
      if texts == PER_CLASS_TOKEN:
        pairs = class_tokens("siglip", feats)
      if positives == "ids":
        owners = batch["image_id"], batch.get("owner_id", batch["image_id"])
      each = [binary(x, y, scale, params["b"], owners, engine=context.engine) for x, y in pairs]
      loss = each[0] if len(each) == 1 else (each[0] + each[1]) / 2
      loss /= len(zimg) if reduction == "row_sum" else len(zimg) * len(pairs[0][1])
    logs = {"contrastive_loss": loss, "logit_scale": scale, "logit_bias": params["b"]}
    return loss, (state, {"loss": loss, **logs})

  needs = {"ids"} if positives == "ids" else set()
  if texts == PER_CLASS_TOKEN:
    needs |= {"second_text", "class_tokens"}
  elif texts != "one":
    needs |= {"texts"}
  return Loss(frozenset(needs), init, apply, temperature.clamped(t_max))
