"""Computes a block of columns against a device's rows, tile by tile: reductions and gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from bigalign import sharding
from bigalign.losses.engine import reductions
from bigalign.losses.engine.reductions import Partial

Arrays = dict[str, jax.Array]
Tile = Callable[[Arrays, Arrays, dict[str, Any]], Arrays]
Sums = tuple[Arrays, Arrays, jax.Array]  # gradients of rows and shared arrays, and the value


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the columns are distributed and streamed past the rows.

  Args:
    axes: mesh axes that shard rows and columns; () outside of a mesh.
    ring: whether blocks of columns are passed from device to device; else they are all-gathered.
    segments: number of parts in which columns are all-gathered.
    chunk: largest number of columns of a tile.
    dtype: of communicated features.
    rows: N, before padding to a multiple of the devices.
    columns: M, likewise.
  """

  axes: tuple[str, ...]
  ring: bool
  segments: int
  chunk: int
  dtype: str
  rows: int
  columns: int


@dataclasses.dataclass(frozen=True)
class TiledReduction:
  """Which tile function to evaluate, how to reduce it, and how its columns are distributed.

  Args:
    tile: (row, col, shared) -> {name: [n, m]}.
    outputs: (name, kind) pairs; (): the sum of all entries.
    fixed: names of row and column arrays that get no gradient.
    plan: how the columns are distributed.
  """

  tile: Tile
  outputs: tuple[tuple[str, str], ...]
  fixed: frozenset[str]
  plan: Plan


def _masked(values: Arrays, row: Arrays, col: Arrays, fills: dict[str, float]) -> Arrays:
  """The values, with the fill in the rows and columns of padding, whose batch_index is -1."""
  real = (row["batch_index"] >= 0)[:, None] & (col["batch_index"] >= 0)[None, :]
  return {name: jnp.where(real, v, fills[name]) for name, v in values.items()}


