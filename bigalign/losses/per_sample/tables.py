"""Per-sample tables: an array over all ids, sharded over all devices by ranges of ids.

Rows are found by 64-bit ids in two uint32 words, [B, 2] (high, low). Device k of the mesh holds the
rows [k r, (k + 1) r). It subtracts k r from each id and uses those that are then below r, so that
no number above 32 bits is formed, and no array of a table's size other than the table.

Communicated bytes of one call, for B ids and K tables: 8 B for the ids and 4 K B for the values.
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

# A table's length is a multiple of this number on every mesh: 2^12 x 3 x 5 also divides over 192
# chips.
ROWS = 61_440

Tables = dict[str, jax.Array]


def make(n: int, fill: float) -> jax.Array:
  """[n, rounded up to a multiple of ROWS]: a table of `fill`, float32; float64 under x64."""
  return jnp.full((max(1, -(-n // ROWS)) * ROWS,), fill, float)


def state_sharding(x: jax.Array, mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of an array of a loss's state: long ones over all devices, others replicated."""
  long = x.ndim > 0 and x.shape[0] >= 4096 and x.shape[0] % mesh.size == 0
  return NamedSharding(mesh, P(mesh.axis_names) if long else P())


def check_ids(ids: np.ndarray, n: int, name: str) -> None:
  """Checks that ids have a row in a table of n samples.

  Args:
    ids: [b, 2] uint32, on the host.
    n: number of samples.
    name: of the ids, for the error.

  Raises:
    ValueError: naming the first id that is not below n.
  """
  words = np.asarray(ids).astype(np.uint64)
  whole = (words[:, 0] << np.uint64(32)) | words[:, 1]
  bad = np.flatnonzero(whole >= np.uint64(n))
  if bad.size:
    raise ValueError(
      f"{name}: id {whole[bad[0]]} in row {bad[0]} of the batch ({bad.size} such rows), but the"
      f" loss keeps state for {n} samples, with ids 0 to {n - 1}. The data has grown, or is not the"
      f" data that the run began with. Start a new run on it, in a new workdir."
    )


def read(tables: Mapping[str, jax.Array], ids: jax.Array) -> Tables:
  """Reads the rows of `ids`.

  Args:
    tables: {name: [n]}, all of one dtype.
    ids: [B, 2] uint32.

  Returns:
    {name: [B]}, sharded over all devices. An id at or above n reads as 0.
  """
  axes, devices = _mesh(tables)
  b, split = ids.shape[0], P(axes)
  local = functools.partial(_local_read, axes, devices)
  rows = sharding.on_each_device(local, (split, split), split)(dict(tables), _padded(ids, devices))
  return {name: x[:b] for name, x in rows.items()}


def write(
  tables: Mapping[str, jax.Array], ids: jax.Array, values: Mapping[str, jax.Array]
) -> tuple[Tables, Tables]:
  """Writes into the rows of `ids`; in place where the tables are donated.

  Of equal ids the last in the batch wins. An id at or above n is not written.

  Args:
    tables: {name: [n]}.
    ids: [B, 2] uint32.
    values: {name: [B]} of some or all of the tables.

  Returns:
    All of `tables`, and {name: [B]}: the value that each id now has, that of the winner.
  """
  axes, devices = _mesh(tables)
  b, split = ids.shape[0], P(axes)
  old = {name: tables[name] for name in values}
  new_values = {name: _padded(x, devices) for name, x in values.items()}
  local = functools.partial(_local_write, axes, devices)
  new, current = sharding.on_each_device(local, (split, split, split), (split, split))(
    old, _padded(ids, devices), new_values
  )
  return {**tables, **new}, {name: x[:b] for name, x in current.items()}


def _mesh(tables: Mapping[str, jax.Array]) -> tuple[tuple[str, ...], int]:
  """All axes of the mesh and the number of its devices; () and 1 outside of a mesh."""
  axes, devices = sharding.devices()
  for name, x in tables.items():
    if x.shape[0] % devices:
      raise ValueError(
        f"config.mesh: the {x.shape[0]} rows of {name!r}, a per-sample table of the loss, do not"
        f" divide over {devices} devices; use a number of devices that divides {ROWS}"
      )
  return axes, devices


def _padded(x: jax.Array, devices: int) -> jax.Array:
  """Pads [B, ...] so that it divides over the devices; padding has the largest id, of no row."""
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
  values = jnp.stack([x.at[row].get(mode="promise_in_bounds") for x in tables.values()])
  values = jnp.where(hit[None], values, 0)  # [K, B]
  # One axis after the other: over several axes at once, TPUs sum the whole array on every device.
  for axis in axes:
    values = jax.lax.psum_scatter(values, axis, scatter_dimension=1, tiled=True)
  return dict(zip(tables, values, strict=True))


def _local_write(
  axes: tuple[str, ...], devices: int, tables: Tables, ids: jax.Array, values: Tables
) -> tuple[Tables, Tables]:
  rows = next(iter(tables.values())).shape[0]
  own = ids.shape[0]
  ids = _gather(axes, ids)
  every = _gather(axes, jnp.stack([values[name] for name in tables]), 1)  # [K, B]
  row, hit = local_row(ids, _first(axes, devices, rows), rows)
  winner, position = last_equal(ids), jnp.arange(ids.shape[0], dtype=jnp.int32)
  # Rows that must not be written get distinct numbers past the end: indices must be unique.
  row = jnp.where(hit & (winner == position), row, rows + position.astype(jnp.uint32))
  new = {
    name: x.at[row].set(value.astype(x.dtype), mode="drop", unique_indices=True)
    for (name, x), value in zip(tables.items(), every, strict=True)
  }
  current = every[:, winner]
  if axes:
    current = jax.lax.dynamic_slice_in_dim(current, jax.lax.axis_index(axes) * own, own, 1)
  return new, dict(zip(tables, current, strict=True))


def _first(axes: tuple[str, ...], devices: int, rows: int) -> jax.Array:
  """[2] uint32: the id of this device's first row, in two words."""
  starts = [k * rows for k in range(devices)]
  words = np.asarray([(x >> 32, x & 0xFFFFFFFF) for x in starts], np.uint32)
  return jnp.asarray(words)[jax.lax.axis_index(axes) if axes else 0]


def local_row(ids: jax.Array, first: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
  """The row of each id in the part of a table that one device holds.

  Args:
    ids: [B, 2] uint32.
    first: [2] uint32, the id of the device's first row.
    rows: number of its rows, below 2^32.

  Returns:
    [B] uint32, the low word of id - first, and [B] bool, whether the device holds the id.
  """
  low = ids[:, 1] - first[1]
  high = ids[:, 0] - first[0] - (ids[:, 1] < first[1])
  return low, (high == 0) & (low < rows)


def last_equal(ids: jax.Array) -> jax.Array:
  """[B, 2] -> [B] int32: for each position of the batch the last position with the same id."""
  order = jnp.arange(ids.shape[0], dtype=jnp.int32)
  high, low, position = jax.lax.sort((ids[:, 0], ids[:, 1], order), num_keys=2, is_stable=True)
  changes = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
  last = jnp.concatenate([changes, jnp.ones(1, bool)])
  end = jax.lax.cummin(jnp.where(last, order, ids.shape[0]), reverse=True)
  return jnp.zeros_like(position).at[position].set(position[end], unique_indices=True)
