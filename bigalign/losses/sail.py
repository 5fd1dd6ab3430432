"""The sigmoid loss with two captions of each image (SAIL)."""

from __future__ import annotations

import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.siglip import binary, binary_texts
from bigalign.losses.texts import of_batch

REDUCTIONS = ("mean_all", "row_sum")


def sail(
  *,
  t_init: float = 20.0,
  b_init: float = -10.0,
  t_max: float | None = 100.0,
  reduction: str = "mean_all",
  texts: str = "two",
) -> Loss:
  """A short and a long caption, both positives of the image: SAIL, https://arxiv.org/abs/2412.04616.

  Short and long captions form separate pairs with the images: the negatives of a short caption are
  short captions. The long caption is the second one, ztxt_second.

  With several texts per image (ztxts [B, M, E] and texts_kind [B, M]; texts="all"), each present
  text forms a pair with each image: since a sigmoid judges pairs one by one, this is the sum over
  the matrices of the first texts, the second, ..., and two texts give the loss of the release. It
  is `siglip` with the divisor "pairs" or, for "row_sum", "images".

  Args:
    t_init: first value of the logit scale; 20 in the release.
    b_init: first value of the logit bias; -10 in the release.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: no bounds.
    reduction: "mean_all" divides the sum by all 2 B² pairs, as in the release, whose learning rates
      are tuned for it; "row_sum" divides it by the B images, which is 2 B times as large: the sum
      of two sigmoid losses. For optimizers that ignore the scale of gradients only clipping
      differs. Of several texts, "mean_all" divides by all pairs of present texts.
    texts: "two": ztxt and ztxt_second; "all": the texts ztxts.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> metrics = apply_once(sail(), {"zimg": z, "ztxt": z, "ztxt_second": z[::-1]})
    >>> round(float(metrics["short"]), 3), round(float(metrics["long"]), 3)
    (0.0, 20.0)
  """
  temperature.check("sail", t_init, t_max)
  checks.known("config.loss.sail.reduction", reduction, REDUCTIONS)
  checks.known("config.loss.sail.texts", texts, ("two", "all"))

  def init(sizes):
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    zimg, scale, bias = feats["zimg"], jnp.exp(params["t"]), params["b"]
    if texts == "all":
      columns, divisor = of_batch(feats, batch), "images" if reduction == "row_sum" else "pairs"
      loss = binary_texts(zimg, columns, scale, bias, divisor, engine=context.engine)
      return loss, (state, {"loss": loss, "logit_scale": scale, "logit_bias": bias})
    short, long = (
      binary(zimg, feats[k], scale, bias, engine=context.engine) / len(zimg)
      for k in ("ztxt", "ztxt_second")
    )
    loss = (short + long) / (1 if reduction == "row_sum" else 2 * len(zimg))
    logs = {"short": short, "long": long, "logit_scale": scale, "logit_bias": bias}
    return loss, (state, {"loss": loss, **logs})

  needs = frozenset({"second_text" if texts == "two" else "texts"})
  return Loss(needs, init, apply, temperature.clamped(t_max))
