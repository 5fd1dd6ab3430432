"""The exact GELU, against its definition in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigalign.towers.base import gelu

X = np.linspace(-12, 12, 4001)


@pytest.mark.parametrize("dtype,epsilon", [("float32", 2**-23), ("bfloat16", 2**-8)])
def test_values_and_derivatives_are_those_of_the_definition(dtype, epsilon):
  """To the rounding of the dtype: absolute below 1, relative above."""
  x = jnp.asarray(X, dtype)
  exact = np.asarray(x, np.float64)
  probability = np.asarray([0.5 * math.erfc(-v * math.sqrt(0.5)) for v in exact])
  density = np.exp(-0.5 * exact**2) / math.sqrt(2 * math.pi)
  y, slope = jax.jvp(gelu, (x,), (jnp.ones_like(x),))
  assert y.dtype == slope.dtype == jnp.dtype(dtype)
  np.testing.assert_array_equal(y, gelu(x))
  for found, expected in ((y, exact * probability), (slope, probability + exact * density)):
    error = np.abs(np.asarray(found, np.float64) - expected)
    # erf is right to two units of float32, which x multiplies; then one rounding.
    assert (error <= epsilon * np.abs(expected) + 2**-22 * np.maximum(np.abs(exact), 1)).all()


def test_infinities_and_gradients():
  assert gelu(jnp.asarray([-40.0, 40.0])).tolist() == [0.0, 40.0]
  np.testing.assert_allclose(jax.grad(gelu)(jnp.asarray(0.0)), 0.5)
