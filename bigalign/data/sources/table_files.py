"""Random access to .csv, .tsv and .jsonl files with paths of image files and their captions."""

from __future__ import annotations

import functools
import json
import logging
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign import tree
from bigalign.data.files import fingerprints, lines
from bigalign.data.files.draws import draw
from bigalign.data.files.patterns import expand_local, expand_variables
from bigalign.data.files.regular import open_regular
from bigalign.data.samples import columns, image_files
from bigalign.data.samples.labels import Labels
from bigalign.data.samples.members import IMAGES
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.webdataset import classnames_near

logger = logging.getLogger(__name__)

_CHUNK = 1 << 24  # bytes
_LONGEST = 1 << 24  # bytes of a row
_PROBES = 100  # rows that are looked at when a table is opened
_LONGEST_HEADER = 1 << 20  # bytes of the first line


class Shape(NamedTuple):
  """What a row of a .csv or .tsv must look like.

  Attributes:
    fields: the number of columns.
    image: the place of the column of image paths.
  """

  fields: int
  image: int


class TableFiles:
  """Random access to .csv, .tsv or .jsonl files with a row per sample; the images are files.

  The defaults are those of open_clip. A .csv or .tsv begins with the names of its columns; the
  separator is a tab if this line has one, else a comma. Fields in double quotes may hold
  separators, line ends and doubled double quotes. A field that begins with a double quote, but
  would swallow the rows after it, is read as it is, and a warning counts such fields. Texts are in
  UTF-8. A row takes eight bytes of memory.

  Args:
    pattern: of local tables.
    image: the column of the paths of the image files, relative to the folder of the table. They
      must be regular files of at most 512 MiB.
    captions: columns in order of preference; "a.b" is the entry b of an object a in a .jsonl.
    label: the column of the class, if it exists: an integer or a name (samples/labels.py). The
      names of the classes are read from a classnames.txt, as for webdataset shards.
    root: a folder that images may be in besides the folder of the table. Without it, paths that
      lead out of that folder, also through links, are rejected: a table from elsewhere could name
      any file of the machine. "/" allows all.
    images: whether images are read; if not, samples need none, and a record has image=b"".

  Raises:
    ValueError: if there are no rows, no image column, or neither a caption column nor a label; if a
      table is not in UTF-8; if all images are outside of the allowed folders.

  Example:
    >>> import pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> root = pathlib.Path(folder.name)
    >>> _ = (root / "cat.jpg").write_bytes(b"an encoded image")
    >>> _ = (root / "train.csv").write_text("filepath,title\\ncat.jpg,a photo of a cat\\n")
    >>> source = TableFiles(f"{root}/train.csv")
    >>> source[0]["key"], source[0]["captions"]
    ('train.csv/0/cat.jpg', ('a photo of a cat',))
    >>> folder.cleanup()
  """

  def __init__(
    self,
    pattern: str,
    *,
    image: str = "filepath",
    captions: Sequence[str] = ("title",),
    label: str = "label",
    root: str | None = None,
    images: bool = True,
  ):
    self.pattern = pattern
    self.captions = tuple(captions)
    self._image, self._label, self._images = image, label, images
    self._root = root and os.path.expanduser(expand_variables(root, what="source_options.root"))
    self._paths = expand_local(pattern, kind="a table of image files")
    self._headers = [_header(path) for path in self._paths]
    self._sizes = [os.path.getsize(path) for path in self._paths]
    starts = [
      row_starts(path, separator=header and header[1], shape=_shape(header, image))
      for path, header in zip(self._paths, self._headers)
    ]
    self._firsts = np.cumsum([0] + [len(file) - 1 for file in starts])
    # The entries of a file are the starts of its rows, and its end.
    self._starts = np.concatenate(starts)
    if not len(self):
      raise ValueError(f"{pattern!r}: no rows in {len(self._paths)} files")
    self.fingerprint = fingerprints.of_files(self._paths, self._starts.astype("<i8").tobytes())
    self.classnames = classnames_near(self._paths[0])
    self.labels = Labels(self.classnames, what=label)
    self._check()

  def __repr__(self) -> str:
    return f"TableFiles({self.pattern!r})"

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    path, row = self._row(i)
    key = self._key(i, row)
    folder = os.path.dirname(path)
    return dict(
      image=image_files.read(row[self._image], folder=folder, root=self._root, key=key)
      if self._images
      else b"",
      key=key,
      **columns.texts(row, self.captions),
      label=self.labels(row.get(self._label), key=key),
    )

  def key(self, i: int) -> str:
    """Returns the key of row i; does not read the image."""
    return self._key(i, self.fields(i))

  def _key(self, i: int, row: Mapping[str, Any]) -> str:
    path, place, _ = self.where(i)
    name = row.get(self._image)
    if not isinstance(name, str) or not name:
      if not self._images:
        return f"{os.path.basename(path)}/{place}"
      raise Rejected("no_image", f"{os.path.basename(path)}: row {i} has no {self._image!r}")
    # With the row, because several rows of a table may name one image, each with a caption.
    return f"{os.path.basename(path)}/{place}/{name}"

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
    key = f"{os.path.basename(path)}, byte {start}"
    with open_regular(path, buffering=0) as file:
      if os.fstat(file.fileno()).st_size != self._sizes[which]:
        raise OSError(
          f"{path}: the file changed while in use; start again to read it from the start"
        )
      if end - start > _LONGEST:
        raise Rejected(
          "bad_metadata", f"{key}: a row of {end - start} bytes; rows have at most {_LONGEST}"
        )
      line = os.pread(file.fileno(), end - start, start).removeprefix(lines.MARK).strip(b"\r\n")
    return path, _parse_json(line, key=key) if header is None else _parse_fields(
      line, *header, key=key
    )

  def _check(self) -> None:
    """Raises ValueError if columns are missing, or if no image may be read."""
    have: set[str] = set()
    for header in self._headers:
      have.update(header[0] if header else ())
    outside: list[tuple[str, str]] = []  # the folder of the table, and the image of a row
    inside = 0
    # At random, because tables can be periodic.
    for i in draw(len(self), _PROBES):
      try:
        path, row = self._row(i)
      except Rejected:
        continue
      have.update(row)
      folder, name = os.path.dirname(path), row.get(self._image)
      if isinstance(name, str) and name:
        if image_files.leads_outside(name, folder=folder, root=self._root):
          outside.append((folder, name))
        else:
          inside += 1
    if self._images:
      if outside and not inside:
        folder, name = outside[0]
        raise ValueError(f"{self.pattern!r}: {image_files.outside(name, folder)}")
      columns.image_column(have, self._image, what=repr(self.pattern))
    columns.check_captions(have, self.captions, label=self._label, what=repr(self.pattern))


