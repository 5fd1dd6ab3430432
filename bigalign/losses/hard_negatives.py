"""Losses with hard-negative texts: captions of an image that are wrong on purpose.

They read several texts per image, ztxts [B, M, E], with texts_kind [B, M]: 0 absent, 1 positive,
2 hard negative.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.data.text.kinds import NEGATIVE
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import contrast_texts
from bigalign.losses.texts import Texts, masked_mean, of_batch, row_lse, row_mean

NEEDS = frozenset({"texts"})


def negclip(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0) -> Loss:
  """CLIP with hard-negative captions as more candidates: NegCLIP, https://arxiv.org/abs/2210.01936.

  An image chooses among the texts of all images and the hard negatives of all images; a text
  chooses among the images, and hard negatives choose none. CLoVe (https://arxiv.org/abs/2402.15021)
  has the same loss with other negatives. It is `clip` with texts="uniform", which holds for several
  positives too.

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> feats = {"zimg": z, "ztxts": jnp.stack([z, z[::-1]], 1)}  # a text that fits, and another
    >>> metrics = apply_once(negclip(t_init=1.0), feats, {"texts_kind": jnp.asarray([[1, 2]] * 4)})
    >>> round(float(metrics["i2t"]), 3), round(float(metrics["t2i"]), 3)
    (1.437, 0.744)
  """
  temperature.check("negclip", t_init, t_max)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale, texts = jnp.exp(params["t"]), of_batch(feats, batch)
    i2t, t2i = contrast_texts(feats["zimg"], texts, scale, "uniform", engine=context.engine)
    loss = (i2t + t2i) / 2
    logs = {"contrastive_loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale}
    return loss, (state, {"loss": loss, **logs})

  return Loss(NEEDS, init, apply, temperature.clamped(t_max))


def hardneg_own(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0) -> Loss:
  """An image chooses between its text and its own hard negatives, without the rest of the batch.

  The second term of DAC (https://arxiv.org/abs/2305.19595), with weight 1 beside `negclip`: the
  cross-entropy over an image's text and its own hard negatives, averaged over the images that have
  one. Of several positives the mean, each against the negatives alone.

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> feats = {"zimg": z, "ztxts": jnp.stack([z, z[::-1]], 1)}
    >>> kinds = {"texts_kind": jnp.asarray([[1, 2]] * 4)}
    >>> round(float(apply_once(hardneg_own(t_init=1.0), feats, kinds)["loss"]), 3)
    0.313
  """
  temperature.check("hardneg_own", t_init, t_max)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale, texts = jnp.exp(params["t"]), of_batch(feats, batch)
    own = texts.cosines(feats["zimg"], context.engine)  # [B, M]
    positive, negative = texts.positive, _negative(texts)
    # [B, M positives, M negatives]: a negative's cosine above a positive's.
    above = scale * (own[:, None, :] - own[:, :, None])
    candidates = negative[:, None, :] & positive[:, :, None]
    rows, count = above.reshape(-1, texts.per_image), candidates.any(-1)
    lse = row_lse(rows, candidates.reshape(rows.shape)).reshape(count.shape)
    each = jax.nn.softplus(jnp.where(count, lse, 0))
    loss = masked_mean(row_mean(each, count), count.any(1))
    return loss, (state, {"loss": loss, "logit_scale": scale})

  return Loss(NEEDS | {"hard_negatives"}, init, apply, temperature.clamped(t_max))


def dac_mil(*, t_init: float = 1 / 0.07, t_max: float | None = 100.0, w_own: float = 1.0) -> Loss:
  """Several texts of an image as one bag: DAC's MIL loss, https://arxiv.org/abs/2305.19595.

  For image i, the log of the sum of exp over all its pairs (i with the texts of all images, all
  images with the texts of i), minus that over its own texts. As in the release, its own pairs count
  twice in the first sum. With hard negatives, the same over its own texts and its own negatives is
  added. An absent text is masked, where the release has a zero vector; an image without a text
  leaves the mean. DAC's whole loss is dict(negclip={}, dac_mil={}, hardneg_own={}).

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.
    w_own: weight of the term with an image's own negatives.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> feats = {"zimg": z, "ztxts": jnp.stack([z, z[::-1]], 1)}
    >>> metrics = apply_once(dac_mil(t_init=1.0), feats, {"texts_kind": jnp.asarray([[1, 2]] * 4)})
    >>> round(float(metrics["mil"]), 3), round(float(metrics["own"]), 3)
    (1.437, 0.313)
  """
  temperature.check("dac_mil", t_init, t_max)
  checks.between("config.loss.dac_mil", 0, w_own=w_own)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    zimg, engine, scale = feats["zimg"], context.engine, jnp.exp(params["t"])
    texts = of_batch(feats, batch)
    own, positive, negative = texts.cosines(zimg, engine), texts.positive, _negative(texts)
    has_text = positive.any(1)
    mean = jax.lax.stop_gradient(row_mean(own, positive))  # all sums are relative to it

    def tile(row, col, shared):
      z, scale = engine.products(row["z"], col["z"]), shared["scale"]
      other = ~texts.owned(row, col) & col["positive"][None, :]
      rows, columns = z - row["mean"][:, None], z - col["mean"][None, :]
      return {
        "texts": jnp.where(other, scale * rows, -jnp.inf),
        "images": jnp.where(other, scale * columns, -jnp.inf),
      }

    means = jnp.broadcast_to(mean[:, None], own.shape)
    columns = texts.columns(positive=positive, mean=means)
    others = engine.reduce(
      tile,
      {"z": zimg, "mean": mean},
      columns,
      {"scale": scale},
      outputs={"texts": "row_lse", "images": "col_lse"},
    )
    relative = scale * (own - mean[:, None])
    mine = jnp.where(has_text, row_lse(relative, positive), 0)
    of_images = row_lse(texts.of_image(others["images"]), positive)
    above = jnp.logaddexp(others["texts"], of_images) - mine
    mil = masked_mean(jnp.logaddexp(above, jnp.log(2.0).astype(above.dtype)), has_text)
    both = has_text & negative.any(1)
    wrong = jnp.where(both, row_lse(relative, negative), 0)
    each = jnp.where(both, jax.nn.softplus(wrong - mine), 0)  # without a negative, it is 0
    own_loss = masked_mean(each, has_text)
    loss = mil + w_own * own_loss
    logs = {"mil": mil, "own": own_loss, "logit_scale": scale}
    return loss, (state, {"loss": loss, **logs})

  return Loss(NEEDS, init, apply, temperature.clamped(t_max))


def _negative(texts: Texts) -> jax.Array:
  """[B, M] bool: the hard negatives."""
  return ~texts.positive if texts.kind is None else texts.kind == NEGATIVE
