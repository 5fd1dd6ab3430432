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
from bigalign.losses import statistics
from bigalign.losses.statistics import Stat

Arrays = dict[str, jax.Array]
Tile = Callable[[Arrays, Arrays, dict[str, Any]], Arrays]
Sums = tuple[Arrays, Arrays, jax.Array]  # gradients of rows and of what is shared, and the value


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the columns come to the rows.

  axes: mesh axes that split rows and columns; none outside of a mesh.
  ring: block by block from the neighbour; else gathered in `segments` parts.
  chunk: columns of one tile.
  dtype: of the features on the wires.
  rows, columns: N and M, before padding to the devices.
  """

  axes: tuple[str, ...]
  ring: bool
  segments: int
  chunk: int
  dtype: str
  rows: int
  columns: int


@dataclasses.dataclass(frozen=True)
class What:
  """A tile, its reductions as (name, kind) pairs (none: the sum of all), rows and columns that have
  no gradient, and the plan."""

  tile: Tile
  outputs: tuple[tuple[str, str], ...]
  fixed: frozenset[str]
  plan: Plan


# --- one block of columns against the device's rows -----------------------------------------------


def _masked(values: Arrays, row: Arrays, col: Arrays, fills: dict[str, float]) -> Arrays:
  """Padding has the place -1 and takes no part."""
  real = (row["at"] >= 0)[:, None] & (col["at"] >= 0)[None, :]
  return {name: jnp.where(real, v, fills[name]) for name, v in values.items()}


def _in_tiles(
  plan: Plan, block: Any, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any
) -> tuple[Any, Any]:
  """Scans `step` over a block's columns, at most `chunk` at a time; what it returns besides is
  joined."""
  g = jax.tree.leaves(block)[0].shape[0]
  least = -(-g // plan.chunk)
  if least == 1:
    return step(carry, block)
  # Equal tiles if up to twice as many make them so, else a padded last one.
  k = next((k for k in range(least, 2 * least) if g % k == 0), least)
  width = -(-g // k)
  if k * width > g:
    block = {part: _pad(x, k * width) for part, x in block.items()}
  tiles = jax.tree.map(lambda x: rearrange(x, "(k c) ... -> k c ...", k=k), block)
  carry, found = jax.lax.scan(step, carry, tiles)
  return carry, jax.tree.map(lambda x: rearrange(x, "k c ... -> (k c) ...")[:g], found)


def _pad(columns: Arrays, size: int) -> Arrays:
  """Columns repeated up to `size`, with the place -1: a copy is a safe thing to compute with."""

  def pad(name: str, x: jax.Array) -> jax.Array:
    ends = [(0, size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, ends, constant_values=-1) if name == "at" else jnp.pad(x, ends, mode="edge")

  return {name: pad(name, x) for name, x in columns.items()}


def _wide(arrays: Arrays) -> Arrays:
  """Features off the wire, in float32 again."""
  return {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in arrays.items()}


def _forward_block(
  what: What, rows: Arrays, shared: Arrays, block: dict[str, Arrays], stats: dict[str, Stat]
) -> tuple[dict[str, Stat], dict[str, Stat]]:
  """Joins a block into the rows' statistics, and the statistics of its columns over these rows."""
  kinds = {name: kind.split("_") for name, kind in what.outputs}
  fills = {name: 0.0 if kind == "sum" else -np.inf for name, (_, kind) in kinds.items()}

  def step(stats: dict[str, Stat], tiles: dict[str, Arrays]) -> tuple[Any, Any]:
    col = _wide(tiles["columns"])
    values = _masked(what.tile(rows, col, shared), rows, col, fills)
    new, own = {}, {}
    for name, (side, kind) in kinds.items():
      if side == "row":
        new[name] = statistics.join(kind, stats[name], statistics.of(kind, values[name], 1))
      else:
        own[name] = statistics.of(kind, values[name], 0)
    return new, own

  return _in_tiles(what.plan, block, step, stats)


