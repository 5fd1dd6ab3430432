"""Softmax loss with several positives, by label."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise


def unicl(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0) -> Loss:
  """Images and texts of one label are each other's positives: https://arxiv.org/abs/2204.03610.

  Targets are even over an anchor's positives; a label of -1 is a caption, the positive of its own
  image only. The paper sums over the batch; this is the mean, which equals `clip` where all labels
  are -1.

  Args:
    t_init: first value of the logit scale; that of `clip`. The authors' code begins at e.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: free.
  """

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt, scale = feats["zimg"], feats["ztxt"], jnp.exp(params["t"])
    engine = context.engine
    pair = {"positive": engine.paired(zimg, ztxt), "label": batch["label"]}

    def tile(row, col, shared):
      above = above_positives(engine.products(row["z"], col["z"]), row, col, shared["scale"])
      alike = (row["label"][:, None] == col["label"][None, :]) & (row["label"] >= 0)[:, None]
      alike &= ~pairwise.same(row, col)
      # Besides the pair itself, which adds a logit of 0 above its own.
      matched = {f"{k}_matched": jnp.where(alike, v, 0) for k, v in above.items()}
      return {**above, **matched, "matches": alike.astype(row["z"].dtype)}

    found = engine.reduce(
      tile,
      {"z": zimg, **pair},
      {"z": ztxt, **pair},
      {"scale": scale},
      outputs={
        "i2t": "row_lse",
        "t2i": "col_lse",
        "i2t_matched": "row_sum",
        "t2i_matched": "col_sum",
        "matches": "row_sum",
      },
    )
    i2t, t2i = (
      (jax.nn.softplus(found[k]) - found[f"{k}_matched"] / (1 + found["matches"])).mean()
      for k in ("i2t", "t2i")
    )
    loss = (i2t + t2i) / 2
    return loss, (state, {"loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale})

  return Loss(frozenset({"labels"}), init, apply, temperature.clamped(t_max))
