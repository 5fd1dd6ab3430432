"""What a loss remembers of every sample: arrays over all ids, each device holding a range of them.

Rows are found by 64-bit ids in two uint32 words, [B, 2] (high, low). Device k of the mesh holds the
rows [k r, (k + 1) r); it subtracts k r from each id and looks at what falls below r, so that no
number above 32 bits is ever formed and nothing of a table's size is, beside the table.

On the wire, for B ids and K tables of one call: 8 B bytes for the ids and 4 K B for the values.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import sharding

# A table's length is a multiple of it, on every mesh: 2^12 x 3 x 5, for slices of 192 chips too.
ROWS = 61_440

Tables = dict[str, jax.Array]


def make(n: int, fill: float) -> jax.Array:
  """[n, rounded up to a multiple of ROWS] of `fill`, float32; float64 under x64."""
  return jnp.full((max(1, -(-n // ROWS)) * ROWS,), fill, float)


def placed(x: jax.Array, mesh: jax.sharding.Mesh) -> NamedSharding:
  """Where an array of a loss's state lies: long ones split over all devices, others on each."""
  long = x.ndim > 0 and x.shape[0] >= 4096 and x.shape[0] % mesh.size == 0
  return NamedSharding(mesh, P(mesh.axis_names) if long else P())


def is_table(x: jax.Array) -> bool:
  """Whether an array of a loss's state is one that `make` made."""
  return x.ndim == 1 and x.shape[0] % ROWS == 0


def check_ids(ids: np.ndarray, n: int, name: str) -> None:
  """Raises ValueError if one of `ids` [b, 2] uint32, on the host, is not below n."""
  words = np.asarray(ids).astype(np.uint64)
  whole = (words[:, 0] << np.uint64(32)) | words[:, 1]
  bad = np.flatnonzero(whole >= np.uint64(n))
  if bad.size:
    raise ValueError(
      f"{name}: id {whole[bad[0]]} in row {bad[0]} of the batch ({bad.size} such rows), but the"
      f" loss remembers {n} samples, with ids 0 to {n - 1}. The data has grown, or is not what the"
      f" run began with: start a run on it in a new workdir."
    )


def read(tables: Mapping[str, jax.Array], ids: jax.Array) -> Tables:
  """The rows of `ids`: {name: [n]}, all of one dtype, and [B, 2] uint32 -> {name: [B]}.

  The result lies over all devices. An id at or above n is read as 0.
  """
  axes, devices = _mesh(tables)
  b, split = ids.shape[0], P(axes)
  local = functools.partial(_local_read, axes, devices)
  found = sharding.on_each_device(local, (split, split), split)(dict(tables), _fit(ids, devices))
  return {name: x[:b] for name, x in found.items()}


def write(
  tables: Mapping[str, jax.Array], ids: jax.Array, values: Mapping[str, jax.Array]
) -> tuple[Tables, Tables]:
  """Puts `values` {name: [B]} into the rows of `ids`; in place where the tables are donated.

  Of equal ids the last in the batch wins. An id at or above n is not written.

  Returns:
    All of `tables`, and {name: [B]}: what now stands under each id, the winner's value.
  """
  axes, devices = _mesh(tables)
  b, split = ids.shape[0], P(axes)
  old = {name: tables[name] for name in values}
  fitted = {name: _fit(x, devices) for name, x in values.items()}
  local = functools.partial(_local_write, axes, devices)
  new, seen = sharding.on_each_device(local, (split, split, split), (split, split))(
    old, _fit(ids, devices), fitted
  )
  return {**tables, **new}, {name: x[:b] for name, x in seen.items()}


def _mesh(tables: Mapping[str, jax.Array]) -> tuple[tuple[str, ...], int]:
  """All axes of the mesh and the number of its devices; none and 1 outside of one."""
  axes, devices = sharding.devices()
  for name, x in tables.items():
    if x.shape[0] % devices:
      raise ValueError(
        f"config.mesh: {devices} devices do not divide the {x.shape[0]} rows of {name!r}, which the"
        f" loss remembers; a number of devices that divides {ROWS} does"
      )
  return axes, devices