def _backward_block(
  what: What, rows: Arrays, shared: Arrays, row: dict[str, Arrays], block: dict[str, Arrays],
  sums: Sums,
) -> tuple[Sums, Arrays]:
  """Adds a block's part to (d rows, d shared, value) and returns d columns.

  row: "ct" and "found", cotangents and values of the rows' statistics; block: the same for its
  columns, and "columns".
  """
  kinds = {name: kind.split("_") for name, kind in what.outputs}

  def cotangent(name: str, v: jax.Array, col: dict[str, Arrays]) -> jax.Array:
    if not kinds:
      return jnp.ones_like(v)
    side, kind = kinds[name]
    of, axis = (row, 1) if side == "row" else (col, 0)
    ct, found = (jnp.expand_dims(of[part][name], axis) for part in ("ct", "found"))
    return statistics.pull(kind, v, ct, found)

  def step(sums: Sums, tiles: dict[str, Arrays]) -> tuple[Sums, Arrays]:
    d_rows, d_shared, value = sums
    col = _wide(tiles["columns"])
    (row_in, row_rest), (col_in, col_rest) = _split(rows, what.fixed), _split(col, what.fixed)
    shared_in, shared_rest = _split(shared)
    values, pull = jax.vjp(
      lambda r, c, s: what.tile(r | row_rest, c | col_rest, s | shared_rest),
      row_in, col_in, shared_in,
    )
    none = dict.fromkeys(values, 0.0)
    cts = {name: cotangent(name, v, tiles) for name, v in values.items()}
    more_rows, d_col, more_shared = pull(_masked(cts, rows, col, none))
    if not kinds:
      value += sum(v.sum() for v in _masked(values, rows, col, none).values())
    return (_add(d_rows, more_rows), _add(d_shared, more_shared), value), d_col

  return _in_tiles(what.plan, block, step, sums)


def _split(
  arrays: Arrays, fixed: frozenset[str] = frozenset()
) -> tuple[Arrays, Arrays]:
  """Those that have a gradient, and the others."""
  real = {
    k: x for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact) and k not in fixed
  }
  return real, {k: x for k, x in arrays.items() if k not in real}


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


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
  return own, _scatter(plan, a[1] * jnp.exp(a[0] - statistics.finite(top)))


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
  return {**arrays, "at": jnp.where(at < limit, at, -1)}


def _wired(plan: Plan, columns: Arrays) -> Arrays:
  """Features in the dtype of the wires."""
  return {
    k: x.astype(plan.dtype) if x.ndim > 1 and x.dtype == jnp.float32 else x
    for k, x in columns.items()
  }


