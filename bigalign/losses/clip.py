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
    scale = jnp.exp(params["t"])
    logits = pairwise.cosines(feats["zimg"], feats["ztxt"]) * scale  # [B, B]
    logits += params.get("b", 0.0)
    positive = jnp.diagonal(logits)
    target = (1 - label_smoothing) * positive.mean() + label_smoothing * logits.mean()
    lse = jax.nn.logsumexp(logits, axis=1).mean() + jax.nn.logsumexp(logits, axis=0).mean()
    loss = lse / 2 - target
    return loss, (state, {"loss": loss, "contrastive_loss": loss, "logit_scale": scale})

  def constrain(params):
    if t_max is None:
      return params
    return {**params, "t": jnp.clip(params["t"], 0.0, math.log(t_max))}

  return Loss(frozenset(), init, apply, constrain)
