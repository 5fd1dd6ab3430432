"""Captions and other values from a second file next to each shard, such as recaptions and scores.

A field "recap.parquet:caption" is the column `caption` of 00000.recap.parquet next to 00000.tar; a
.jsonl has one object per line. The column `key` names the sample of a row: its name in the tar
without the extension. Rows may be in any order; several rows of one sample are several captions.

  bigalign index 'DIR/{00000..00099}.tar' --sidecars recap.parquet:caption

writes a file next to the index, in the order of the samples, that training reads at random:

  bigalign.sidecars/00000.tar.STAMP.recap.parquet:caption   STAMP as in stats.py
    16 bytes     size (int64) and stamp (uint64) of the sidecar that was read
    8 (N + 1)    uint64: where the captions of sample i begin in this file, and where the last end
    text         a JSON list of the captions of each sample, or of its other values, such as numbers
                 and lists of numbers; nothing for a sample without
"""

from __future__ import annotations

import io
import json
import os
import shlex
import struct
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from bigalign import tree
from bigalign.data.files import lines, storage
from bigalign.data.files.draws import draw
from bigalign.data.samples import columns
from bigalign.data.tar import index, parse
from bigalign.data.tar.shards import CHECKED, Shards

FOLDER = "bigalign.sidecars"
KEY = "key"
_STAT = struct.Struct("<qQ")
_SPAN = struct.Struct("<QQ")


def is_field(name: str) -> bool:
  """Returns whether a caption field is in a sidecar, such as "recap.parquet:caption"."""
  return ":" in name


def path_of(name: str, index_folder: str, stat: storage.Stat, field: str) -> str:
  """Returns the path of the captions of a shard, next to its index."""
  return os.path.join(index_folder, FOLDER, f"{name}.{stat.stamp:016x}.{field}")


def sidecar_of(path: str, field: str) -> str:
  """Returns the path of a shard's sidecar."""
  return f"{path.removesuffix('.tar')}.{field.partition(':')[0]}"


def is_current(path: str, index_folder: str, stat: storage.Stat, field: str) -> bool:
  """Returns whether the captions of a shard are those of its sidecar, or of one since removed."""
  written = path_of(os.path.basename(path), index_folder, stat, field)
  if not os.path.exists(written):
    return False
  try:
    now = storage.stat(sidecar_of(path, field))
  except FileNotFoundError:
    return True
  return storage.read(written, 0, _STAT.size) == _STAT.pack(*now)


def write(path: str, index_folder: str, field: str) -> None:
  """Writes the captions of an indexed shard in the order of its samples.

  Args:
    path: of the shard.
    index_folder: of its index.
    field: such as "recap.parquet:caption".

  Raises:
    ValueError: if the shard is not indexed, or the sidecar lacks the column or has no row for any
      sample.
    FileNotFoundError: if there is no sidecar. An empty .jsonl is one: no sample has a caption.
  """
  name, source = os.path.basename(path), sidecar_of(path, field)
  located = index.locate(name, index_folder)
  if located is None:
    raise ValueError(f"{path} is not in the index in {index_folder}")
  part = located[0].part(located[1])
  stat = storage.stat(source)
  texts: dict[str, list[Any]] = {}
  for key, captions in _rows(source, field.partition(":")[2]):
    texts.setdefault(key, []).extend(captions)
  with index.open_buffer(path) as buffer:
    keys = parse.scan(buffer, path=path).keys
  if texts and not any(key in texts for key in keys):
    raise ValueError(
      f"{source} has no row for any sample of {name}: its keys are like"
      f" {next(iter(texts))!r}, and those of the shard like {keys[0]!r}"
    )
  parts = [
    json.dumps(texts[key], ensure_ascii=False).encode("utf-8", "replace") if texts.get(key) else b""
    for key in keys
  ]
  first = _STAT.size + 8 * (len(parts) + 1)
  ends = first + np.cumsum([0, *map(len, parts)], dtype=np.uint64)
  os.makedirs(os.path.join(index_folder, FOLDER), exist_ok=True)
  target = path_of(name, index_folder, part.stat, field)
  with storage.atomic_write(target, suffix=storage.unique_suffix()) as file:
    file.write(_STAT.pack(*stat) + ends.astype("<u8").tobytes() + b"".join(parts))


