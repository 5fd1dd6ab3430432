"""Our arrays from the tensors of a file: on the host, or each device's part on that device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from bigalign.weights import positions, table
from bigalign.weights.files import Tensors
from bigalign.weights.table import Conversion

Grid = tuple[int, int] | None  # (rows, columns) of patches; None: a square
_SMALL = 2**24  # bytes; a smaller stack of layers is assembled on the host, without a compilation

Piece = tuple[Conversion, int]  # a conversion, and the index of one of its arrays


def as_in_file(tensors: Tensors, conversion: Conversion) -> Conversion:
  """The conversion for the number of positions in the file, if they can be resized."""
  if not conversion.row.resize:
    return conversion
  left, _ = table.sides(conversion.row.rule)
  key, expected = conversion.theirs[0], table.expected(conversion)[0]
  shape = tensors[key].shape
  axis = left.index(("n",))
  if len(shape) != len(expected) or shape[axis] < len(conversion.ours):
    return conversion
  first, n, last = conversion.shapes[-1]
  resized = (first, n + shape[axis] - expected[axis], last)
  return conversion._replace(shapes=(*conversion.shapes[:-1], resized))


def on_host(tensors: Tensors, pieces: list[Piece], spec: Any, grid: Grid) -> np.ndarray:
  """An array on the host.

  Args:
    tensors: of the file.
    pieces: the source of the array, or of each of its layers.
    spec: shape and dtype of the array.
    grid: of its patches, if it holds positions.
  """
  if pieces[0][0].layer is None:
    # Views of a memory-mapped file are copied: the file may change.
    copy = None if tensors[pieces[0][0].theirs[0]].member else True
    return np.array(_part(tensors, *pieces[0], grid), spec.dtype, order="C", copy=copy)
  out = np.empty(spec.shape, spec.dtype)
  for i, piece in enumerate(pieces):
    out[i] = _part(tensors, *piece, grid)
  return out


def on_devices(
  tensors: Tensors, pieces: list[Piece], spec: Any, grid: Grid, sharding: NamedSharding
) -> jax.Array:
  """An array with a sharding; arguments as of `on_host`."""
  if pieces[0][0].layer is None:
    cut = functools.partial(_cut, tensors, pieces[0], spec, grid)
    return _sharded(cut, spec.shape, sharding)
  if math.prod(spec.shape) * spec.dtype.itemsize <= _SMALL:
    return _sharded(on_host(tensors, pieces, spec, grid).__getitem__, spec.shape, sharding)
  return _stacked(tensors, pieces, spec, grid, sharding)


def _set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
  """The stack with layer i replaced."""
  updated: jax.Array = jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
  return updated


def _stacked(
  tensors: Tensors, pieces: list[Piece], spec: Any, grid: Grid, sharding: NamedSharding
) -> jax.Array:
  """A stack that is filled layer by layer: it may be larger than any file of the checkpoint."""
  one = NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
  put = jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)
  stack: jax.Array = jnp.zeros(spec.shape, spec.dtype, device=sharding)
  for i, piece in enumerate(pieces):
    cut = functools.partial(_cut, tensors, piece, spec, grid)
    stack = put(stack, _sharded(cut, spec.shape[1:], one), np.int32(i))
    jax.block_until_ready(stack)
  return stack


def _sharded(
  cut: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
  """As jax.make_array_from_callback, which would hold the parts of all devices at once."""
  parts = [
    # A CPU device must not alias a view of a memory-mapped file.
    jax.block_until_ready(jax.device_put(cut(index or ()), device, may_alias=False))
    for device, index in sharding.addressable_devices_indices_map(shape).items()
  ]
  return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _cut(
  tensors: Tensors, piece: Piece, spec: Any, grid: Grid, index: tuple[slice, ...]
) -> np.ndarray:
  """The slice `index` of an array, or of a layer of a stack; a view if possible."""
  return np.asarray(_part(tensors, *piece, grid)[index], spec.dtype, order="C")


def _part(tensors: Tensors, conversion: Conversion, which: int, grid: Grid) -> np.ndarray:
  """One array of a conversion, a view if possible."""
  theirs = [tensors.read(key) for key in conversion.theirs]
  if conversion.their_layer is not None:
    theirs = [x[conversion.their_layer] for x in theirs]
  part = table.to_ours(as_in_file(tensors, conversion), theirs)[which]
  if conversion.row.resize and which == len(conversion.ours) - 1:
    return _resized(tensors, conversion, part, grid)
  return part


def _resized(tensors: Tensors, conversion: Conversion, part: np.ndarray, grid: Grid) -> np.ndarray:
  """Positions resized to the number of patches of our array, in a square if `grid` is None."""
  count = conversion.shapes[-1][1]
  side = math.isqrt(count)
  if part.shape[1] == count and grid in (None, (side, side)):
    return part
  rows, cols = grid or (side, side)
  if rows * cols != count:
    raise ValueError(
      f"{tensors.path}: {conversion.theirs[0]}: {conversion.ours[-1]} has {count} positions; give"
      f" grid=(rows, columns) of as many patches, not {grid}"
    )
  try:
    return positions.resize(np.asarray(part), (rows, cols), conversion.row.resize)
  except ValueError as error:
    raise ValueError(f"{tensors.path}: {conversion.theirs[0]}: {error}") from error
