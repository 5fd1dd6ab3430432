"""Tensors by name in safetensors and npz files, read one by one. No torch, and no pickle anywhere.

A file is not trusted: what its header says is checked against its true size before any memory is
taken, and every error names the file and the key.
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
# Weights of a folder, by preference; the index names the shards of a big model.
NAMES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "open_clip_model.safetensors",
  "open_clip_model.safetensors.index.json",
)
_HEADER = 100_000_000  # bytes: the longest header that the format allows
_JSON = 100_000_000
_DIMENSIONS = 32


class Entry(NamedTuple):
  """Where a tensor lies: at `offset` of a safetensors file, or in the npz member `member`."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: Any
  offset: int = 0
  member: str = ""


class Tensors(Mapping[str, Entry]):
  """{key: Entry} of all files of a checkpoint; `read` brings one tensor into memory."""

  def __init__(self, path: pathlib.Path, entries: Mapping[str, Entry]):
    self.path = path
    self._entries = dict(entries)
    self._last: tuple[str, np.ndarray] | None = None

  def __getitem__(self, key: str) -> Entry:
    return self._entries[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def read(self, key: str) -> np.ndarray:
    """The tensor; that of a safetensors file is a view of the mapped file."""
    entry = self._entries[key]
    if entry.member:  # rows that make several arrays of one tensor ask for it again
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
    ValueError: for a file that contradicts itself, with its name and the key.
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


def read_json(file: pathlib.Path, kind: type = dict) -> Any:
  """The object, or the list, in a JSON file; a key that stands twice is an error."""
  try:
    if file.stat().st_size > _JSON:
      raise ValueError(f"{file.stat().st_size} bytes are too many")
    return _json(file.read_bytes(), kind)
  except FileNotFoundError:
    raise
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{file}: no JSON {kind.__name__}: {error}") from error


def _json(data: bytes, kind: type = dict) -> Any:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
      raise ValueError(f"{twice!r} stands there twice")
    return found

  found = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
  if not isinstance(found, kind):
    raise ValueError(f"it is a {type(found).__name__}")
  return found


def _weights_of(folder: pathlib.Path) -> pathlib.Path:
  for name in NAMES:
    if (folder / name).is_file():
      return folder / name
  others = sorted(x for x in folder.iterdir() if x.suffix in (".safetensors", ".npz"))
  if len(others) == 1:
    return others[0]
  if others:
    raise ValueError(f"{folder}: which of {[x.name for x in others]}? Name the file")
  raise FileNotFoundError(
    f"{folder}: none of {list(NAMES)}, and no .npz. There is: "
    f"{sorted(x.name for x in folder.iterdir())[:20]}"
  )


def _index(file: pathlib.Path) -> dict[str, Entry]:
  """The tensors of all shards, each where the index says."""
  names = read_json(file).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{file}: weight_map: must say in which file each tensor lies")
  shards: dict[str, dict[str, Entry]] = {}
  for key, name in names.items():
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\0" in name:
      raise ValueError(f"{file}: {key}: {name!r} is no file beside the index")
    if name not in shards:
      if not (file.parent / name).is_file():
        raise FileNotFoundError(f"{file}: {key}: no such file: {file.parent / name}")
      shards[name] = _safetensors(file.parent / name)
    if key not in shards[name]:
      raise ValueError(f"{file}: {key}: is not in {name}, where the index puts it")
  for name, entries in shards.items():
    stray = sorted(key for key in entries if names.get(key) != name)
    if stray:
      raise ValueError(f"{file.parent / name}: {stray[0]}: is in this file, not in the index")
  return {key: shards[name][key] for key, name in names.items()}


def _safetensors(file: pathlib.Path) -> dict[str, Entry]:
  size = file.stat().st_size
  with file.open("rb") as f:
    head = f.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > min(size - 8, _HEADER):
      raise ValueError(f"{file}: no safetensors file: {size} bytes, with a header of {length}")
    data = f.read(length)
  try:
    header = _json(data)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file}: no safetensors file: its header: {error}") from error
  about = header.pop("__metadata__", {})
  if not isinstance(about, dict) or not all(isinstance(x, str) for x in about.values()):
    raise ValueError(f"{file}: __metadata__: not an object of texts")
  spans = []
  entries = {}
  for key, found in header.items():
    try:
      shape, dtype, (start, end) = _described(found, size - 8 - length)
    except ValueError as error:
      raise ValueError(f"{file}: {key}: {error}") from error
    entries[key] = Entry(file, shape, dtype, 8 + length + start)
    spans.append((start, end, key))
  last = 0
  for start, end, key in sorted(spans):
    if start != last:
      raise ValueError(f"{file}: {key}: starts at byte {start}, the tensor before ends at {last}")
    last = end
  if last != size - 8 - length:
    raise ValueError(f"{file}: holds {size - 8 - length} bytes of tensors, its header says {last}")
  return entries


