"""A block of columns against a device's rows, in tiles: statistics forward, gradients backward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from bigalign import sharding
from bigalign.losses.engine import reductions
from bigalign.losses.engine.reductions import Stat

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


def _masked(values: Arrays, row: Arrays, col: Arrays, fills: dict[str, float]) -> Arrays:
  """Padding has the place -1 and takes no part."""
  real = (row["batch_index"] >= 0)[:, None] & (col["batch_index"] >= 0)[None, :]
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
    block = {part: padded(x, k * width) for part, x in block.items()}
  tiles = jax.tree.map(lambda x: rearrange(x, "(k c) ... -> k c ...", k=k), block)
  carry, found = jax.lax.scan(step, carry, tiles)
  return carry, jax.tree.map(lambda x: rearrange(x, "k c ... -> (k c) ...")[:g], found)


def padded(columns: Arrays, size: int) -> Arrays:
  """Columns repeated up to `size`, with the place -1: a copy is a safe thing to compute with."""

  def longer(name: str, x: jax.Array) -> jax.Array:
    ends = [(0, size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]
    return (
      jnp.pad(x, ends, constant_values=-1)
      if name == "batch_index"
      else jnp.pad(x, ends, mode="edge")
    )

  return {name: longer(name, x) for name, x in columns.items()}


def wide(arrays: Arrays) -> Arrays:
  """Features off the wire, in float32 again."""
  return {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in arrays.items()}


def forward(
  what: What, rows: Arrays, shared: Arrays, block: dict[str, Arrays], stats: dict[str, Stat]
) -> tuple[dict[str, Stat], dict[str, Stat]]:
  """Joins a block into the rows' statistics, and the statistics of its columns over these rows."""
  kinds = {name: kind.split("_") for name, kind in what.outputs}
  fills = {name: 0.0 if kind == "sum" else -np.inf for name, (_, kind) in kinds.items()}

  def step(stats: dict[str, Stat], tiles: dict[str, Arrays]) -> tuple[Any, Any]:
    col = wide(tiles["columns"])
    values = _masked(what.tile(rows, col, shared), rows, col, fills)
    new, own = {}, {}
    for name, (side, kind) in kinds.items():
      if side == "row":
        new[name] = reductions.join(kind, stats[name], reductions.of(kind, values[name], 1))
      else:
        own[name] = reductions.of(kind, values[name], 0)
    return new, own

  return _in_tiles(what.plan, block, step, stats)


def backward(
  what: What,
  rows: Arrays,
  shared: Arrays,
  row: dict[str, Arrays],
  block: dict[str, Arrays],
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
    return reductions.pull(kind, v, ct, found)

  def step(sums: Sums, tiles: dict[str, Arrays]) -> tuple[Sums, Arrays]:
    d_rows, d_shared, value = sums
    col = wide(tiles["columns"])
    (row_in, row_rest), (col_in, col_rest) = split(rows, what.fixed), split(col, what.fixed)
    shared_in, shared_rest = split(shared)
    values, pull = jax.vjp(
      lambda r, c, s: what.tile(r | row_rest, c | col_rest, s | shared_rest),
      row_in,
      col_in,
      shared_in,
    )
    none = dict.fromkeys(values, 0.0)
    cts = {name: cotangent(name, v, tiles) for name, v in values.items()}
    more_rows, d_col, more_shared = pull(_masked(cts, rows, col, none))
    if not kinds:
      value += sum(v.sum() for v in _masked(values, rows, col, none).values())
    return (add(d_rows, more_rows), add(d_shared, more_shared), value), d_col

  return _in_tiles(what.plan, block, step, sums)


def split(arrays: Arrays, fixed: frozenset[str] = frozenset()) -> tuple[Arrays, Arrays]:
  """Those that have a gradient, and the others."""
  real = {
    k: x for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact) and k not in fixed
  }
  return real, {k: x for k, x in arrays.items() if k not in real}


def add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def dense(
  tile: Tile, outputs: dict[str, str], rows: Arrays, columns: Arrays, shared: Arrays
) -> Arrays:
  """The whole matrix, in the compiler's hands."""
  values = _dense_tile(tile, rows, columns, shared)
  found = {}
  for name, kind in outputs.items():
    side, what = kind.split("_")
    stat = reductions.of(what, values[name], 1 if side == "row" else 0)
    found[name] = reductions.done(what, stat)
  return found


def dense_total(tile: Tile, rows: Arrays, columns: Arrays, shared: Arrays) -> jax.Array:
  """The sum of the whole matrix."""
  return functools.reduce(
    jnp.add, (v.sum() for v in _dense_tile(tile, rows, columns, shared).values())
  )


def _dense_tile(tile: Tile, rows: Arrays, columns: Arrays, shared: Arrays) -> Arrays:
  def placed(x: Arrays) -> Arrays:
    n = next(iter(x.values())).shape[0]
    return {**x, "batch_index": jnp.arange(n, dtype=jnp.int32)}

  # Pinned rows make it one-sided: columns are gathered, rows stay.
  values = tile(placed(rows), placed(columns), shared)
  return {name: sharding.constrain_batch(v) for name, v in values.items()}
