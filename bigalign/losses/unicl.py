"""The softmax loss with several positives, chosen by label (UniCL)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise


def unicl(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0) -> Loss:
  """Images and texts with equal labels are positives: UniCL, https://arxiv.org/abs/2204.03610.

  The target is spread evenly over an anchor's positives. A pair with label -1 is a caption: it is a
  positive of its own image only. The paper sums over the batch; this is the mean, which equals
  `clip` if all labels are -1.

  Args:
    t_init: first value of the logit scale, as in `clip`. The authors' code begins at e.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: no bounds.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, label = jnp.eye(4), jnp.asarray([0, 0, 1, -1])
    >>> metrics = apply_once(unicl(t_init=1.0), {"zimg": z, "ztxt": z}, {"label": label})
    >>> round(float(metrics["loss"]), 3)
    0.994
  """
  temperature.check("unicl", t_init, t_max)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    zimg, ztxt, scale = feats["zimg"], feats["ztxt"], jnp.exp(params["t"])
    engine = context.engine
    pair = {"positive": engine.paired(zimg, ztxt), "label": batch["label"]}

    def tile(row, col, shared):
      above = above_positives(engine.products(row["z"], col["z"]), row, col, shared["scale"])
      same_label = (row["label"][:, None] == col["label"][None, :]) & (row["label"] >= 0)[:, None]
      same_label &= ~pairwise.same(row, col)
      # Without the pair itself, whose logit relative to its own is 0.
      matched = {f"{k}_matched": jnp.where(same_label, v, 0) for k, v in above.items()}
      return {**above, **matched, "matches": same_label.astype(row["z"].dtype)}

    reduced = engine.reduce(
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
      (jax.nn.softplus(reduced[k]) - reduced[f"{k}_matched"] / (1 + reduced["matches"])).mean()
      for k in ("i2t", "t2i")
    )
    loss = (i2t + t2i) / 2
    return loss, (state, {"loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale})

  return Loss(frozenset({"labels"}), init, apply, temperature.clamped(t_max))
