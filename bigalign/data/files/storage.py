"""Bytes of files: local ones, and objects under gs://, s3://, http:// and https://.

Remote files are read through tensorstore's key-value stores, which find the credentials and pool
the connections. epath and gcsfs, which write work directories, do not serve here: a read does not
return the generation of the object, and http:// and s3:// would need more packages. tensorstore in
turn has no files to append to or rename. It is imported when the first remote path is read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import io
import logging
import os
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from bigalign.data.files.cache import LRUCache
from bigalign.data.files.regular import open_descriptor
from bigalign.private_apis import tensorstore_status

logger = logging.getLogger(__name__)

TRIES = 8  # of a request, within at least 40 s
FIRST_WAIT = 0.25  # seconds after the first failure; doubles after each
_REQUESTS = 32  # at a time, for what is not data
_OPEN_FILES = 128  # local files that stay open
_TRANSIENT = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
_DRIVERS = ("gs", "s3", "http", "https")


class Stat(NamedTuple):
  """Differs if a file was changed or replaced."""

  size: int  # bytes; -1 for a remote file, because stores do not send the size with every read
  stamp: int  # local: modification time in ns; remote: hash of the generation or ETag


class FileChanged(OSError):
  """The file is not the one that was indexed."""


def is_remote(path: str) -> bool:
  """Returns whether the path is a URL of an object store.

  Raises:
    ValueError: for an unknown scheme.
  """
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
def atomic_write(path: str | os.PathLike[str], *, suffix: str = "part") -> Iterator[BinaryIO]:
  """Opens a local file that appears under its name only once all of it is on the disk.

  Args:
    path: of the file; an old file of this name is replaced.
    suffix: ends the name until then. Processes that may write the same file at the same time each
      need their own, such as unique_suffix().
  """
  partial = pathlib.Path(f"{os.fspath(path)}.{suffix}")
  try:
    with partial.open("wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
  except BaseException:
    partial.unlink(missing_ok=True)  # the disk may be full
    raise
  partial.replace(path)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], program: str, *, wait: bool = False) -> Iterator[None]:
  """Locks a folder for one process of this machine; the lock also ends with the process.

  Args:
    folder: to lock.
    program: what another process that holds the lock probably is, for the error.
    wait: until the other process has ended, instead of raising.

  Raises:
    BlockingIOError: if another process holds the lock.
    FileNotFoundError: if the folder does not exist, or another process removed or renamed it.
  """
  descriptor = _lock(folder, program, wait)
  # The process that held the lock may have removed the folder. A lock on a removed folder does not
  # exclude other processes, so the folder that has this name now is locked instead.
  while not is_at(descriptor, folder):
    os.close(descriptor)
    descriptor = _lock(folder, program, wait)
  try:
    yield
  finally:
    os.close(descriptor)


def _lock(folder: str | os.PathLike[str], program: str, wait: bool) -> int:
  descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    os.close(descriptor)
    raise BlockingIOError(f"{folder}: another {program} writes there; wait for it") from None
  except BaseException:
    os.close(descriptor)
    raise
  return descriptor


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
  """Returns whether a path leads to the file or folder that is open as this descriptor."""
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def forget_listings() -> None:
  """Makes gcsfs ask the store each time, unless the user has configured its cache of listings.

  By default it remembers a listing of a folder for ever, with the sizes of the files. What another
  process writes later is then missing, or is read up to its old size.
  """
  with contextlib.suppress(ImportError):  # epath may also use TensorFlow, which remembers nothing
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def unique_suffix() -> str:
  """Returns a suffix for atomic_write that no other process on any machine has."""
  return f"{os.uname().nodename}-{os.getpid()}.tmp"


def read(path: str, start: int, end: int, *, expect: Stat | None = None) -> bytes:
  """Returns bytes [start, end) of a file, fewer if the file ends before.

  Raises:
    FileNotFoundError: if the file is missing.
    FileChanged: if the file is not the one that `expect` describes.
  """
  data, current = (_read_remote if is_remote(path) else _read_local)(path, start, end)
  if expect is not None and current != expect:
    raise FileChanged(f"{path}: {_difference(expect, Stat(*current))}")
  return data


def tail(path: str, size: int) -> tuple[bytes, Stat]:
  """Returns the last `size` bytes of a remote file (all bytes of a smaller one), and its Stat."""
  try:
    return _read_remote(path, -size, None)
  except ValueError as error:
    if tensorstore_status(error) != "OUT_OF_RANGE":
      raise
    return _read_remote(path, 0, None)


class SeekableFile(io.RawIOBase):
  """A remote file with seek; each read is a request.

  Args:
    path: of the file.
    size: where the file ends for the reader, in bytes.
    expect: which version of the file to read; another one raises FileChanged.
  """

  def __init__(self, path: str, size: int, expect: Stat):
    self._path, self._size, self._expect, self._position = path, size, expect, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
    self._position = offset + origin[whence]
    return self._position

  def tell(self) -> int:
    return self._position

  def readinto(self, buffer: Any) -> int:
    end = min(self._position + len(buffer), self._size)
    data = b""
    if end > self._position:
      data = read(self._path, self._position, end, expect=self._expect)
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)


def stat(path: str) -> Stat:
  """Returns the size and stamp that the file has now."""
  return _read_remote(path, 0, 0)[1] if is_remote(path) else _local_stat(os.stat(path))


def requests(paths: Iterable[str]) -> concurrent.futures.ThreadPoolExecutor:
  """Returns threads that ask for files at the same time, if some are remote; otherwise one thread.

  A request takes tens of milliseconds, so thousands of shards would take minutes one by one.
  """
  return concurrent.futures.ThreadPoolExecutor(_REQUESTS if any(map(is_remote, paths)) else 1)


def check(path: str, expect: Stat) -> None:
  """Raises FileChanged if the file is not the one that `expect` describes."""
  current = stat(path)
  if current != expect:
    raise FileChanged(f"{path}: {_difference(expect, current)}")


def exists(path: str) -> bool:
  """Returns whether there is a file at a path.

  A store that does not let a reader list its objects answers "permission denied" for a missing one.
  """
  if not is_remote(path):
    return os.path.isfile(path)
  try:
    stat(path)
  except FileNotFoundError:
    return False
  except ValueError as error:
    if tensorstore_status(error) != "PERMISSION_DENIED":
      raise
    return False
  return True


def names(folder: str, *, prefix: str = "") -> list[str]:
  """Returns the names of the files in a folder, unsorted.

  tensorstore cannot ask for one level only, so objects in subfolders are listed and left out.

  Args:
    folder: local or remote.
    prefix: begins the names; a store is asked for these only.

  Raises:
    ValueError: for a store that cannot list files, such as http://.
  """
  if not is_remote(folder):
    return [name for name in os.listdir(folder or os.curdir) if name.startswith(prefix)]
  try:
    keys = _request(folder, lambda: _store(folder).list(_keys_of(prefix)).result())
  except NotImplementedError:
    raise ValueError(
      f"{folder}: this store cannot list its files; write the names out, as in {{00000..00099}}.tar"
    ) from None
  return [key.decode() for key in keys if b"/" not in key]


def _keys_of(prefix: str) -> Any:
  """tensorstore's range of the keys that begin so."""
  import tensorstore

  first = prefix.encode()  # UTF-8 has no byte 0xff, so the last one can be incremented
  return tensorstore.KvStore.KeyRange(first, first[:-1] + bytes([first[-1] + 1]) if first else b"")


