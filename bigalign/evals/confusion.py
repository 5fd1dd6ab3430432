"""Which classes are taken for which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigalign import sharding
from bigalign.evals.embed import Context, EvalData, embedded_images, first_class, logits


class Confusion(NamedTuple):
  """The classes of images, and those that they are taken for.

  Attributes:
    names: of K classes.
    label: [N] int32, the class of each image.
    found: [N] int32, the class that it is taken for; -1 for an image whose scores are all NaN.
  """

  names: Sequence[str]
  label: np.ndarray
  found: np.ndarray

  def matrix(self) -> np.ndarray:
    """[K, K], the number of images of each class (rows) that are taken for each class (columns)."""
    counts = np.zeros((len(self.names), len(self.names)), np.int64)
    np.add.at(counts, (self.label[self.found >= 0], self.found[self.found >= 0]), 1)
    return counts

  def pairs(self, most: int) -> list[tuple[int, int, int, int]]:
    """The pairs of classes that are confused most often; needs no K x K matrix.

    >>> label, found = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 0, 2])
    >>> Confusion(("ant", "bee", "cat"), label, found).pairs(9)
    [(0, 1, 2, 3), (1, 0, 1, 1)]

    Args:
      most: at most so many.

    Returns:
      (class, class that its images are taken for, how many are, images of the class), by falling
      number; equal ones in the order of the classes.
    """
    images = np.bincount(self.label, minlength=len(self.names))
    wrong = (self.found >= 0) & (self.found != self.label)
    number = self.label[wrong].astype(np.int64) * len(self.names) + self.found[wrong]
    both, counts = np.unique(number, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [
      (int(a), int(b), int(n), int(images[a]))
      for (a, b), n in zip(zip(*np.divmod(both[order], len(self.names))), counts[order])
    ]

  def recalls(self) -> np.ndarray:
    """[K], the share of the images of each class that are found; NaN for a class without images."""
    images = np.bincount(self.label, minlength=len(self.names))
    hits = np.bincount(self.label[self.label == self.found], minlength=len(self.names))
    return np.where(images > 0, hits / np.maximum(images, 1), np.nan)


def confusion(
  context: Context, data: EvalData, names: Sequence[str], params: Any, weights: jax.Array
) -> Confusion:
  """The classes that the images of a source are taken for.

  Of equal scores the earlier class is the one. Images without one of the labels are left out.

  Args:
    context: of the evaluator.
    data: the images.
    names: of K classes.
    params: of the model.
    weights: [K, E], classes.
  """
  top = _on_every_host(context.mesh)
  parts = []
  for zimg, batch in embedded_images(context, data, params):
    label, found, used = map(
      np.asarray, sharding.block_on_cpu(top(zimg, weights, batch["label"], batch["valid"]))
    )
    parts.append((label[used], found[used]))
  label, found = (np.concatenate(x) for x in zip(*parts))
  return Confusion(names, label, found)


@functools.cache
def _on_every_host(mesh: jax.sharding.Mesh) -> Callable[..., tuple[jax.Array, ...]]:
  return jax.jit(_of_batch, out_shardings=sharding.replicated_sharding(mesh))


def _of_batch(
  zimg: jax.Array, weights: jax.Array, label: jax.Array, valid: jax.Array
) -> tuple[jax.Array, ...]:
  """[B] each: the label, the class that is found, and whether the image counts."""
  found = first_class(logits(zimg, weights))
  return label, found, valid & (label >= 0) & (label < len(weights))
