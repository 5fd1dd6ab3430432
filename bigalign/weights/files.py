"""Reads tensors by key from safetensors and npz files, one at a time, without torch or pickle.

Files are not trusted: the header is checked against the size of the file before any memory is
allocated, and every error names the file and the key.
"""

from __future__ import annotations

import ast
import json
import math
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bigalign import tree

DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
# The weights of a folder, in order of preference. The index names the shards of a large model.
NAMES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "open_clip_model.safetensors",
  "open_clip_model.safetensors.index.json",
)
_HEADER = 100_000_000  # bytes: the longest header that the format allows
_JSON = 100_000_000
_DIMENSIONS = 32
_LONGEST_NAME = 255  # bytes of the name of a file


class Entry(NamedTuple):
  """The place of a tensor.

  Args:
    file: the safetensors or npz file.
    shape: its shape.
    dtype: its dtype.
    offset: of its first byte in a safetensors file.
    member: its name in an npz file.
  """

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: Any
  offset: int = 0
  member: str = ""


class Tensors(Mapping[str, Entry]):
  """{key: Entry} of all files of a checkpoint; `read` returns one tensor.

  Args:
    path: the file, or the index of the shards.
    entries: {key: Entry}.
    shapes: {key: another shape of as many numbers}, in which the tensor is read.
  """

  def __init__(
    self,
    path: pathlib.Path,
    entries: Mapping[str, Entry],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
  ):
    self.path = path
    self._entries = dict(entries)
    self._shapes = dict(shapes or {})
    self._last: tuple[str, np.ndarray] | None = None

  def __getitem__(self, key: str) -> Entry:
    entry = self._entries[key]
    return entry._replace(shape=self._shapes[key]) if key in self._shapes else entry

  def renamed(self, names: Mapping[str, str]) -> Tensors:
    """The same tensors with other keys, {old: new}."""
    return Tensors(self.path, {names[key]: entry for key, entry in self._entries.items()})

  def joined(self, others: Mapping[str, Entry]) -> Tensors:
    """The same tensors and those of other files."""
    return Tensors(self.path, {**self._entries, **others}, self._shapes)

  def reshaped(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """The same tensors, some of another shape with as many numbers."""
    return Tensors(self.path, self._entries, shapes)

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def read(self, key: str) -> np.ndarray:
    """The tensor; from a safetensors file, a view of the memory-mapped file.

    Raises:
      ValueError: for damaged data, with the file and the key.
    """
    if key in self._shapes:
      return Tensors(self.path, self._entries).read(key).reshape(self._shapes[key])
    entry = self._entries[key]
    if entry.member:  # the last one is kept: a row with several arrays reads it several times
      if self._last is None or self._last[0] != key:
        self._last = None
        self._last = (key, _read_npz(entry, key))
      return self._last[1]
    if not math.prod(entry.shape):
      return np.empty(entry.shape, entry.dtype)
    try:
      return np.memmap(entry.file, entry.dtype, "r", entry.offset, entry.shape)
    except (OSError, ValueError) as error:
      raise ValueError(f"{entry.file}: {key}: cannot be read: {error}") from error


def open_tensors(path: str | pathlib.Path) -> Tensors:
  """The tensors of a .safetensors or .npz file, an index of shards, or a folder with one of them.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: for a file that contradicts itself, with the file and the key.
  """
  path = pathlib.Path(path)
  file = _weights_of(path) if path.is_dir() else path
  if not file.is_file():
    raise FileNotFoundError(f"{file}: no such file")
  if file.name.endswith(".index.json"):
    return Tensors(file, _index(file))
  if file.suffix == ".npz":
    return Tensors(file, _npz(file))
  if file.suffix == ".safetensors":
    return Tensors(file, _safetensors(file))
  raise ValueError(
    f"{file}: weights are read from .safetensors, .safetensors.index.json and .npz files only; a"
    " .bin or .pt file holds a pickle, which can run code: save it again as safetensors"
  )


def _short(error: BaseException) -> str:
  """The text of an error; zipfile repeats names, which may be a part of the data."""
  return tree.cut(str(error), 300)


def is_name(value: Any) -> bool:
  """Returns whether a value in a file can be the name of a file or folder next to it."""
  if not isinstance(value, str) or value in ("", "..") or "\0" in value:
    return False
  size = len(value.encode("utf-8", "surrogatepass"))
  return pathlib.PurePath(value).name == value and size <= _LONGEST_NAME


def read_json(file: pathlib.Path, kind: type = dict) -> Any:
  """The object or list in a JSON file.

  Args:
    file: the file.
    kind: dict or list.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: for another type, a duplicate key, or invalid JSON, with the file.
  """
  try:
    if file.stat().st_size > _JSON:
      raise ValueError(f"{file.stat().st_size} bytes are more than {_JSON}")
    return _json(file.read_bytes(), kind)
  except FileNotFoundError:
    raise
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not a JSON {kind.__name__}: {error}") from error


def _json(data: bytes, kind: type = dict) -> Any:
  """The object or list in the text of a JSON file; refuses duplicate keys."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
      twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
      raise ValueError(f"duplicate key {twice!r}")
    return values

  value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
  if not isinstance(value, kind):
    raise ValueError(f"it is a {type(value).__name__}")
  return value


def _weights_of(folder: pathlib.Path) -> pathlib.Path:
  """The file of weights in a folder, or the index of its shards."""
  for name in NAMES:
    if (folder / name).is_file():
      return folder / name
  others = sorted(x for x in folder.iterdir() if x.suffix in (".safetensors", ".npz"))
  if len(others) == 1:
    return others[0]
  if others:
    raise ValueError(
      f"{folder} holds several files of weights: {tree.shown(x.name for x in others)}. Give the"
      " path of one"
    )
  raise FileNotFoundError(
    f"{folder} holds none of {list(NAMES)}, and no .npz. It holds: "
    f"{tree.shown(sorted(x.name for x in folder.iterdir()))}"
  )


def _index(file: pathlib.Path) -> dict[str, Entry]:
  """The tensors of all shards, which must agree with the index."""
  names = read_json(file).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{file}: weight_map: must be an object {{key: file of the tensor}}")
  shards: dict[str, dict[str, Entry]] = {}
  for key, name in names.items():
    if not is_name(name):
      shown = tree.cut(repr(name), 300)
      raise ValueError(f"{file}: {key}: {shown} is not a file next to the index")
    if name not in shards:
      if not (file.parent / name).is_file():
        raise FileNotFoundError(f"{file}: {key}: no such file: {file.parent / name}")
      shards[name] = _safetensors(file.parent / name)
    if key not in shards[name]:
      raise ValueError(f"{file}: {key}: is missing in {name}, where it should be")
  for name, entries in shards.items():
    stray = sorted(key for key in entries if names.get(key) != name)
    if stray:
      raise ValueError(f"{file.parent / name}: {stray[0]}: is in this file but not in the index")
  return {key: shards[name][key] for key, name in names.items()}


def _safetensors(file: pathlib.Path) -> dict[str, Entry]:
  """The tensors of a safetensors file, whose spans must cover it without gaps."""
  size = file.stat().st_size
  with file.open("rb") as f:
    head = f.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > min(size - 8, _HEADER):
      raise ValueError(f"{file}: not a safetensors file: {size} bytes, with a header of {length}")
    data = f.read(length)
  try:
    header = _json(data)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not a safetensors file: its header: {error}") from error
  about = header.pop("__metadata__", {})
  if not isinstance(about, dict) or not all(isinstance(x, str) for x in about.values()):
    raise ValueError(f"{file}: __metadata__: not an object of strings")
  spans = []
  entries = {}
  for key, description in header.items():
    try:
      shape, dtype, (start, end) = _described(description, size - 8 - length)
    except ValueError as error:
      raise ValueError(f"{file}: {key}: {error}") from error
    entries[key] = Entry(file, shape, dtype, 8 + length + start)
    spans.append((start, end, key))
  last = 0
  for start, end, key in sorted(spans):
    if start != last:
      raise ValueError(
        f"{file}: {key}: starts at byte {start}, but the previous tensor ends at {last}"
      )
    last = end
  if last != size - 8 - length:
    raise ValueError(
      f"{file}: holds {size - 8 - length} bytes of tensors, but its header says {last}"
    )
  return entries


def _described(description: Any, size: int) -> tuple[tuple[int, ...], np.dtype, tuple[int, int]]:
  """(shape, dtype, (start, end)) of a header's entry; they must agree and fit into `size` bytes."""
  names = {"dtype", "shape", "data_offsets"}
  if not isinstance(description, dict) or set(description) != names:
    raise ValueError(f"must be dtype, shape and data_offsets, not {str(description)[:80]}")
  kind, shape, offsets = (description[name] for name in ("dtype", "shape", "data_offsets"))
  if not isinstance(kind, str) or kind not in DTYPES:
    raise ValueError(f"dtype {str(kind)[:80]!r}; known: {sorted(DTYPES)}")
  for name, numbers in (("shape", shape), ("data_offsets", offsets)):
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
      raise ValueError(f"{name} {str(numbers)[:80]} is not a list of sizes")
  dtype = np.dtype(DTYPES[kind])
  if len(shape) > _DIMENSIONS or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
    raise ValueError(f"shape {str(shape)[:80]}, data_offsets {str(offsets)[:80]} of {size} bytes")
  if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
    raise ValueError(f"{kind} {shape} is not {offsets[1] - offsets[0]} bytes")
  return tuple(shape), dtype, (offsets[0], offsets[1])


# The errors of zipfile and ast for damaged files.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  ValueError,
  EOFError,
  NotImplementedError,
  RuntimeError,
  OSError,
  struct.error,
  KeyError,
  SyntaxError,
  TypeError,
  OverflowError,
  MemoryError,
)


