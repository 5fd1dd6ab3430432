"""Reads and writes a checkpoint, after every key and every shape is accounted for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from bigalign import tree
from bigalign.weights import slices, table
from bigalign.weights.files import Tensors
from bigalign.weights.layout import Layout
from bigalign.weights.table import Conversion

# dtypes that convert to float32 without a loss.
FLOATS = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to read from a checkpoint, after all keys, shapes and dtypes were found to agree.

  Args:
    tensors: of the checkpoint.
    shapes: {our path: shape and dtype} of the arrays.
    conversions: the conversions.
    grid: (rows, columns) of patches, for positions; None: a square.
  """

  tensors: Tensors
  shapes: Mapping[str, Any]
  conversions: list[Conversion]
  grid: tuple[int, int] | None

  @property
  def keys(self) -> list[str]:
    """The keys of the tensors that are read."""
    return list(dict.fromkeys(key for conversion in self.conversions for key in conversion.theirs))

  @property
  def resized(self) -> dict[str, tuple[int, int, str]]:
    """{path: (positions in the file, positions of the model, method)} if the two differ."""
    changed = {}
    for conversion in (x for x in self.conversions if x.row.resize):
      theirs, ours = (
        x.shapes[-1][1] for x in (slices.as_in_file(self.tensors, conversion), conversion)
      )
      if theirs != ours:
        changed[conversion.ours[-1]] = (theirs, ours, conversion.row.resize)
    return changed

  def arrays(
    self, shardings: Mapping[str, NamedSharding] | None = None
  ) -> Iterator[tuple[str, Any]]:
    """Yields (path, array), one at a time.

    Args:
      shardings: {path: sharding}. Each device gets its part of each array, and the host holds at
        most one tensor at a time. None: the arrays are numpy arrays.
    """
    for path, pieces in _pieces(self).items():
      spec = self.shapes[path]
      if shardings:
        yield path, slices.on_devices(self.tensors, pieces, spec, self.grid, shardings[path])
      else:
        yield path, slices.on_host(self.tensors, pieces, spec, self.grid)


def plan(
  tensors: Tensors,
  layout: Layout,
  shapes: Mapping[str, Any],
  *,
  grid: tuple[int, int] | None = None,
  fresh: str = "",
  drop: str = "",
) -> Plan:
  """Plans how to fill `shapes` from a checkpoint. Reads no tensor.

  Args:
    tensors: of the checkpoint.
    layout: of the checkpoint.
    shapes: {path: object with shape and dtype} as from jax.eval_shape, "image_tower/…". A tower
      of the checkpoint without a path here is not read.
    grid: (rows, columns) of patches, if positions must be resized to a grid that is not square.
    fresh: regular expression of paths that are not read: they keep their random initial values.
    drop: regular expression of keys that may be left out although the model lacks them.

  Raises:
    ValueError: listing all keys and paths that are missing, unknown, or of another shape or dtype.
  """
  conversions = _conversions(tensors, layout, shapes, fresh, drop)
  _compare(tensors, conversions, shapes)
  wanted = {path: x for path, x in shapes.items() if not _matches(fresh, path)}
  return Plan(tensors, wanted, conversions, grid)


def read(
  tensors: Tensors,
  layout: Layout,
  shapes: Mapping[str, Any],
  *,
  shardings: Mapping[str, NamedSharding] | None = None,
  **options: Any,
) -> Iterator[tuple[str, Any]]:
  """Yields (path, array) for each of `shapes`; options and errors as of `plan` and Plan.arrays."""
  return plan(tensors, layout, shapes, **options).arrays(shardings)


