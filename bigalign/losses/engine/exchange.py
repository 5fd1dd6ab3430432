"""Columns that come by: the engine under `pairwise`, forward and backward, on one device or many.

Inside of a mesh every function here that begins with `_local` runs once per device (shard_map), on
that device's rows and columns. A device's own columns are [m], a block that has come to it is [g].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec as P

from bigalign import sharding
from bigalign.losses.engine import reductions, tiles
from bigalign.losses.engine.reductions import Stat
from bigalign.losses.engine.tiles import Arrays, Plan, What

# --- over the mesh --------------------------------------------------------------------------------


def _gather(plan: Plan, x: Any) -> Any:
  return jax.lax.all_gather(x, plan.axes, tiled=True) if plan.axes else x


# An axis of this many devices is summed over in two stages.
STAGED = 64


def _scatter(plan: Plan, x: Any) -> Any:
  """Sums [g, ...] over the devices and leaves each with its own part.

  One axis after the other, and a long one in two stages: TPUs turn a reduce-scatter over more than
  one direction of their torus into an all-reduce of the whole.
  """
  for axis in plan.axes:
    n = jax.lax.axis_size(axis)
    inner = max(k for k in range(1, math.isqrt(n) + 1) if n % k == 0) if n >= STAGED else 1
    if inner > 1:
      places = np.arange(n).reshape(-1, inner)
      x = jax.lax.psum_scatter(x, axis, axis_index_groups=places.T.tolist(), tiled=True)
      x = jax.lax.psum_scatter(x, axis, axis_index_groups=places.tolist(), tiled=True)
    elif n > 1:
      x = jax.lax.psum_scatter(x, axis, tiled=True)
  return x


def _own_column_stats(plan: Plan, kind: str, a: Stat) -> Stat:
  """A gathered block's statistics over this device's rows -> its own columns' over all rows."""
  if not plan.axes:
    return a
  if kind == "sum":
    return (_scatter(plan, a[0]),)
  top = jax.lax.pmax(a[0], plan.axes)
  n = top.shape[0] // jax.lax.axis_size(plan.axes)
  own = jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index(plan.axes) * n, n)
  if kind == "max":
    return (own,)
  return own, _scatter(plan, a[1] * jnp.exp(a[0] - reductions.finite(top)))


def _next(plan: Plan, x: Any) -> Any:
  """What the neighbour holds."""
  if not plan.axes:
    return x
  n = jax.lax.axis_size(plan.axes)
  return jax.lax.ppermute(x, plan.axes, [((i + 1) % n, i) for i in range(n)])


def _placed(plan: Plan, arrays: Arrays, limit: int) -> Arrays:
  """A device's arrays [n, ...] with their places in the batch, -1 for padding."""
  n = next(iter(arrays.values())).shape[0]
  at = jnp.arange(n, dtype=jnp.int32)
  if plan.axes:
    at += jax.lax.axis_index(plan.axes) * n
  return {**arrays, "batch_index": jnp.where(at < limit, at, -1)}


def _wired(plan: Plan, columns: Arrays) -> Arrays:
  """Features in the dtype of the wires."""
  return {
    k: x.astype(plan.dtype) if x.ndim > 1 and x.dtype == jnp.float32 else x
    for k, x in columns.items()
  }


