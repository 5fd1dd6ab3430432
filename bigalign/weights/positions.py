"""Position embeddings for another grid of patches, each family's own way.

Every way is a matrix [n_out, n_in] per axis: jax.image.resize has torch's bicubic filter only with
antialiasing.
"""

from __future__ import annotations

import math

import numpy as np


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' kernel, https://doi.org/10.1109/TASSP.1981.1163711."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _antialiased(n_in: int, n_out: int, support: float, kernel) -> np.ndarray:
  """Pillow's filter: as wide as an output pixel where that is the larger, cut at the edges."""
  scale = n_in / n_out
  wide = max(scale, 1.0)
  weights = np.zeros((n_out, n_in))
  for row in range(n_out):
    center = (row + 0.5) * scale
    first = max(int(center - support * wide + 0.5), 0)
    last = min(int(center + support * wide + 0.5), n_in)
    weights[row, first:last] = kernel((np.arange(first, last) - center + 0.5) / wide)
  return weights / weights.sum(1, keepdims=True)


def _bicubic(n_in: int, n_out: int) -> np.ndarray:
  """torch's "bicubic": a = -0.75, edges repeated, no antialiasing."""
  weights = np.zeros((n_out, n_in))
  for row in range(n_out):
    x = (row + 0.5) * n_in / n_out - 0.5
    for i in range(math.floor(x) - 1, math.floor(x) + 3):
      weights[row, min(max(i, 0), n_in - 1)] += _cubic(np.asarray(x - i), -0.75)
  return weights


def _corners(n_in: int, n_out: int) -> np.ndarray:
  """scipy.ndimage.zoom(order=1), as in big_vision: the corners stay where they are."""
  at = np.linspace(0, n_in - 1, n_out)
  return _triangle(at[:, None] - np.arange(n_in)[None])


METHODS = {
  "bicubic": _bicubic,
  "bicubic_antialias": lambda n_in, n_out: _antialiased(n_in, n_out, 2, lambda x: _cubic(x, -0.5)),
  "bilinear_antialias": lambda n_in, n_out: _antialiased(n_in, n_out, 1, _triangle),
  "bilinear_corners": _corners,
}


def resize(table: np.ndarray, grid: tuple[int, int], method: str) -> np.ndarray:
  """[1, n * n, D] -> [1, rows * cols, D] for grid = (rows, cols); untouched if it is that grid."""
  n = math.isqrt(table.shape[1])
  if n * n != table.shape[1]:
    raise ValueError(f"{table.shape[1]} positions are no square grid, which cannot be resized")
  if grid == (n, n):
    return table
  down, across = (METHODS[method](n, size).astype(np.float32) for size in grid)
  square = table.astype(np.float32).reshape(n, n, -1)
  moved = np.einsum("yi,xj,ijd->yxd", down, across, square, optimize=True)
  return moved.reshape(1, grid[0] * grid[1], -1)
