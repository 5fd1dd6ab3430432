"""The softmax loss with more weight on pairs that are not matched yet (focal loss)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives_lse


def focal_itc(
  *,
  gamma: float = 2.0,
  detach_weight: bool = False,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """-(1 - p)^gamma log p, p the softmax probability of an anchor's positive; both directions.

  The focal loss (https://arxiv.org/abs/1708.02002) for image-text contrast, as in text-driven soft
  masks (https://arxiv.org/abs/2304.00719). Gamma, and whether the weight has a gradient, are our
  definition.

  Args:
    gamma: exponent of the weight; 0 is `clip`, 2 is the choice of the focal loss.
    detach_weight: whether no gradient flows through (1 - p)^gamma. By default it does, as in the
      focal loss: then the gradient is that of the value.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> metrics = apply_once(focal_itc(t_init=1.0), {"zimg": z, "ztxt": z})
    >>> round(float(metrics["loss"]), 3)
    0.205
  """
  temperature.check("focal_itc", t_init, t_max)
  if gamma < 0:
    raise ValueError(f"config.loss.focal_itc.gamma={gamma!r} must be 0 or more; 0 is clip")

  def anchors(above):
    """The loss of each anchor [B], from the lse of the others relative to its positive [B]."""
    if not gamma:  # softplus(above) is -log p
      return jax.nn.softplus(above)
    weight = jnp.exp(-gamma * jax.nn.softplus(-above))  # 1 - p = sigmoid(above), without a pow at 0
    return (jax.lax.stop_gradient(weight) if detach_weight else weight) * jax.nn.softplus(above)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale = jnp.exp(params["t"])
    above = above_positives_lse(feats["zimg"], feats["ztxt"], scale, engine=context.engine)
    i2t, t2i = (anchors(x).mean() for x in above)
    loss = (i2t + t2i) / 2
    return loss, (state, {"loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))
