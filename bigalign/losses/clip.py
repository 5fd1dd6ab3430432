"""The softmax contrastive loss (CLIP)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.engine.tiles import Arrays


def above_positives(z: jax.Array, row: Arrays, col: Arrays, scale: jax.Array) -> Arrays:
  """Logits relative to the logit of the row's, and of the column's, positive.

  The positives themselves are -inf: with r the lse of a row of "i2t", -log p of its positive is
  softplus(r). Absolute logits would lose the loss to rounding, in 100 - 100 at a scale of 100.

  Args:
    z: [n, m], a tile of cosines.
    row: "positive" [n], the cosines of the rows' own pairs, and "batch_index".
    col: likewise of the columns, [m].
    scale: [], of the logits.

  Returns:
    "i2t" and "t2i", [n, m].
  """
  other = ~pairwise.same(row, col)
  i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
  return {k: jnp.where(other, scale * v, -jnp.inf) for k, v in (("i2t", i2t), ("t2i", t2i))}


def above_positives_lse(
  zimg: jax.Array, ztxt: jax.Array, scale: jax.Array, *, engine: Engine
) -> tuple[jax.Array, jax.Array]:
  """[B] per image and [B] per text: the lse of its other logits, relative to its positive's."""
  positive = engine.paired(zimg, ztxt)  # [B]

  def tile(row, col, shared):
    return above_positives(engine.products(row["z"], col["z"]), row, col, shared["scale"])

  lse = engine.reduce(
    tile,
    {"z": zimg, "positive": positive},
    {"z": ztxt, "positive": positive},
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse"},
  )
  return lse["i2t"], lse["t2i"]


def contrast(zimg: jax.Array, ztxt: jax.Array, scale: jax.Array, *, engine: Engine) -> jax.Array:
  """[]: the symmetric InfoNCE loss of [B, E] and [B, E], without label smoothing."""
  i2t, t2i = above_positives_lse(zimg, ztxt, scale, engine=engine)
  return (jax.nn.softplus(i2t).mean() + jax.nn.softplus(t2i).mean()) / 2


def clip(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  label_smoothing: float = 0.0,
  b_init: float | None = None,
) -> Loss:
  """InfoNCE, averaged over both directions: CLIP, https://arxiv.org/abs/2103.00020.

  Args:
    t_init: first value of the logit scale (1 / temperature); the learned parameter "t" is its log.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: no bounds. The
      paper and open_clip use 100.
    label_smoothing: share of the target that is spread evenly over all B candidates, including the
      positive.
    b_init: first value of a logit bias "b", which has no effect on a softmax (its gradient is 0);
      only for checkpoints shared with the sigmoid loss. None: no bias.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # aligned pairs, orthogonal to each other
    >>> metrics = apply_once(clip(t_init=1.0), {"zimg": z, "ztxt": z})
    >>> round(float(metrics["loss"]), 3)
    0.744
  """
  temperature.check("clip", t_init, t_max)
  checks.between("config.loss.clip", 0, 1, label_smoothing=label_smoothing)

  def init(sizes):
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt, engine = feats["zimg"], feats["ztxt"], context.engine
    scale = jnp.exp(params["t"])
    # The mean of all cosines, relative to the mean of the positives'; in float32, as in `nitc`.
    even = jnp.sum(zimg.mean(0) * ztxt.mean(0)) - jnp.sum(zimg * ztxt, -1).mean()
    loss = contrast(zimg, ztxt, scale, engine=engine) - label_smoothing * scale * even
    return loss, (state, {"loss": loss, "contrastive_loss": loss, "logit_scale": scale})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))
