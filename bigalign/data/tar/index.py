"""The index of tar shards: where each sample is, 4 bytes per sample, read from the disk on demand.

One file per folder of shards, for the shards that were indexed, sorted by name:

  FOLDER/bigalign.index: next to the shards; `bigalign index` writes it.
  ROOT/NAME-HASH/bigalign.index: for a folder that is read-only or remote, or that was indexed when
    it was opened. ROOT is $BIGALIGN_INDEX or ~/.cache/bigalign/index; HASH is a hash of the
    folder's absolute path.

All numbers are little-endian:

  8 bytes     b"BAINDEX1"
  8 bytes     S, the number of shards (uint32), and the bytes of the JSON text at the end (uint32)
  8 bytes     E, the number of entries (uint64): samples + S
  4 E bytes   uint32 entries: for each shard the first block of 512 bytes of each sample in order,
              then the block after its last sample
  30 S bytes  TABLE, a row per shard
  JSON        [names, lists of member extensions that TABLE's `fields` counts, {name: where the tar
              is cut off}]

While shards are indexed, each has such a file of its own in bigalign.index.parts/. So any number of
processes or machines can work, stop and resume; the parts are merged at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from bigalign.data.files import storage
from bigalign.data.files.regular import open_regular
from bigalign.data.tar import parse

logger = logging.getLogger(__name__)

FILE, PARTS = "bigalign.index", "bigalign.index.parts"
MAGIC = b"BAINDEX1"
HEADER = struct.Struct("<8sIIQ")
TABLE = np.dtype(
  [
    ("size", "<i8"),  # bytes of the shard, -1 if it is remote
    ("stamp", "<u8"),  # storage.Stat.stamp
    ("digest", "<u8"),  # the first bytes of the SHA-256 of its name and entries
    ("entries", "<u4"),  # samples + 1
    ("fields", "<u2"),
  ]
)
_TRIES = 100  # to write a part into a folder that other processes may remove
_PAIR = struct.Struct("<II")


class Part(NamedTuple):
  """The index of one shard."""

  name: str
  stat: storage.Stat
  digest: int
  entries: int  # samples + 1
  fields: tuple[str, ...]  # extensions of the members
  problem: str  # where the tar is cut off; "" if it is complete


class Index:
  """An index file: the table in memory, the entries on the disk.

  The file stays open until `close`.

  Args:
    path: of the file.

  Raises:
    ValueError: if the file is incomplete or of another version.
  """

  def __init__(self, path: str):
    self.path = path
    self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    self.close = weakref.finalize(self, os.close, self._descriptor)
    header = os.pread(self._descriptor, HEADER.size, 0).ljust(HEADER.size, b"\0")
    magic, shards, tail, self.entries = HEADER.unpack(header)
    after = HEADER.size + 4 * self.entries
    size = TABLE.itemsize * shards + tail
    if magic != MAGIC or os.fstat(self._descriptor).st_size != after + size:
      raise ValueError(
        f"{path}: not a complete index of this version ({magic!r}); remove it, and "
        "run bigalign index again"
      )
    rest = os.pread(self._descriptor, size, after)
    self.table, text = np.frombuffer(rest, TABLE, shards), rest[len(rest) - tail :]
    self.names, self.fields, self.problems = json.loads(text)
    self.rows = {name: row for row, name in enumerate(self.names)}
    # Entry first[row] is the first one of a shard.
    self.first = np.cumsum(self.table["entries"], dtype=np.int64) - self.table["entries"]

  def part(self, row: int) -> Part:
    """Returns the index of one shard."""
    size, stamp, digest, entries, fields = self.table[row].tolist()
    name = self.names[row]
    return Part(
      name,
      storage.Stat(size, stamp),
      digest,
      entries,
      tuple(self.fields[fields]),
      self.problems.get(name, ""),
    )

  def span(self, entry: int) -> tuple[int, int]:
    """Returns (first byte, byte after the last) of the sample with this entry."""
    # A memory map would need no system call. But the kernel maps 16 pages around each read, so that
    # after an hour of random reads the whole index counts as memory of every worker.
    start, end = _PAIR.unpack(os.pread(self._descriptor, 8, HEADER.size + 4 * entry))
    return start * parse.BLOCK, end * parse.BLOCK

  def starts(self, row: int) -> np.ndarray:
    """Returns the entries of a shard, [entries] uint32; works after `close`."""
    return np.fromfile(
      self.path,
      "<u4",
      int(self.table["entries"][row]),
      offset=HEADER.size + 4 * int(self.first[row]),
    )


def home(folder: str, root: str | None = None) -> str:
  """Returns the folder of an index that is not next to its shards.

  Args:
    folder: of the shards.
    root: of all such indexes; by default $BIGALIGN_INDEX or ~/.cache/bigalign/index.
  """
  root = root or homes()
  absolute = folder.rstrip("/") if storage.is_remote(folder) else os.path.abspath(folder)
  name = f"{os.path.basename(absolute)}-{hashlib.sha256(absolute.encode()).hexdigest()[:16]}"
  return os.path.join(os.path.expanduser(root), name)


def homes() -> str:
  """Returns the folder of all indexes that are not next to their shards."""
  return os.path.expanduser(os.environ.get("BIGALIGN_INDEX") or "~/.cache/bigalign/index")


def index_folders(folder: str) -> list[str]:
  """Returns the folders that have an index of these shards: their own, its `home`, or both."""
  candidates = [home(folder)] if storage.is_remote(folder) else [folder, home(folder)]
  return [path for path in candidates if os.path.exists(os.path.join(path, FILE))]


def index_shard(path: str, index_folder: str) -> Part:
  """Scans a shard and writes its part of the index.

  Args:
    path: of the shard.
    index_folder: of the index.

  Returns:
    What was written. A shard that is cut off keeps its complete samples, and has a `problem`.

  Raises:
    ValueError: if the shard is empty or not a tar, or if members of a sample are not adjacent.
    storage.FileChanged: if the shard was written meanwhile.
  """
  stat = storage.stat(path)
  if not stat.size:
    raise ValueError(f"{path}: the shard is an empty file (0 bytes); fetch it again")
  with open_buffer(path) as buffer:
    scan = parse.scan(buffer, path=path)
  storage.check(path, stat)
  name, starts = os.path.basename(path), scan.starts.astype("<u4")
  digest = hashlib.sha256(name.encode() + b"/" + starts.tobytes()).digest()
  part = Part(
    name, stat, int.from_bytes(digest[:8], "little"), len(starts), scan.fields, scan.problem
  )
  folder = os.path.join(index_folder, PARTS)
  for attempt in range(_TRIES):
    os.makedirs(folder, exist_ok=True)
    try:
      _write(
        os.path.join(folder, f"{part.name}.index"), [part], lambda file: file.write(starts.data)
      )
      break
    except FileNotFoundError:  # another process merged the other parts, and removed the folder
      if attempt == _TRIES - 1:
        raise
  return part


@contextlib.contextmanager
def open_buffer(path: str) -> Iterator[parse.Buffer]:
  """Opens a file, local or remote, as bytes that are read when they are sliced."""
  if storage.is_remote(path):
    yield storage.BlockReader(path)
    return
  with (
    open_regular(path) as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
  ):
    yield buffer


def locate(name: str, index_folder: str) -> tuple[Index, int] | None:
  """Returns (Index, row) of a shard, from its part if there is one; None if it is not indexed."""
  for path in (
    os.path.join(index_folder, PARTS, f"{name}.index"),
    os.path.join(index_folder, FILE),
  ):
    # Another process may merge the part in between; then the index, which is read next, has it.
    with contextlib.suppress(FileNotFoundError):
      index = Index(path)
      if name in index.rows:
        return index, index.rows[name]
  return None


def current(paths: Sequence[str], index_folder: str) -> dict[str, Part]:
  """Returns {path: Part} of the shards that did not change since they were indexed.

  Raises:
    ValueError: if the index is damaged. A damaged part counts as missing, and is written again.
  """
  known: dict[str, Part] = {}
  parts = os.path.join(index_folder, PARTS)
  own: list[str] = []
  with contextlib.suppress(FileNotFoundError):
    own = sorted(os.listdir(parts))
  merged = os.path.join(index_folder, FILE)
  if os.path.exists(merged):
    known = _all_parts(merged)
  for name in own:
    if name.endswith(".index"):
      with contextlib.suppress(ValueError, FileNotFoundError):  # another process may merge it now
        known |= _all_parts(os.path.join(parts, name))
  have = [path for path in paths if os.path.basename(path) in known]
  with storage.requests(have) as pool:
    stats = dict(zip(have, pool.map(_stat, have)))
  return {
    path: part for path in have if (part := known[os.path.basename(path)]).stat == stats[path]
  }


def _all_parts(path: str) -> dict[str, Part]:
  index = Index(path)
  return {name: index.part(row) for name, row in index.rows.items()}


def _stat(path: str) -> storage.Stat | None:
  """The size and stamp of a shard; None if it cannot be asked for, which indexing it reports."""
  try:
    return storage.stat(path)
  except (OSError, ValueError):
    return None


def merge(folder: str, index_folder: str) -> None:
  """Merges the parts into the index, and drops shards that no longer exist.

  Args:
    folder: of the shards.
    index_folder: of the index and its parts.
  """
  parts = os.path.join(index_folder, PARTS)
  for attempt in range(_TRIES):
    try:
      with storage.locked(parts, "bigalign index", wait=True):
        _merge_parts(folder, index_folder, parts)
      return
    except FileNotFoundError:
      # Without the folder, no parts are left to merge. If it is there again, another process merged
      # the parts and removed it, and a third one has written new parts since.
      if not os.path.isdir(parts):
        return
      if attempt == _TRIES - 1:
        raise


def _merge_parts(folder: str, index_folder: str, parts: str) -> None:
  """Merges the parts and removes their folder, under its lock."""
  merged = os.path.join(index_folder, FILE)
  new = sorted(os.path.join(parts, name) for name in os.listdir(parts) if name.endswith(".index"))
  present = None if storage.is_remote(folder) else set(storage.names(folder))
  chosen: dict[str, tuple[Index, int]] = {}
  for path in ([merged] if os.path.exists(merged) else []) + new:
    index = Index(path)
    index.close()  # there may be more parts than a process can have open files
    chosen |= {
      name: (index, row) for name, row in index.rows.items() if present is None or name in present
    }
  order = [chosen[name] for name in sorted(chosen)]

  def write_starts(file: IO[bytes]) -> None:
    for index, row in order:
      file.write(index.starts(row).data)

  _write(merged, [index.part(row) for index, row in order], write_starts)
  for path in new:
    os.unlink(path)
  with contextlib.suppress(OSError):  # another process may have begun a part
    os.rmdir(parts)


def _write(path: str, parts: Sequence[Part], write_starts: Callable[[IO[bytes]], Any]) -> None:
  """Writes an index file; `write_starts` writes the entries of all parts to it."""
  fields = sorted({part.fields for part in parts})
  table = np.array(
    [(*part.stat, part.digest, part.entries, fields.index(part.fields)) for part in parts], TABLE
  )
  problems = {part.name: part.problem for part in parts if part.problem}
  tail = json.dumps(
    [[part.name for part in parts], fields, problems], separators=(",", ":")
  ).encode()

  with storage.atomic_write(path, suffix=storage.unique_suffix()) as file:
    file.write(HEADER.pack(MAGIC, len(parts), len(tail), sum(part.entries for part in parts)))
    write_starts(file)
    file.write(table.tobytes() + tail)