def _described(found: Any, size: int) -> tuple[tuple[int, ...], np.dtype, tuple[int, int]]:
  """(shape, dtype, (start, end)) of a header's entry, if they agree and fit into `size` bytes."""
  if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"must be dtype, shape and data_offsets, not {str(found)[:80]}")
  kind, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise ValueError(f"dtype {str(kind)[:80]!r}; known: {sorted(DTYPES)}")
  for name, numbers in (("shape", shape), ("data_offsets", offsets)):
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
      raise ValueError(f"{name} {str(numbers)[:80]} is no list of sizes")
  dtype = np.dtype(DTYPES[kind])
  if len(shape) > _DIMENSIONS or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
    raise ValueError(f"shape {str(shape)[:80]}, data_offsets {str(offsets)[:80]} of {size} bytes")
  if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
    raise ValueError(f"{kind} {shape} is not {offsets[1] - offsets[0]} bytes")
  return tuple(shape), dtype, (offsets[0], offsets[1])


# What zipfile and ast raise for damaged files.
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
  entries = {}
  try:
    archive = zipfile.ZipFile(file)
  except _DAMAGE as error:
    raise ValueError(f"{file}: no npz file: {error}") from error
  with archive:
    for info in archive.infolist():
      key = info.filename.removesuffix(".npy")
      try:
        with archive.open(info) as f:
          shape, _, dtype = _npy_header(f)
      except _DAMAGE as error:
        raise ValueError(f"{file}: {key}: {error}") from error
      if key in entries:
        raise ValueError(f"{file}: {key}: stands there twice")
      if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{file}: {key}: {dtype} {shape} is more than {info.file_size} bytes")
      entries[key] = Entry(file, shape, dtype, member=info.filename)
  return entries


# Types of npy headers; numpy writes bfloat16, which it does not know, as two bytes of anything.
_NPY = {np.dtype(x).str: np.dtype(x) for x in DTYPES.values() if x is not ml_dtypes.bfloat16}
_NPY |= {"|V2": np.dtype(ml_dtypes.bfloat16), "<V2": np.dtype(ml_dtypes.bfloat16)}


def _npy_header(f: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
  """(shape, whether columns come first, dtype) of an array in a file; never one of objects."""
  magic = f.read(8)
  if magic not in (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"):
    raise ValueError(f"no array: it begins with {magic!r}")
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
  """Not np.load, which takes the memory that a header asks for before it looks at the data."""
  size = math.prod(entry.shape) * entry.dtype.itemsize
  try:
    with zipfile.ZipFile(entry.file) as archive, archive.open(entry.member) as f:
      shape, columns, dtype = _npy_header(f)
      data = bytearray()
      while len(data) <= size and (part := f.read(2**20)):  # to the end, where the checksum is
        data += part
  except _DAMAGE as error:
    raise ValueError(f"{entry.file}: {key}: {error}") from error
  if shape != entry.shape or dtype != entry.dtype or len(data) != size:
    raise ValueError(f"{entry.file}: {key}: {dtype} {shape} is not the data that follows")
  return np.frombuffer(data, dtype).reshape(shape, order="F" if columns else "C")
