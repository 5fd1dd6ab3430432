"""Softmax loss that turns to the pairs which are not yet matched."""

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
  """-(1 - p)^gamma log p of each anchor's positive, p its softmax probability; both directions.

  The focal loss (https://arxiv.org/abs/1708.02002) on image-text contrast, as text-driven soft
  masks use it (https://arxiv.org/abs/2304.00719); gamma and whether the weight has a gradient are
  our definition.

  Args:
    gamma: 0 is `clip`; 2 is the focal loss's own choice.
    detach_weight: no gradient through (1 - p)^gamma. By default there is, as in the focal loss: the
      value is then what is descended.
    t_init, t_max: first value and upper bound of the logit scale, as in `clip`.
  """
  if gamma < 0:
    raise ValueError(f"config.loss.focal_itc.gamma={gamma!r} must be 0 or more; 0 is clip")

  def anchors(above):
    """lse of the others above the positive [B] -> [B]; softplus(above) is -log p."""
    if not gamma:
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
