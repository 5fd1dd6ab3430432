"""Random access to Parquet files that hold encoded images, as on the Hugging Face hub."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.files import fingerprints, regular, storage
from bigalign.data.files.cache import LRUCache
from bigalign.data.files.patterns import expand_shards, expand_variables
from bigalign.data.samples import columns
from bigalign.data.samples.image_values import image_bytes
from bigalign.data.samples.labels import Labels
from bigalign.data.samples.members import entry
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.webdataset import classnames_near
from bigalign.tree import cut

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
    image: the column of the encoded images: bytes, also as base64 or as a list of integers; paths
      relative to the folder of a local file; or Hugging Face's struct of bytes and path. By default
      image, or jpg, png, ... as img2dataset writes them.
    captions: columns of strings or lists of strings, in order of preference; "a.b" is the field b
      of a struct a, or of each struct in a list a.
    label: the column of the class, if it exists: an integer or a name (samples/labels.py). The
      names of the classes come from Hugging Face's ClassLabel, or else from a classnames.txt, as
      for webdataset shards.
    root: a folder that image files may be in besides that of the Parquet file, as for tables.
    images: whether images are read; if not, samples need none, and a record has image=b"".
    frames: whether a sample may have several images, as a list in the column; a record's image is
      then a list of them.

  Raises:
    ValueError: if there are no rows; for a file without the image column, or without caption
      columns and label, or with a column of a type that is not accepted: names file, column, type.

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
    root: str | None = None,
    images: bool = True,
    frames: bool = False,
  ):
    self.pattern = pattern
    self._frames = frames
    self._root = root and os.path.expanduser(expand_variables(root, what="source_options.root"))
    self._paths = expand_shards(pattern)
    self._label = label
    self._footers = LRUCache(_footer, capacity=_FOOTERS)
    with storage.requests(self._paths) as pool:
      read = functools.partial(_open, kind="metadata", footers=self._footers)
      metadata = list(pool.map(read, self._paths))
    self.captions = tuple(captions)
    schemas = [_schema(file, path) for file, path in zip(metadata, self._paths)]
    # A file without rows may have a schema without types.
    filled = [n for n, file in enumerate(metadata) if file.num_rows] or [0]
    first = schemas[filled[0]]
    self._image = (
      columns.image_column(first.names, image, what=self._paths[filled[0]]) if images else None
    )
    for n in filled:
      _check(
        schemas[n],
        self._paths[n],
        image=self._image,
        captions=self.captions,
        label=label,
        frames=frames,
      )
    columns.warn_of_differences(
      {self._paths[n]: {*schemas[n].names} for n in filled}, [*self.captions, label]
    )
    self._wanted = {label, *captions, *(path.partition(".")[0] for path in captions)}
    self._wanted |= {self._image} if self._image else set()
    rows = [[file.row_group(g).num_rows for g in range(file.num_row_groups)] for file in metadata]
    # For each row group of all files: its file, its place there, and its first sample.
    self._files = np.repeat(np.arange(len(rows)), [len(groups) for groups in rows])
    self._places = np.concatenate([np.arange(len(groups)) for groups in rows])
    self._firsts = np.cumsum(np.concatenate([[0], *rows]).astype(np.int64))
    if not len(self):
      raise ValueError(f"{pattern!r}: no rows in {len(self._paths)} files")
    self.block = max(max(groups, default=0) for groups in rows)
    self.classnames = _classnames(first, label) or classnames_near(self._paths[0])
    self.labels = Labels(self.classnames, what=label)
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
    key = self.key(i)
    row = self._row(i, self._groups)
    return dict(
      image=self._image_bytes(i, row[self._image], key=key) if self._image else b"",
      key=key,
      **columns.texts(row, self.captions),
      label=self.labels(row.get(self._label), key=key),
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
    """Returns {column: value} of row i; of the image its bytes, None without."""
    row = self._row(i, self._groups) | self._row(i, self._other_columns)
    if not self._image:
      return row
    image = None
    with contextlib.suppress(Rejected):
      image = self._image_bytes(i, row[self._image], key=self.key(i))
    return {**row, self._image: image}

  def value(self, i: int, path: str) -> Any:
    """Returns the value of a column of row i; reads the image only if that is the column."""
    name = path.partition(".")[0]
    groups = self._groups if {path, name} & self._wanted else self._other_columns
    return entry(self._row(i, groups), path)

  def _row(self, i: int, groups: LRUCache[int, Any]) -> dict[str, Any]:
    """{column: value} of row i; raises Rejected if its row group cannot be read."""
    group, place = self._place(i)
    table = groups[group]
    if isinstance(table, str):
      raise Rejected("undecodable", table)
    return {name: _value(table.column(name)[place]) for name in table.column_names}

  def _image_bytes(self, i: int, value: Any, *, key: str) -> bytes | list[bytes]:
    path = self._paths[self._files[self._place(i)[0]]]
    # A list of integers, the bytes of one image, is an array.
    cells = value if self._frames and isinstance(value, list) else [value]
    found = [image_bytes(x, folder=os.path.dirname(path), root=self._root, key=key) for x in cells]
    images = [image for image in found if image is not None]
    if not images or len(images) < len(found):
      raise Rejected("no_image", f"{key}: no bytes in the column {self._image!r}")
    return images if self._frames else images[0]

  def _place(self, i: int) -> tuple[int, int]:
    """The row group of row i, and its place there."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    group = int(np.searchsorted(self._firsts, i, side="right")) - 1
    return group, i - int(self._firsts[group])

  def _read(self, group: int, *, others: bool = False) -> tuple[Any, int]:
    """A row group and its size in bytes, or why it cannot be read: its columns, or all others."""
    import pyarrow  # takes 0.1 s, which other sources need not wait for

    path, place = self._paths[self._files[group]], int(self._places[group])
    try:
      with _open(path, "ParquetFile", self._footers) as file:
        names = file.schema_arrow.names
        # One thread, because several workers read at once.
        table = file.read_row_group(
          place,
          columns=[name for name in names if (name in self._wanted) != others],
          use_threads=False,
        ).combine_chunks()
    except (OSError, pyarrow.ArrowException) as error:
      if not _is_corrupt(error, path):
        raise
      # The rows of the group are rejected, and the group is not read again while this is kept.
      return f"{path}: row group {place}: {error}", 1
    expected = int(self._firsts[group + 1] - self._firsts[group])
    if table.num_columns and table.num_rows != expected:
      return f"{path}: row group {place} has {table.num_rows} rows, not {expected}", 1
    return table, table.nbytes