def row_starts(path: str, *, separator: bytes | None, shape: Shape | None = None) -> np.ndarray:
  """Finds the rows of a table that are not blank.

  Args:
    path: of the table.
    separator: of its fields, for a .csv or .tsv: fields may be quoted, and the first row, the
      header, is left out. None for a .jsonl.
    shape: of its rows: a line that has it is a row, and does not belong to a quoted field of an
      earlier one. None: quotes alone decide.

  Returns:
    [N + 1] int64: byte offsets of the rows, and of the end of the last one.

  Raises:
    ValueError: if a double quote is not closed, and its line is not a row by itself.
  """
  if not os.path.getsize(path):
    return np.zeros(1, np.int64)
  with (
    open_regular(path) as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
  ):
    lines.check_encoding(buffer[:4], name=path)
    total = len(buffer)
    if separator is None or buffer.find(b'"') < 0:
      ends = np.concatenate(list(_line_ends(buffer)))
    else:
      quoted = _Quoted(buffer, separator, shape, path=path)
      ends = np.fromiter(quoted.ends(), np.int64)
      quoted.warn()
    starts = np.concatenate([[0], ends])
    if starts[-1] < total:  # the last line has no end
      starts = np.append(starts, total)
    filled = np.diff(starts) > 2
    for n in np.flatnonzero(~filled).tolist():
      filled[n] = bool(buffer[starts[n] : starts[n + 1]].strip(b"\r\n"))
  kept = np.append(starts[:-1][filled], starts[1:][filled][-1:])
  return kept[int(separator is not None) :] if len(kept) else np.zeros(1, np.int64)