def _segments(plan: Plan, own: dict[str, Arrays]) -> Any:
  """A device's own columns [m, ...] as [segments, m / segments, ...], padded."""
  m = own["columns"]["batch_index"].shape[0]
  size = -(-m // plan.segments) * plan.segments
  if size > m:
    own = {part: tiles.padded(x, size) for part, x in own.items()}
  return jax.tree.map(lambda x: rearrange(x, "(s k) ... -> s k ...", s=plan.segments), own)


def _visits(
  plan: Plan,
  own: dict[str, Arrays],
  visit: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  travelling: Any,
  home: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
  """Brings every block of columns to these rows once; returns the carry and what the devices found
  for this device's own columns.

  own: this device's columns and what belongs to them, [m, ...].
  visit: (carry, block) -> (carry, found), with `found` [g, ...] for the block's columns.
  travelling: for the ring, what a block carries before its first visit.
  home: for the ring, (carried, found) -> carried; else (None, found) -> this device's own part.
  """
  m = own["columns"]["batch_index"].shape[0]
  if plan.ring:

    def hop(state: Any, _: None) -> Any:
      carry, block, carried = state
      after = _next(plan, block)
      carry, found = visit(carry, block)
      return (carry, after, _next(plan, home(carried, found))), None

    hops = jax.lax.axis_size(plan.axes) if plan.axes else 1
    (carry, _, carried), _ = jax.lax.scan(hop, (carry, own, travelling), length=hops)
    return carry, carried

  def segment(carry: Any, part: Any) -> Any:
    carry, found = visit(carry, _gather(plan, part))
    return carry, home(None, found)

  if plan.segments == 1:
    return segment(carry, own)
  carry, found = jax.lax.scan(segment, carry, _segments(plan, own))
  return carry, jax.tree.map(lambda x: rearrange(x, "s k ... -> (s k) ...")[:m], found)


def _local_forward(what: What, rows: Arrays, columns: Arrays, shared: Arrays) -> Arrays:
  plan, kinds = what.plan, {name: kind.split("_") for name, kind in what.outputs}
  rows = _placed(plan, tiles.wide(_wired(plan, rows)), plan.rows)
  own = {"columns": _placed(plan, _wired(plan, columns), plan.columns)}
  dtype = jnp.result_type(jnp.float32, *tiles.split(rows)[0].values())
  n, m = (x["batch_index"].shape[0] for x in (rows, own["columns"]))

  def home(carried: Any, found: dict[str, Stat]) -> dict[str, Stat]:
    if carried is None:
      return {k: _own_column_stats(plan, kinds[k][1], x) for k, x in found.items()}
    return {k: reductions.join(kinds[k][1], carried[k], x) for k, x in found.items()}

  found, col = _visits(
    plan,
    own,
    lambda stats, block: tiles.forward(what, rows, shared, block, stats),
    {k: reductions.empty(kind, n, dtype) for k, (side, kind) in kinds.items() if side == "row"},
    {k: reductions.empty(kind, m, dtype) for k, (side, kind) in kinds.items() if side == "col"},
    home,
  )
  return {k: reductions.done(kinds[k][1], x) for k, x in {**found, **col}.items()}


def _local_backward(
  what: What, rows: Arrays, columns: Arrays, shared: Arrays, cts: Arrays, found: Arrays
) -> tuple[Arrays, Arrays, Arrays, jax.Array]:
  """d rows, d columns, d shared, and the sum of all entries if there are no outputs."""
  plan = what.plan
  rows = _placed(plan, tiles.wide(_wired(plan, rows)), plan.rows)
  own_columns = _placed(plan, _wired(plan, columns), plan.columns)

  def side(name: str) -> dict[str, Arrays]:
    named = [k for k, kind in what.outputs if kind.startswith(name)]
    return {"ct": {k: cts[k] for k in named}, "found": {k: found[k] for k in named}}

  def home(carried: Any, d_block: Arrays) -> Arrays:
    return (
      jax.tree.map(lambda x: _scatter(plan, x), d_block)
      if carried is None
      else tiles.add(carried, d_block)
    )

  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
  row_in = tiles.split(rows, what.fixed)[0]
  value = jnp.zeros((), jnp.result_type(jnp.float32, *row_in.values()))
  (d_rows, d_shared, value), d_columns = _visits(
    plan,
    {"columns": own_columns, **side("col")},
    lambda sums, block: tiles.backward(what, rows, shared, side("row"), block, sums),
    (zeros(row_in), zeros(tiles.split(shared)[0]), value),
    zeros(tiles.split(columns, what.fixed)[0]),
    home,
  )
  if plan.axes:
    d_shared, value = jax.lax.psum((d_shared, value), plan.axes)
  return d_rows, d_columns, d_shared, value


# --- global view ----------------------------------------------------------------------------------


def _fit(arrays: Arrays) -> Arrays:
  """Padded so that every device has as many."""
  n = next(iter(arrays.values())).shape[0]
  _, parts = sharding.devices()
  size = -(-n // parts) * parts
  return tiles.padded(arrays, size) if size > n else arrays


def _cut(arrays: Arrays, like: Arrays) -> Arrays:
  n = next(iter(like.values())).shape[0]
  return {k: x[:n] for k, x in arrays.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reduce(what: What, rows: Arrays, columns: Arrays, shared: Arrays) -> Arrays:
  """See pairwise.reduce."""
  split = P(what.plan.axes)
  found = sharding.on_each_device(
    functools.partial(_local_forward, what), (split, split, P()), split
  )(_fit(rows), _fit(columns), shared)
  return {
    k: found[k][: what.plan.rows if kind.startswith("row") else what.plan.columns]
    for k, kind in what.outputs
  }


def _reduce_forward(what: What, rows: Arrays, columns: Arrays, shared: Arrays) -> Any:
  found = reduce(what, rows, columns, shared)
  return found, (rows, columns, shared, found)


def _reduce_backward(what: What, saved: Any, cts: Arrays) -> Any:
  rows, columns, shared, found = saved
  d_rows, d_columns, d_shared, _ = _gradients(what, rows, columns, shared, cts, found)
  return d_rows, d_columns, d_shared


def _gradients(
  what: What, rows: Arrays, columns: Arrays, shared: Arrays, cts: Arrays, found: Arrays
) -> tuple[Arrays, Arrays, Arrays, jax.Array]:
  split = P(what.plan.axes)
  d_rows, d_columns, d_shared, value = sharding.on_each_device(
    functools.partial(_local_backward, what),
    (split, split, P(), split, split),
    (split, split, P(), P()),
  )(_fit(rows), _fit(columns), shared, *(_fit_each(x) for x in (cts, found)))
  return (
    _all_of(rows, _cut(d_rows, rows)),
    _all_of(columns, _cut(d_columns, columns)),
    _all_of(shared, d_shared),
    value,
  )


def _fit_each(arrays: Arrays) -> Arrays:
  return {k: _fit({k: x})[k] for k, x in arrays.items()}


def _all_of(arrays: Arrays, gradients: Arrays) -> dict[str, Any]:
  """Gradients of all: zeros for what is fixed, JAX's own kind of zero for integers."""

  def zeros(x: jax.Array) -> Any:
    real = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if real else np.zeros(x.shape, jax.dtypes.float0)

  return {k: gradients[k] if k in gradients else zeros(x) for k, x in arrays.items()}


reduce.defvjp(_reduce_forward, _reduce_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total(what: What, rows: Arrays, columns: Arrays, shared: Arrays) -> jax.Array:
  """See pairwise.total."""

  def tile(row: Arrays, col: Arrays, shared: Arrays) -> Arrays:
    values = list(what.tile(row, col, shared).values())
    return {"row": functools.reduce(jnp.add, values)}

  each = dataclasses.replace(what, tile=tile, outputs=(("row", "row_sum"),))
  return reduce(each, rows, columns, shared)["row"].sum()


def _total_forward(what: What, rows: Arrays, columns: Arrays, shared: Arrays) -> Any:
  d_rows, d_columns, d_shared, value = _gradients(what, rows, columns, shared, {}, {})
  return value, (d_rows, d_columns, d_shared)


def _total_backward(what: What, saved: Any, ct: jax.Array) -> Any:
  del what

  def scaled(x: Any) -> Any:
    return x if x.dtype == jax.dtypes.float0 else x * ct

  return jax.tree.map(scaled, saved)


total.defvjp(_total_forward, _total_backward)
