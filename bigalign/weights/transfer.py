"""A checkpoint's tensors as our arrays and back, after every key and shape is accounted for."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bigalign.weights import positions, table
from bigalign.weights.files import Tensors
from bigalign.weights.layout import Layout
from bigalign.weights.table import Step

# What becomes float32 without a loss.
FLOATS = ("float32", "float16", "bfloat16")
_SHOWN = 20


def read(
  tensors: Tensors,
  layout: Layout,
  shapes: Mapping[str, Any],
  *,
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
  grid: tuple[int, int] | None = None,
  fresh: str = "",
  drop: str = "",
) -> Iterator[tuple[str, Any]]:
  """(path, array) for each of `shapes`, one by one: nobody needs to hold them all.

  Nothing is read before all keys, shapes and dtypes of both sides are found to agree.

  Args:
    shapes: {path: something with a shape and a dtype}, as of jax.eval_shape, "image_tower/…". Of
      a checkpoint with two towers the one that has no path here is left out.
    shardings: {path: where it lies}. Each device is then given its part of each array, and the
      host holds no more than one such part at a time; without, the arrays are numpy's.
    grid: rows and columns of patches, if position embeddings must be resized to no square.
    fresh: regular expression of paths that are not read: they keep their random start.
    drop: regular expression of keys that are left out, though the model has no place for them.

  Raises:
    ValueError: with all that is missing, that has no place or another shape or type.
  """
  plan = _plan(tensors, layout, shapes, fresh, drop)
  _compare(tensors, plan, shapes)
  for path, pieces in _pieces(plan).items():
    if _matches(fresh, path):
      continue
    make = functools.partial(_array, tensors, pieces, shapes[path], grid)
    yield path, _placed(make, shapes[path].shape, shardings[path]) if shardings else make()


def write(layout: Layout, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
  """(key, array) of the checkpoint that `read` makes `arrays` of; unused keys are zeros."""
  for row in layout.rows:
    steps = table.steps(row, arrays)
    if not steps and not row.optional:
      raise ValueError(f"no array for {row.ours}, which {row.theirs} is made of")
    stacked: dict[str, list[np.ndarray]] = {}
    for step in steps:
      ours = [np.asarray(arrays[path]) for path in step.ours]
      parts = table.to_theirs(step, [x if step.layer is None else x[step.layer] for x in ours])
      for key, part in zip(step.theirs, parts):
        if step.slot is None:
          yield key, np.array(part, order="C")
        else:
          stacked.setdefault(key, []).append(part)
    for key, layers in stacked.items():
      yield key, np.stack(layers)
  for key, shape in layout.zeros.items():
    yield key, np.zeros(shape, np.float32)


def _plan(
  tensors: Tensors, layout: Layout, shapes: Mapping[str, Any], fresh: str, drop: str
) -> list[list[Step]]:
  """The steps of each row that is read."""
  for what, pattern, names in (("fresh", fresh, shapes), ("drop", drop, tensors)):
    if pattern and not any(re.search(pattern, name) for name in names):
      raise ValueError(f"{what}: {pattern!r} matches none of {sorted(names)[:_SHOWN]}")
  known = {*layout.zeros, *(key for row in layout.rows for key in table.keys(row))}
  unknown = [
    key for key in tensors
    if key not in known and not _matches(layout.unused, key) and not _matches(drop, key)
  ]
  tops = {path.split("/")[0] for path in shapes}
  plan, homeless = [], []
  for row in layout.rows:
    paths = row.ours if isinstance(row.ours, tuple) else (row.ours,)
    if paths[0].split("/")[0] not in tops:
      continue
    steps = table.steps(row, shapes)
    if steps:
      plan.append([x for x in steps if not all(_matches(fresh, path) for path in x.ours)])
    elif not row.optional:
      homeless += [key for key in table.keys(row) if not _matches(drop, key)]
  filled = {path for steps in plan for step in steps for path in step.ours}
  empty = [path for path in shapes if path not in filled and not _matches(fresh, path)]
  wanted = [key for steps in plan for step in steps for key in step.theirs]
  missing = [key for key in dict.fromkeys(wanted) if key not in tensors]
  problems = [
    ("keys that this kind of checkpoint does not have", unknown),
    ("keys that the model has no place for (another option, or drop=)", homeless),
    ("missing keys (fresh= leaves paths as they start)", missing),
    ("paths that nothing fills (another option, or fresh=)", empty),
  ]
  _raise(tensors, problems)
  return plan


def _compare(tensors: Tensors, plan: list[list[Step]], ours: Mapping[str, Any]) -> None:
  shapes, dtypes = [], []
  for step in (step for steps in plan for step in steps):
    if step.layer == 0 and ours[step.ours[0]].shape[0] != step.row.layers:
      shapes.append(
        f"{step.row.theirs} has {step.row.layers} layers, {step.ours[0]}"
        f" {ours[step.ours[0]].shape[0]}"
      )
    for key, shape in zip(step.theirs, table.expected(_source(tensors, step))):
      entry = tensors[key]
      found = entry.shape if step.slot is None else entry.shape[1:]
      if step.slot is not None and entry.shape[:1] != (step.row.layers,):
        shapes.append(f"{key} {list(entry.shape)}, the model has {step.row.layers} layers")
      elif found != shape:
        shapes.append(f"{key} {list(entry.shape)}, the model's: {list(shape)}")
      if np.dtype(entry.dtype).name not in FLOATS:
        dtypes.append(f"{key} {np.dtype(entry.dtype).name}")
  _raise(tensors, [
    ("tensors of another shape than the model's", shapes),
    (f"tensors of a type that is none of {list(FLOATS)}", dtypes),
  ])


def _source(tensors: Tensors, step: Step) -> Step:
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
  return step._replace(
    shapes=(*step.shapes[:-1], (first, n + found[axis] - shape[axis], last))
  )


Piece = tuple[Step, int]  # a step, and which of its arrays


def _pieces(plan: list[list[Step]]) -> dict[str, list[Piece]]:
  """{path: where its layers come from, or the whole}."""
  found: dict[str, list[Piece]] = {}
  for step in (step for steps in plan for step in steps):
    for i, path in enumerate(step.ours):
      found.setdefault(path, []).append((step, i))
  return found


def _array(
  tensors: Tensors, pieces: list[Piece], spec: Any, grid: tuple[int, int] | None,
  index: tuple[slice, ...] = (),
) -> np.ndarray:
  """An array, or what `index` cuts out of it."""
  if pieces[0][0].layer is None:
    # Views of a mapped file are copied: the file may change.
    copy = None if tensors[pieces[0][0].theirs[0]].member and not index else True
    return np.array(_part(tensors, *pieces[0], grid)[index], spec.dtype, order="C", copy=copy)
  index = index or (slice(None),) * len(spec.shape)
  layers = pieces[index[0]]
  out = None
  for i, (step, which) in enumerate(layers):
    part = _part(tensors, step, which, grid)[index[1:]]
    out = np.empty((len(layers), *part.shape), spec.dtype) if out is None else out
    out[i] = part
  assert out is not None
  return out


def _part(
  tensors: Tensors, step: Step, which: int, grid: tuple[int, int] | None
) -> np.ndarray:
  """One array of ours of one step, a view where that can be."""
  theirs = [tensors.read(key) for key in step.theirs]
  if step.slot is not None:
    theirs = [x[step.slot] for x in theirs]
  part = table.to_ours(_source(tensors, step), theirs)[which]
  if step.row.resize and which == len(step.ours) - 1:
    return _resized(tensors, step, part, grid)
  return part


def _placed(
  make: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...],
  sharding: jax.sharding.Sharding,
) -> jax.Array:
  """Not jax.make_array_from_callback, which holds the parts of all devices at once."""
  parts = [
    jax.block_until_ready(jax.device_put(make(index or ()), device))
    for device, index in sharding.addressable_devices_indices_map(shape).items()
  ]
  return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _resized(
  tensors: Tensors, step: Step, part: np.ndarray, grid: tuple[int, int] | None
) -> np.ndarray:
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


def _matches(pattern: str, name: str) -> bool:
  return bool(pattern) and re.search(pattern, name) is not None


def _raise(tensors: Tensors, problems: list[tuple[str, list[str]]]) -> None:
  lines = [
    f"{what}: {', '.join(names[:_SHOWN])}" + (f" … {len(names)} in all" * (len(names) > _SHOWN))
    for what, names in problems if names
  ]
  if lines:
    raise ValueError(f"{tensors.path}: " + "\n".join(lines))
