"""Calibration: whether the probability of the top class is how often it is correct."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from bigalign import sharding
from bigalign.evals.embed import logits

BINS = 15
EVERY = 5  # a fifth of the samples fits the temperature
RANGE = (1e-3, 1e5)  # of the fitted scale
_STEPS = 60  # of the search, which ends much earlier


def expected_calibration_error(
  confidence: np.ndarray, correct: np.ndarray, bins: int = BINS
) -> float:
  """The mean of |accuracy - confidence| over bins of equal width, weighted by their samples.

  https://arxiv.org/abs/1706.04599. Bin b holds the confidences in (b / bins, (b + 1) / bins].

  >>> expected_calibration_error(np.array([0.75, 0.75, 0.5, 0.5]), np.array([1, 1, 1, 0]))
  0.125

  Args:
    confidence: [N], of the top class. NaN counts as 1, so that a broken model is not calibrated.
    correct: [N] bool, whether the top class is the label.
    bins: their number.

  Returns:
    From 0 to 1; NaN without samples.
  """
  confidence = np.asarray(confidence, np.float64)
  confidence = np.where(np.isnan(confidence), 1.0, confidence)
  hit = np.asarray(correct, np.float64)
  edges = np.linspace(0, 1, bins + 1)
  bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
  difference = np.bincount(bin_of, hit - confidence, minlength=bins)
  return float(np.abs(difference).sum() / len(hit)) if len(hit) else math.nan


def top_class(
  zimg: jax.Array, weights: jax.Array, label: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The confidence of the top class and whether it is the label.

  Of equal logits the earlier class is the top class. With NaN the confidence is NaN, and the class
  is wrong.

  Args:
    zimg: [B, E], images.
    weights: [K, E], classes.
    label: [B] int32.
    scale: [], factor of the cosines.

  Returns:
    [B] float32, softmax(scale * cosines) of the top class; [B] bool.
  """
  scores = scale * logits(zimg, weights)
  confidence = jnp.exp(jnp.max(scores, 1) - jax.nn.logsumexp(scores, 1))
  return confidence, (jnp.argmax(scores, 1) == label) & ~jnp.isnan(confidence)


def moments(
  zimg: jax.Array, weights: jax.Array, label: jax.Array, used: jax.Array, scale: jax.Array
) -> jax.Array:
  """[2], the sums over images of the first two derivatives of the log loss by the scale.

  The log loss is convex in the scale: its second derivative is a variance of cosines.

  Args:
    zimg, weights, label, scale: as of `top_class`.
    used: [B] bool, the images that count; those with NaN do not.
  """
  cosines = logits(zimg, weights)
  own = jnp.take_along_axis(cosines, jnp.clip(label, 0, len(weights) - 1)[:, None], axis=1)
  used &= jnp.isfinite(cosines).all(1)
  p = jax.nn.softmax(scale * jnp.where(used[:, None], cosines, 0), axis=1)
  away = jnp.where(used[:, None], cosines - own, 0)  # from the label, so that sums stay exact
  first = jnp.sum(p * away, 1)
  second = jnp.sum(p * jnp.square(away - first[:, None]), 1)
  return jnp.stack([jnp.sum(jnp.where(used, x, 0)) for x in (first, second)])


def fit_scale(derivatives: Callable[[float], Sequence[float] | np.ndarray], start: float) -> float:
  """The scale at which the log loss is smallest, by Newton's method within a bracket.

  >>> round(fit_scale(lambda s: (s - 3, 1.0), 1.0), 6)  # of (s - 3)² / 2
  3.0

  Args:
    derivatives: scale -> the first and the second derivative of a convex function.
    start: the first scale, positive.

  Returns:
    A scale; an end of RANGE if the function falls up to there, as where all labels are found.
  """
  low, high = RANGE
  scale = min(max(start, low), high)
  for _ in range(_STEPS):
    first, second = derivatives(scale)
    if first < 0:
      low = scale
    else:
      high = scale
    step = scale - first / second if second > 0 else math.nan
    # A step out of the bracket, or far across it, is replaced by the middle of the logarithms.
    inside = low < step < high and 0.25 < step / scale < 4
    following = step if inside else math.sqrt(low * high)
    if abs(following - scale) <= 1e-7 * scale:
      return following
    scale = following
  return scale


