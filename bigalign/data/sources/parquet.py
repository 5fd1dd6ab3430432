"""Random access to Parquet files that hold encoded images, as on the Hugging Face hub."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints, storage
from bigalign.data.files.cache import LRUCache
from bigalign.data.files.patterns import expand_shards
from bigalign.data.samples import columns
from bigalign.data.samples.rejects import Rejected

_TAIL = 1 << 16  # bytes of a remote file that are read first to find its footer
_FOOTERS = 1024  # of remote files, kept by each process
_CACHE_BYTES = 1 << 29  # of row groups, kept by each process
_CAPTIONS = ("caption", "captions", "text", "txt", "title")


class Parquet:
  """Random access to Parquet files with a row per sample.

  A row group is read at once, and each process keeps row groups of up to 512 MiB in total, but at
  least one. `block` is the size of the largest row group: an order that jumps from sample to sample
  reads a row group for each sample, and one that shuffles blocks of this size reads each about
  once.

  Args:
    pattern: of the files, local or remote.
    image: the column of the encoded images, bytes or Hugging Face's struct of bytes and path. By
      default image, or jpg, png, ... as img2dataset writes them.
    captions: columns of strings or lists of strings, in order of preference; "a.b" is the field b
      of a struct a.
    label: the column of the integer class, if it exists. Hugging Face's ClassLabel also holds the
      names of the classes.

  Raises:
    ValueError: if there are no rows, no image column, or no caption column and no label.

  Example:
    >>> import pyarrow, pyarrow.parquet, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> table = pyarrow.table(dict(image=[b"an encoded image"], caption=["a photo of a cat"]))
    >>> pyarrow.parquet.write_table(table, f"{folder.name}/0.parquet")
    >>> source = Parquet(f"{folder.name}/*.parquet", captions=("caption",))
    >>> source[0]["key"], source[0]["captions"]
    ('0.parquet/0.0', ('a photo of a cat',))
    >>> folder.cleanup()
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
    self._footers = LRUCache(_footer, capacity=_FOOTERS)
    metadata = [_open(path, "metadata", self._footers) for path in self._paths]
    schema = metadata[0].schema.to_arrow_schema()
    what = repr(pattern)
    self._image = columns.image_column(schema.names, image, what=what)
    columns.check_captions(schema.names, captions, label=label, what=what)
    self.captions = tuple(captions)
    wanted = {self._image, label, *captions, *(path.partition(".")[0] for path in captions)}
    self._columns = [name for name in schema.names if name in wanted]
    self._others = [name for name in schema.names if name not in wanted]
    rows = [[file.row_group(g).num_rows for g in range(file.num_row_groups)] for file in metadata]
    # For each row group of all files: its file, its place there, and its first sample.
    self._files = np.repeat(np.arange(len(rows)), [len(groups) for groups in rows])
    self._places = np.concatenate([np.arange(len(groups)) for groups in rows])
    self._firsts = np.cumsum(np.concatenate([[0], *rows]).astype(np.int64))
    if not len(self):
      raise ValueError(f"{pattern!r}: no rows in {len(self._paths)} files")
    self.block = max(max(groups, default=0) for groups in rows)
    self.classnames = _classnames(schema, label)
    self.fingerprint = fingerprints.of_files(self._paths)
    self._groups = LRUCache(self._read, capacity=_CACHE_BYTES)
    self._other_columns = LRUCache(
      functools.partial(self._read, others=True), capacity=_CACHE_BYTES
    )

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
    """Returns the key of row i."""
    group, place = self._place(i)
    return f"{os.path.basename(self._paths[self._files[group]])}/{self._places[group]}.{place}"

  def where(self, i: int) -> tuple[str, int, int]:
    """Returns the file of row i, its place there, and the rows of the file."""
    group, _ = self._place(i)
    first, end = np.searchsorted(self._files, self._files[group] + np.array([0, 1])).tolist()
    return (
      self._paths[self._files[group]],
      i - int(self._firsts[first]),
      int(self._firsts[end] - self._firsts[first]),
    )

  def fields(self, i: int) -> dict[str, Any]:
    """Returns {column: value} of row i; of the image its bytes."""
    group, place = self._place(i)
    row = _row(self._groups[group], place)
    return {**row, self._image: _bytes(row[self._image]), **_row(self._other_columns[group], place)}

  def _place(self, i: int) -> tuple[int, int]:
    """The row group of row i, and its place there."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    group = int(np.searchsorted(self._firsts, i, side="right")) - 1
    return group, i - int(self._firsts[group])

  def _read(self, group: int, *, others: bool = False) -> tuple[Any, int]:
    """A row group and its size in bytes: the columns of a record, or all others."""
    path = self._paths[self._files[group]]
    with _open(path, "ParquetFile", self._footers) as file:
      # One thread, because several workers read at once.
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


def _open(path: str, kind: str, footers: LRUCache[str, Any]) -> Any:
  """The "metadata" of a file, or a "ParquetFile" to read from."""
  import pyarrow  # takes 0.1 s, which other sources need not wait for
  from pyarrow import parquet

  try:
    if storage.is_remote(path):
      metadata, ranges = footers[path]
      if kind == "metadata":
        return metadata
      file = pyarrow.PythonFile(storage.SeekableFile(path, *ranges), "r")
      # pre_buffer reads adjacent columns with one request.
      return parquet.ParquetFile(file, metadata=metadata, pre_buffer=True)
    return parquet.read_metadata(path) if kind == "metadata" else parquet.ParquetFile(path)
  except pyarrow.ArrowInvalid as error:
    size = "" if storage.is_remote(path) else f" ({os.path.getsize(path)} bytes)"
    raise ValueError(
      f"{path}: not a complete Parquet file{size}: {error}. Fetch it again."
    ) from error


def _footer(path: str) -> tuple[Any, int]:
  """((metadata, (end of the data, Stat)), 1) of a remote file; 1 is the size for LRUCache."""
  from pyarrow import parquet

  data, stat = storage.tail(path, _TAIL)
  length = int.from_bytes(data[-8:-4], "little") + 8
  if length > len(data):
    data, stat = storage.tail(path, length)
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
  return (metadata, (max(ends, default=0), stat)), 1


def _classnames(schema: Any, label: str) -> tuple[str, ...]:
  """The names of the classes, which Hugging Face's datasets library writes into the schema."""
  metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
  return tuple(metadata.get("info", {}).get("features", {}).get(label, {}).get("names") or ())