def _line_ends(buffer: mmap.mmap) -> Iterator[np.ndarray]:
  """Yields the offsets after each line end, a chunk at a time."""
  for start in range(0, len(buffer), _CHUNK):
    chunk = np.frombuffer(buffer[start : start + _CHUNK], np.uint8)
    yield np.flatnonzero(chunk == ord("\n")).astype(np.int64) + start + 1


class _Quoted:
  """The rows of a table in which fields may be quoted.

  A quoted field may hold line ends. But a caption may also begin with a double quote, in a table
  that was written without quoting: taken as quoted, it would swallow rows up to the next double
  quote. So the lines that a quoted field would span are looked at. If one of them is a row by
  itself, with a field for each column and the path of an image in its place, the double quote is a
  character.

  Args:
    buffer: the table.
    separator: of its fields.
    shape: of its rows, or None.
    path: of the table, for errors.
  """

  def __init__(self, buffer: mmap.mmap, separator: bytes, shape: Shape | None, *, path: str):
    self._buffer, self._separator, self._shape, self._path = buffer, separator, shape, path
    self._field = _field(separator)
    self._strays = 0
    self._first_stray = 0  # byte

  def ends(self) -> Iterator[int]:
    """Yields the offset after each row."""
    buffer, position = self._buffer, 0
    while position < len(buffer):
      end = self._line_end(position)
      if buffer.find(b'"', position, end) >= 0:
        end = self._row_end(position, end)
      position = end
      yield end

  def warn(self) -> None:
    """Logs how many double quotes were taken for characters."""
    if self._strays:
      logger.warning(
        "%s: %d fields begin with a double quote that would swallow rows (the first in line %d);"
        " it is read as a character",
        self._path,
        self._strays,
        self._line_number(self._first_stray),
      )

  def _line_number(self, offset: int) -> int:
    chunks = (
      self._buffer[start : min(start + _CHUNK, offset)] for start in range(0, offset, _CHUNK)
    )
    return 1 + sum(chunk.count(b"\n") for chunk in chunks)

  def _line_end(self, position: int) -> int:
    """The offset after the line that `position` is in."""
    return self._buffer.find(b"\n", position) + 1 or len(self._buffer)

  def _row_end(self, start: int, end: int) -> int:
    """The offset after the row that begins at `start`, in a line that ends at `end`."""
    buffer, before = self._buffer, list[bytes]()
    position = start + len(lines.MARK) if buffer[start : start + 3] == lines.MARK else start
    first_line = True
    while True:
      match = self._field.match(buffer, position)
      close = None if match is None else match.end(1) + 1
      if close is None or close > end:  # the field would span lines; an unquoted one has close = 0
        if first_line and self._is_stray(start, end, close, before):
          self._strays += 1
          self._first_stray = self._first_stray or start
          return end
        if match is None:
          raise ValueError(
            f"{self._path}: a field in the row that begins in line {self._line_number(start)}"
            " opens a double quote that is never closed; close it, and double the quotes inside"
            " of a quoted field"
          )
        first_line, end = False, self._line_end(match.end())
      assert match is not None
      if buffer[match.end() : match.end() + 1] in (b"", b"\n"):
        return end
      before.append(match[3] if match[1] is None else match[1])
      position = match.end() + 1

  def _is_stray(self, start: int, end: int, close: int | None, before: list[bytes]) -> bool:
    """Returns whether a double quote is a character, by the lines that its field would span.

    Args:
      start: of the row.
      end: of its first line.
      close: the offset after the closing double quote; None if there is none.
      before: the fields of the row before the quoted one.
    """
    shape, buffer = self._shape, self._buffer
    if shape is None:
      return False
    first = self._image_of(buffer[start:end])
    if close is None and first is not None:
      return True
    reference = before[shape.image] if shape.image < len(before) else first
    stop, position = len(buffer) if close is None else close, end
    while position < stop:
      after = self._line_end(position)
      # The last line may hold what follows the quoted field, such as the path of the image.
      remainder = after >= stop and close is not None and reference is None
      image = None if remainder else self._image_of(buffer[position:after])
      if image is not None and self._are_images(reference, image):
        return True
      position = after
    return False

  def _image_of(self, line: bytes) -> bytes | None:
    """The path of the image if a line is a row by itself; else None."""
    assert self._shape is not None
    fields = _split(line.removeprefix(lines.MARK).strip(b"\r\n"), self._separator)
    return fields[self._shape.image] if len(fields) == self._shape.fields else None

  def _are_images(self, reference: bytes | None, image: bytes) -> bool:
    """Returns whether two fields are paths of images, as far as their endings show."""
    ending = _ending(image)
    if reference is None:
      return ending in IMAGES
    ours = _ending(reference)
    if ending or ours:
      return ending == ours or (ending in IMAGES and ours in IMAGES)
    # Names without endings, as hashes. A tab inside of a caption is rare; a comma is not.
    return bool(image) and (self._separator == b"\t" or (b"/" in image and b"/" in reference))