def _value(scalar: Any) -> Any:
  """The Python value of a cell; invalid UTF-8 becomes U+FFFD, lists of integers numpy arrays."""
  import pyarrow

  if not scalar.is_valid:
    return None
  values = getattr(scalar, "values", None)
  if isinstance(values, pyarrow.Array) and pyarrow.types.is_integer(values.type):
    return values.to_numpy(zero_copy_only=False)
  try:
    return scalar.as_py()
  except UnicodeDecodeError:
    return _repaired(scalar)


def _repaired(scalar: Any) -> Any:
  import pyarrow

  if not scalar.is_valid:
    return None
  if isinstance(scalar, pyarrow.ListScalar | pyarrow.LargeListScalar):
    return [_repaired(part) for part in scalar.values]
  if isinstance(scalar, pyarrow.StructScalar):
    return {name: _repaired(part) for name, part in scalar.items()}
  if isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar):
    return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
  return scalar.as_py()


def _schema(metadata: Any, path: str) -> Any:
  import pyarrow

  try:
    schema = metadata.schema.to_arrow_schema()
    counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise ValueError(f"{path}: the schema of this Parquet file cannot be read: {error}") from error
  if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
    raise ValueError(
      f"{path}: the footer of this Parquet file is damaged: {tree.shown(counts)} rows in row"
      f" groups, {metadata.num_rows} in all. Fetch it again."
    )
  return schema