class BlockReader:
  """A file that is read once from front to back, sliced like bytes; keeps two blocks in memory.

  Args:
    path: of the file, local or remote.
    block: bytes that are read at once.
  """

  def __init__(self, path: str, *, block: int = 1 << 23):
    self._block = block
    # Two, because a slice may end in the next block, and the following slice begin before it.
    self._blocks = LRUCache(functools.partial(_read_block, path, block), capacity=2)

  def __getitem__(self, part: slice) -> bytes:
    """Returns buffer[start:end], cut where the file ends; the end must be given."""
    parts, start, stop = [], part.start or 0, part.stop
    for n in range(start // self._block, -(-stop // self._block)):
      block, first = self._blocks[n], n * self._block
      parts.append(block[max(start - first, 0) : stop - first])
    return b"".join(parts)


def _read_block(path: str, block: int, n: int) -> tuple[bytes, int]:
  """Block n of a file, and its size as LRUCache counts it."""
  return read(path, n * block, (n + 1) * block), 1


class FileSlice:
  """Bytes [start, end) of a file, sliced like bytes; each slice is read when it is taken."""

  def __init__(self, path: str, start: int, end: int, *, expect: Stat | None = None):
    self._path, self._start, self._end, self._expect = path, start, end, expect

  def __getitem__(self, part: slice) -> bytes:
    first = min(self._start + (part.start or 0), self._end)
    last = self._end if part.stop is None else min(self._start + part.stop, self._end)
    return read(self._path, first, last, expect=self._expect)


class Stream(io.RawIOBase):
  """A file, local or remote, read from front to back; for io.BufferedReader."""

  def __init__(self, path: str):
    self._blocks, self._position = BlockReader(path, block=1 << 20), 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._blocks[self._position : self._position + len(buffer)]
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)


