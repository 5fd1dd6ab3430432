"""Distributes a TiledReduction over the mesh: streams the columns past each device's rows.

Functions that begin with `_local` run once per device (shard_map), on that device's rows and
columns. A device's own columns are [m]; a block of columns that it receives is [g].
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
from bigalign.losses.engine.reductions import Partial
from bigalign.losses.engine.tiles import Arrays, Plan, TiledReduction

# --- communication --------------------------------------------------------------------------------


def _gather(plan: Plan, x: Any) -> Any:
  return jax.lax.all_gather(x, plan.axes, tiled=True) if plan.axes else x


# A mesh axis of at least this many devices is reduce-scattered in two steps.
TWO_STEPS_FROM = 64


def _scatter(plan: Plan, x: Any) -> Any:
  """Sums [g, ...] over the devices and leaves each device with its own part (a reduce-scatter).

  One axis after the other, and a long axis in two steps, whose inner groups have the largest
  divisor of its length up to the square root: TPUs turn a reduce-scatter over more than one
  direction of their torus into an all-reduce of the whole array.
  """
  for axis in plan.axes:
    n = jax.lax.axis_size(axis)
    inner = max(k for k in range(1, math.isqrt(n) + 1) if n % k == 0) if n >= TWO_STEPS_FROM else 1
    if inner > 1:
      groups = np.arange(n).reshape(-1, inner)
      x = jax.lax.psum_scatter(x, axis, axis_index_groups=groups.T.tolist(), tiled=True)
      x = jax.lax.psum_scatter(x, axis, axis_index_groups=groups.tolist(), tiled=True)
    elif n > 1:
      x = jax.lax.psum_scatter(x, axis, tiled=True)
  return x


def _scatter_reduction(plan: Plan, kind: str, a: Partial) -> Partial:
  """A gathered block's reductions over this device's rows -> its own columns' over all rows."""
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


def _from_neighbour(plan: Plan, x: Any) -> Any:
  """The arrays of the next device in the ring."""
  if not plan.axes:
    return x
  n = jax.lax.axis_size(plan.axes)
  return jax.lax.ppermute(x, plan.axes, [((i + 1) % n, i) for i in range(n)])


def _indexed(plan: Plan, arrays: Arrays, limit: int) -> Arrays:
  """A device's arrays [n, ...] with their batch_index [n]: -1 for padding, from `limit` on."""
  n = next(iter(arrays.values())).shape[0]
  index = jnp.arange(n, dtype=jnp.int32)
  if plan.axes:
    index += jax.lax.axis_index(plan.axes) * n
  return {**arrays, "batch_index": jnp.where(index < limit, index, -1)}


def _narrowed(plan: Plan, arrays: Arrays) -> Arrays:
  """Features in the dtype in which they are communicated."""
  return {k: x.astype(tiles.communicated_dtype(x, plan.dtype)) for k, x in arrays.items()}


