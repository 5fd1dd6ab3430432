"""Weighted means of the arrays of several models, computed in float64.

WiSE-FT, https://arxiv.org/abs/2109.01903: (1 - alpha) * A + alpha * B. Model soups,
https://arxiv.org/abs/2203.05482: the mean of several. Both take all parameters, norms and the logit
scale (its log) among them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from absl import logging

from bigalign import tree

Arrays = dict[str, np.ndarray]
_STATISTICS = ("/mean", "/var")  # of batch norm


class Mean:
  """A weighted mean to which one model after the other is added.

  The mean of equal arrays is that array, and a single model of weight 1 keeps its bits.
  """

  def __init__(self) -> None:
    self._first: Arrays = {}
    self._name = ""
    self._sums: Arrays = {}
    self._differ: dict[str, np.ndarray] = {}  # where an array is not that of the first model
    self._weight = 0.0

  def add(self, arrays: Mapping[str, np.ndarray], name: str, weight: float = 1.0) -> None:
    """Adds a model.

    Args:
      arrays: {path: array}.
      name: of the model, for errors.
      weight: of the model, relative to the others; one of weight 0 is only compared.

    Raises:
      ValueError: for other paths, shapes or integers than those of the first model, by name.
    """
    if not self._first:
      self._first, self._name = dict(arrays), name
    check_alike(self._first, arrays, self._name, name)
    if not weight:
      return
    if not self._weight:
      self._first, self._name = dict(arrays), name
    for path, x in arrays.items():
      if _is_floating(x):
        term = np.asarray(x, np.float64) * weight
        self._sums[path] = self._sums[path] + term if path in self._sums else term
        differs = self._differ.get(path, False) | (self._first[path] != x)
        self._differ[path] = np.asarray(differs)
    self._weight += weight

  def arrays(self) -> Arrays:
    """The mean, {path: array} of the dtypes of the first model."""
    moved = [path for path, x in self._differ.items() if path.endswith(_STATISTICS) and x.any()]
    if moved:
      logging.warning(
        "Statistics of batch norm are averaged like parameters, which are not those of the averaged"
        " model: %s",
        tree.shown(moved, sep=", ", width=200),
      )
    mean = {}
    for path, x in self._first.items():
      if path in self._sums:
        averaged = (self._sums[path] / self._weight).astype(x.dtype)
        mean[path] = np.where(self._differ[path], averaged, x).astype(x.dtype)
      else:
        mean[path] = x
    return mean


def interpolated(
  first: Mapping[str, np.ndarray],
  second: Mapping[str, np.ndarray],
  alpha: float,
  names: tuple[str, str] = ("A", "B"),
) -> Arrays:
  """(1 - alpha) * first + alpha * second; 0 and 1 return the arrays of one of them, to the bit.

  Raises:
    ValueError: for other paths, shapes or integers, by name.
  """
  mean = Mean()
  mean.add(first, names[0], 1 - alpha)
  mean.add(second, names[1], alpha)
  return mean.arrays()


def check_alike(
  first: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], name: str, other_name: str
) -> None:
  """Raises ValueError, by name, unless two models have equal paths, shapes and integers."""
  both = [path for path in first if path in other]
  shapes = [
    f"{path} {list(first[path].shape)} and {list(other[path].shape)}"
    for path in both
    if first[path].shape != other[path].shape
  ]
  integers = [
    path
    for path in both
    if not _is_floating(first[path])
    and first[path].shape == other[path].shape
    and not np.array_equal(first[path], other[path])
  ]
  problems = [
    (f"only {name} has", sorted(first.keys() - other.keys())),
    (f"only {other_name} has", sorted(other.keys() - first.keys())),
    ("of different shapes are", shapes),
    ("integers, which have no mean, but differ, are", integers),
  ]
  lines = [f"{what} {tree.shown(found, sep=', ', width=200)}" for what, found in problems if found]
  if lines:
    raise ValueError(f"{name} and {other_name} cannot be merged: " + "; ".join(lines))


def _is_floating(x: np.ndarray) -> bool:
  return x.dtype.kind == "f" or x.dtype.name == "bfloat16"