def _difference(expect: Stat, current: Stat) -> str:
  if expect.size != current.size:
    return f"the shard changed since it was indexed: {expect.size} bytes then, {current.size} now"
  return "the shard changed since it was indexed: it was written again, to the same size"


def _local_stat(status: os.stat_result) -> Stat:
  return Stat(status.st_size, status.st_mtime_ns)


class _OpenFile:
  """The descriptor of a file; closes once neither the cache nor a thread that reads holds it."""

  __slots__ = ("descriptor",)

  def __init__(self, path: str):
    self.descriptor = open_descriptor(path)

  def __del__(self) -> None:
    if hasattr(self, "descriptor"):  # missing if the file could not be opened
      os.close(self.descriptor)


def _open_local(path: str) -> tuple[_OpenFile, int]:
  """An open file, and its size as LRUCache counts it."""
  return _OpenFile(path), 1


_LOCAL_FILES: LRUCache[str, _OpenFile] = LRUCache(_open_local, capacity=_OPEN_FILES)


def _read_local(path: str, start: int, end: int) -> tuple[bytes, tuple[int, int]]:
  """Bytes, and the fields of Stat; making a Stat would slow down short random reads."""
  file = _LOCAL_FILES[path]
  data, status = os.pread(file.descriptor, end - start, start), os.fstat(file.descriptor)
  return data, (status.st_size, status.st_mtime_ns)


@functools.cache
def _store(folder: str) -> Any:
  """tensorstore's key-value store of a remote folder. _request retries, so tensorstore does not."""
  import tensorstore

  retries = {f"{driver}_request_retries": {"max_retries": 0} for driver in ("http", "gcs", "s3")}
  return tensorstore.KvStore.open(
    folder.rstrip("/") + "/", context=tensorstore.Context(retries)
  ).result()


def _read_remote(path: str, start: int, end: int | None) -> tuple[bytes, Stat]:
  folder, _, name = path.rpartition("/")
  store = _store(folder)
  try:
    answer = _request(path, lambda: store.read(name, byte_range=slice(start, end)).result())
  except ValueError as error:
    # Stores answer a range past the end with an error, and do not send the size before.
    if tensorstore_status(error) != "OUT_OF_RANGE" or start < 0 or end is None:
      raise
    try:
      answer = _request(path, lambda: store.read(name, byte_range=slice(start, None)).result())
    except ValueError as past_the_end:
      if tensorstore_status(past_the_end) != "OUT_OF_RANGE":
        raise
      return b"", stat(path)
  if answer.state == "missing":
    raise FileNotFoundError(f"{path}: there is no such object")
  generation = hashlib.sha256(answer.stamp.generation).digest()
  return answer.value, Stat(-1, int.from_bytes(generation[:8], "little"))


def _request(path: str, send: Callable[[], Any]) -> Any:
  """Returns the answer of a store; retries after 429, 5xx and broken connections."""
  for attempt in range(1, TRIES + 1):
    try:
      return send()
    except ValueError as error:
      if tensorstore_status(error) not in _TRANSIENT:
        raise
      if attempt == TRIES:
        raise OSError(f"{path}: given up after {TRIES} tries: {error}") from error
      # Jitter, so that workers that failed together do not retry together.
      wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
      logger.warning("%s: %s; try %d of %d in %.1f s", path, error, attempt + 1, TRIES, wait)
      time.sleep(wait)
