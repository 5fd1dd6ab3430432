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
from bigalign.losses.texts import (
  PER_CLASS_TOKEN,
  Texts,
  class_tokens,
  masked_mean,
  negatives,
  of_batch,
  row_lse,
  row_mean,
)

# Of several texts per image.
FORMS = ("one", "uniform", "sum_inside", "per_ordinal", PER_CLASS_TOKEN)


def above_positives(z: jax.Array, row: Arrays, col: Arrays, scale: jax.Array) -> Arrays:
  """Logits relative to the logit of the row's, and of the column's, positive.

  The positives themselves are -inf: with r the lse of a row of "i2t", -log p of its positive is
  softplus(r). Absolute logits would lose the loss to rounding, in 100 - 100 at a scale of 100.

  Args:
    z: [n, m], a tile of cosines.
    row: "positive" [n], the cosines of the rows' own pairs, and "batch_index".
    col: likewise of the columns, [m]; and "present" [m] bool, if some texts are absent.
    scale: [], of the logits.

  Returns:
    "i2t" and "t2i", [n, m].
  """
  other = ~pairwise.same(row, col)
  candidates = {"i2t": other & col["present"][None, :] if "present" in col else other, "t2i": other}
  i2t, t2i = z - row["positive"][:, None], z - col["positive"][None, :]
  above = {"i2t": i2t, "t2i": t2i}
  return {k: jnp.where(candidates[k], scale * v, -jnp.inf) for k, v in above.items()}


def above_positives_lse(
  zimg: jax.Array,
  ztxt: jax.Array,
  scale: jax.Array,
  present: jax.Array | None = None,
  *,
  engine: Engine,
) -> tuple[jax.Array, jax.Array]:
  """[B] per image and [B] per text: the lse of its other logits, relative to its positive's.

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm.
    scale: [], of the logits.
    present: [B] bool, which texts an image is compared with; None: all.
    engine: forms the logits.
  """
  positive = engine.paired(zimg, ztxt)  # [B]

  def tile(row, col, shared):
    return above_positives(engine.products(row["z"], col["z"]), row, col, shared["scale"])

  lse = engine.reduce(
    tile,
    {"z": zimg, "positive": positive},
    {"z": ztxt, "positive": positive, **({} if present is None else {"present": present})},
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse"},
  )
  return lse["i2t"], lse["t2i"]


def contrast(zimg: jax.Array, ztxt: jax.Array, scale: jax.Array, *, engine: Engine) -> jax.Array:
  """[]: the symmetric InfoNCE loss of [B, E] and [B, E], without label smoothing."""
  i2t, t2i = above_positives_lse(zimg, ztxt, scale, engine=engine)
  return (jax.nn.softplus(i2t).mean() + jax.nn.softplus(t2i).mean()) / 2


def contrast_texts(
  zimg: jax.Array, texts: Texts, scale: jax.Array, form: str, *, engine: Engine
) -> tuple[jax.Array, jax.Array]:
  """[] and [], the losses of images to texts and of texts to images, with several texts per image.

  Args:
    zimg: [B, E], unit norm.
    texts: of the images; hard negatives are candidates of every image, and choose no image.
    scale: [], of the logits.
    form: "uniform", "sum_inside" or "per_ordinal", see `clip`.
    engine: forms the logits.
  """
  positive = texts.positive
  if form == "per_ordinal":
    z = texts.of_image(texts.z)
    sums = []
    for m in range(texts.per_image):  # one matrix at a time
      both = above_positives_lse(zimg, z[:, m], scale, positive[:, m], engine=engine)
      sums.append([jnp.where(positive[:, m], jax.nn.softplus(x), 0).sum() for x in both])
    i2t, t2i = (sum(x) / texts.number(positive) for x in zip(*sums))
    return i2t, t2i
  own = texts.cosines(zimg, engine)  # [B, M]
  mean = row_mean(own, positive)

  def tile(row, col, shared):
    z, scale = engine.products(row["z"], col["z"]), shared["scale"]
    i2t, t2i = z - row["mean"][:, None], z - col["positive"][None, :]
    return {
      "i2t": jnp.where(negatives(row, col, texts.per_image), scale * i2t, -jnp.inf),
      "t2i": jnp.where(~texts.owned(row, col), scale * t2i, -jnp.inf),
    }

  above = engine.reduce(
    tile,
    {"z": zimg, "mean": mean},
    texts.columns(positive=own),
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse"},
  )
  has_text = positive.any(1)
  mine = jnp.where(has_text, row_lse(scale * (own - mean[:, None]), positive), 0)
  if form == "sum_inside":
    i2t = jax.nn.softplus(above["i2t"] - mine)
  else:  # relative to the mean of the positives' logits, the mean of -log p is the lse of all
    i2t = jnp.logaddexp(above["i2t"], mine)
  t2i = jax.nn.softplus(texts.of_image(above["t2i"]))
  return masked_mean(i2t, has_text), masked_mean(t2i, positive)


