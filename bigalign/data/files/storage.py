"""Bytes out of files: local ones, and objects under gs://, s3://, http:// and https://.

What is remote goes through tensorstore's key-value stores, which bring the credentials and the
pools of connections; it is imported when the first remote path is read.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import hashlib
import io
import logging
import os
import pathlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

logger = logging.getLogger(__name__)

TRIES = 8  # of a request, over 40 s at least
FIRST_WAIT = 0.25  # seconds after the first failure, doubled after each
_TRANSIENT = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
_DRIVERS = ("gs", "s3", "http", "https")


class Stat(NamedTuple):
  """What tells that a file is another one than before."""

  size: int  # bytes; of a remote file -1, as stores do not tell it with every read
  stamp: int  # time of change in ns of a local file, hash of the generation or ETag of a remote one


class Changed(OSError):
  """The file is not the one that was indexed."""


def is_remote(path: str) -> bool:
  """Whether the path is a URL of an object store."""
  if "://" not in path:
    return False
  scheme = path.partition("://")[0]
  if scheme not in _DRIVERS:
    raise ValueError(
      f"{path!r}: unknown store {scheme}://; known: a local path, "
      + ", ".join(f"{name}://" for name in _DRIVERS)
    )
  return True


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], *, mark: str = "part") -> Iterator[BinaryIO]:
  """A local file that gets its name when all of it is on the disk.

  mark  ends the name until then; of several that may write the same file each needs its own.
  """
  half = pathlib.Path(f"{os.fspath(path)}.{mark}")
  with half.open("wb") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  half.replace(path)


@contextlib.contextmanager
def alone(folder: str | os.PathLike[str], who: str, *, wait: bool = False) -> Iterator[None]:
  """One process of this machine at a time in a folder; ends with the process too.

  Raises:
    BlockingIOError: if another one is there, unless it shall `wait`; `who` says what it may be.
  """
  descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      raise BlockingIOError(f"{folder}: another {who} writes there; wait for it") from None
    yield
  finally:
    os.close(descriptor)


def own_mark() -> str:
  """A mark for `whole` that no other process on any machine has."""
  return f"{os.uname().nodename}-{os.getpid()}.tmp"


def read(path: str, start: int, end: int, *, expect: Stat | None = None) -> bytes:
  """Bytes [start, end) of a file, fewer where it ends before.

  Raises FileNotFoundError, and Changed if the file is not the one that `expect` was taken of.
  """
  data, found = (_read_remote if is_remote(path) else _FILES.read)(path, start, end)
  if expect is not None and found != expect:
    raise Changed(f"{path}: {_difference(expect, Stat(*found))}")
  return data


def tail(path: str, size: int) -> tuple[bytes, Stat]:
  """The last bytes of a remote file, all of a smaller one; and what the file is."""
  try:
    return _read_remote(path, -size, None)
  except ValueError as error:
    if not _status(error) == "OUT_OF_RANGE":
      raise
    return _read_remote(path, 0, None)


class Ranges(io.RawIOBase):
  """A remote file to seek in, up to `size`; each read is a request."""

  def __init__(self, path: str, size: int, expect: Stat):
    self._path, self._size, self._expect, self._at = path, size, expect, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
    return self._at

  def tell(self) -> int:
    return self._at

  def readinto(self, buffer: Any) -> int:
    end = min(self._at + len(buffer), self._size)
    data = read(self._path, self._at, end, expect=self._expect) if end > self._at else b""
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)


def stat(path: str) -> Stat:
  """Size and stamp as they are now."""
  return _read_remote(path, 0, 0)[1] if is_remote(path) else _local(os.stat(path))


def check(path: str, expect: Stat) -> None:
  """Raises Changed if the file is not the one that `expect` was taken of."""
  found = stat(path)
  if found != expect:
    raise Changed(f"{path}: {_difference(expect, found)}")


def names(folder: str) -> list[str]:
  """What a folder holds, in no order."""
  if not is_remote(folder):
    return os.listdir(folder or os.curdir)
  try:
    found = _request(folder, lambda: _store(folder).list().result())
  except NotImplementedError:
    raise ValueError(
      f"{folder}: this store cannot list its files; write the names out, as in {{00000..00099}}.tar"
    ) from None
  return [key.decode() for key in found if b"/" not in key]


class Blocks:
  """A file that is read once from front to back, sliced like bytes; holds two blocks of it."""

  def __init__(self, path: str, *, block: int = 1 << 23):
    self._path = path
    self._block = block
    self._held: collections.OrderedDict[int, bytes] = collections.OrderedDict()

  def __getitem__(self, part: slice) -> bytes:
    """buffer[start:end], cut where the file ends."""
    parts = []
    for n in range(part.start // self._block, -(-part.stop // self._block)):
      if n not in self._held:
        while len(self._held) > 1:
          self._held.popitem(last=False)
        self._held[n] = read(self._path, n * self._block, (n + 1) * self._block)
      block, first = self._held[n], n * self._block
      parts.append(block[max(part.start - first, 0) : part.stop - first])
    return b"".join(parts)


class Window:
  """Bytes [start, end) of a file, sliced like bytes; each slice is read when it is asked for."""

  def __init__(self, path: str, start: int, end: int, *, expect: Stat | None = None):
    self._path, self._start, self._end, self._expect = path, start, end, expect

  def __getitem__(self, part: slice) -> bytes:
    first, last = (min(self._start + place, self._end) for place in (part.start, part.stop))
    return read(self._path, first, last, expect=self._expect)


class Stream(io.RawIOBase):
  """A file, local or remote, read from front to back; for io.BufferedReader."""

  def __init__(self, path: str):
    self._blocks, self._place = Blocks(path, block=1 << 20), 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._blocks[self._place : self._place + len(buffer)]
    buffer[: len(data)] = data
    self._place += len(data)
    return len(data)


def _difference(expect: Stat, found: Stat) -> str:
  if expect.size != found.size:
    return f"the shard changed since it was indexed: {expect.size} bytes then, {found.size} now"
  return "the shard changed since it was indexed: it was written again, to the same size"


def _local(status: os.stat_result) -> Stat:
  return Stat(status.st_size, status.st_mtime_ns)


class _Files:
  """Local files opened on first use, the least recently used closed."""

  def __init__(self, limit: int = 128):
    self._limit = limit
    self._open: collections.OrderedDict[str, int] = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(self, path: str, start: int, end: int) -> tuple[bytes, tuple[int, int]]:
    """Bytes, and what Stat holds: random reads are so short that to make one would show."""
    with self._lock:  # else another thread could close the file under the read
      if path not in self._open:
        while len(self._open) >= self._limit:
          os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
      else:
        self._open.move_to_end(path)
      descriptor = self._open[path]
      data, status = os.pread(descriptor, end - start, start), os.fstat(descriptor)
    return data, (status.st_size, status.st_mtime_ns)


_FILES = _Files()


@functools.cache
def _store(folder: str) -> Any:
  """tensorstore's key-value store of a remote folder; what fails is tried again here, not there."""
  import tensorstore

  retries = {f"{driver}_request_retries": {"max_retries": 0} for driver in ("http", "gcs", "s3")}
  return tensorstore.KvStore.open(
    folder.rstrip("/") + "/", context=tensorstore.Context(retries)
  ).result()