def _npz(file: pathlib.Path) -> dict[str, Entry]:
  """The tensors of an npz file; only headers are read."""
  entries = {}
  try:
    archive = zipfile.ZipFile(file)
  except _DAMAGE as error:
    raise ValueError(f"{file}: not an npz file: {_short(error)}") from error
  with archive:
    for info in archive.infolist():
      key = info.filename.removesuffix(".npy")
      try:
        with archive.open(info) as f:
          shape, _, dtype = _npy_header(f)
      except _DAMAGE as error:
        raise ValueError(f"{file}: {tree.cut(key, 200)}: {_short(error)}") from error
      if key in entries:
        raise ValueError(f"{file}: {key}: duplicate key")
      if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{file}: {key}: {dtype} {shape} needs more than {info.file_size} bytes")
      entries[key] = Entry(file, shape, dtype, member=info.filename)
  return entries


# {descr of an npy header: dtype}. numpy has no bfloat16, and writes it as two bytes of void.
_NPY = {np.dtype(x).str: np.dtype(x) for x in DTYPES.values() if x is not ml_dtypes.bfloat16}
_NPY |= {"|V2": np.dtype(ml_dtypes.bfloat16), "<V2": np.dtype(ml_dtypes.bfloat16)}


def _npy_header(f: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
  """(shape, whether in Fortran order, dtype) of the npy array in a file; refuses objects."""
  magic = f.read(8)
  if magic not in (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"):
    raise ValueError(f"not an npy array: it begins with {magic!r}")
  long = magic[6] == 2
  length = struct.unpack("<I" if long else "<H", f.read(4 if long else 2))[0]
  if length > 10_000:
    raise ValueError(f"a header of {length} bytes")
  header = ast.literal_eval(f.read(length).decode("latin1"))
  if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
    raise ValueError(f"header {str(header)[:80]}")
  kind, columns, shape = header["descr"], header["fortran_order"], header["shape"]
  if not isinstance(kind, str) or kind not in _NPY:
    raise ValueError(f"dtype {str(kind)[:80]!r}; known: {sorted(_NPY)}")
  if not isinstance(columns, bool) or not isinstance(shape, tuple) or len(shape) > _DIMENSIONS:
    raise ValueError(f"header {str(header)[:80]}")
  if not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f"shape {str(shape)[:80]}")
  return shape, columns, _NPY[kind]


def _read_npz(entry: Entry, key: str) -> np.ndarray:
  """The tensor. np.load would allocate the memory that the header asks for without a check."""
  size = math.prod(entry.shape) * entry.dtype.itemsize
  try:
    with zipfile.ZipFile(entry.file) as archive, archive.open(entry.member) as f:
      shape, columns, dtype = _npy_header(f)
      data = bytearray()
      while len(data) <= size and (part := f.read(2**20)):  # to the end: zipfile checks the CRC
        data += part
  except _DAMAGE as error:
    raise ValueError(f"{entry.file}: {tree.cut(key, 200)}: {_short(error)}") from error
  if shape != entry.shape or dtype != entry.dtype or len(data) != size:
    raise ValueError(f"{entry.file}: {key}: {dtype} {shape} does not fit the data that follows")
  return np.frombuffer(data, dtype).reshape(shape, order="F" if columns else "C")