def held_out(sample_id: np.ndarray | jax.Array) -> Any:
  """[B] bool: a fifth of the samples, chosen by the hash of their keys, whatever their order.

  Classes often repeat with a period, such as that of ten classes in turn, and every fifth sample
  would then show two of them.

  Args:
    sample_id: [B, 2] uint32, the two words of the hash.
  """
  return sample_id[:, 1] % EVERY == 0


class Calibration:
  """Collects the batches of one evaluation, and measures their calibration.

  The temperature is fitted on the samples of `held_out`, and applied to the others.

  Args:
    mesh: of the arrays.
    weights: [K, E], classes.
    scale: that of training.
  """

  def __init__(self, mesh: jax.sharding.Mesh, weights: jax.Array, scale: float):
    self._weights, self._scale = weights, scale
    self._batches: list[_Batch] = []
    on_every = functools.partial(jax.jit, out_shardings=sharding.replicated_sharding(mesh))
    self._top, self._moments = on_every(_top_of_batch), on_every(_moments_of_batch)

  def add(self, zimg: jax.Array, batch: dict[str, jax.Array]) -> None:
    """Keeps the embeddings [B, E] and the batch that they are of, on their devices."""
    self._batches.append(_Batch(zimg, batch["label"], batch["sample_id"], batch["valid"]))

  def metrics(self, name: str) -> dict[str, float]:
    """The measures, see `zeroshot`.

    Args:
      name: of the evaluator, for the log.
    """
    confidence, correct, fitted = self._rows(self._scale)
    found = {
      "ece": expected_calibration_error(confidence, correct),
      "logit_scale": self._scale,
    }
    if fitted.all() or not fitted.any():
      logging.warning(
        "evaluation %r has no calibrated ECE: of its %d samples %d are to fit the temperature",
        *(name, len(fitted), fitted.sum()),
      )
      return found
    scale = fit_scale(self._derivatives, self._scale)
    if not RANGE[0] * 1.01 < scale < RANGE[1] / 1.01:
      logging.warning(
        "evaluation %r: the fitted scale %.3g is at the end of its range %s: the samples that fit"
        " it are too few, or all correct, or no better than chance",
        *(name, scale, RANGE),
      )
    after, correct_after, _ = self._rows(scale)
    rest = ~fitted
    return found | {
      "ece_rest": expected_calibration_error(confidence[rest], correct[rest]),
      "ece_rest_calibrated": expected_calibration_error(after[rest], correct_after[rest]),
      "calibrated_temperature": self._scale / scale,
      "calibration_samples": int(fitted.sum()),
    }

  def _rows(self, scale: float) -> tuple[np.ndarray, ...]:
    """[N] confidence, correct and held out of the valid samples, on every host."""
    parts = []
    for batch in self._batches:
      found = self._top(batch, self._weights, np.float32(scale))
      parts.append([np.asarray(x) for x in sharding.block_on_cpu(found)])
    *rows, valid = (np.concatenate(x) for x in zip(*parts))
    return tuple(x[valid] for x in rows)

  def _derivatives(self, scale: float) -> np.ndarray:
    """[2] float64, of the log loss of the samples that fit."""
    total = np.zeros(2)
    for batch in self._batches:
      total += np.asarray(
        sharding.block_on_cpu(self._moments(batch, self._weights, np.float32(scale)))
      )
    return total


class _Batch(NamedTuple):
  """Embeddings [B, E] of images, and their fields of a batch."""

  zimg: jax.Array
  label: jax.Array
  sample_id: jax.Array
  valid: jax.Array


def _top_of_batch(batch: _Batch, weights: jax.Array, scale: jax.Array) -> tuple[jax.Array, ...]:
  found = top_class(batch.zimg, weights, batch.label, scale)
  return *found, held_out(batch.sample_id), batch.valid


def _moments_of_batch(batch: _Batch, weights: jax.Array, scale: jax.Array) -> jax.Array:
  used = batch.valid & held_out(batch.sample_id)
  return moments(batch.zimg, weights, batch.label, used, scale)