def _check(
  schema: Any,
  path: str,
  *,
  image: str | None,
  captions: Sequence[str],
  label: str,
  frames: bool,
) -> None:
  """Raises ValueError if a file lacks columns, or they have types that are not accepted."""
  twice = [name for name, n in collections.Counter(schema.names).items() if n > 1]
  if twice:
    raise ValueError(f"{path}: several columns have the name {tree.shown(twice)}")
  if image is not None:
    columns.image_column(schema.names, image, what=path)
  kind = None if image is None else schema.field(image).type
  inner = getattr(kind, "value_type", None) if frames else None
  several = inner is not None and _is_image(inner)
  if kind is not None and not _is_image(kind) and not several:
    raise ValueError(
      f"{path}: the image column {image!r} has the type {kind}. Accepted are binary, a string (a"
      " path or base64), a list of integers (the bytes), and a struct of bytes and path."
      + columns.IMAGE_ADVICE
    )
  usable = []
  for name in captions:
    column, _, rest = (name, "", "") if name in schema.names else name.partition(".")
    if column not in schema.names:
      continue
    leaf = _leaf(schema.field(column).type, rest)
    if leaf is None:
      raise ValueError(
        f"{path}: no caption field {name!r}: the column {column!r} has the type"
        f" {cut(str(schema.field(column).type), 300)}." + columns.CAPTION_ADVICE
      )
    if _is_text(leaf):
      usable.append(name)
    elif captions != _CAPTIONS:
      raise ValueError(
        f"{path}: the caption field {name!r} has the type {cut(str(leaf), 300)}; accepted are"
        " strings and lists of strings. A field b of a struct a is written 'a.b'."
        + columns.CAPTION_ADVICE
      )
  columns.check_captions(
    [name for name in schema.names if name not in captions or name in usable],
    captions,
    label=label,
    what=path,
  )


def _leaf(kind: Any, path: str) -> Any:
  """The type of the field at a path, inside of lists and structs; None if there is none."""
  from pyarrow import types

  while types.is_nested(kind) and hasattr(kind, "value_type"):
    kind = kind.value_type
  if not path:
    return kind
  if not types.is_struct(kind):
    return None
  names = [field.name for field in kind.fields]
  first, _, rest = (path, "", "") if path in names else path.partition(".")
  return _leaf(kind.field(first).type, rest) if first in names else None


def _is_text(kind: Any) -> bool:
  """Whether a column holds texts or bytes, also as a dictionary; or nulls only."""
  from pyarrow import types

  plain = kind.value_type if types.is_dictionary(kind) else kind
  tests = (
    *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
    *(types.is_string, types.is_large_string, types.is_string_view, types.is_null),
  )
  return any(test(plain) for test in tests)


def _is_image(kind: Any) -> bool:
  from pyarrow import types

  if types.is_struct(kind):
    fields = {field.name: field.type for field in kind.fields}
    return any(
      name in fields and _is_text(fields[name]) and not types.is_null(fields[name])
      for name in ("bytes", "path")
    )
  if types.is_nested(kind) and hasattr(kind, "value_type"):
    return bool(types.is_integer(kind.value_type))
  return _is_text(kind)


def _is_corrupt(error: Exception, path: str) -> bool:
  """Whether pyarrow says that a file is damaged; errors of the disk and of stores are others.

  pyarrow raises OSError without a number for damaged data; errors of storage.py begin with the
  path.
  """
  return not isinstance(error, OSError) or (
    type(error) is OSError and error.errno is None and not str(error).startswith(path)
  )


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
    regular.check(path)
    return parquet.read_metadata(path) if kind == "metadata" else parquet.ParquetFile(path)
  except (pyarrow.ArrowException, OSError) as error:
    if not _is_corrupt(error, path):
      raise
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
  try:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = metadata.get("info", {}).get("features", {}).get(label, {}).get("names")
    return tuple(map(str, names or ()))
  except (ValueError, RecursionError, AttributeError, TypeError):  # written by something else
    return ()