def _rows(path: str, column: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
  """Yields (key, captions) of each row of a sidecar; without captions the value, if it is one."""
  with io.BufferedReader(storage.Stream(path)) as file:
    rows: Iterable[dict[str, Any]] = (
      _parquet_rows(file.read(), path, column)
      if path.endswith("parquet")
      else _json_rows(file, path)
    )
    for row in rows:
      missing = [name for name in (KEY, column) if name not in row]
      if missing:
        raise ValueError(
          f"{path}: no column {missing[0]!r}; the columns are: {tree.shown(sorted(row))}"
        )
      captions = columns.texts(row, (column,))["captions"]
      yield str(row[KEY]), captions or _other_value(row[column])


def _other_value(value: Any) -> tuple[Any, ...]:
  """A number, or a nest of lists of numbers, as a tuple of one; () for anything else."""
  left = [value]
  while left:
    part = left.pop()
    if isinstance(part, list):
      left += part
    elif not isinstance(part, int | float):
      return ()
  return (value,)


def _parquet_rows(data: bytes, path: str, column: str) -> list[dict[str, Any]]:
  """The key and the caption column of all rows; if one is missing, one row with all columns."""
  import pyarrow  # takes 0.1 s, which other sources need not wait for
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(pyarrow.BufferReader(data))
  except pyarrow.ArrowInvalid as error:
    raise ValueError(f"{path}: not a complete Parquet file: {error}") from error
  names = file.schema_arrow.names
  chosen = [name for name in (KEY, column) if name in names]
  rows: list[dict[str, Any]] = file.read(chosen).to_pylist()
  return rows if len(chosen) == 2 else [dict.fromkeys(names)]


def _json_rows(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
  for number, line in enumerate(lines.iterate(file, name=path), 1):
    if line.strip():
      try:
        row = json.loads(line.decode("utf-8", "replace"))
      except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
      if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: a {type(row).__name__}, expected an object")
      yield row


class Sidecars:
  """The captions of one field of chosen shards.

  Args:
    shards: whose samples have the captions.
    field: such as "recap.parquet:caption".
    pattern: names the shards in errors.

  Raises:
    FileNotFoundError: if captions of some shards were not written; gives the command.
    storage.FileChanged: if the sidecar of a local shard changed since it was read.
  """

  def __init__(self, shards: Shards, field: str, *, pattern: str):
    self._shards, self._field = shards, field
    command = f"bigalign index {shlex.quote(pattern)} --sidecars {shlex.quote(field)}"
    present = {
      index_folder: set(os.listdir(folder) if os.path.isdir(folder) else ())
      for index_folder in {shards.index_folder(n) for n in range(len(shards.paths))}
      for folder in [os.path.join(index_folder, FOLDER)]
    }
    missing = [
      path
      for n, path in enumerate(shards.paths)
      if os.path.basename(self._path(n)) not in present[shards.index_folder(n)]
    ]
    if missing:
      raise FileNotFoundError(
        f"the field {field!r} of {len(missing)} of {len(shards.paths)} shards was not read from"
        f" the files next to them (the first: {missing[0]}); read it: {command}"
      )
    for n in draw(len(shards.paths), CHECKED):
      path = shards.paths[n]
      if not storage.is_remote(path) and not is_current(
        path, shards.index_folder(n), shards.stat(n), field
      ):
        raise storage.FileChanged(
          f"{sidecar_of(path, field)} changed since it was read; read it again: {command}"
        )

  def texts(self, i: int, shard: int) -> tuple[str, ...]:
    """Returns the captions of sample i, which is in that shard."""
    return tuple(text for text in self._values(i, shard) if isinstance(text, str))

  def value(self, i: int, shard: int) -> Any:
    """Returns the value of the first row of sample i, which is in that shard; None without one."""
    return next(iter(self._values(i, shard)), None)

  def _values(self, i: int, shard: int) -> list[Any]:
    path = self._path(shard)
    offset = _STAT.size + 8 * (i - self._shards.firsts[shard])
    start, end = _SPAN.unpack(storage.read(path, offset, offset + 16))
    values: list[Any] = json.loads(storage.read(path, start, end)) if end > start else []
    return values

  def _path(self, shard: int) -> str:
    return path_of(
      os.path.basename(self._shards.paths[shard]),
      self._shards.index_folder(shard),
      self._shards.stat(shard),
      self._field,
    )