def clip(
  *,
  t_init: float = 1 / 0.07,
  t_learned: bool = True,
  t_max: float | None = 100.0,
  label_smoothing: float = 0.0,
  b_init: float | None = None,
  texts: str = "one",
) -> Loss:
  """InfoNCE, averaged over both directions: CLIP, https://arxiv.org/abs/2103.00020.

  With several texts per image (ztxts [B, M, E] and texts_kind [B, M]; `texts`), the loss of texts
  is the mean over all positive texts, each of which chooses among the B images. Absent texts take
  no part. Hard negatives are candidates that every image must not choose, as in `negclip`; they
  choose no image. An image without a positive leaves the mean of the images. With M = 1 all forms
  are "one".

  Args:
    t_init: first value of the logit scale (1 / temperature); the learned parameter "t" is its log.
    t_learned: whether the scale is learned; else it is t_init in the whole run, without bounds.
    t_max: upper bound of the scale after each update, with the lower bound 1; None: no bounds. The
      paper and open_clip use 100.
    label_smoothing: share of the target that is spread evenly over all B candidates, including the
      positive.
    b_init: first value of a logit bias "b", which has no effect on a softmax (its gradient is 0);
      only for checkpoints shared with the sigmoid loss. None: no bias.
    texts: "one": an image has one text, ztxt. With several: "uniform": an image's target is spread
      evenly over its texts, among all texts of the batch. "sum_inside": the probabilities of its
      texts are added up before the logarithm (MIL-NCE, https://arxiv.org/abs/1912.06430).
      "per_ordinal": the first texts form a CLIP loss, and so do the second, the third, ...; the
      mean over all texts (DreamLIP, https://arxiv.org/abs/2403.17007), without hard negatives.
      "per_class_token": the mean of the losses of the first class token and the first captions, and
      of the second class token and config.data.second_captions (TIPS,
      https://arxiv.org/abs/2410.16512); the image tower has class_tokens=2.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # aligned pairs, orthogonal to each other
    >>> metrics = apply_once(clip(t_init=1.0), {"zimg": z, "ztxt": z})
    >>> round(float(metrics["loss"]), 3)
    0.744
    >>> feats = {"zimg": z, "ztxts": jnp.stack([z, z[::-1]], 1)}  # a text that fits, and another
    >>> batch = {"texts_kind": jnp.asarray([[1, 2]] * 4)}
    >>> metrics = apply_once(clip(t_init=1.0, texts="uniform"), feats, batch)
    >>> round(float(metrics["i2t"]), 3), round(float(metrics["t2i"]), 3)
    (1.437, 0.744)
  """
  temperature.check("clip", t_init, t_max, learned=t_learned)
  checks.between("config.loss.clip", 0, 1, label_smoothing=label_smoothing)
  checks.known("config.loss.clip.texts", texts, FORMS)
  if texts != "one" and label_smoothing:
    raise ValueError(
      f"config.loss.clip.label_smoothing={label_smoothing!r} is for one text per image, but"
      f" texts={texts!r} spreads the target over several; set one of the two"
    )

  def init(sizes):
    return temperature.init(t_init, b_init=b_init, learned=t_learned), {}

  def apply(params, state, feats, batch, context):
    zimg, engine = feats["zimg"], context.engine
    scale = temperature.scale(params, t_init, zimg)
    if texts == PER_CLASS_TOKEN:
      both = class_tokens("clip", feats)
      first, second = (contrast(x, y, scale, engine=engine) for x, y in both)
      loss = (first + second) / 2
      logs = {"contrastive_loss": loss, "first": first, "second": second, "logit_scale": scale}
      return loss, (state, {"loss": loss, **logs})
    several = None if texts == "one" else of_batch(feats, batch)
    if several is not None and several.per_image > 1:
      i2t, t2i = contrast_texts(zimg, several, scale, texts, engine=engine)
      loss = (i2t + t2i) / 2
      logs = {"contrastive_loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale}
      return loss, (state, {"loss": loss, **logs})
    ztxt = feats["ztxt"] if several is None else several.z
    # The mean of all cosines, relative to the mean of the positives'; in float32, as in `nitc`.
    even = jnp.sum(zimg.mean(0) * ztxt.mean(0)) - jnp.sum(zimg * ztxt, -1).mean()
    loss = contrast(zimg, ztxt, scale, engine=engine) - label_smoothing * scale * even
    return loss, (state, {"loss": loss, "contrastive_loss": loss, "logit_scale": scale})

  if texts == PER_CLASS_TOKEN:
    needs = {"second_text", "class_tokens"}
  else:
    needs = set() if texts == "one" else {"texts"}
  return Loss(frozenset(needs), init, apply, temperature.clamped(t_max))
