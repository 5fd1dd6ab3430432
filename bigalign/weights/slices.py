"""Arrays of ours made of a file's tensors: on the host, or part by part where devices hold them."""

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
from bigalign.weights.table import Step

Grid = tuple[int, int] | None  # rows and columns of patches, if they are no square
_SMALL = 2**24  # bytes of a stack of layers that is made on the host, without a program of its own

Piece = tuple[Step, int]  # a step, and which of its arrays


def source(tensors: Tensors, step: Step) -> Step:
  """The step with as many positions as the file has, where they can be resized."""
  if not step.row.resize:
    return step
  left, _ = table.sides(step.row.rule)
  key, shape = step.theirs[0], table.expected(step)[0]
  found = tensors[key].shape
  axis = left.index(("n",))
  if len(found) != len(shape) or found[axis] < len(step.ours):
    return step
  first, n, last = step.shapes[-1]
  return step._replace(shapes=(*step.shapes[:-1], (first, n + found[axis] - shape[axis], last)))


def host(tensors: Tensors, pieces: list[Piece], spec: Any, grid: Grid) -> np.ndarray:
  """An array on the host."""
  if pieces[0][0].layer is None:
    # Views of a mapped file are copied: the file may change.
    copy = None if tensors[pieces[0][0].theirs[0]].member else True
    return np.array(_part(tensors, *pieces[0], grid), spec.dtype, order="C", copy=copy)
  out = np.empty(spec.shape, spec.dtype)
  for i, piece in enumerate(pieces):
    out[i] = _part(tensors, *piece, grid)
  return out


def placed(
  tensors: Tensors, pieces: list[Piece], spec: Any, grid: Grid, sharding: NamedSharding
) -> jax.Array:
  """An array where its devices want it."""
  if pieces[0][0].layer is None:
    cut = functools.partial(_cut, tensors, pieces[0], spec, grid)
    return _placed(cut, spec.shape, sharding)
  if math.prod(spec.shape) * spec.dtype.itemsize <= _SMALL:
    return _placed(host(tensors, pieces, spec, grid).__getitem__, spec.shape, sharding)
  return _stacked(tensors, pieces, spec, grid, sharding)


def _set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _stacked(
  tensors: Tensors, pieces: list[Piece], spec: Any, grid: Grid, sharding: NamedSharding
) -> jax.Array:
  """Layer by layer into an array that is there already: a stack may be larger than any file."""
  one = NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
  put = jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)
  stack = jnp.zeros(spec.shape, spec.dtype, device=sharding)
  for i, piece in enumerate(pieces):
    cut = functools.partial(_cut, tensors, piece, spec, grid)
    stack = jax.block_until_ready(put(stack, _placed(cut, spec.shape[1:], one), np.int32(i)))
  return stack


def _placed(
  cut: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
  """Not jax.make_array_from_callback, which holds the parts of all devices at once."""
  parts = [
    # A view of a mapped file must not become the array of a CPU device.
    jax.block_until_ready(jax.device_put(cut(index or ()), device, may_alias=False))
    for device, index in sharding.addressable_devices_indices_map(shape).items()
  ]
  return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _cut(
  tensors: Tensors, piece: Piece, spec: Any, grid: Grid, index: tuple[slice, ...]
) -> np.ndarray:
  """What `index` cuts out of an array, or of a layer of a stack; a view where that can be."""
  return np.asarray(_part(tensors, *piece, grid)[index], spec.dtype, order="C")


def _part(tensors: Tensors, step: Step, which: int, grid: Grid) -> np.ndarray:
  """One array of ours of one step, a view where that can be."""
  theirs = [tensors.read(key) for key in step.theirs]
  if step.slot is not None:
    theirs = [x[step.slot] for x in theirs]
  part = table.to_ours(source(tensors, step), theirs)[which]
  if step.row.resize and which == len(step.ours) - 1:
    return _resized(tensors, step, part, grid)
  return part


def _resized(tensors: Tensors, step: Step, part: np.ndarray, grid: Grid) -> np.ndarray:
  """Positions for another number of patches, a square grid if `grid` does not say."""
  count = step.shapes[-1][1]
  side = math.isqrt(count)
  if part.shape[1] == count and grid in (None, (side, side)):
    return part
  rows, cols = grid or (side, side)
  if rows * cols != count:
    raise ValueError(
      f"{tensors.path}: {step.theirs[0]}: {step.ours[-1]} has {count} positions; say grid=(rows,"
      f" columns) of that many patches, not {grid}"
    )
  try:
    return positions.resize(np.asarray(part), (rows, cols), step.row.resize)
  except ValueError as error:
    raise ValueError(f"{tensors.path}: {step.theirs[0]}: {error}") from error
