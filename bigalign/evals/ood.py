"""Out-of-distribution detection by the maximum class probability."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import sharding
from bigalign.evals.embed import Context, EvalData, embedded_images, log_rejects, logits

TRUE_POSITIVES = 0.95


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
  """The probability that an inside score is above an outside score; equal ones count half.

  NaN is never in favour: it is the lowest inside score, and the highest outside score.

  >>> auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
  0.875

  Args:
    inside: [N], scores of samples of the distribution.
    outside: [M], scores of others.

  Returns:
    From 0 to 1; 0.5 by chance.
  """
  inside, outside = _without_nan(inside, outside)
  ranked = np.sort(outside)
  below = np.searchsorted(ranked, inside, side="left")
  up_to = np.searchsorted(ranked, inside, side="right")
  return float((below + up_to).mean(dtype=np.float64) / (2 * len(outside)))


def false_positive_rate(
  inside: np.ndarray, outside: np.ndarray, true_positives: float = TRUE_POSITIVES
) -> float:
  """The share of outside scores at or above the threshold that keeps a share of the inside scores.

  The threshold is the largest score that keeps at least `true_positives` of the inside scores.

  >>> false_positive_rate(np.arange(20.0), np.array([0.0, 1.0, 2.0, 30.0]))
  0.75

  Args:
    inside, outside: as of `auroc`.
    true_positives: the share.
  """
  inside, outside = _without_nan(inside, outside)
  kept = int(np.ceil(round(true_positives * len(inside), 9)))
  return float((outside >= np.sort(inside)[len(inside) - kept]).mean())


def _without_nan(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  return np.where(np.isnan(inside), -np.inf, inside), np.where(np.isnan(outside), np.inf, outside)


def certainty(zimg: jax.Array, weights: jax.Array, scale: jax.Array) -> jax.Array:
  """[B]: the log odds of the top class, which rise with its probability and do not saturate.

  In float32 the probability of a certain class is 1, so that many images would have the same.

  Args:
    zimg: [B, E], images.
    weights: [K, E], classes.
    scale: [], factor of the cosines.
  """
  scores = scale * logits(zimg, weights)
  top = jnp.argmax(scores, 1)[:, None] == jnp.arange(len(weights))[None]
  return jnp.max(scores, 1) - jax.nn.logsumexp(jnp.where(top, -jnp.inf, scores), 1)


class Outside:
  """Compares the images of a source with those of another that shows none of its classes.

  Args:
    context: of the evaluator.
    data: the other source.
  """

  def __init__(self, context: Context, data: EvalData):
    self._context, self._data = context, data
    on_every = functools.partial(jax.jit, out_shardings=sharding.replicated_sharding(context.mesh))
    self._score = on_every(_score)

  def score(
    self, zimg: jax.Array, weights: jax.Array, scale: float, batch: Mapping[str, jax.Array]
  ) -> tuple[np.ndarray, np.ndarray]:
    """[n], the certainties of the valid images of a batch; [R], its rejects; on every host."""
    found = self._score(zimg, weights, np.float32(scale), batch["valid"], batch["rejects"])
    scores, valid, rejects = (np.asarray(x) for x in sharding.block_on_cpu(found))
    return scores[valid], rejects

  def metrics(
    self, params: Any, weights: jax.Array, scale: float, inside: np.ndarray
  ) -> dict[str, float]:
    """The measures.

    Args:
      params: of the model.
      weights: [K, E], classes.
      scale: factor of the cosines.
      inside: [N], certainties of the images of the source.

    Raises:
      ValueError: if no image of the other source can be used.
    """
    images = embedded_images(self._context, self._data, params)
    parts = [self.score(zimg, weights, scale, batch) for zimg, batch in images]
    outside = np.concatenate([scores for scores, _ in parts])
    rejected = log_rejects(f"{self._context.name}.ood", np.sum([x for _, x in parts], axis=0))
    if not len(outside):
      raise ValueError(
        f"config.evals.{self._context.name}.ood: all {rejected} samples are rejected; the log gives"
        " the reasons"
      )
    return {
      "ood_auroc": auroc(inside, outside),
      "ood_fpr95": false_positive_rate(inside, outside),
      "ood_num_samples": len(outside),
      **({"ood_rejected": rejected} if rejected else {}),
    }


def _score(
  zimg: jax.Array, weights: jax.Array, scale: jax.Array, valid: jax.Array, rejects: jax.Array
) -> tuple[jax.Array, ...]:
  return certainty(zimg, weights, scale), valid, rejects.sum(0)
