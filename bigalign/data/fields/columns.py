"""Any number or small array of a sample as a field of the batch: config.data.columns."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bigalign.data.fields import column_files
from bigalign.data.fields.base import Draws, Sample, Spec
from bigalign.data.files.draws import draw
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, value

DTYPES = ("float32", "int32", "uint8", "bool")
_PROBES = 64  # samples that are read when a column is opened


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnOptions:
  """A number or a small array of each sample. A text alone names the field.

  Args:
    field: where the value is stored: "json.noise" (KEY.json of a tar), "npy" (KEY.npy), "txt" (a
      number as text), "scores.parquet:noise" (a file next to each shard, as for captions),
      "stats:width" (a column that `bigalign index --stats` wrote), or the column of a Parquet file
      or a table; "a.b" is the entry b of a.
    file: instead of `field`, a column that a program such as `bigalign score` wrote, without .npy.
    shape: of the array; () for a number.
    dtype: "float32", "int32", "uint8" or "bool".
    ragged: whether the first axis may be shorter than in `shape`: the remainder is 0, and
      NAME_mask [B, shape[0]] says which entries there are.
    default: the value of a sample without one, which is rejected otherwise.
  """

  SHORTHAND: ClassVar[str] = "field"

  field: str = ""
  file: str = ""
  shape: Sequence[int] = ()
  dtype: str = "float32"
  ragged: bool = False
  default: float | None = None

  def __post_init__(self) -> None:
    if bool(self.field) == bool(self.file):
      raise ValueError(
        f"config.data.columns: a column has either a field or a file; got field={self.field!r},"
        f" file={self.file!r}"
      )
    if self.dtype not in DTYPES:
      raise ValueError(f"config.data.columns: dtype={self.dtype!r}; known: {DTYPES}")
    if any(n < 1 for n in self.shape) or (self.ragged and not self.shape):
      raise ValueError(
        f"config.data.columns: shape={tuple(self.shape)}: sizes above 0, and at least one if the"
        " column is ragged"
      )
    if self.file and (self.shape or self.ragged):
      raise ValueError("config.data.columns: a column of a file holds one number per sample")


def spec(columns: Mapping[str, ColumnOptions]) -> Spec:
  """The arrays of all columns."""
  arrays: dict[str, tuple[tuple[int, ...], Any]] = {}
  for name, column in columns.items():
    arrays[name] = (tuple(column.shape), np.dtype(column.dtype))
    if column.ragged:
      arrays[f"{name}_mask"] = ((column.shape[0],), np.dtype(bool))
  return arrays


class Columns:
  """The columns of a source, as a field.

  Args:
    columns: {name: options}.
    source: of the samples.
    taken: names that other fields of a batch have, or would have with other options.

  Raises:
    ValueError: for a name that is taken; if none of the samples drawn from the source
      has a value that can be used, or most values do not have the shape and the type of the
      options; for a file of another source.
  """

  def __init__(
    self, columns: Mapping[str, ColumnOptions], source: Source, *, taken: Collection[str]
  ):
    self._columns, self._source = dict(columns), source
    self.spec = spec(columns)
    for name in self.spec:
      if name in taken or not name.isidentifier():
        raise ValueError(
          f"config.data.columns: {name!r} cannot be the name of a column; choose a name of letters"
          " that no other field of the batch has"
        )
    self._files = {
      name: column_files.ColumnFile(column.file, source, f"config.data.columns.{name}.file")
      for name, column in columns.items()
      if column.file
    }
    for name, column in columns.items():
      if column.field:
        self._check(name, column)

  def read(self, sample: Sample, draws: Draws) -> dict[str, np.ndarray]:
    """{name: array} of a sample.

    Raises:
      Rejected: "no_column" for a sample without a value, "bad_metadata" for a wrong one.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, column in self._columns.items():
      arrays |= self._read(name, column, sample.index, sample.key)
    return arrays

  def stack(self, values: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{name: [b, *shape]}."""
    return {
      name: np.array([one[name] for one in values], dtype).reshape(len(values), *shape)
      for name, (shape, dtype) in self.spec.items()
    }

  def _read(self, name: str, column: ColumnOptions, i: int, key: str) -> dict[str, np.ndarray]:
    where = f"{key}: the column {name!r} ({column.field or column.file})"
    given: Any = self._files[name][i] if column.file else value(self._source, i, column.field)
    if given is None or (column.file and math.isnan(given)):
      if column.default is None:
        raise Rejected("no_column", f"{where} has no value")
      given = np.full(column.shape, column.default)
      if column.ragged:
        given = given[:0]
    array = _array(given, column, where)
    if not column.ragged:
      return {name: array}
    whole = np.zeros(tuple(column.shape), array.dtype)
    whole[: len(array)] = array
    return {name: whole, f"{name}_mask": np.arange(len(whole)) < len(array)}

  def _check(self, name: str, column: ColumnOptions) -> None:
    missing = wrong = 0
    first: Rejected | None = None
    probes = draw(len(self._source), _PROBES)
    for i in probes:
      try:
        self._read(name, column, i, f"sample {i}")
      except Rejected as rejected:
        missing += rejected.reason == "no_column"
        wrong += rejected.reason == "bad_metadata"
        first = first or rejected
    if missing + wrong == len(probes) or 2 * wrong > len(probes):
      raise ValueError(
        f"config.data.columns.{name}: of {len(probes)} samples drawn from {self._source!r},"
        f" {missing} have no value, and {wrong} have one that cannot be used. The first:"
        f" {first.detail if first else ''}"
      )


def _array(given: Any, column: ColumnOptions, where: str) -> np.ndarray:
  """A value as an array of the column's shape and type; raises Rejected."""
  try:
    if isinstance(given, bytes):
      given = (
        np.load(io.BytesIO(given), allow_pickle=False)
        if given.startswith(b"\x93NUMPY")
        else float(given)
      )
    while not column.shape and isinstance(given, list | tuple) and len(given) == 1:
      given = given[0]  # a feature of an ArrayRecord is a list
    if isinstance(given, str):
      given = float(given)
    array = np.asarray(given)
    if column.shape and not array.size:
      array = array.reshape(0, *column.shape[1:])
    if array.dtype.kind not in "biuf":
      raise ValueError(f"{array.dtype} holds no numbers")
    shape = tuple(column.shape)
    fits = array.shape == shape or (
      column.ragged and array.shape[1:] == shape[1:] and len(array) <= shape[0]
    )
    if not fits:
      raise ValueError(f"the shape is {array.shape}, expected {shape}{' or less' * column.ragged}")
    converted = array.astype(column.dtype)
    if not np.isfinite(array.astype(np.float64)).all():
      raise ValueError("not finite")
    if column.dtype != "float32" and not np.array_equal(converted, array):
      raise ValueError(f"{array.ravel()[:4].tolist()} cannot be {column.dtype}")
  except (ValueError, TypeError, OverflowError) as error:
    raise Rejected("bad_metadata", f"{where}: {error}") from None
  return converted
