"""The pairwise sigmoid loss (SigLIP)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine


def binary(
  zimg: jax.Array,
  ztxt: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  owners: tuple[jax.Array, jax.Array] | None = None,
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
    engine: forms the logits.
  """
  rows, columns = {"z": zimg}, {"z": ztxt}
  if owners:
    rows["id"], columns["id"] = owners

  def tile(row, col, shared):
    logits = shared["scale"] * engine.products(row["z"], col["z"]) + shared["bias"]
    if owners is None:
      positive = pairwise.same(row, col)
    else:
      positive = (row["id"][:, None, :] == col["id"][None, :, :]).all(-1)
    # The sign goes inside: 1 - sigmoid would round the loss of a confident positive to 0.
    return {"loss": jax.nn.softplus(jnp.where(positive, -logits, logits))}

  return engine.total(tile, rows, columns, {"scale": scale, "bias": bias})


def siglip(
  *,
  t_init: float = 10.0,
  b_init: float = -10.0,
  t_max: float | None = None,
  positives: str = "pair",
  reduction: str = "row_sum",
) -> Loss:
  """Classifies each pair as matching or not: SigLIP, https://arxiv.org/abs/2303.15343.

  The loss is summed over texts and averaged over images, as in the paper.

  Args:
    t_init: first value of the logit scale; the learned parameter "t" is its log.
    b_init: first logit bias; -10 from scratch. big_vision uses -2.71 for LiT on COCO.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: no bounds, as
      in the paper. open_clip uses 100.
    positives: "pair": image i belongs to text i. "ids": an image belongs to every text of the same
      image, so that several captions of an image, and images that occur twice in a batch, are not
      negatives. The batch then holds the images' ids, image_id [B, 2] uint32, and, if the texts are
      not in the order of the images, the ids of the texts' images, owner_id [M, 2].
    reduction: "row_sum" divides by the number of images, "mean_all" by the number of pairs.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # aligned pairs, orthogonal to each other
    >>> metrics = apply_once(siglip(t_init=10.0, b_init=-5.0), {"zimg": z, "ztxt": z})
    >>> round(float(metrics["loss"]), 3)
    0.027
  """
  temperature.check("siglip", t_init, t_max)
  checks.known("config.loss.siglip.positives", positives, ("pair", "ids"))
  checks.known("config.loss.siglip.reduction", reduction, ("row_sum", "mean_all"))

  def init(sizes):
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt = feats["zimg"], feats["ztxt"]
    scale, owners = jnp.exp(params["t"]), None
    if positives == "ids":
      owners = batch["image_id"], batch.get("owner_id", batch["image_id"])
    loss = binary(zimg, ztxt, scale, params["b"], owners, engine=context.engine)
    loss /= len(zimg) if reduction == "row_sum" else len(zimg) * len(ztxt)
    logs = {"contrastive_loss": loss, "logit_scale": scale, "logit_bias": params["b"]}
    return loss, (state, {"loss": loss, **logs})

  needs = frozenset({"ids"} if positives == "ids" else ())
  return Loss(needs, init, apply, temperature.clamped(t_max))
