"""Reductions of logit tiles over an axis, built up part by part: sum, max and log-sum-exp (lse)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# The reduction of the entries so far: (sum,), (max,) or, for an lse, (max, sum of exp(x - max)).
Partial = tuple[jax.Array, ...]


def empty(kind: str, n: int, dtype: Any) -> Partial:
  """The reduction of no entries, [n]."""
  zeros, low = jnp.zeros(n, dtype), jnp.full(n, -jnp.inf, dtype)
  return {"sum": (zeros,), "max": (low,), "lse": (low, zeros)}[kind]


def of_tile(kind: str, v: jax.Array, axis: int) -> Partial:
  """The reduction of a tile [n, m] over one of its axes."""
  if kind == "sum":
    return (v.sum(axis),)
  top = jax.lax.stop_gradient(v.max(axis))
  if kind == "max":
    return (top,)
  return top, jnp.exp(v - jnp.expand_dims(finite(top), axis)).sum(axis)


def combine(kind: str, a: Partial, b: Partial) -> Partial:
  """The reduction of the entries of both."""
  if kind == "sum":
    return (a[0] + b[0],)
  top = jnp.maximum(a[0], b[0])
  if kind == "max":
    return (top,)
  base = finite(top)
  return top, a[1] * jnp.exp(a[0] - base) + b[1] * jnp.exp(b[0] - base)


def result(kind: str, a: Partial) -> jax.Array:
  """[n]: the value of a reduction; an lse over no entries is -inf, with gradient 0."""
  if kind != "lse":
    return a[0]
  # A gradient passes through both branches of a where. A NaN sum counts as not empty and stays NaN.
  nonempty = a[1] != 0
  return jnp.where(nonempty, jnp.log(jnp.where(nonempty, a[1], 1)) + finite(a[0]), -jnp.inf)


def finite(x: jax.Array) -> jax.Array:
  """x, or 0 where it is not finite, so that it can be subtracted."""
  return jnp.where(jnp.isfinite(x), x, 0)


def tile_cotangent(kind: str, v: jax.Array, ct: jax.Array, value: jax.Array) -> jax.Array:
  """The cotangent of a tile, from those of its reduction.

  Args:
    kind: "sum", "max" or "lse".
    v: [n, m], the tile.
    ct: [n, 1] or [1, m], the cotangent of the reduction.
    value: of the same shape, the value of the reduction.
  """
  if kind == "sum":
    return jnp.broadcast_to(ct, v.shape)
  if kind == "max":
    return jnp.zeros_like(v)
  return ct * jnp.exp(v - finite(value))
