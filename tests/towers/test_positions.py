"""Position embeddings for other grids."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bigalign.weights import positions

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
  "method,ours",
  [
    ("bicubic_antialias", "cubic"),
    ("bilinear_antialias", "linear"),
  ],
)
@pytest.mark.parametrize("grid", [(3, 9), (7, 7), (2, 2)])
def test_antialiased_positions_are_those_of_jax(method, ours, grid):
  """jax.image.resize has torch's filters, where these are antialiased."""
  table = RNG.standard_normal((1, 36, 5)).astype(np.float32)
  expected = jax.image.resize(table.reshape(6, 6, 5), (*grid, 5), ours, antialias=True)
  found = positions.resize(table, grid, method)
  np.testing.assert_allclose(found.reshape(*grid, 5), expected, atol=3e-6)


@pytest.mark.parametrize("method", sorted(positions.METHODS))
def test_resized_constants_stay_constant(method):
  for n_in, n_out in ((4, 4), (4, 7), (7, 3)):
    matrix = positions.METHODS[method](n_in, n_out)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    if n_in == n_out:
      np.testing.assert_allclose(matrix, np.eye(n_in), atol=1e-12)
