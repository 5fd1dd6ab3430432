"""Softmax contrastive loss."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from bigalign.losses import pairwise
from bigalign.losses.base import Loss


def clip(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  label_smoothing: float = 0.0,
  b_init: float | None = None,
) -> Loss:
  """InfoNCE in both directions, averaged: https://arxiv.org/abs/2103.00020.

  Args:
    t_init: first value of the logit scale (1 / temperature); the learned parameter "t" is its log.
    t_max: upper bound of the scale, applied to the parameter after each update, together with the
      lower bound 1; None leaves the scale free. The paper and open_clip use 100.
    label_smoothing: mass spread evenly over all B candidates, the positive included.
    b_init: first value of a logit bias "b", which a softmax cannot see (its gradient is 0); only
      for checkpoints shared with the sigmoid loss.
  """

  def init(sizes):
    params = {"t": jnp.asarray(math.log(t_init), jnp.float32)}
    if b_init is not None:
      params["b"] = jnp.asarray(b_init, jnp.float32)
    return params, {}

  def apply(params, state, feats, batch, at):
    zimg, ztxt = feats["zimg"], feats["ztxt"]
    scale = jnp.exp(params["t"])
    positive = pairwise.paired(zimg, ztxt)  # [B]

    def tile(row, col, shared):
      z = pairwise.products(row["z"], col["z"])
      other = ~pairwise.same(row, col)
      # Relative to the positive: at a scale of 100 the loss would be lost in 100 - 100.
      i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
      scale = shared["scale"]
      return {k: jnp.where(other, scale * v, -jnp.inf) for k, v in (("i2t", i2t), ("t2i", t2i))}

    found = pairwise.reduce(
      tile, {"z": zimg, "positive": positive}, {"z": ztxt, "positive": positive},
      {"scale": scale}, outputs={"i2t": "row_lse", "t2i": "col_lse"},
    )
    i2t, t2i = (jax.nn.softplus(found[k]).mean() for k in ("i2t", "t2i"))
    # The mean of all logits above that of the positives.
    even = scale * (zimg.mean(0) @ ztxt.mean(0) - positive.mean())
    loss = (i2t + t2i) / 2 - label_smoothing * even
    return loss, (state, {"loss": loss, "contrastive_loss": loss, "logit_scale": scale})

  def constrain(params):
    if t_max is None:
      return params
    return {**params, "t": jnp.clip(params["t"], 0.0, math.log(t_max))}

  return Loss(frozenset(), init, apply, constrain)