def _scan_tiles(
  plan: Plan, block: Any, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any
) -> tuple[Any, Any]:
  """Scans `step` over a block's columns [g, ...], at most `chunk` at a time.

  Returns:
    The last carry, and the second results of all steps, concatenated to [g, ...].
  """
  g = jax.tree.leaves(block)[0].shape[0]
  least = -(-g // plan.chunk)
  if least == 1:
    return step(carry, block)
  # Equal tiles if at most twice as many of them divide the block, else a padded last tile.
  k = next((k for k in range(least, 2 * least) if g % k == 0), least)
  width = -(-g // k)
  if k * width > g:
    block = {part: padded(x, k * width) for part, x in block.items()}
  tiles = jax.tree.map(lambda x: rearrange(x, "(k c) ... -> k c ...", k=k), block)
  carry, per_tile = jax.lax.scan(step, carry, tiles)
  return carry, jax.tree.map(lambda x: rearrange(x, "k c ... -> (k c) ...")[:g], per_tile)


def padded(columns: Arrays, size: int) -> Arrays:
  """Columns padded to `size` with copies of the last one, which are safe to compute with.

  Their batch_index is -1.
  """

  def longer(name: str, x: jax.Array) -> jax.Array:
    ends = [(0, size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]
    if name == "batch_index":
      return jnp.pad(x, ends, constant_values=-1)
    return jnp.pad(x, ends, mode="edge")

  return {name: longer(name, x) for name, x in columns.items()}


def is_feature(x: jax.Array) -> bool:
  """Whether an array of rows or columns is communicated in the engine's dtype."""
  return x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)


def communicated_dtype(x: jax.Array, dtype: str) -> Any:
  """The dtype in which an array is communicated: bfloat16 for features, or its own.

  Args:
    x: an array of rows or columns.
    dtype: of the engine.
  """
  return jnp.dtype(dtype) if is_feature(x) and dtype == "bfloat16" else x.dtype


def widened(arrays: Mapping[str, jax.Array]) -> Arrays:
  """The arrays, with float16 and bfloat16 converted to float32."""

  def narrow(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4

  return {k: x.astype(jnp.float32) if narrow(x) else x for k, x in arrays.items()}


def forward(
  reduction: TiledReduction,
  rows: Arrays,
  shared: Arrays,
  block: dict[str, Arrays],
  partials: dict[str, Partial],
) -> tuple[dict[str, Partial], dict[str, Partial]]:
  """Reduces a block of columns against the device's rows.

  Args:
    reduction: what to compute.
    rows: {name: [n, ...]} of this device.
    shared: what every tile reads.
    block: {"columns": {name: [g, ...]}}.
    partials: row reductions of the blocks so far, [n].

  Returns:
    The row reductions with this block included, [n], and the block's column reductions over these
    rows, [g].
  """
  kinds = {name: kind.split("_") for name, kind in reduction.outputs}
  fills = {name: 0.0 if kind == "sum" else -np.inf for name, (_, kind) in kinds.items()}

  def step(partials: dict[str, Partial], tiles: dict[str, Arrays]) -> tuple[Any, Any]:
    col = widened(tiles["columns"])
    values = _masked(reduction.tile(rows, col, shared), rows, col, fills)
    of_rows, of_columns = {}, {}
    for name, (side, kind) in kinds.items():
      if side == "row":
        of_this = reductions.of_tile(kind, values[name], 1)
        of_rows[name] = reductions.combine(kind, partials[name], of_this)
      else:
        of_columns[name] = reductions.of_tile(kind, values[name], 0)
    return of_rows, of_columns

  return _scan_tiles(reduction.plan, block, step, partials)


def backward(
  reduction: TiledReduction,
  rows: Arrays,
  shared: Arrays,
  row_outputs: dict[str, Arrays],
  block: dict[str, Arrays],
  sums: Sums,
) -> tuple[Sums, Arrays]:
  """Adds a block's part to (d rows, d shared, value) and returns d columns.

  Args:
    reduction: what `forward` computed.
    rows: {name: [n, ...]} of this device.
    shared: what every tile reads.
    row_outputs: "cotangents" and "values" of the row reductions, {name: [n]}.
    block: "columns" {name: [g, ...]}, and "cotangents" and "values" of the column reductions,
      {name: [g]}.
    sums: of the blocks so far. The value is the sum of all entries, if there are no outputs.
  """
  kinds = {name: kind.split("_") for name, kind in reduction.outputs}

  def cotangent(name: str, v: jax.Array, tiles: dict[str, Arrays]) -> jax.Array:
    if not kinds:
      return jnp.ones_like(v)
    side, kind = kinds[name]
    outputs, axis = (row_outputs, 1) if side == "row" else (tiles, 0)
    ct, value = (jnp.expand_dims(outputs[part][name], axis) for part in ("cotangents", "values"))
    return reductions.tile_cotangent(kind, v, ct, value)

  def step(sums: Sums, tiles: dict[str, Arrays]) -> tuple[Sums, Arrays]:
    d_rows, d_shared, value = sums
    col = widened(tiles["columns"])
    row_in, row_rest = split(rows, reduction.fixed)
    col_in, col_rest = split(col, reduction.fixed)
    shared_in, shared_rest = split(shared)
    values, pull = jax.vjp(
      lambda r, c, s: reduction.tile(r | row_rest, c | col_rest, s | shared_rest),
      row_in,
      col_in,
      shared_in,
    )
    zero_fills = dict.fromkeys(values, 0.0)
    cts = {name: cotangent(name, v, tiles) for name, v in values.items()}
    more_rows, d_col, more_shared = pull(_masked(cts, rows, col, zero_fills))
    if not kinds:
      value += sum(v.sum() for v in _masked(values, rows, col, zero_fills).values())
    return (add(d_rows, more_rows), add(d_shared, more_shared), value), d_col

  return _scan_tiles(reduction.plan, block, step, sums)


def split(arrays: Arrays, fixed: frozenset[str] = frozenset()) -> tuple[Arrays, Arrays]:
  """The arrays that get a gradient, and the others: integers and `fixed`."""
  real = {
    k: x for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact) and k not in fixed
  }
  return real, {k: x for k, x in arrays.items() if k not in real}


def add(a: Any, b: Any) -> Any:
  """The sum of two trees of arrays."""
  return jax.tree.map(jnp.add, a, b)


def dense(
  tile: Tile, outputs: dict[str, str], rows: Arrays, columns: Arrays, shared: Arrays
) -> Arrays:
  """The reductions of one whole matrix, which the compiler lays out."""
  values = _dense_tile(tile, rows, columns, shared)
  results = {}
  for name, side_kind in outputs.items():
    side, kind = side_kind.split("_")
    partial = reductions.of_tile(kind, values[name], 1 if side == "row" else 0)
    results[name] = reductions.result(kind, partial)
  return results


def dense_total(tile: Tile, rows: Arrays, columns: Arrays, shared: Arrays) -> jax.Array:
  """[]: the sum of one whole matrix."""
  return functools.reduce(
    jnp.add, (v.sum() for v in _dense_tile(tile, rows, columns, shared).values())
  )


def _dense_tile(tile: Tile, rows: Arrays, columns: Arrays, shared: Arrays) -> Arrays:
  def indexed(x: Arrays) -> Arrays:
    n = next(iter(x.values())).shape[0]
    return {**x, "batch_index": jnp.arange(n, dtype=jnp.int32)}

  # With its rows constrained, the matrix is one-sided: columns are gathered, rows stay.
  values = tile(indexed(rows), indexed(columns), shared)
  return {name: sharding.constrain_batch(v) for name, v in values.items()}
