"""The softmax loss with label smoothing for each pair, by how noisy it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives_lse


def nitc(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0, smoothing: float = 0.5) -> Loss:
  """Noise-adaptive contrast, after NLIP (https://arxiv.org/abs/2212.07086); the form is our own.

  Each pair has its own label smoothing. The batch holds noise_prob [B], the probability that a pair
  does not belong together (in the paper from a mixture of two Gaussians, fitted to each pair's loss
  after a first epoch). A share smoothing * noise_prob of the target is spread evenly over the other
  pairs, in both directions. With noise_prob 0 it is `clip`.

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.
    smoothing: share of the target that a pair with noise_prob 1 loses; unpublished, 0.5 is our
      choice.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, noise = jnp.eye(4), jnp.asarray([0.0, 0.0, 0.0, 1.0])
    >>> metrics = apply_once(nitc(t_init=1.0), {"zimg": z, "ztxt": z}, {"noise_prob": noise})
    >>> round(float(metrics["loss"]), 3)
    0.869
  """
  temperature.check("nitc", t_init, t_max)
  checks.between("config.loss.nitc", 0, 1, smoothing=smoothing)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt, scale = feats["zimg"], feats["ztxt"], jnp.exp(params["t"])
    engine, size = context.engine, len(zimg)
    given_away = (
      smoothing * batch["noise_prob"].astype(zimg.dtype) / max(size - 1, 1)
    )  # [B], to each other pair
    above = above_positives_lse(zimg, ztxt, scale, engine=engine)
    # Products of B rows, in float32 whatever the engine's dtype: rounding a sum over the batch
    # would change the mean gradient of embeddings in a cone by much of itself.
    positive = jnp.sum(zimg * ztxt, -1)

    def direction(above, anchor, others):
      # The sum of an anchor's logits, relative to that of its positive.
      even = scale * (jnp.sum(anchor * others.sum(0)[None], -1) - size * positive)
      return (jax.nn.softplus(above) - given_away * even).mean()

    i2t, t2i = direction(above[0], zimg, ztxt), direction(above[1], ztxt, zimg)
    loss = (i2t + t2i) / 2
    logs = {"i2t": i2t, "t2i": t2i, "logit_scale": scale}
    return loss, (state, {"loss": loss, "contrastive_loss": loss, **logs})

  return Loss(frozenset({"noise"}), init, apply, temperature.clamped(t_max))
