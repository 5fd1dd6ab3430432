"""Sigmoid loss with two captions of each image."""

from __future__ import annotations

import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.siglip import binary

REDUCTIONS = ("mean_all", "row_sum")


def sail(
  *,
  t_init: float = 20.0,
  b_init: float = -10.0,
  t_max: float | None = 100.0,
  reduction: str = "mean_all",
) -> Loss:
  """A short and a long caption, both positives of the image: https://arxiv.org/abs/2412.04616.

  Each kind forms its own pairs with the images; its negatives are captions of the same kind.

  Args:
    t_init, b_init: first values of the logit scale and of the bias; 20 and -10 are the release's.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: free.
    reduction: "mean_all" divides the sum by all 2 B² pairs: the release, whose learning rates are
      tuned with it; "row_sum" by the B images: the sigmoid losses of both kinds added, 2 B times as
      much. Optimizers that ignore the scale of gradients differ by clipping only.
  """
  checks.known("config.loss.sail.reduction", reduction, REDUCTIONS)

  def init(sizes):
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    zimg, scale, bias = feats["zimg"], jnp.exp(params["t"]), params["b"]
    short, long = (
      binary(zimg, feats[k], scale, bias, engine=context.engine) / len(zimg)
      for k in ("ztxt", "ztxt_second")
    )
    loss = (short + long) / (1 if reduction == "row_sum" else 2 * len(zimg))
    logs = {"short": short, "long": long, "logit_scale": scale, "logit_bias": bias}
    return loss, (state, {"loss": loss, **logs})

  return Loss(frozenset({"second_text"}), init, apply, temperature.clamped(t_max))
