"""The softmax loss with several positives, chosen by label (UniCL)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.data.text.kinds import POSITIVE
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.texts import Texts, masked_mean, negatives, of_batch, row_lse, row_mean


def unicl(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0, texts: str = "one") -> Loss:
  """Images and texts with equal labels are positives: UniCL, https://arxiv.org/abs/2204.03610.

  The target is spread evenly over an anchor's positives. A pair with label -1 is a caption: it is a
  positive of its own image only. The paper sums over the batch; this is the mean, which equals
  `clip` if all labels are -1.

  With several texts per image (ztxts [B, M, E] and texts_kind [B, M]; texts="uniform"), an image's
  target is spread evenly over its own positive texts and those of the images with its label; each
  positive text's over the images with its image's label. Hard negatives are candidates of every
  image, as in `clip`.

  Args:
    t_init: first value of the logit scale, as in `clip`. The authors' code begins at e.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: no bounds.
    texts: "one": an image has one text, ztxt; "uniform": it has several.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z, label = jnp.eye(4), jnp.asarray([0, 0, 1, -1])
    >>> metrics = apply_once(unicl(t_init=1.0), {"zimg": z, "ztxt": z}, {"label": label})
    >>> round(float(metrics["loss"]), 3)
    0.994
  """
  temperature.check("unicl", t_init, t_max)
  checks.known("config.loss.unicl.texts", texts, ("one", "uniform"))

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    zimg, scale, engine = feats["zimg"], jnp.exp(params["t"]), context.engine
    several = None if texts == "one" else of_batch(feats, batch)
    if several is not None and several.per_image > 1:
      i2t, t2i = _of_texts(zimg, several, batch["label"], scale, engine)
      loss = (i2t + t2i) / 2
      return loss, (state, {"loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale})
    ztxt = feats["ztxt"] if several is None else several.z
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

  needs = {"labels", *(("texts",) if texts != "one" else ())}
  return Loss(frozenset(needs), init, apply, temperature.clamped(t_max))


def _of_texts(
  zimg: jax.Array, texts: Texts, label: jax.Array, scale: jax.Array, engine: Engine
) -> tuple[jax.Array, jax.Array]:
  """[] and [], the losses of images to texts and of texts to images, with several texts."""
  positive, own = texts.positive, texts.cosines(zimg, engine)
  mean = row_mean(own, positive)

  def tile(row, col, shared):
    z, scale = engine.products(row["z"], col["z"]), shared["scale"]
    mine = texts.owned(row, col)
    i2t, t2i = scale * (z - row["mean"][:, None]), scale * (z - col["positive"][None, :])
    matched = (row["label"][:, None] == col["label"][None, :]) & (row["label"] >= 0)[:, None]
    matched &= ~mine & (col["kind"] == POSITIVE)[None, :]
    return {
      "i2t": jnp.where(negatives(row, col, texts.per_image), i2t, -jnp.inf),
      "t2i": jnp.where(mine, -jnp.inf, t2i),
      "i2t_matched": jnp.where(matched, i2t, 0),
      "t2i_matched": jnp.where(matched, t2i, 0),
      "texts": matched.astype(z.dtype),
      "images": matched.astype(z.dtype),
    }

  labels = jnp.broadcast_to(label[:, None], own.shape)
  reduced = engine.reduce(
    tile,
    {"z": zimg, "mean": mean, "label": label},
    texts.columns(positive=own, label=labels),
    {"scale": scale},
    outputs={
      "i2t": "row_lse",
      "t2i": "col_lse",
      "i2t_matched": "row_sum",
      "t2i_matched": "col_sum",
      "texts": "row_sum",
      "images": "col_sum",
    },
  )
  has_text = positive.any(1)
  mine = jnp.where(has_text, row_lse(scale * (own - mean[:, None]), positive), -jnp.inf)
  targets = positive.sum(1) + reduced["texts"]
  # The mean of the own texts' logits is 0, as all are relative to it.
  i2t = jnp.logaddexp(reduced["i2t"], mine) - reduced["i2t_matched"] / jnp.maximum(targets, 1)
  t2i = jax.nn.softplus(reduced["t2i"]) - reduced["t2i_matched"] / (1 + reduced["images"])
  return masked_mean(i2t, targets > 0), masked_mean(texts.of_image(t2i), positive)
