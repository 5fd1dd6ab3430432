"""Random access to Parquet files that hold encoded images, as the Hugging Face hub has them."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints, storage
from bigalign.data.files.cache import Recent
from bigalign.data.files.patterns import expand_shards
from bigalign.data.samples import columns
from bigalign.data.samples.rejects import Rejected

_TAIL = 1 << 16  # bytes of a remote file in which its footer is sought first
_FOOTERS = 1024  # of remote files, kept by each process
_ROOM = 1 << 29  # bytes of row groups that a process keeps
_CAPTIONS = ("caption", "captions", "text", "txt", "title")


class Parquet:
  """One row per sample in Parquet files. A whole row group is read at once and kept for a while.

  image     the column of the encoded images, bytes or Hugging Face's struct of bytes and path; by
            default image, or jpg, png, … as img2dataset writes them
  captions  columns of strings or lists of them, in order of preference; "a.b" is a struct's field
  label     the column of the integer class, used if it is there; Hugging Face's ClassLabel brings
            the names of the classes
  block     how many consecutive samples are read at once: the largest row group. An order that
            jumps from sample to sample reads a row group for each; one that shuffles blocks of
            this many reads each about once.

  Row groups of up to 512 MiB in all are kept by each process, always at least one.
  """

  def __init__(
    self,
    pattern: str,
    *,
    image: str | None = None,
    captions: Sequence[str] = _CAPTIONS,
    label: str = "label",
  ):
    self.pattern = pattern
    self._paths = expand_shards(pattern)
    self._label = label
    self._footers = Recent(_footer, room=_FOOTERS)
    metadata = [_open(path, "metadata", self._footers) for path in self._paths]
    schema = metadata[0].schema.to_arrow_schema()
    what = repr(pattern)
    self._image = columns.image_column(schema.names, image, what=what)
    columns.check_captions(schema.names, captions, label=label, what=what)
    self.captions = tuple(captions)
    wanted = {self._image, label, *captions, *(path.partition(".")[0] for path in captions)}
    self._columns = [name for name in schema.names if name in wanted]
    self._others = [name for name in schema.names if name not in wanted]
    rows = [[each.row_group(g).num_rows for g in range(each.num_row_groups)] for each in metadata]
    # Row group g of all: its file, its place there, and its first sample.
    self._files = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
    self._places = np.concatenate([np.arange(len(each)) for each in rows])
    self._firsts = np.cumsum(np.concatenate([[0], *rows]).astype(np.int64))
    if not len(self):
      raise ValueError(f"{pattern!r}: no rows in {len(self._paths)} files")
    self.block = max(max(each, default=0) for each in rows)
    self.classnames = _classnames(schema, label)
    self.fingerprint = fingerprints.of_files(self._paths)
    self._groups = Recent(self._read, room=_ROOM)
    self._rest = Recent(functools.partial(self._read, others=True), room=_ROOM)

  def __repr__(self) -> str:
    return f"Parquet({self.pattern!r})"

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    group, place = self._place(i)
    row = _row(self._groups[group], place)
    key = self.key(i)
    image = _bytes(row[self._image])
    if image is None:
      raise Rejected("no_image", f"{key}: no bytes in the column {self._image!r}")
    return dict(
      image=image,
      key=key,
      **columns.texts(row, self.captions),
      label=columns.label(row.get(self._label), column=self._label, key=key),
    )

  def key(self, i: int) -> str:
    """The key of row i."""
    group, place = self._place(i)
    return f"{os.path.basename(self._paths[self._files[group]])}/{self._places[group]}.{place}"

  def where(self, i: int) -> tuple[str, int, int]:
    """The file of row i, its place there, and how many rows it has."""
    group, _ = self._place(i)
    first, end = np.searchsorted(self._files, self._files[group] + np.array([0, 1])).tolist()
    return (
      self._paths[self._files[group]],
      i - int(self._firsts[first]),
      int(self._firsts[end] - self._firsts[first]),
    )

  def fields(self, i: int) -> dict[str, Any]:
    """The columns of row i; of the image its bytes."""
    group, place = self._place(i)
    row = _row(self._groups[group], place)
    return {**row, self._image: _bytes(row[self._image]), **_row(self._rest[group], place)}

  def _place(self, i: int) -> tuple[int, int]:
    """The row group of row i, and its place there."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    group = int(np.searchsorted(self._firsts, i, side="right")) - 1
    return group, i - int(self._firsts[group])

  def _read(self, group: int, *, others: bool = False) -> tuple[Any, int]:
    path = self._paths[self._files[group]]
    with _open(path, "ParquetFile", self._footers) as file:
      # One thread: the workers are the parallelism.
      table = file.read_row_group(
        int(self._places[group]),
        columns=self._others if others else self._columns,
        use_threads=False,
      ).combine_chunks()
    return table, table.nbytes


def _row(table: Any, place: int) -> dict[str, Any]:
  return {name: table.column(name)[place].as_py() for name in table.column_names}


def _bytes(image: Any) -> Any:
  return image.get("bytes") if isinstance(image, dict) else image


def _open(path: str, kind: str, footers: Recent) -> Any:
  """pyarrow's view of a file: "metadata", or a "ParquetFile" to read from."""
  import pyarrow  # a tenth of a second that other sources need not wait
  from pyarrow import parquet

  try:
    if storage.is_remote(path):
      metadata, ranges = footers[path]
      return (
        metadata
        if kind == "metadata"
        else parquet.ParquetFile(
          pyarrow.PythonFile(storage.Ranges(path, *ranges), "r"), metadata=metadata, pre_buffer=True
        )
      )  # neighbouring columns come with one request
    return parquet.read_metadata(path) if kind == "metadata" else parquet.ParquetFile(path)
  except pyarrow.ArrowInvalid as error:
    size = "" if storage.is_remote(path) else f" ({os.path.getsize(path)} bytes)"
    raise ValueError(f"{path}: not a whole Parquet file{size}: {error}. Fetch it again.") from error


def _footer(path: str) -> tuple[Any, int]:
  """The metadata of a remote file, with the size of what is read of it and which file it is; 1."""
  from pyarrow import parquet

  data, found = storage.tail(path, _TAIL)
  length = int.from_bytes(data[-8:-4], "little") + 8
  if length > len(data):
    data, found = storage.tail(path, length)
  metadata = parquet.read_metadata(io.BytesIO(data))
  parts = [
    metadata.row_group(g).column(c)
    for g in range(metadata.num_row_groups)
    for c in range(metadata.num_columns)
  ]
  ends = [
    min(filter(None, (part.dictionary_page_offset, part.data_page_offset)))
    + part.total_compressed_size
    for part in parts
  ]
  return (metadata, (max(ends, default=0), found)), 1


def _classnames(schema: Any, label: str) -> tuple[str, ...]:
  """The names that Hugging Face's datasets library leaves in the schema."""
  metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
  return tuple(metadata.get("info", {}).get("features", {}).get(label, {}).get("names") or ())
