"""Resizes position embeddings to another grid of patches, with each family's own interpolation.

A method is a matrix [n_out, n_in] for each axis: jax.image.resize has torch's bicubic filter only
with antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def _triangle(x: np.ndarray) -> np.ndarray:
  """The linear kernel."""
  return np.asarray(np.maximum(1 - np.abs(x), 0))


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' kernel, https://doi.org/10.1109/TASSP.1981.1163711."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _antialiased(
  n_in: int, n_out: int, support: float, kernel: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
  """Pillow's filter: as wide as the larger of input and output pixel, cut off at the edges."""
  scale = n_in / n_out
  wide = max(scale, 1.0)
  weights = np.zeros((n_out, n_in))
  for row in range(n_out):
    center = (row + 0.5) * scale
    first = max(int(center - support * wide + 0.5), 0)
    last = min(int(center + support * wide + 0.5), n_in)
    weights[row, first:last] = kernel((np.arange(first, last) - center + 0.5) / wide)
  return np.asarray(weights / weights.sum(1, keepdims=True))


def _bicubic(n_in: int, n_out: int) -> np.ndarray:
  """torch's "bicubic": a = -0.75, edge pixels repeated, no antialiasing."""
  weights = np.zeros((n_out, n_in))
  for row in range(n_out):
    x = (row + 0.5) * n_in / n_out - 0.5
    for i in range(math.floor(x) - 1, math.floor(x) + 3):
      weights[row, min(max(i, 0), n_in - 1)] += _cubic(np.asarray(x - i), -0.75)
  return weights


def _corners(n_in: int, n_out: int) -> np.ndarray:
  """scipy.ndimage.zoom(order=1), as in big_vision: corners are aligned."""
  position = np.linspace(0, n_in - 1, n_out)
  return _triangle(position[:, None] - np.arange(n_in)[None])


METHODS: dict[str, Callable[[int, int], np.ndarray]] = {
  "bicubic": _bicubic,
  "bicubic_antialias": lambda n_in, n_out: _antialiased(n_in, n_out, 2, lambda x: _cubic(x, -0.5)),
  "bilinear_antialias": lambda n_in, n_out: _antialiased(n_in, n_out, 1, _triangle),
  "bilinear_corners": _corners,
}


def resize(table: np.ndarray, grid: tuple[int, int], method: str) -> np.ndarray:
  """[1, n * n, D] -> [1, rows * cols, D].

  Args:
    table: positions of a square grid.
    grid: (rows, cols) of the result; the table itself is returned if it has this grid.
    method: one of METHODS.

  Raises:
    ValueError: if the table is not of a square grid.
  """
  n = math.isqrt(table.shape[1])
  if n * n != table.shape[1]:
    raise ValueError(f"{table.shape[1]} positions are not a square grid, so they cannot be resized")
  if grid == (n, n):
    return table
  down, across = (METHODS[method](n, size).astype(np.float32) for size in grid)
  square = table.astype(np.float32).reshape(n, n, -1)
  resized: np.ndarray = np.einsum("yi,xj,ijd->yxd", down, across, square, optimize=True)
  return resized.reshape(1, grid[0] * grid[1], -1)
