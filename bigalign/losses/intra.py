"""Softmax losses that also compare images with images, and texts with texts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from bigalign.losses import temperature
from bigalign.losses.base import Features, Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.engine.tiles import Arrays
from bigalign.sphere import unit

BOTH = {"i2t": "row_lse", "t2i": "col_lse"}


def _contrast(lse):
  """([], []): the mean loss of images and of texts, from the lse of both directions [B]."""
  return tuple(jax.nn.softplus(lse[k]).mean() for k in ("i2t", "t2i"))


def _pairs(feats: Features, engine: Engine) -> Arrays:
  """Rows, and columns, with which a tile can compare any modality with any."""
  positive = engine.paired(feats["zimg"], feats["ztxt"])
  return {"img": feats["zimg"], "txt": feats["ztxt"], "positive": positive}


def _above(z, row, col, scale):
  """Logits [n, m] within a modality, relative to the row's positive; -inf on the diagonal."""
  return jnp.where(pairwise.same(row, col), -jnp.inf, scale * (z - row["positive"][:, None]))


def cyclip(
  *,
  l_in: float = 0.25,
  l_cross: float = 0.25,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """CLIP with consistent cosines in and across modalities: CyCLIP, https://arxiv.org/abs/2205.14459.

  Squared differences of cosines are summed over all B² pairs and divided by B.

  Args:
    l_in: weight of (x_i . x_j - y_i . y_j)², the paper's 0.25.
    l_cross: weight of (x_i . y_j - x_j . y_i)², the paper's 0.25.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> zimg, ztxt = jnp.eye(4), jnp.roll(jnp.eye(4), 1, axis=1)
    >>> metrics = apply_once(cyclip(t_init=1.0), {"zimg": zimg, "ztxt": ztxt})
    >>> round(float(metrics["in_modal"]), 3), round(float(metrics["cross_modal"]), 3)
    (0.0, 2.0)
  """
  temperature.check("cyclip", t_init, t_max)

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

    reduced = engine.reduce(
      tile, pairs, pairs, {"scale": scale}, outputs={**BOTH, "in": "row_sum", "cross": "row_sum"}
    )
    clip = sum(_contrast(reduced)) / 2
    within, cross = reduced["in"].mean(), reduced["cross"].mean()
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
  """CLIP, and separation within each modality: AlignCLIP, https://arxiv.org/abs/2406.17639.

  A text must be closer to its image than to the other texts, and an image closer to its text than
  to the other images. Samples with similar captions count less: cosines are multiplied by
  1 - the cosine of the captions' sentence embeddings (teacher_txt, without a gradient).

  Args:
    alpha: weight of CLIP's loss, whose directions are added, not averaged, as in the authors' code.
    beta: weight of the separation terms.
    separate_text: whether texts have a separation term.
    separate_image: whether images have one.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> metrics = apply_once(alignclip(t_init=1.0), {"zimg": z, "ztxt": z}, {"teacher_txt": z})
    >>> round(float(metrics["cross"]), 3), round(float(metrics["tt"]), 3)
    (1.487, 0.744)
  """
  temperature.check("alignclip", t_init, t_max)
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
      dissimilarity = 1 - engine.products(row["sentence"], col["sentence"])
      for name, modality in chosen.items():
        z = dissimilarity * engine.products(row[modality], col[modality])
        values[name] = _above(z, row, col, scale)
      return values

    reduced = engine.reduce(
      tile,
      pairs,
      pairs,
      {"scale": scale},
      outputs={**BOTH, **dict.fromkeys(chosen, "row_lse")},
      fixed={"sentence"},
    )
    cross = sum(_contrast(reduced))
    parts = {name: jax.nn.softplus(reduced[name]).mean() for name in chosen}
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
  """CLIP in which the other images are negatives of an image too, and the other texts of a text.

  Our definition, without a paper: w_img exp(s x_i . x_j), j ≠ i, is added to the denominator of
  image i, and likewise for texts. The numerators do not change. With both weights 0 it is `clip`;
  with w_img=0 only texts are pushed apart.

  Args:
    w_img: weight of the other images for an image.
    w_txt: weight of the other texts for a text.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # three texts and three images against each positive
    >>> metrics = apply_once(clip_intra_neg(t_init=1.0), {"zimg": z, "ztxt": z})
    >>> round(float(metrics["loss"]), 3)
    1.165
  """
  temperature.check("clip_intra_neg", t_init, t_max)
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

    reduced = engine.reduce(
      tile, pairs, pairs, {"scale": scale}, outputs={**BOTH, **dict.fromkeys(weights, "row_lse")}
    )
    for direction, modality in (("i2t", "img"), ("t2i", "txt")):
      if modality in weights:
        reduced[direction] = jnp.logaddexp(reduced[direction], reduced[modality])
    i2t, t2i = _contrast(reduced)
    loss = (i2t + t2i) / 2
    return loss, (state, {"loss": loss, "i2t": i2t, "t2i": t2i, "logit_scale": scale})

  return Loss(frozenset(), init, apply, temperature.clamped(t_max))
