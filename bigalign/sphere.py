"""Unit vectors: normalisation, and interpolation along the sphere."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def unit(x: jax.Array) -> jax.Array:
  """[..., E]: x with unit L2 norm; below a norm of 1e-12 it is zero, with gradient zero."""
  square = jnp.sum(x * x, -1, keepdims=True)
  small = square < 1e-24
  # Two wheres, since a gradient passes through both branches of one.
  return jnp.where(small, 0, x * jax.lax.rsqrt(jnp.where(small, 1, square)))


def geodesic(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
  """[..., E]: the unit vectors between a and b on the sphere.

  (sin(share θ) a + sin((1 - share) θ) b) / sin θ, with θ the angle between a and b; for angles
  below 1.4e-3, where this is 0 / 0, the normalised linear interpolation.

  Args:
    a: [..., E], unit norm.
    b: [..., E], unit norm.
    share: [], of a.
  """
  cosine = jnp.sum(a * b, -1, keepdims=True)
  near = cosine > 1 - 1e-6
  # Two wheres, since a gradient passes through both branches of one; arccos has none at ±1.
  angle = jnp.arccos(jnp.where(near, 0, jnp.maximum(cosine, -1 + 1e-6)))
  arc = (jnp.sin(share * angle) * a + jnp.sin((1 - share) * angle) * b) / jnp.sin(angle)
  return jnp.where(near, unit(share * a + (1 - share) * b), arc)
