"""Softmax contrastive loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.engine.tiles import Arrays


def above_positives(z: jax.Array, row: Arrays, col: Arrays, scale: jax.Array) -> Arrays:
  """A tile of cosines [n, m] -> logits above that of the row's, and of the column's, positive.

  The positives themselves are -inf: with r the lse of a row of "i2t", -log p of its positive is
  softplus(r). At a scale of 100 the loss would be lost in 100 - 100.

  Args:
    row, col: "positive" [n], [m], the cosines of the pairs, and the places "at".
  """
  other = ~pairwise.same(row, col)
  i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
  return {k: jnp.where(other, scale * v, -jnp.inf) for k, v in (("i2t", i2t), ("t2i", t2i))}


def above_positives_lse(
  zimg: jax.Array, ztxt: jax.Array, scale: jax.Array, *, engine: Engine
) -> tuple[jax.Array, jax.Array]:
  """[B, E], [B, E] -> [B] per image and [B] per text: the lse of all other logits above its own."""
  positive = engine.paired(zimg, ztxt)  # [B]

  def tile(row, col, shared):
    return above_positives(engine.products(row["z"], col["z"]), row, col, shared["scale"])

  found = engine.reduce(
    tile,
    {"z": zimg, "positive": positive},
    {"z": ztxt, "positive": positive},
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse"},
  )
  return found["i2t"], found["t2i"]


def contrast(zimg: jax.Array, ztxt: jax.Array, scale: jax.Array, *, engine: Engine) -> jax.Array:
  """[]: the loss without smoothing."""
  i2t, t2i = above_positives_lse(zimg, ztxt, scale, engine=engine)
  return (jax.nn.softplus(i2t).mean() + jax.nn.softplus(t2i).mean()) / 2


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
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt, engine = feats["zimg"], feats["ztxt"], context.engine
    scale = jnp.exp(params["t"])
    # The mean of all cosines above that of the positives.
    even = jnp.sum(zimg.mean(0) * ztxt.mean(0)) - engine.paired(zimg, ztxt).mean()
    loss = contrast(zimg, ztxt, scale, engine=engine) - label_smoothing * scale * even
    return loss, (state, {"loss": loss, "contrastive_loss": loss, "logit_scale": scale})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))
