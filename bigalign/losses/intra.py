"""Softmax losses that also compare images with images and texts with texts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.sphere import unit

BOTH = {"i2t": "row_lse", "t2i": "col_lse"}


def _contrast(found):
  """The lse of both directions -> the loss per image and per text, averaged over the batch."""
  return tuple(jax.nn.softplus(found[k]).mean() for k in ("i2t", "t2i"))


def _pairs(feats, engine: Engine):
  """Both sides of a sweep in which every tile can compare any modality with any."""
  positive = engine.paired(feats["zimg"], feats["ztxt"])
  return {"img": feats["zimg"], "txt": feats["ztxt"], "positive": positive}


def _above(z, row, col, scale):
  """Cosines within a modality [n, m] -> logits above the row's positive, without the diagonal."""
  return jnp.where(pairwise.same(row, col), -jnp.inf, scale * (z - row["positive"][:, None]))


def cyclip(
  *,
  l_in: float = 0.25,
  l_cross: float = 0.25,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """CLIP with consistent cosines, within and across modalities: https://arxiv.org/abs/2205.14459.

  Squares of cosine differences are summed over all B² pairs and divided by B.

  Args:
    l_in: weight of (x_i . x_j - y_i . y_j)², the paper's 0.25.
    l_cross: weight of (x_i . y_j - x_j . y_i)², the paper's 0.25.
    t_init, t_max: first value and upper bound of the logit scale, as in `clip`.
  """

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    engine, scale = context.engine, jnp.exp(params["t"])
    pairs = _pairs(feats, engine)

    def tile(row, col, shared):
      i2t = engine.products(row["img"], col["txt"])
      cross = i2t - engine.products(row["txt"], col["img"])
      within = engine.products(row["img"], col["img"]) - engine.products(row["txt"], col["txt"])
      return {**above_positives(i2t, row, col, shared["scale"]), "in": within**2, "cross": cross**2}

    found = engine.reduce(
      tile, pairs, pairs, {"scale": scale}, outputs={**BOTH, "in": "row_sum", "cross": "row_sum"}
    )
    clip = sum(_contrast(found)) / 2
    within, cross = found["in"].mean(), found["cross"].mean()
    loss = clip + l_in * within + l_cross * cross
    logs = {"contrastive_loss": clip, "in_modal": within, "cross_modal": cross}
    return loss, (state, {"loss": loss, **logs, "logit_scale": scale})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))


def alignclip(
  *,
  alpha: float = 1.0,
  beta: float = 0.5,
  separate_text: bool = True,
  separate_image: bool = True,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """CLIP, and separation within each modality: https://arxiv.org/abs/2406.17639.

  A text is to be closer to its image than to the other texts, an image closer to its text than to
  the other images; others count the less the more alike their captions are: cosines are multiplied
  by 1 - the cosine of the captions' sentence embeddings (teacher_txt, no gradient).

  Args:
    alpha: of CLIP, whose directions are added, not averaged, as in the authors' code.
    beta: of the separation terms.
    separate_text, separate_image: whether there is one for texts, for images.
    t_init, t_max: first value and upper bound of the logit scale, as in `clip`.
  """
  chosen = {
    name: modality
    for name, modality, on in (("tt", "txt", separate_text), ("vv", "img", separate_image))
    if on
  }

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    engine, scale = context.engine, jnp.exp(params["t"])
    pairs = {**_pairs(feats, engine), "sentence": unit(batch["teacher_txt"])}

    def tile(row, col, shared):
      scale = shared["scale"]
      values = above_positives(engine.products(row["img"], col["txt"]), row, col, scale)
      unlike = 1 - engine.products(row["sentence"], col["sentence"])
      for name, modality in chosen.items():
        z = unlike * engine.products(row[modality], col[modality])
        values[name] = _above(z, row, col, scale)
      return values

    found = engine.reduce(
      tile,
      pairs,
      pairs,
      {"scale": scale},
      outputs={**BOTH, **dict.fromkeys(chosen, "row_lse")},
      fixed={"sentence"},
    )
    cross = sum(_contrast(found))
    parts = {name: jax.nn.softplus(found[name]).mean() for name in chosen}
    loss = alpha * cross + beta * sum(parts.values())
    return loss, (state, {"loss": loss, "cross": cross, **parts, "logit_scale": scale})

  return Loss(frozenset({"teacher_text"}), init, apply, temperature.clamped(t_max))


def clip_intra_neg(
  *,
  w_img: float = 1.0,
  w_txt: float = 1.0,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """CLIP where an image's negatives are the other images too, a text's the other texts too.

  Our definition: exp(s x_i . x_j), j ≠ i, times w_img joins the denominator of image i, likewise
  for texts; numerators stay. Both weights 0: `clip`; w_img=0 only pushes unlike texts apart.

  Args:
    w_img, w_txt: weights of images for images and of texts for texts.
    t_init, t_max: first value and upper bound of the logit scale, as in `clip`.
  """
  for name, weight in (("w_img", w_img), ("w_txt", w_txt)):
    if weight < 0:
      raise ValueError(f"config.loss.clip_intra_neg.{name}={weight!r} must be 0 or more")
  weights = {k: w for k, w in (("img", w_img), ("txt", w_txt)) if w}

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    engine, scale = context.engine, jnp.exp(params["t"])
    pairs = _pairs(feats, engine)

    def tile(row, col, shared):
      scale = shared["scale"]
      values = above_positives(engine.products(row["img"], col["txt"]), row, col, scale)
      for modality, weight in weights.items():
        z = engine.products(row[modality], col[modality])
        values[modality] = _above(z, row, col, scale) + math.log(weight)
      return values

    found = engine.reduce(
      tile, pairs, pairs, {"scale": scale}, outputs={**BOTH, **dict.fromkeys(weights, "row_lse")}
    )
    for direction, modality in (("i2t", "img"), ("t2i", "txt")):
      if modality in weights:
        found[direction] = jnp.logaddexp(found[direction], found[modality])
    i2t, t2i = _contrast(found)
    loss = (i2t + t2i) / 2
    return loss, (state, {"loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))
