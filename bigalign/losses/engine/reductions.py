"""What a tile leaves of its rows and columns: sums, maxima, logs of sums of exponentials."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Stat = tuple[jax.Array, ...]  # what has been seen so far: (sum,), (max,) or (max, sum of exp)


def empty(kind: str, n: int, dtype: Any) -> Stat:
  """The statistic of nothing, [n]."""
  zeros, low = jnp.zeros(n, dtype), jnp.full(n, -jnp.inf, dtype)
  return {"sum": (zeros,), "max": (low,), "lse": (low, zeros)}[kind]


def of(kind: str, v: jax.Array, axis: int) -> Stat:
  """The statistic of a tile [n, m] over one of its axes."""
  if kind == "sum":
    return (v.sum(axis),)
  top = jax.lax.stop_gradient(v.max(axis))
  if kind == "max":
    return (top,)
  return top, jnp.exp(v - jnp.expand_dims(finite(top), axis)).sum(axis)


def join(kind: str, a: Stat, b: Stat) -> Stat:
  """The statistic of what both have seen."""
  if kind == "sum":
    return (a[0] + b[0],)
  top = jnp.maximum(a[0], b[0])
  if kind == "max":
    return (top,)
  base = finite(top)
  return top, a[1] * jnp.exp(a[0] - base) + b[1] * jnp.exp(b[0] - base)


def done(kind: str, a: Stat) -> jax.Array:
  """[n]: the value; an lse over nothing is -inf, with gradient 0."""
  if kind != "lse":
    return a[0]
  # A gradient passes through both branches of a where. NaN is not nothing: it stays NaN.
  seen = a[1] != 0
  return jnp.where(seen, jnp.log(jnp.where(seen, a[1], 1)) + finite(a[0]), -jnp.inf)


def finite(x: jax.Array) -> jax.Array:
  """x, or 0 where it is not finite: what can be subtracted."""
  return jnp.where(jnp.isfinite(x), x, 0)


def pull(kind: str, v: jax.Array, ct: jax.Array, found: jax.Array) -> jax.Array:
  """The cotangent of a tile from that of its statistic, both spread over the tile."""
  if kind == "sum":
    return jnp.broadcast_to(ct, v.shape)
  if kind == "max":
    return jnp.zeros_like(v)
  return ct * jnp.exp(v - finite(found))
