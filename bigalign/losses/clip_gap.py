"""The softmax loss with terms that close the gap between the modalities."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss, others
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise

OUTPUTS = {
  "i2t": "row_lse",
  "t2i": "col_lse",
  "img": "row_lse",
  "txt": "row_lse",
  "cross": "row_lse",
}


def clip_gap(
  *,
  t: float = 2.0,
  w_clip: float = 1.0,
  w_uniform: float = 1.0,
  w_align: float = 1.0,
  w_xuniform: float = 1.0,
  t_init: float = 100.0,
  t_learned: bool = False,
  t_max: float | None = 100.0,
) -> Loss:
  """CLIP + uniformity + alignment + cross-modal uniformity: https://arxiv.org/abs/2405.18570.

  uniform: log of the mean over i < j of exp(-t |a_i - a_j|²), averaged over the modalities.
  xuniform: the same over images i and texts j ≠ i. align: the mean of |x_i - y_i|². Distances are
  computed as squares, from products, so that gradients are finite where two points coincide.

  Args:
    t: factor in the Gaussian of both uniformities; 2 in the paper.
    w_clip: weight of CLIP's loss; 1 in the paper, as the other weights.
    w_uniform: weight of the uniformity.
    w_align: weight of the alignment.
    w_xuniform: weight of the cross-modal uniformity; the paper has a variant with 0.
    t_init: the logit scale. The authors fine-tune with a fixed temperature of 0.01.
    t_learned: whether the scale is learned; it then stays in [1, t_max].
    t_max: upper bound of a learned scale, with the lower bound 1; None: no bounds.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> metrics = apply_once(clip_gap(t_init=1.0), {"zimg": z, "ztxt": z})
    >>> [round(float(metrics[name]), 3) for name in ("contrastive_loss", "uniform", "align")]
    [0.744, -4.0, 0.0]
  """
  temperature.check("clip_gap", t_init, t_max, learned=t_learned)
  checks.above_zero("config.loss.clip_gap", t=t)

  def init(sizes):
    return temperature.init(t_init, learned=t_learned), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt, engine = feats["zimg"], feats["ztxt"], context.engine
    scale = temperature.scale(params, t_init, zimg)
    pairs = {
      "img": zimg,
      "txt": ztxt,
      "positive": engine.paired(zimg, ztxt),
      "img_square": engine.paired(zimg, zimg),
      "txt_square": engine.paired(ztxt, ztxt),
    }

    def tile(row, col, shared):
      other = ~pairwise.same(row, col)

      def gauss(a, b, z):
        square = row[f"{a}_square"][:, None] + col[f"{b}_square"][None, :] - 2 * z
        return jnp.where(other, -t * square, -jnp.inf)

      z = engine.products(row["img"], col["txt"])
      within = {k: gauss(k, k, engine.products(row[k], col[k])) for k in ("img", "txt")}
      return {
        **above_positives(z, row, col, shared["scale"]),
        **within,
        "cross": gauss("img", "txt", z),
      }

    lse = engine.reduce(tile, pairs, pairs, {"scale": scale}, outputs=OUTPUTS)

    def log_mean(name):
      return jax.nn.logsumexp(lse[name]) - math.log(len(zimg) * others(len(zimg)))

    parts = {
      "contrastive_loss": sum(jax.nn.softplus(lse[k]).mean() for k in ("i2t", "t2i")) / 2,
      "uniform": (log_mean("img") + log_mean("txt")) / 2,
      "align": jnp.sum((zimg - ztxt) ** 2, -1).mean(),
      "xuniform": log_mean("cross"),
    }
    loss = sum(w * x for w, x in zip((w_clip, w_uniform, w_align, w_xuniform), parts.values()))
    return loss, (state, {"loss": loss, **parts, "logit_scale": scale})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))
