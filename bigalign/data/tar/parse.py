"""Finds the samples of a webdataset shard in one pass over the headers of its tar.

A tar is a sequence of 512-byte blocks. A sample is a sequence of adjacent members whose names are
equal up to the first dot. Shards are neither converted nor unpacked.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

BLOCK = 512
_LONGEST_NAME = 1 << 16  # bytes of the name of a member; Linux allows 4096
_LONGEST_HEADER = 1 << 20  # bytes of a GNU long name or of pax records, which are read at once
_SHOWN = 200  # characters of a name in an error
_ZERO_CHUNK = 1 << 16  # bytes
_REGULAR = (b"0", b"\0", b"7")
_ZEROS = bytes(BLOCK)
# name, size, checksum, type, magic, prefix
_HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")


class BrokenTar(ValueError):
  """The bytes at `offset` are not a tar header, or the data ends inside a member."""

  def __init__(self, offset: int, what: str):
    super().__init__(offset, what)
    self.offset = offset
    self.what = what

  def __str__(self) -> str:
    return f"{self.what} at byte {self.offset}"


class Member(NamedTuple):
  """A regular file in a tar."""

  name: str
  header: int  # byte offset of its first header, long-name headers included
  start: int  # byte offset of its data
  size: int  # bytes
  end: int  # byte offset of the next header


def sample(buffer: bytes) -> tuple[str, dict[str, bytes]]:
  """Returns the key of a sample and its members.

  The checksums were right when the index was made, so those of plain headers are not computed
  again.

  Args:
    buffer: the bytes of the sample in its shard, from the index.

  Returns:
    (key, {extension: bytes}).

  Raises:
    BrokenTar: as `members` does.
  """
  key, fields, offset, end = "", dict[str, bytes](), 0, len(buffer)
  while offset + BLOCK <= end:
    name, kind = buffer[offset : offset + 100], buffer[offset + 156 : offset + 157]
    # Nearly all headers: a plain file with a short name, its size in 11 octal digits, no prefix.
    if kind != b"0" or buffer[offset + 345] or buffer[offset + 135] not in b"\0 ":
      break
    try:
      size = int(buffer[offset + 124 : offset + 135], 8)
    except ValueError:
      break
    start = offset + BLOCK
    if size < 0 or start + size > end:
      break
    named = split_name(_text(name))
    if named:
      key, field = named
      fields[field] = buffer[start : start + size]
    offset = start + -(-size // BLOCK) * BLOCK
  else:
    return key, fields
  for member in members(buffer):
    named = split_name(member.name) if member else None
    if member and named:  # all members of a sample have the same key
      key, field = named
      fields[field] = buffer[member.start : member.start + member.size]
  return key, fields


class Buffer(Protocol):
  """Bytes that can be sliced: bytes, mmap, storage.BlockReader."""

  def __getitem__(self, part: slice, /) -> bytes: ...


def members(buffer: Buffer) -> Iterator[Member | None]:
  """Yields the regular files of a tar, and None at each end mark (blocks of zeros).

  Understands ustar prefixes, GNU long names, and pax paths and sizes. Goes on after an end mark,
  because tars are concatenated with `cat`; only zeros may follow the last one.

  Raises:
    BrokenTar: at the first wrong header checksum, if the data ends inside a member, and for names
      and pax records above 1 MiB.
  """
  offset = 0
  first: int | None = None  # where the extended headers of the next member began
  long_name: str | None = None
  pax: dict[bytes, bytes] = {}
  while header := buffer[offset : offset + BLOCK]:
    if header == _ZEROS:
      yield None
      after = _after_zeros(buffer, offset)
      if after is None:
        return
      offset, first, long_name, pax = after, None, None, {}
      continue
    if len(header) < BLOCK:
      raise BrokenTar(offset, "a header is cut off")
    name, digits, checksum, kind, magic, prefix = _HEADER.unpack(header)
    # The checksum is the sum of the header's bytes, with its own bytes counted as spaces. The lower
    # half of Adler-32 is 1 + this sum, modulo 65521, and ten times as fast as sum().
    total = _number(checksum, offset=offset) + sum(checksum) - 8 * 32 + 1
    if (total - zlib.adler32(header) % 65536) % 65521:
      raise BrokenTar(offset, "wrong header checksum")
    size = _number(digits, offset=offset)
    if kind in _REGULAR and b"size" in pax:
      size = _number(pax[b"size"], offset=offset, base=10)
    elif kind in b"123456":  # links, devices and folders have no data, whatever their size
      size = 0
    start = offset + BLOCK
    end = start + -(-size // BLOCK) * BLOCK
    if size and not buffer[start + size - 1 : start + size]:
      raise BrokenTar(offset, f"the data ends inside a member of {size} bytes")
    if kind in b"Lx" and size > _LONGEST_HEADER:
      raise BrokenTar(offset, f"a name or pax records of {size} bytes, above {_LONGEST_HEADER}")
    first = offset if first is None else first
    if kind == b"L":
      long_name = _text(buffer[start : start + size])
    elif kind == b"x":
      pax |= _pax(buffer[start : start + size], offset=start)
    elif kind not in (b"g", b"K"):
      if kind in _REGULAR:
        text = long_name or _text(pax.get(b"path", name))
        # Old GNU tars keep times at the place of the prefix of POSIX ustar.
        if magic == b"ustar\0" and prefix[0] and not (long_name or b"path" in pax):
          text = f"{_text(prefix)}/{text}"
        if len(text) > _LONGEST_NAME:
          raise BrokenTar(offset, f"a name of {len(text)} characters, above {_LONGEST_NAME}")
        yield Member(text, first, start, size, end)
      first, long_name, pax = None, None, {}
    offset = end


def _after_zeros(buffer: Buffer, offset: int) -> int | None:
  """The first block from `offset` on that is not zeros; None if the tar ends before."""
  while chunk := buffer[offset : offset + _ZERO_CHUNK]:
    zeros = len(chunk) - len(chunk.lstrip(b"\0"))
    if zeros < len(chunk):
      return offset + zeros // BLOCK * BLOCK
    offset += len(chunk)
  return None


def split_name(name: str) -> tuple[str, str] | None:
  """Splits the name of a member: "./a/b.seg.png" → ("a/b", "seg.png").

  Returns:
    (key, extension), or None for files that do not belong to a sample: names without a dot, and
    names that start with one, as macOS writes ("._x.jpg").
  """
  name = name.removeprefix("./")
  folder, slash, base = name.rpartition("/")
  stem, _, extension = base.partition(".")
  return (folder + slash + stem, extension.lower()) if stem and extension else None


@dataclasses.dataclass(frozen=True)
class Scan:
  """The samples of a shard: sample i is in blocks starts[i] to starts[i + 1]."""

  starts: np.ndarray  # [N + 1] uint32, in blocks of 512 bytes
  keys: tuple[str, ...]  # of the samples, as split_name gives them
  fields: tuple[str, ...]  # the extensions of all members, sorted
  problem: str  # where and how the tar is cut off; "" if it is complete


def scan(buffer: Buffer, *, path: str) -> Scan:
  """Finds the samples of a shard; of a shard that is cut off, its complete samples.

  Args:
    buffer: the shard.
    path: names the shard in errors.

  Raises:
    ValueError: if the bytes are not a tar, if members of a sample are not adjacent, or if a member
      occurs twice in a sample.
  """
  groups, problem = _groups(buffer, path=path)
  if not groups and problem:
    raise ValueError(
      f"{path}: not an uncompressed tar ({problem}); it starts with {buffer[:16]!r}. Random"
      " access needs plain .tar: gunzip a .tar.gz, and fetch again what was saved as an error"
      " page."
    )
  _check_adjacent(groups, path=path)
  ends = [groups[-1].end] if groups else [0]
  starts = np.array([group.start for group in groups] + ends, np.int64) // BLOCK
  if starts[-1] > np.iinfo(np.uint32).max:
    raise ValueError(f"{path}: shards above 2 TiB cannot be indexed; split it")
  fields = {field for group in groups for field in group.fields}
  keys = tuple(group.key for group in groups)
  return Scan(starts.astype(np.uint32), keys, tuple(sorted(fields)), problem)


@dataclasses.dataclass
class _Group:
  key: str
  start: int
  end: int
  fields: set[str]


def _groups(buffer: Buffer, *, path: str) -> tuple[list[_Group], str]:
  """The complete samples in order, and where the tar is cut off ("" if it is complete)."""
  groups: list[_Group] = []
  end, end_mark = 0, False
  try:
    for member in members(buffer):
      if member is None:
        end_mark = True
        continue
      new, end_mark, end = end_mark, False, member.end  # a sample does not go on after an end mark
      name = split_name(member.name)
      if name is None:
        continue
      key, field = name
      if groups and groups[-1].key == key and not new:
        if field in groups[-1].fields:
          raise ValueError(f"{path}: {member.name[:_SHOWN]!r} occurs twice in one sample")
        groups[-1].fields.add(field)
        groups[-1].end = member.end
      else:
        groups.append(_Group(key, member.header, member.end, {field}))
  except BrokenTar as error:
    problem = f"after its end mark: {error}" if end_mark else str(error)
  else:
    problem = "" if end_mark else f"the tar has no end mark at byte {end}"
  # The last sample of a shard that is cut off counts as complete if it has the members of the one
  # before it.
  if problem and not end_mark and len(groups) > 1 and groups[-1].fields < groups[-2].fields:
    groups.pop()
  return groups, problem


def _check_adjacent(groups: list[_Group], *, path: str) -> None:
  seen: set[str] = set()
  for group in groups:
    if group.key in seen:
      raise ValueError(
        f"{path}: members of sample {group.key[:_SHOWN]!r} are not adjacent, as webdataset"
        " requires. Rewrite the shard in order: tar --sort=name -cf NEW.tar FOLDER"
      )
    seen.add(group.key)


def _number(field: bytes, *, offset: int, base: int = 8) -> int:
  """The number in a field: text up to the first zero; base 256 if the first bit is set (GNU)."""
  if field[:1] >= b"\x80" and base == 8:
    number = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
  else:
    digits = field.partition(b"\0")[0].strip() or b"0"
    try:
      number = int(digits, base)
    except ValueError:
      number = -1
  if not 0 <= number < 1 << 63:  # a negative size would make the scan loop forever
    raise BrokenTar(offset, "wrong number in a header")
  return number


def _text(field: bytes) -> str:
  return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes, *, offset: int) -> dict[bytes, bytes]:
  """Parses records "LENGTH KEY=VALUE\\n", where LENGTH counts the whole record.

  Returns:
    The path and the size, if they are given; other keys would only take memory.
  """
  records, position, end = dict[bytes, bytes](), 0, len(data.rstrip(b"\0"))
  while position < end:
    space = data.find(b" ", position, position + 9)  # the data has at most 1 MiB: 7 digits
    digits = data[position:space]
    length = int(digits) if space > 0 and digits.isdigit() else 0
    if not len(digits) < length <= len(data) - position:
      raise BrokenTar(offset, "wrong pax record")
    key, _, value = data[space + 1 : position + length - 1].partition(b"=")
    if key in (b"path", b"size"):
      records[key] = value
    position += length
  return records