def _read_remote(path: str, start: int, end: int | None) -> tuple[bytes, Stat]:
  folder, _, name = path.rpartition("/")
  store = _store(folder)
  try:
    found = _request(path, lambda: store.read(name, byte_range=slice(start, end)).result())
  except ValueError as error:
    # Stores answer a range past the end with an error, and do not tell the size beforehand.
    if not _status(error) == "OUT_OF_RANGE" or start < 0 or end is None:
      raise
    try:
      found = _request(path, lambda: store.read(name, byte_range=slice(start, None)).result())
    except ValueError as past:
      if not _status(past) == "OUT_OF_RANGE":
        raise
      return b"", stat(path)
  if found.state == "missing":
    raise FileNotFoundError(f"{path}: there is no such object")
  generation = hashlib.sha256(found.stamp.generation).digest()
  return found.value, Stat(-1, int.from_bytes(generation[:8], "little"))


def _request(path: str, send: Callable[[], Any]) -> Any:
  """The answer, asked for again after 429, 5xx and broken connections."""
  for attempt in range(1, TRIES + 1):
    try:
      return send()
    except ValueError as error:
      if _status(error) not in _TRANSIENT:
        raise
      if attempt == TRIES:
        raise OSError(f"{path}: given up after {TRIES} tries: {error}") from error
      # Jitter, so that workers that failed together do not come back together.
      wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
      logger.warning("%s: %s; try %d of %d in %.1f s", path, error, attempt + 1, TRIES, wait)
      time.sleep(wait)


def _status(error: ValueError) -> str:
  """tensorstore puts the status before its message: "UNAVAILABLE: Too Many Requests …"."""
  found = re.match(r"[A-Z_]+(?=: )", str(error))
  return found[0] if found else ""
