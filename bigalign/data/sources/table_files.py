"""Random access to .csv, .tsv and .jsonl files with paths of image files and their captions."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints
from bigalign.data.files.patterns import expand_local
from bigalign.data.samples import columns
from bigalign.data.samples.rejects import Rejected

_CHUNK = 1 << 24  # bytes
# Errors of a row, not of the disk.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class TableFiles:
  """Random access to .csv, .tsv or .jsonl files with a row per sample; the images are files.

  The defaults are those of open_clip. A .csv or .tsv begins with the names of its columns; the
  separator is a tab if this line has one, else a comma. Fields in double quotes may hold
  separators, line ends and doubled double quotes. A row takes eight bytes of memory.

  Args:
    pattern: of local tables.
    image: the column of the paths of the image files, relative to the folder of the table.
    captions: columns in order of preference; "a.b" is the entry b of an object a in a .jsonl.
    label: the column of the integer class, if it exists.

  Raises:
    ValueError: if there are no rows, no image column, or neither a caption column nor a label.

  Example:
    >>> import pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> root = pathlib.Path(folder.name)
    >>> _ = (root / "cat.jpg").write_bytes(b"an encoded image")
    >>> _ = (root / "train.csv").write_text("filepath,title\\ncat.jpg,a photo of a cat\\n")
    >>> source = TableFiles(f"{root}/train.csv")
    >>> source[0]["key"], source[0]["captions"]
    ('train.csv/cat.jpg', ('a photo of a cat',))
    >>> folder.cleanup()
  """

  def __init__(
    self,
    pattern: str,
    *,
    image: str = "filepath",
    captions: Sequence[str] = ("title",),
    label: str = "label",
  ):
    self.pattern = pattern
    self.captions = tuple(captions)
    self._image, self._label = image, label
    self._paths = expand_local(pattern, kind="a table of image files")
    self._headers = [_header(path) for path in self._paths]
    self._sizes = [os.path.getsize(path) for path in self._paths]
    starts = [
      row_starts(path, separator=header and header[1])
      for path, header in zip(self._paths, self._headers)
    ]
    self._firsts = np.cumsum([0] + [len(file) - 1 for file in starts])
    # The entries of a file are the starts of its rows, and its end.
    self._starts = np.concatenate(starts)
    if not len(self):
      raise ValueError(f"{pattern!r}: no rows in {len(self._paths)} files")
    self.fingerprint = fingerprints.of_files(self._paths, self._starts.astype("<i8").tobytes())
    self._check()

  def __repr__(self) -> str:
    return f"TableFiles({self.pattern!r})"

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    path, row = self._row(i)
    key = self._key(i, path, row)
    name = row[self._image]
    return dict(
      image=_read_image(os.path.join(os.path.dirname(path), name), key=key),
      key=key,
      **columns.texts(row, self.captions),
      label=columns.label(row.get(self._label), column=self._label, key=key),
    )

  def key(self, i: int) -> str:
    """Returns the key of row i; does not read the image."""
    return self._key(i, *self._row(i))

  def _key(self, i: int, path: str, row: Mapping[str, Any]) -> str:
    name = row.get(self._image)
    if not isinstance(name, str) or not name:
      raise Rejected("no_image", f"{os.path.basename(path)}: row {i} has no {self._image!r}")
    return f"{os.path.basename(path)}/{name}"

  def where(self, i: int) -> tuple[str, int, int]:
    """Returns the table of row i, its place there, and the rows of the table."""
    which = int(np.searchsorted(self._firsts, i, side="right")) - 1
    first, end = self._firsts[which : which + 2].tolist()
    return self._paths[which], i - first, end - first

  def fields(self, i: int) -> dict[str, Any]:
    """Returns {column: value} of row i."""
    return self._row(i)[1]

  def _row(self, i: int) -> tuple[str, dict[str, Any]]:
    """The table of row i, and {column: value}."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    which = int(np.searchsorted(self._firsts, i, side="right")) - 1
    path, header = self._paths[which], self._headers[which]
    start, end = self._starts[i + which : i + which + 2].tolist()
    with open(path, "rb", buffering=0) as file:
      if os.fstat(file.fileno()).st_size != self._sizes[which]:
        raise OSError(
          f"{path}: the file changed while in use; start again to read it from the start"
        )
      line = os.pread(file.fileno(), end - start, start).strip(b"\r\n")
    key = f"{os.path.basename(path)}, byte {start}"
    return path, _parse_json(line, key=key) if header is None else _parse_fields(
      line, *header, key=key
    )

  def _check(self) -> None:
    """Raises ValueError if the image column, or both captions and label, are missing."""
    have: set[str] = set()
    for header in self._headers:
      have.update(header[0] if header else ())
    if None in self._headers:
      for i in range(0, len(self), -(-len(self) // 100)):  # a hundred rows suffice
        try:
          have.update(self._row(i)[1])
        except Rejected:
          continue
    columns.image_column(have, self._image, what=repr(self.pattern))
    columns.check_captions(have, self.captions, label=self._label, what=repr(self.pattern))


def row_starts(path: str, *, separator: bytes | None) -> np.ndarray:
  """Finds the rows of a table that are not blank.

  Args:
    path: of the table.
    separator: of its fields, for a .csv or .tsv: fields may be quoted, and the first row, the
      header, is left out. None for a .jsonl.

  Returns:
    [N + 1] int64: byte offsets of the rows, and of the end of the last one.

  Raises:
    ValueError: if a double quote is not closed.
  """
  if not os.path.getsize(path):
    return np.zeros(1, np.int64)
  with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
    total = len(buffer)
    if separator is None or buffer.find(b'"') < 0:
      ends = np.concatenate(list(_line_ends(buffer)))
    else:
      ends = np.fromiter(_quoted_ends(buffer, separator, path=path), np.int64)
  starts = np.concatenate([[0], ends])
  if starts[-1] < total:  # the last line has no end
    starts = np.append(starts, total)
  filled = np.diff(starts) > 2  # a blank line is "\n" or "\r\n"; no row of two columns is shorter
  kept = np.append(starts[:-1][filled], starts[1:][filled][-1:])
  return kept[int(separator is not None) :] if len(kept) else np.zeros(1, np.int64)


def _line_ends(buffer: mmap.mmap) -> Iterator[np.ndarray]:
  """Yields the offsets after each line end, a chunk at a time."""
  for start in range(0, len(buffer), _CHUNK):
    chunk = np.frombuffer(buffer[start : start + _CHUNK], np.uint8)
    yield np.flatnonzero(chunk == ord("\n")).astype(np.int64) + start + 1


def _quoted_ends(buffer: mmap.mmap, separator: bytes, *, path: str) -> Iterator[int]:
  """Yields the offset after each row; a quoted field may hold line ends."""
  field = _field(separator)
  row = re.compile(field + b"(?:" + re.escape(separator) + field + rb")*+(?:\n|\Z)")
  position = 0
  while position < len(buffer):
    match = row.match(buffer, position)
    if match is None:
      line = buffer[:position].count(b"\n") + 1
      raise ValueError(
        f"{path}: a field in the row that begins in line {line} opens a double quote"
        " that is never closed; close it, and double the quotes inside of a quoted field"
      )
    position = match.end()
    yield position


def _field(separator: bytes) -> bytes:
  """A regular expression of a field: quoted if it begins with a double quote, else taken literally.

  The quantifiers are possessive, so that matching takes linear time.
  """
  rest = b"[^\n" + re.escape(separator) + b"]*+"
  return b'(?:"((?:[^"]++|"")*+)"(' + rest + b')|((?!")' + rest + b"))"


def _header(path: str) -> tuple[list[str], bytes] | None:
  """The columns of a .csv or .tsv and the separator; None for a .jsonl."""
  if path.endswith((".jsonl", ".ndjson")):
    return None
  with open(path, "rb") as file:
    line = file.readline().removeprefix(b"\xef\xbb\xbf").strip(b"\r\n")
  separator = b"\t" if b"\t" in line else b","
  return [name.decode("utf-8", "replace") for name in _split(line, separator)], separator


def _split(line: bytes, separator: bytes) -> list[bytes]:
  """The fields of a row, without quotes."""
  field, fields, position = re.compile(_field(separator)), [], 0
  while True:
    match = field.match(line, position)
    if match is None:
      raise ValueError(f"an open double quote in {line[position : position + 40]!r}")
    quoted, rest, plain = match.groups()
    fields.append(plain if quoted is None else quoted.replace(b'""', b'"') + rest)
    position = match.end() + 1
    if position > len(line):
      return fields


def _parse_fields(line: bytes, names: list[str], separator: bytes, *, key: str) -> dict[str, Any]:
  fields = _split(line, separator)
  if len(fields) != len(names):
    raise Rejected("bad_metadata", f"{key}: {len(fields)} fields, but {len(names)} columns {names}")
  return {name: field.decode("utf-8", "replace") for name, field in zip(names, fields)}


def _parse_json(line: bytes, *, key: str) -> dict[str, Any]:
  try:
    row = json.loads(line.decode("utf-8", "replace"))
  except ValueError as error:
    raise Rejected("bad_metadata", f"{key}: {error}") from None
  if not isinstance(row, dict):
    raise Rejected("bad_metadata", f"{key}: a {type(row).__name__}, expected an object")
  return row


def _read_image(path: str, *, key: str) -> bytes:
  try:
    with open(path, "rb", buffering=0) as file:
      return file.readall()
  except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
    if isinstance(error, OSError) and error.errno not in _NO_FILE:
      raise
    raise Rejected("no_image", f"{key}: {error}") from None