def _ending(path: bytes) -> str:
  """The ending of a file name, in lower case, without the dot; "" if it has none."""
  ending = os.path.splitext(path)[1][1:].decode("utf-8", "replace").lower()
  return ending if ending.isalnum() else ""


@functools.cache
def _field(separator: bytes) -> re.Pattern[bytes]:
  """A regular expression of a field: quoted if it begins with a double quote, else taken literally.

  The quantifiers are possessive, so that matching takes linear time.
  """
  rest = b"[^\n" + re.escape(separator) + b"]*+"
  return re.compile(b'(?:"((?:[^"]++|"")*+)"(' + rest + b')|((?!")' + rest + b"))")


def _shape(header: tuple[list[str], bytes] | None, image: str) -> Shape | None:
  """What the rows below a header look like; None without a column of images."""
  if header is None or image not in header[0]:
    return None
  return Shape(len(header[0]), header[0].index(image))


def _header(path: str) -> tuple[list[str], bytes] | None:
  """The columns of a .csv or .tsv and the separator; None for a .jsonl."""
  if path.endswith((".jsonl", ".ndjson")):
    return None
  with open_regular(path) as file:
    line = file.readline(_LONGEST_HEADER + 1)
  lines.check_encoding(line, name=path)
  line = line.removeprefix(lines.MARK).strip(b"\r\n")
  if b"\r" in line:
    raise ValueError(
      f"{path}: a carriage return in the names of the columns. If all lines end with it, as on old"
      " Macs, translate them: tr '\\r' '\\n'"
    )
  if len(line) > _LONGEST_HEADER:
    raise ValueError(f"{path}: the names of the columns have more than {_LONGEST_HEADER} bytes")
  separator = b"\t" if b"\t" in line else b","
  return [name.decode("utf-8", "replace") for name in _split(line, separator)], separator


def _split(line: bytes, separator: bytes, *, strict: bool = False) -> list[bytes]:
  """Returns the fields of a row, without quotes. A double quote that is not closed is a character.

  Args:
    line: the row, without its line end.
    separator: of the fields.
    strict: whether a field is only quoted if nothing follows its closing double quote. Readers of
      CSV append what follows.
  """
  field, fields, position = _field(separator), [], 0
  while True:
    match = field.match(line, position)
    if match is None or (strict and match[2]):
      end = line.find(separator, position)
      end = len(line) if end < 0 else end
      fields.append(line[position:end])
    else:
      quoted, rest, plain = match.groups()
      fields.append(plain if quoted is None else quoted.replace(b'""', b'"') + rest)
      end = match.end()
    position = end + 1
    if position > len(line):
      return fields


def _parse_fields(line: bytes, names: list[str], separator: bytes, *, key: str) -> dict[str, Any]:
  fields: list[bytes] = []
  # Nothing follows a closing quote where quotes are meant; with tabs, they often are characters.
  for strict in (True, False) if separator == b"\t" else (False, True):
    fields = _split(line, separator, strict=strict)
    if len(fields) == len(names):
      return {name: field.decode("utf-8", "replace") for name, field in zip(names, fields)}
  raise Rejected(
    "bad_metadata", f"{key}: {len(fields)} fields, but {len(names)} columns {tree.shown(names)}"
  )


def _parse_json(line: bytes, *, key: str) -> dict[str, Any]:
  try:
    row = json.loads(line.decode("utf-8", "replace"))
  except (ValueError, RecursionError) as error:
    raise Rejected("bad_metadata", f"{key}: {error}") from None
  if not isinstance(row, dict):
    raise Rejected("bad_metadata", f"{key}: a {type(row).__name__}, expected an object")
  return row
