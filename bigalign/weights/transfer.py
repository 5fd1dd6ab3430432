"""A checkpoint's tensors as our arrays and back, after every key and shape is accounted for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from bigalign.weights import slices, table
from bigalign.weights.files import Tensors
from bigalign.weights.layout import Layout
from bigalign.weights.table import Step

# What becomes float32 without a loss.
FLOATS = ("float32", "float16", "bfloat16")
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is read of a checkpoint, after all keys, shapes and dtypes are found to agree."""

  tensors: Tensors
  shapes: Mapping[str, Any]
  steps: list[Step]
  grid: tuple[int, int] | None

  @property
  def keys(self) -> list[str]:
    """Those of the tensors that are read."""
    return list(dict.fromkeys(key for step in self.steps for key in step.theirs))

  @property
  def resized(self) -> dict[str, tuple[int, int, str]]:
    """{path: (positions in the file, positions of the model, method)} where the two differ."""
    found = {}
    for step in (x for x in self.steps if x.row.resize):
      theirs, ours = (x.shapes[-1][1] for x in (slices.source(self.tensors, step), step))
      if theirs != ours:
        found[step.ours[-1]] = (theirs, ours, step.row.resize)
    return found

  def arrays(
    self, shardings: Mapping[str, NamedSharding] | None = None
  ) -> Iterator[tuple[str, Any]]:
    """(path, array), one by one: nobody needs to hold them all.

    shardings: {path: where it lies}. Each device is then given its part of each array, and the
    host holds no more than one tensor at a time; without, the arrays are numpy's.
    """
    for path, pieces in _pieces(self).items():
      spec = self.shapes[path]
      if shardings:
        yield path, slices.placed(self.tensors, pieces, spec, self.grid, shardings[path])
      else:
        yield path, slices.host(self.tensors, pieces, spec, self.grid)


def plan(
  tensors: Tensors,
  layout: Layout,
  shapes: Mapping[str, Any],
  *,
  grid: tuple[int, int] | None = None,
  fresh: str = "",
  drop: str = "",
) -> Plan:
  """How `shapes` are made of a checkpoint; reads no tensor.

  Args:
    shapes: {path: something with a shape and a dtype}, as of jax.eval_shape, "image_tower/…". Of
      a checkpoint with two towers the one that has no path here is left out.
    grid: rows and columns of patches, if position embeddings must be resized to no square.
    fresh: regular expression of paths that are not read: they keep their random start.
    drop: regular expression of keys that are left out, though the model has no place for them.

  Raises:
    ValueError: with all that is missing, that has no place or another shape or type.
  """
  steps = _steps(tensors, layout, shapes, fresh, drop)
  _compare(tensors, steps, shapes)
  wanted = {path: x for path, x in shapes.items() if not _matches(fresh, path)}
  return Plan(tensors, wanted, steps, grid)


def read(
  tensors: Tensors,
  layout: Layout,
  shapes: Mapping[str, Any],
  *,
  shardings: Mapping[str, NamedSharding] | None = None,
  **options: Any,
) -> Iterator[tuple[str, Any]]:
  """(path, array) for each of `shapes`; options and errors as of `plan` and Plan.arrays."""
  return plan(tensors, layout, shapes, **options).arrays(shardings)


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


def _steps(
  tensors: Tensors, layout: Layout, shapes: Mapping[str, Any], fresh: str, drop: str
) -> list[Step]:
  """The steps of all rows that are read."""
  for what, pattern, names in (("fresh", fresh, shapes), ("drop", drop, tensors)):
    if pattern and not any(re.search(pattern, name) for name in names):
      raise ValueError(f"{what}: {pattern!r} matches none of {sorted(names)[:_SHOWN]}")
  known = {*layout.zeros, *(key for row in layout.rows for key in table.keys(row))}
  unknown = [
    key
    for key in tensors
    if key not in known and not _matches(layout.unused, key) and not _matches(drop, key)
  ]
  tops = {path.split("/")[0] for path in shapes}
  chosen: list[Step] = []
  homeless = []
  for row in layout.rows:
    paths = row.ours if isinstance(row.ours, tuple) else (row.ours,)
    if paths[0].split("/")[0] not in tops:
      continue
    steps = table.steps(row, shapes)
    if steps:
      chosen += [x for x in steps if not all(_matches(fresh, path) for path in x.ours)]
    elif not row.optional:
      homeless += [key for key in table.keys(row) if not _matches(drop, key)]
  filled = {path for step in chosen for path in step.ours}
  empty = [path for path in shapes if path not in filled and not _matches(fresh, path)]
  wanted = [key for step in chosen for key in step.theirs]
  missing = [key for key in dict.fromkeys(wanted) if key not in tensors]
  problems = [
    ("keys that this kind of checkpoint does not have", unknown),
    ("keys that the model has no place for (another option, or drop=)", homeless),
    ("missing keys (fresh= leaves paths as they start)", missing),
    ("paths that nothing fills (another option, or fresh=)", empty),
  ]
  _raise(tensors, problems)
  return chosen


def _compare(tensors: Tensors, steps: list[Step], ours: Mapping[str, Any]) -> None:
  shapes, dtypes = [], []
  for step in steps:
    if step.layer == 0 and ours[step.ours[0]].shape[0] != step.row.layers:
      shapes.append(
        f"{step.row.theirs} has {step.row.layers} layers, {step.ours[0]}"
        f" {ours[step.ours[0]].shape[0]}"
      )
    for key, shape in zip(step.theirs, table.expected(slices.source(tensors, step))):
      entry = tensors[key]
      found = entry.shape if step.slot is None else entry.shape[1:]
      if step.slot is not None and entry.shape[:1] != (step.row.layers,):
        shapes.append(f"{key} {list(entry.shape)}, the model has {step.row.layers} layers")
      elif found != shape:
        shapes.append(f"{key} {list(entry.shape)}, the model's: {list(shape)}")
      if np.dtype(entry.dtype).name not in FLOATS:
        dtypes.append(f"{key} {np.dtype(entry.dtype).name}")
  _raise(
    tensors,
    [
      ("tensors of another shape than the model's", shapes),
      (f"tensors of a type that is none of {list(FLOATS)}", dtypes),
    ],
  )


def _pieces(plan: Plan) -> dict[str, list[slices.Piece]]:
  """{path: where its layers come from, or the whole}."""
  found: dict[str, list[slices.Piece]] = {}
  for step in plan.steps:
    for i, path in enumerate(step.ours):
      if path in plan.shapes:
        found.setdefault(path, []).append((step, i))
  return found


def _matches(pattern: str, name: str) -> bool:
  return bool(pattern) and re.search(pattern, name) is not None


def _raise(tensors: Tensors, problems: list[tuple[str, list[str]]]) -> None:
  lines = [
    f"{what}: {', '.join(names[:_SHOWN])}" + (f" … {len(names)} in all" * (len(names) > _SHOWN))
    for what, names in problems
    if names
  ]
  if lines:
    raise ValueError(f"{tensors.path}: " + "\n".join(lines))