def write(layout: Layout, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (key, array) of a checkpoint from our arrays: the inverse of `read`.

  Tensors that no forward pass uses are zeros.

  Raises:
    ValueError: if an array is missing.
  """
  for row in layout.rows:
    conversions = table.conversions(row, arrays)
    if not conversions and not row.optional:
      raise ValueError(f"{row.ours} is missing, which {row.theirs} needs")
    stacked: dict[str, list[np.ndarray]] = {}
    for conversion in conversions:
      ours = [np.asarray(arrays[path]) for path in conversion.ours]
      parts = table.to_theirs(
        conversion, [x if conversion.layer is None else x[conversion.layer] for x in ours]
      )
      for key, part in zip(conversion.theirs, parts):
        if conversion.their_layer is None:
          yield key, np.array(part, order="C")
        else:
          stacked.setdefault(key, []).append(part)
    for key, layers in stacked.items():
      yield key, np.stack(layers)
  for key, shape in layout.zeros.items():
    yield key, np.zeros(shape, np.float32)


def _conversions(
  tensors: Tensors, layout: Layout, shapes: Mapping[str, Any], fresh: str, drop: str
) -> list[Conversion]:
  """The conversions of all rows that are read.

  Raises:
    ValueError: listing all keys and paths that are missing, unknown or without a counterpart.
  """
  for what, pattern, names in (("fresh", fresh, shapes), ("drop", drop, tensors)):
    if pattern and not any(re.search(pattern, name) for name in names):
      listed = tree.shown(sorted(names), width=200)
      raise ValueError(f"{what}: {pattern!r} matches none of {listed}")
  known = {*layout.zeros, *(key for row in layout.rows for key in table.keys(row))}
  unknown = [
    key
    for key in tensors
    if key not in known and not _matches(layout.unused, key) and not _matches(drop, key)
  ]
  tops = {path.split("/")[0] for path in shapes}
  chosen: list[Conversion] = []
  no_place = []
  for row in layout.rows:
    paths = row.ours if isinstance(row.ours, tuple) else (row.ours,)
    if paths[0].split("/")[0] not in tops:
      continue
    conversions = table.conversions(row, shapes)
    if conversions:
      chosen += [x for x in conversions if not all(_matches(fresh, path) for path in x.ours)]
    elif not row.optional:
      no_place += [key for key in table.keys(row) if not _matches(drop, key)]
  filled = {path for conversion in chosen for path in conversion.ours}
  empty = [path for path in shapes if path not in filled and not _matches(fresh, path)]
  wanted = [key for conversion in chosen for key in conversion.theirs]
  missing = [key for key in dict.fromkeys(wanted) if key not in tensors]
  problems = [
    ("keys that this kind of checkpoint does not have", unknown),
    ("keys that the model has no place for (another option, or drop=)", no_place),
    ("missing keys (fresh= initialises paths at random)", missing),
    ("paths that nothing fills (another option, or fresh=)", empty),
  ]
  _raise(tensors, problems)
  return chosen


def _compare(tensors: Tensors, conversions: list[Conversion], ours: Mapping[str, Any]) -> None:
  """Raises ValueError listing all tensors of another shape or dtype."""
  shapes, dtypes = [], []
  for conversion in conversions:
    if conversion.layer == 0 and ours[conversion.ours[0]].shape[0] != conversion.row.layers:
      shapes.append(
        f"{conversion.row.theirs} has {conversion.row.layers} layers, {conversion.ours[0]}"
        f" {ours[conversion.ours[0]].shape[0]}"
      )
    for key, shape in zip(
      conversion.theirs, table.expected(slices.as_in_file(tensors, conversion))
    ):
      entry = tensors[key]
      one_layer = entry.shape if conversion.their_layer is None else entry.shape[1:]
      if conversion.their_layer is not None and entry.shape[:1] != (conversion.row.layers,):
        shapes.append(f"{key} {list(entry.shape)}, the model has {conversion.row.layers} layers")
      elif one_layer != shape:
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
  """{path: the sources of its layers, or of the whole array}."""
  pieces: dict[str, list[slices.Piece]] = {}
  for conversion in plan.conversions:
    for i, path in enumerate(conversion.ours):
      if path in plan.shapes:
        pieces.setdefault(path, []).append((conversion, i))
  return pieces


def _matches(pattern: str, name: str) -> bool:
  """Whether a regular expression, if any, matches."""
  return bool(pattern) and re.search(pattern, name) is not None


def _raise(tensors: Tensors, problems: list[tuple[str, list[str]]]) -> None:
  """Raises ValueError listing the problems, {problem: names}, if there are any."""
  lines = [f"{what}: {tree.shown(names, sep=', ', width=300)}" for what, names in problems if names]
  if lines:
    raise ValueError(f"{tensors.path}: " + "\n".join(lines))