def _segments(plan: Plan, own: dict[str, Arrays]) -> Any:
  """A device's own columns [m, ...] as [segments, m / segments, ...], padded."""
  m = own["columns"]["at"].shape[0]
  size = -(-m // plan.segments) * plan.segments
  if size > m:
    own = {part: _pad(x, size) for part, x in own.items()}
  return jax.tree.map(lambda x: rearrange(x, "(s k) ... -> s k ...", s=plan.segments), own)


def _visits(plan: Plan, own: dict[str, Arrays], visit: Callable[[Any, Any], tuple[Any, Any]],
            carry: Any, travelling: Any, home: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
  """Brings every block of columns to these rows once; returns the carry and what the devices found
  for this device's own columns.

  own: this device's columns and what belongs to them, [m, ...].
  visit: (carry, block) -> (carry, found), with `found` [g, ...] for the block's columns.
  travelling: for the ring, what a block carries before its first visit.
  home: for the ring, (carried, found) -> carried; else (None, found) -> this device's own part.
  """
  m = own["columns"]["at"].shape[0]
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
  rows = _placed(plan, _wide(_wired(plan, rows)), plan.rows)
  own = {"columns": _placed(plan, _wired(plan, columns), plan.columns)}
  dtype = jnp.result_type(*(x for x in _split(rows)[0].values()))
  n, m = (x["at"].shape[0] for x in (rows, own["columns"]))

  def home(carried: Any, found: dict[str, Stat]) -> dict[str, Stat]:
    if carried is None:
      return {k: _own_column_stats(plan, kinds[k][1], x) for k, x in found.items()}
    return {k: statistics.join(kinds[k][1], carried[k], x) for k, x in found.items()}

  found, col = _visits(
    plan, own, lambda stats, block: _forward_block(what, rows, shared, block, stats),
    {k: statistics.empty(kind, n, dtype) for k, (side, kind) in kinds.items() if side == "row"},
    {k: statistics.empty(kind, m, dtype) for k, (side, kind) in kinds.items() if side == "col"},
    home,
  )
  return {k: statistics.done(kinds[k][1], x) for k, x in {**found, **col}.items()}


def _local_backward(
  what: What, rows: Arrays, columns: Arrays, shared: Arrays, cts: Arrays, found: Arrays
) -> tuple[Arrays, Arrays, Arrays, jax.Array]:
  """d rows, d columns, d shared, and the sum of all entries if there are no outputs."""
  plan = what.plan
  rows = _placed(plan, _wide(_wired(plan, rows)), plan.rows)
  own_columns = _placed(plan, _wired(plan, columns), plan.columns)

  def side(name: str) -> dict[str, Arrays]:
    named = [k for k, kind in what.outputs if kind.startswith(name)]
    return {"ct": {k: cts[k] for k in named}, "found": {k: found[k] for k in named}}

  def home(carried: Any, d_block: Arrays) -> Arrays:
    return jax.tree.map(lambda x: _scatter(plan, x), d_block) if carried is None \
      else _add(carried, d_block)

  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
  row_in = _split(rows, what.fixed)[0]
  value = jnp.zeros((), jnp.result_type(*row_in.values()))
  (d_rows, d_shared, value), d_columns = _visits(
    plan, {"columns": own_columns, **side("col")},
    lambda sums, block: _backward_block(what, rows, shared, side("row"), block, sums),
    (zeros(row_in), zeros(_split(shared)[0]), value), zeros(_split(columns, what.fixed)[0]), home,
  )
  if plan.axes:
    d_shared, value = jax.lax.psum((d_shared, value), plan.axes)
  return d_rows, d_columns, d_shared, value


# --- global view ----------------------------------------------------------------------------------


def _everywhere(
  plan: Plan, function: Callable[..., Any], specs: Any, out: Any
) -> Callable[..., Any]:
  """`function` on each device's part; the function itself outside of a mesh."""
  if not plan.axes:
    return function
  return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)


def _fit(plan: Plan, arrays: Arrays) -> Arrays:
  """Padded so that every device has as many."""
  n = next(iter(arrays.values())).shape[0]
  parts = int(np.prod([jax.sharding.get_abstract_mesh().shape[a] for a in plan.axes], dtype=int))
  size = -(-n // parts) * parts
  return _pad(arrays, size) if size > n else arrays


def _cut(arrays: Arrays, like: Arrays) -> Arrays:
  n = next(iter(like.values())).shape[0]
  return {k: x[:n] for k, x in arrays.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reduce(what: What, rows: Arrays, columns: Arrays, shared: Arrays) -> Arrays:
  """See pairwise.reduce."""
  split = P(what.plan.axes)
  found = _everywhere(
    what.plan, functools.partial(_local_forward, what), (split, split, P()), split
  )(_fit(what.plan, rows), _fit(what.plan, columns), shared)
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
  plan, split = what.plan, P(what.plan.axes)
  d_rows, d_columns, d_shared, value = _everywhere(
    plan, functools.partial(_local_backward, what), (split, split, P(), split, split),
    (split, split, P(), P()),
  )(_fit(plan, rows), _fit(plan, columns), shared, *(_fit_each(plan, x) for x in (cts, found)))
  return (
    _all_of(rows, _cut(d_rows, rows)), _all_of(columns, _cut(d_columns, columns)),
    _all_of(shared, d_shared), value,
  )


def _fit_each(plan: Plan, arrays: Arrays) -> Arrays:
  return {k: _fit(plan, {k: x})[k] for k, x in arrays.items()}


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
  each = dataclasses.replace(what, outputs=(("row", "row_sum"),))

  def tile(row: Arrays, col: Arrays, shared: Arrays) -> Arrays:
    values = list(what.tile(row, col, shared).values())
    return {"row": functools.reduce(jnp.add, values)}

  each = dataclasses.replace(each, tile=tile)
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


# --- one matrix -----------------------------------------------------------------------------------


def dense(
  tile: Tile, outputs: dict[str, str], rows: Arrays, columns: Arrays, shared: Arrays
) -> Arrays:
  """The whole matrix, in the compiler's hands."""
  values = _dense_tile(tile, rows, columns, shared)
  found = {}
  for name, kind in outputs.items():
    side, what = kind.split("_")
    stat = statistics.of(what, values[name], 1 if side == "row" else 0)
    found[name] = statistics.done(what, stat)
  return found


def dense_total(tile: Tile, rows: Arrays, columns: Arrays, shared: Arrays) -> jax.Array:
  """The sum of the whole matrix."""
  return functools.reduce(
    jnp.add, (v.sum() for v in _dense_tile(tile, rows, columns, shared).values())
  )


def _dense_tile(tile: Tile, rows: Arrays, columns: Arrays, shared: Arrays) -> Arrays:
  def placed(x: Arrays) -> Arrays:
    n = next(iter(x.values())).shape[0]
    return {**x, "at": jnp.arange(n, dtype=jnp.int32)}

  # Pinned rows make it one-sided: columns are gathered, rows stay.
  values = tile(placed(rows), placed(columns), shared)
  return {name: sharding.pin(v) for name, v in values.items()}