def _segments(plan: Plan, local: dict[str, Arrays]) -> Any:
  """A device's own columns [m, ...] as [segments, m / segments, ...], padded."""
  m = local["columns"]["batch_index"].shape[0]
  size = -(-m // plan.segments) * plan.segments
  if size > m:
    local = {part: tiles.padded(x, size) for part, x in local.items()}
  return jax.tree.map(lambda x: rearrange(x, "(s k) ... -> s k ...", s=plan.segments), local)


def _stream_columns(
  plan: Plan,
  local: dict[str, Arrays],
  process: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  initial: Any,
  merge: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
  """Processes every block of columns once with this device's rows.

  Args:
    plan: how the columns are distributed.
    local: this device's own columns and their outputs, {"columns": {name: [m, ...]}, ...}.
    process: (carry, block) -> (carry, result), with `result` [g, ...] for the block's columns.
    carry: before the first block.
    initial: for the ring, the accumulated result of a block that no device has processed.
    merge: for the ring, (accumulated, result) -> accumulated; else (None, result) -> the sum over
      the devices, of this device's own columns.

  Returns:
    The last carry, and the results of all devices for this device's own columns.
  """
  m = local["columns"]["batch_index"].shape[0]
  if plan.ring:

    def hop(state: Any, _: None) -> Any:
      carry, block, accumulated = state
      incoming = _from_neighbour(plan, block)
      carry, result = process(carry, block)
      return (carry, incoming, _from_neighbour(plan, merge(accumulated, result))), None

    hops = jax.lax.axis_size(plan.axes) if plan.axes else 1
    (carry, _, accumulated), _ = jax.lax.scan(hop, (carry, local, initial), length=hops)
    return carry, accumulated

  def segment(carry: Any, part: Any) -> tuple[Any, Any]:
    carry, result = process(carry, _gather(plan, part))
    return carry, merge(None, result)

  if plan.segments == 1:
    return segment(carry, local)
  carry, results = jax.lax.scan(segment, carry, _segments(plan, local))
  return carry, jax.tree.map(lambda x: rearrange(x, "s k ... -> (s k) ...")[:m], results)


def _local_forward(
  reduction: TiledReduction, rows: Arrays, columns: Arrays, shared: Arrays
) -> Arrays:
  """{name: [n] or [m]}: the outputs of this device's own rows and columns."""
  plan, kinds = reduction.plan, {name: kind.split("_") for name, kind in reduction.outputs}
  rows = _indexed(plan, tiles.widened(_narrowed(plan, rows)), plan.rows)
  local = {"columns": _indexed(plan, _narrowed(plan, columns), plan.columns)}
  dtype = jnp.result_type(jnp.float32, *tiles.split(rows)[0].values())
  n, m = (x["batch_index"].shape[0] for x in (rows, local["columns"]))

  def merge(accumulated: Any, result: dict[str, Partial]) -> dict[str, Partial]:
    if accumulated is None:
      return {k: _scatter_reduction(plan, kinds[k][1], x) for k, x in result.items()}
    return {k: reductions.combine(kinds[k][1], accumulated[k], x) for k, x in result.items()}

  of_rows, of_columns = _stream_columns(
    plan,
    local,
    lambda partials, block: tiles.forward(reduction, rows, shared, block, partials),
    {k: reductions.empty(kind, n, dtype) for k, (side, kind) in kinds.items() if side == "row"},
    {k: reductions.empty(kind, m, dtype) for k, (side, kind) in kinds.items() if side == "col"},
    merge,
  )
  return {k: reductions.result(kinds[k][1], x) for k, x in {**of_rows, **of_columns}.items()}


def _local_backward(
  reduction: TiledReduction,
  rows: Arrays,
  columns: Arrays,
  shared: Arrays,
  cts: Arrays,
  values: Arrays,
) -> tuple[Arrays, Arrays, Arrays, jax.Array]:
  """d rows, d columns, d shared, and the sum of all entries if there are no outputs."""
  plan = reduction.plan
  rows = _indexed(plan, tiles.widened(_narrowed(plan, rows)), plan.rows)
  local_columns = _indexed(plan, _narrowed(plan, columns), plan.columns)

  def outputs_of(side: str) -> dict[str, Arrays]:
    names = [k for k, kind in reduction.outputs if kind.startswith(side)]
    return {"cotangents": {k: cts[k] for k in names}, "values": {k: values[k] for k in names}}

  def merge(accumulated: Any, d_block: Arrays) -> Arrays:
    if accumulated is None:
      return {name: _scatter(plan, x) for name, x in d_block.items()}
    return {name: accumulated[name] + x for name, x in d_block.items()}

  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
  row_in = tiles.split(rows, reduction.fixed)[0]
  value = jnp.zeros((), jnp.result_type(jnp.float32, *row_in.values()))
  (d_rows, d_shared, value), d_columns = _stream_columns(
    plan,
    {"columns": local_columns, **outputs_of("col")},
    lambda sums, block: tiles.backward(reduction, rows, shared, outputs_of("row"), block, sums),
    (zeros(row_in), zeros(tiles.split(shared)[0]), value),
    zeros(tiles.split(tiles.widened(columns), reduction.fixed)[0]),
    merge,
  )
  if plan.axes:
    d_shared, value = jax.lax.psum((d_shared, value), plan.axes)
  return d_rows, d_columns, d_shared, value


def _local_replaced(plan: Plan, queue: Arrays, new: Arrays, start: jax.Array) -> Arrays:
  """This device's part of a ring buffer, with the new elements that belong there."""
  n = next(iter(queue.values())).shape[0]
  first = jax.lax.axis_index(plan.axes) * n if plan.axes else 0

  def write(queue: Arrays, block: Any) -> tuple[Arrays, Arrays]:
    position = block["columns"]["batch_index"]
    place = (start + position) % plan.rows - first
    here = (position >= 0) & (place >= 0) & (place < n)
    # Elements of other devices get distinct numbers past the end: indices must be unique.
    place = jnp.where(here, place, n + jnp.arange(place.shape[0]))
    written = {
      name: x.at[place].set(
        block["columns"][name].astype(x.dtype), mode="drop", unique_indices=True
      )
      for name, x in queue.items()
    }
    return written, {}

  columns = {"columns": _indexed(plan, new, plan.columns)}
  written: Arrays = _stream_columns(plan, columns, write, queue, {}, lambda before, after: {})[0]
  return written


# --- global arrays --------------------------------------------------------------------------------


def _padded(arrays: Arrays) -> Arrays:
  """Arrays padded so that they divide over the devices."""
  n = next(iter(arrays.values())).shape[0]
  _, parts = sharding.devices()
  size = -(-n // parts) * parts
  return tiles.padded(arrays, size) if size > n else arrays


def _padded_each(arrays: Arrays) -> Arrays:
  return {k: _padded({k: x})[k] for k, x in arrays.items()}


def _cut(arrays: Arrays, like: Arrays) -> Arrays:
  """Arrays cut to the length of `like`."""
  n = next(iter(like.values())).shape[0]
  return {k: x[:n] for k, x in arrays.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reduce(reduction: TiledReduction, rows: Arrays, columns: Arrays, shared: Arrays) -> Arrays:
  """{name: [N] or [M]}: the outputs of a reduction; see Engine.reduce."""
  split = P(reduction.plan.axes)
  outputs = sharding.on_each_device(
    functools.partial(_local_forward, reduction), (split, split, P()), split
  )(_padded(rows), _padded(columns), shared)
  return {
    k: outputs[k][: reduction.plan.rows if kind.startswith("row") else reduction.plan.columns]
    for k, kind in reduction.outputs
  }


def replaced(plan: Plan, queue: Arrays, new: Arrays, start: jax.Array) -> Arrays:
  """{name: [K, ...]}: a ring buffer with new elements; see Engine.replaced."""
  split = P(plan.axes)
  parts = sharding.on_each_device(
    functools.partial(_local_replaced, plan), (split, split, P()), split
  )(_padded(queue), _padded(new), start)
  return _cut(parts, queue)


def _reduce_forward(
  reduction: TiledReduction, rows: Arrays, columns: Arrays, shared: Arrays
) -> Any:
  outputs = reduce(reduction, rows, columns, shared)
  return outputs, (rows, columns, shared, outputs)


def _reduce_backward(reduction: TiledReduction, saved: Any, cts: Arrays) -> Any:
  rows, columns, shared, outputs = saved
  d_rows, d_columns, d_shared, _ = _gradients(reduction, rows, columns, shared, cts, outputs)
  return d_rows, d_columns, d_shared


def _gradients(
  reduction: TiledReduction,
  rows: Arrays,
  columns: Arrays,
  shared: Arrays,
  cts: Arrays,
  values: Arrays,
) -> tuple[Arrays, Arrays, Arrays, jax.Array]:
  """d rows, d columns, d shared, and the sum of all entries if there are no outputs."""
  split = P(reduction.plan.axes)
  d_rows, d_columns, d_shared, value = sharding.on_each_device(
    functools.partial(_local_backward, reduction),
    (split, split, P(), split, split),
    (split, split, P(), P()),
  )(_padded(rows), _padded(columns), shared, *(_padded_each(x) for x in (cts, values)))
  return (
    _with_zeros(rows, _cut(d_rows, rows)),
    _with_zeros(columns, _cut(d_columns, columns)),
    _with_zeros(shared, d_shared),
    value,
  )


def _with_zeros(arrays: Arrays, gradients: Arrays) -> dict[str, Any]:
  """Gradients of all arrays, in their dtypes: zeros if fixed, JAX's float0 zeros for integers."""

  def zeros(x: jax.Array) -> Any:
    real = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if real else np.zeros(x.shape, jax.dtypes.float0)

  return {
    k: gradients[k].astype(x.dtype) if k in gradients else zeros(x) for k, x in arrays.items()
  }


reduce.defvjp(_reduce_forward, _reduce_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total(reduction: TiledReduction, rows: Arrays, columns: Arrays, shared: Arrays) -> jax.Array:
  """[]: the sum of all entries; see Engine.total."""

  def tile(row: Arrays, col: Arrays, shared: Arrays) -> Arrays:
    values = list(reduction.tile(row, col, shared).values())
    return {"row": functools.reduce(jnp.add, values)}

  by_row = dataclasses.replace(reduction, tile=tile, outputs=(("row", "row_sum"),))
  return reduce(by_row, rows, columns, shared)["row"].sum()


def _total_forward(reduction: TiledReduction, rows: Arrays, columns: Arrays, shared: Arrays) -> Any:
  d_rows, d_columns, d_shared, value = _gradients(reduction, rows, columns, shared, {}, {})
  return value, (d_rows, d_columns, d_shared)


def _total_backward(reduction: TiledReduction, saved: Any, ct: jax.Array) -> Any:
  del reduction

  def scaled(x: Any) -> Any:
    return x if x.dtype == jax.dtypes.float0 else x * ct

  return jax.tree.map(scaled, saved)


total.defvjp(_total_forward, _total_backward)