def _fit(x: jax.Array, devices: int) -> jax.Array:
  """Padded so that every device has as many; an id of padding is the largest, and of no row."""
  pad = -x.shape[0] % devices
  if not pad:
    return x
  fill = np.iinfo(np.uint32).max if x.ndim == 2 else 0
  return jnp.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)], constant_values=np.asarray(fill, x.dtype))


def _gather(axes: tuple[str, ...], x: jax.Array, axis: int = 0) -> jax.Array:
  for name in reversed(axes):
    x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
  return x


def _local_read(axes: tuple[str, ...], devices: int, tables: Tables, ids: jax.Array) -> Tables:
  rows = next(iter(tables.values())).shape[0]
  row, hit = local_row(_gather(axes, ids), _first(axes, devices, rows), rows)
  row = jnp.where(hit, row, 0)
  found = jnp.stack([x.at[row].get(mode="promise_in_bounds") for x in tables.values()])
  found = jnp.where(hit[None], found, 0)  # [K, B]
  for axis in axes:  # one after the other: over all at once, TPUs sum the whole on every device
    found = jax.lax.psum_scatter(found, axis, scatter_dimension=1, tiled=True)
  return dict(zip(tables, found, strict=True))


def _local_write(
  axes: tuple[str, ...], devices: int, tables: Tables, ids: jax.Array, values: Tables
) -> tuple[Tables, Tables]:
  rows = next(iter(tables.values())).shape[0]
  own = ids.shape[0]
  ids = _gather(axes, ids)
  every = _gather(axes, jnp.stack([values[name] for name in tables]), 1)  # [K, B]
  row, hit = local_row(ids, _first(axes, devices, rows), rows)
  winner, place = last_equal(ids), jnp.arange(ids.shape[0], dtype=jnp.int32)
  # What is not to be written goes past the end, each to its own row: they must be unique.
  row = jnp.where(hit & (winner == place), row, rows + place.astype(jnp.uint32))
  new = {
    name: x.at[row].set(value.astype(x.dtype), mode="drop", unique_indices=True)
    for (name, x), value in zip(tables.items(), every, strict=True)
  }
  seen = every[:, winner]
  if axes:
    seen = jax.lax.dynamic_slice_in_dim(seen, jax.lax.axis_index(axes) * own, own, 1)
  return new, dict(zip(tables, seen, strict=True))


def _first(axes: tuple[str, ...], devices: int, rows: int) -> jax.Array:
  """[2] uint32: the id of this device's first row, in words."""
  starts = [k * rows for k in range(devices)]
  words = np.asarray([(x >> 32, x & 0xFFFFFFFF) for x in starts], np.uint32)
  return jnp.asarray(words)[jax.lax.axis_index(axes) if axes else 0]


def local_row(ids: jax.Array, first: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
  """[B, 2], [2] uint32 words -> [B] uint32, the low word of id - first, and [B] bool, whether the
  difference is at least 0 and below `rows`, itself below 2^32."""
  low = ids[:, 1] - first[1]
  high = ids[:, 0] - first[0] - (ids[:, 1] < first[1])
  return low, (high == 0) & (low < rows)


def last_equal(ids: jax.Array) -> jax.Array:
  """[B, 2] -> [B] int32: for each place of the batch the last one with the same id."""
  order = jnp.arange(ids.shape[0], dtype=jnp.int32)
  high, low, place = jax.lax.sort((ids[:, 0], ids[:, 1], order), num_keys=2, is_stable=True)
  changes = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
  last = jnp.concatenate([changes, jnp.ones(1, bool)])
  end = jax.lax.cummin(jnp.where(last, order, ids.shape[0]), reverse=True)
  return jnp.zeros_like(place).at[place].set(place[end], unique_indices=True)
