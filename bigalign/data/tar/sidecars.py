"""Captions from a second file beside each shard, such as recaptions, in the order of its samples.

A field "recap.parquet:caption" is the column `caption` of 00000.recap.parquet beside 00000.tar; a
.jsonl has an object a line. The column `key` tells which sample a row belongs to, by its name in
the tar without the extension; rows come in any order, several of one sample are several captions.

  bigalign index 'DIR/{00000..00099}.tar' --sidecars recap.parquet:caption

writes what training reads at random, beside the index:

  bigalign.sidecars/00000.tar.STAMP.recap.parquet:caption   STAMP as of stats.py
    16 bytes     size (int64) and stamp (uint64) of the file that was read
    8 (N + 1)    uint64: where the captions of sample i begin in this file, and where the last end
    text         of each sample a JSON list of captions; nothing, if it has none
"""

from __future__ import annotations

import io
import json
import os
import shlex
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigalign.data.files import storage
from bigalign.data.samples import columns
from bigalign.data.tar import index, parse
from bigalign.data.tar.shards import CHECKED, Shards

FOLDER = "bigalign.sidecars"
KEY = "key"
_STAT = struct.Struct("<qQ")
_SPAN = struct.Struct("<QQ")


def is_field(name: str) -> bool:
  """Whether a caption field lies in a sidecar: "recap.parquet:caption"."""
  return ":" in name


def path_of(name: str, place: str, stat: storage.Stat, field: str) -> str:
  """Where the captions of a shard lie; `place` is the folder of its index."""
  return os.path.join(place, FOLDER, f"{name}.{stat.stamp:016x}.{field}")


def sidecar_of(path: str, field: str) -> str:
  """The second file of a shard."""
  return f"{path.removesuffix('.tar')}.{field.partition(':')[0]}"


def is_current(path: str, place: str, stat: storage.Stat, field: str) -> bool:
  """Whether they were written of the sidecar as it is now, or as it was before it was removed."""
  written = path_of(os.path.basename(path), place, stat, field)
  if not os.path.exists(written):
    return False
  try:
    now = storage.stat(sidecar_of(path, field))
  except FileNotFoundError:
    return True
  return storage.read(written, 0, _STAT.size) == _STAT.pack(*now)


def write(path: str, place: str, field: str) -> None:
  """Puts the captions of an indexed shard in the order of its samples.

  Raises:
    ValueError: if the sidecar has no such column, or no row for any sample.
    FileNotFoundError: if there is no sidecar; an empty .jsonl says that no sample has a caption.
  """
  name, source = os.path.basename(path), sidecar_of(path, field)
  located = index.locate(name, place)
  if located is None:
    raise ValueError(f"{path} is not in the index in {place}")
  part = located[0].part(located[1])
  stat = storage.stat(source)
  texts: dict[str, list[str]] = {}
  for key, found in _rows(source, field.partition(":")[2]):
    texts.setdefault(key, []).extend(found)
  with index.buffer_of(path) as buffer:
    keys = parse.scan(buffer, path=path).keys
  if texts and not any(key in texts for key in keys):
    raise ValueError(
      f"{source} tells of none of the samples of {name}: its keys are such as"
      f" {next(iter(texts))!r}, those of the shard such as {keys[0]!r}"
    )
  parts = [
    json.dumps(texts[key], ensure_ascii=False).encode("utf-8", "replace") if texts.get(key) else b""
    for key in keys
  ]
  first = _STAT.size + 8 * (len(parts) + 1)
  ends = first + np.cumsum([0, *map(len, parts)], dtype=np.uint64)
  os.makedirs(os.path.join(place, FOLDER), exist_ok=True)
  with storage.whole(path_of(name, place, part.stat, field), mark=storage.own_mark()) as file:
    file.write(_STAT.pack(*stat) + ends.astype("<u8").tobytes() + b"".join(parts))


def _rows(path: str, column: str) -> Iterator[tuple[str, tuple[str, ...]]]:
  """(key, captions) of each row of a sidecar."""
  with io.BufferedReader(storage.Stream(path)) as file:
    data = file.read()
  for row in _parquet(data, path, column) if path.endswith("parquet") else _json(data, path):
    missing = [name for name in (KEY, column) if name not in row]
    if missing:
      raise ValueError(f"{path}: no column {missing[0]!r}; the columns there are: {sorted(row)}")
    yield str(row[KEY]), columns.texts(row, (column,))["captions"]


def _parquet(data: bytes, path: str, column: str) -> list[dict[str, Any]]:
  import pyarrow  # a tenth of a second that other sources need not wait
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(pyarrow.BufferReader(data))
  except pyarrow.ArrowInvalid as error:
    raise ValueError(f"{path}: not a whole Parquet file: {error}") from error
  names = file.schema_arrow.names
  chosen = [name for name in (KEY, column) if name in names]
  rows: list[dict[str, Any]] = file.read(chosen).to_pylist()
  return rows if len(chosen) == 2 else [dict.fromkeys(names)]


def _json(data: bytes, path: str) -> Iterator[dict[str, Any]]:
  for number, line in enumerate(data.decode("utf-8", "replace").split("\n"), 1):
    if line.strip():
      try:
        row = json.loads(line)
      except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
      if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: a {type(row).__name__}, expected an object")
      yield row


class Sidecars:
  """The captions of a field of chosen shards.

  Raises:
    FileNotFoundError: if some were not written, with the command.
    storage.Changed: if a sidecar of a local shard is another one than was read.
  """

  def __init__(self, shards: Shards, field: str, *, pattern: str):
    self._shards, self._field = shards, field
    command = f"bigalign index {shlex.quote(pattern)} --sidecars {shlex.quote(field)}"
    there = {
      place: set(os.listdir(folder) if os.path.isdir(folder) else ())
      for place in {shards.place(n) for n in range(len(shards.paths))}
      for folder in [os.path.join(place, FOLDER)]
    }
    lacking = [
      path
      for n, path in enumerate(shards.paths)
      if os.path.basename(self._path(n)) not in there[shards.place(n)]
    ]
    if lacking:
      raise FileNotFoundError(
        f"the field {field!r} of {len(lacking)} of {len(shards.paths)} shards was not read from"
        f" beside them (the first: {lacking[0]}); read it: {command}"
      )
    for n in range(0, len(shards.paths), -(-len(shards.paths) // CHECKED)):
      path = shards.paths[n]
      if not storage.is_remote(path) and not is_current(
        path, shards.place(n), shards.stat(n), field
      ):
        raise storage.Changed(
          f"{sidecar_of(path, field)} changed since it was read; read it again: {command}"
        )

  def texts(self, i: int, shard: int) -> tuple[str, ...]:
    """The captions of sample i, which lies in that shard."""
    path = self._path(shard)
    place = _STAT.size + 8 * (i - self._shards.firsts[shard])
    start, end = _SPAN.unpack(storage.read(path, place, place + 16))
    return tuple(json.loads(storage.read(path, start, end))) if end > start else ()

  def _path(self, shard: int) -> str:
    return path_of(
      os.path.basename(self._shards.paths[shard]),
      self._shards.place(shard),
      self._shards.stat(shard),
      self._field,
    )
