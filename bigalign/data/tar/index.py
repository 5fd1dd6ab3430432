"""A sidecar of tar shards: where each sample lies, 4 bytes a sample, read as they are asked for.

One file per folder of shards, for those of them that were indexed, sorted by name:

  FOLDER/bigalign.index          beside the shards, which `bigalign index` writes
  ROOT/NAME-HASH/bigalign.index  of a folder that cannot be written, a remote one, or one that was
                                 indexed when it was opened; ROOT is $BIGALIGN_INDEX or
                                 ~/.cache/bigalign/index, HASH that of the folder's absolute path

All numbers are little-endian:

  8 bytes     b"BAINDEX1"
  8 bytes     S, the shards (uint32), and the bytes of the JSON text at the end (uint32)
  8 bytes     E, the entries (uint64): samples + S
  4 E bytes   uint32 entries: the first block of 512 bytes of each sample of a shard in order, then
              the block after its last sample; then the next shard
  30 S bytes  TABLE, a row per shard
  JSON        [names, lists of member extensions that TABLE's `fields` counts, {name: what broke
              the tar off}]
While shards are indexed, each has such a file of its own in bigalign.index.parts/, so that any
number of processes or machines can work and stop and go on; they are merged at the end.
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
from bigalign.data.tar import parse

logger = logging.getLogger(__name__)

FILE, PARTS = "bigalign.index", "bigalign.index.parts"
MAGIC = b"BAINDEX1"
HEADER = struct.Struct("<8sIIQ")
TABLE = np.dtype(
  [
    ("size", "<i8"),  # bytes of the shard, -1 of a remote one
    ("stamp", "<u8"),  # storage.Stat.stamp
    ("digest", "<u8"),  # the first bytes of the SHA-256 of its name and entries
    ("entries", "<u4"),  # samples + 1
    ("fields", "<u2"),
  ]
)
_PAIR = struct.Struct("<II")


class Part(NamedTuple):
  """What the index says of one shard."""

  name: str
  stat: storage.Stat
  digest: int
  entries: int  # samples + 1
  fields: tuple[str, ...]
  problem: str


class Index:
  """An index file: the table in memory, the entries on the disk, held open until `close`."""

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
        f"{path}: not a whole index of this version ({magic!r}); remove it, and "
        "run bigalign index again"
      )
    rest = os.pread(self._descriptor, size, after)
    self.table, text = np.frombuffer(rest, TABLE, shards), rest[len(rest) - tail :]
    self.names, self.fields, self.problems = json.loads(text)
    self.rows = {name: row for row, name in enumerate(self.names)}
    # Entry first[row] is the first of a shard.
    self.first = np.cumsum(self.table["entries"], dtype=np.int64) - self.table["entries"]

  def part(self, row: int) -> Part:
    """What it says of a shard."""
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
    """(first byte, byte after the last) of the sample with this entry."""
    # A map would cost no call, but the kernel maps 16 pages around each, and an hour of random
    # reads would count the whole index as memory of every worker.
    start, end = _PAIR.unpack(os.pread(self._descriptor, 8, HEADER.size + 4 * entry))
    return start * parse.BLOCK, end * parse.BLOCK

  def starts(self, row: int) -> np.ndarray:
    """[entries] uint32; works after `close`."""
    return np.fromfile(
      self.path,
      "<u4",
      int(self.table["entries"][row]),
      offset=HEADER.size + 4 * int(self.first[row]),
    )


def home(folder: str, root: str | None = None) -> str:
  """Where the index of a folder goes if not beside the shards; under `root` if it is given."""
  root = root or os.environ.get("BIGALIGN_INDEX") or "~/.cache/bigalign/index"
  where = folder.rstrip("/") if storage.is_remote(folder) else os.path.abspath(folder)
  name = f"{os.path.basename(where)}-{hashlib.sha256(where.encode()).hexdigest()[:16]}"
  return os.path.join(os.path.expanduser(root), name)


def places(folder: str) -> list[str]:
  """Where a folder has an index: beside the shards, in its `home`, in both or nowhere."""
  candidates = [home(folder)] if storage.is_remote(folder) else [folder, home(folder)]
  return [place for place in candidates if os.path.exists(os.path.join(place, FILE))]


def index_shard(path: str, place: str) -> Part:
  """Scans a shard and writes its part of the index that lies in `place`.

  Raises ValueError if it is no tar or its samples lie apart; a shard that breaks off keeps its
  whole samples, and the part tells the problem.
  """
  stat = storage.stat(path)
  if not stat.size:
    raise ValueError(f"{path}: the shard is an empty file (0 bytes); fetch it again")
  with buffer_of(path) as buffer:
    found = parse.scan(buffer, path=path)
  storage.check(path, stat)  # not written while it was read
  name, starts = os.path.basename(path), found.starts.astype("<u4")
  digest = hashlib.sha256(name.encode() + b"/" + starts.tobytes()).digest()
  part = Part(
    name, stat, int.from_bytes(digest[:8], "little"), len(starts), found.fields, found.problem
  )
  folder = os.path.join(place, PARTS)
  os.makedirs(folder, exist_ok=True)
  _write(os.path.join(folder, f"{part.name}.index"), [part], lambda file: file.write(starts.data))
  return part


@contextlib.contextmanager
def buffer_of(path: str) -> Iterator[parse.Buffer]:
  """A file as bytes that are read where they are looked at."""
  if storage.is_remote(path):
    yield storage.Blocks(path)
    return
  with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
    yield buffer


def locate(name: str, place: str) -> tuple[Index, int] | None:
  """Where the index in `place` tells of a shard: (Index, row); a part goes before the whole."""
  for path in (os.path.join(place, PARTS, f"{name}.index"), os.path.join(place, FILE)):
    if os.path.exists(path):
      found = Index(path)
      if name in found.rows:
        return found, found.rows[name]
  return None


def current(paths: Sequence[str], place: str) -> dict[str, Part]:
  """The shards that need no scan: path → what the index in `place` or its part says."""
  known: dict[str, Part] = {}
  parts = os.path.join(place, PARTS)
  own = sorted(os.listdir(parts)) if os.path.isdir(parts) else []
  for path in (os.path.join(place, FILE), *(os.path.join(parts, name) for name in own)):
    if path.endswith(".index") and os.path.exists(path):
      found = Index(path)
      known |= {name: found.part(row) for name, row in found.rows.items()}
  pairs = [(path, known.get(os.path.basename(path))) for path in paths]
  return {path: part for path, part in pairs if part and part.stat == storage.stat(path)}


def merge(folder: str, place: str) -> None:
  """Puts the parts into the index in `place`, and leaves out the shards that are there no more."""
  parts = os.path.join(place, PARTS)
  if not os.path.isdir(parts):
    return
  with storage.alone(parts, "bigalign index", wait=True):
    whole = os.path.join(place, FILE)
    fresh = sorted(
      os.path.join(parts, name) for name in os.listdir(parts) if name.endswith(".index")
    )
    there = None if storage.is_remote(folder) else set(storage.names(folder))
    chosen: dict[str, tuple[Index, int]] = {}
    for path in ([whole] if os.path.exists(whole) else []) + fresh:
      index = Index(path)
      index.close()  # there may be more parts than files can be open
      chosen |= {
        name: (index, row) for name, row in index.rows.items() if there is None or name in there
      }
    order = [chosen[name] for name in sorted(chosen)]

    def write_starts(file: IO[bytes]) -> None:
      for index, row in order:
        file.write(index.starts(row).data)

    _write(whole, [index.part(row) for index, row in order], write_starts)
    for path in fresh:
      os.unlink(path)
  with contextlib.suppress(OSError):  # another process may have begun a part
    os.rmdir(parts)


def _write(path: str, parts: Sequence[Part], write_starts: Callable[[IO[bytes]], Any]) -> None:
  """An index file."""
  fields = sorted({part.fields for part in parts})
  table = np.array(
    [(*part.stat, part.digest, part.entries, fields.index(part.fields)) for part in parts], TABLE
  )
  problems = {part.name: part.problem for part in parts if part.problem}
  tail = json.dumps(
    [[part.name for part in parts], fields, problems], separators=(",", ":")
  ).encode()

  with storage.whole(path, mark=storage.own_mark()) as file:
    file.write(HEADER.pack(MAGIC, len(parts), len(tail), sum(part.entries for part in parts)))
    write_starts(file)
    file.write(table.tobytes() + tail)
