"""The samples of chosen shards, numbered in the order of the shards, and the bytes they lie in."""

from __future__ import annotations

import array
import bisect
import hashlib
import logging
import os
import shlex
from collections.abc import Sequence

import numpy as np

from bigalign.data.files import patterns, storage
from bigalign.data.tar import index

logger = logging.getLogger(__name__)

CHECKED = 1_000  # shards whose stamp is looked at on opening; the others when they are first read
UNASKED = 50e9  # bytes of local shards that opening indexes by itself: a minute or so


class Shards:
  """Where sample i of these shards lies. Memory grows with the shards, not with the samples.

  Pickles as the paths; another process opens the indexes for itself.
  """

  def __init__(self, paths: Sequence[str], *, pattern: str):
    self.paths = list(paths)
    self._pattern = pattern
    self._indexes: list[index.Index] = [None] * len(self.paths)  # type: ignore[list-item]
    table, first = np.empty(len(self.paths), index.TABLE), np.empty(len(self.paths), np.int64)
    self.fields: set[str] = set()
    self.remote = False
    self._problems: dict[int, str] = {}
    for folder, (chosen, names) in patterns.by_folder(self.paths).items():
      found = self._open(folder, names)
      rows = [found.rows[name] for name in names]
      table[chosen], first[chosen] = found.table[rows], found.first[rows]
      self.fields.update(*(found.fields[k] for k in set(found.table["fields"][rows].tolist())))
      for n in chosen:
        self._indexes[n] = found
      if found.problems:
        self._problems |= {
          n: found.problems[name] for n, name in zip(chosen, names) if name in found.problems
        }
      self.remote = self.remote or storage.is_remote(folder)
    # Arrays of Python's own: bisect and indexing are several times faster than with numpy.
    counts = table["entries"].astype(np.int64) - 1
    self.firsts = array.array("q", np.cumsum(np.append(0, counts)).tobytes())
    self._entries = array.array("q", first.tobytes())
    self._stats = [
      array.array(code, table[name].tobytes()) for code, name in (("q", "size"), ("Q", "stamp"))
    ]
    self.fingerprint = hashlib.sha256(table["digest"].tobytes()).hexdigest()[:32]
    self._check()
    self._warn()

  def __reduce__(self):
    return _reopen, (self.paths, self._pattern, self.fingerprint)

  def __len__(self) -> int:
    return self.firsts[-1]

  def shard(self, i: int) -> int:
    """The shard of sample i."""
    return bisect.bisect_right(self.firsts, i) - 1

  def span(self, i: int, shard: int) -> tuple[int, int]:
    """The bytes [start, end) of sample i in its shard."""
    return self._indexes[shard].span(self._entries[shard] + i - self.firsts[shard])

  def stat(self, shard: int) -> storage.Stat:
    """What the shard was when it was indexed."""
    size, stamp = self._stats
    return storage.Stat(size[shard], stamp[shard])

  def place(self, shard: int) -> str:
    """The folder of the shard's index."""
    return os.path.dirname(self._indexes[shard].path)

  def changed(self, error: storage.Changed) -> storage.Changed:
    """The error with the way on."""
    return storage.Changed(f"{error}; index it again: bigalign index {shlex.quote(self._pattern)}")

  def _open(self, folder: str, names: Sequence[str]) -> index.Index:
    """The index of a folder, made first if it is missing and that is little work."""
    found = _fittest(folder, names)
    lacking = [os.path.join(folder, name) for name in names if not found or name not in found.rows]
    if found and not lacking:
      return found
    own, remote = index.home(folder), storage.is_remote(folder)
    size = 0 if remote else sum(storage.stat(path).size for path in lacking)
    beside = found is not None and os.path.dirname(found.path) == folder
    if remote or beside or size > UNASKED:
      raise ValueError(
        f"{self._pattern!r}: {len(lacking)} of {len(names)} shards in {folder or os.curdir} are"
        f" in no index (sought beside them and in {own}; the first: "
        f"{os.path.basename(lacking[0])}). Build it, once: "
        f"bigalign index {shlex.quote(self._pattern)}; after --out DIR, also set "
        "BIGALIGN_INDEX=DIR"
      )
    logger.info("Indexing %d shards of %s, %.2g GB, into %s", len(lacking), folder, size / 1e9, own)
    for path in lacking:
      index.index_shard(path, own)
    index.merge(folder, own)
    return index.Index(os.path.join(own, index.FILE))

  def _check(self) -> None:
    step = -(-len(self.paths) // CHECKED)
    try:
      for n in range(0, len(self.paths), step):
        if not storage.is_remote(self.paths[n]):  # a request each would take minutes
          storage.check(self.paths[n], self.stat(n))
    except storage.Changed as error:
      raise self.changed(error) from None

  def _warn(self) -> None:
    for n, problem in list(self._problems.items())[:5]:
      logger.warning(
        "%s: %s; the %d whole samples before it are used, what follows is lost",
        self.paths[n],
        problem,
        self.firsts[n + 1] - self.firsts[n],
      )
    if len(self._problems) > 5:
      logger.warning(
        "%s: %d more of %d shards break off",
        self._pattern,
        len(self._problems) - 5,
        len(self.paths),
      )


def _fittest(folder: str, names: Sequence[str]) -> index.Index | None:
  """Of the indexes of a folder the one that is wrong about the fewest of these shards.

  What lies in a folder that cannot be written can be old, and a newer index only lie elsewhere.
  """
  found = [index.Index(os.path.join(place, index.FILE)) for place in index.places(folder)]
  if len(found) < 2:
    return next(iter(found), None)

  def wrong(one: index.Index) -> int:
    known = [name for name in names if name in one.rows]
    looked = known[:: -(-len(known) // CHECKED) or 1]
    return (
      len(names)
      - len(known)
      + sum(
        one.part(one.rows[name]).stat != storage.stat(os.path.join(folder, name)) for name in looked
      )
    )

  return min(found, key=wrong)  # of equals the one beside the shards


def _reopen(paths: Sequence[str], pattern: str, fingerprint: str) -> Shards:
  shards = Shards(paths, pattern=pattern)
  if shards.fingerprint != fingerprint:
    raise OSError(f"{pattern!r}: the shards were indexed again, and differ; start again")
  return shards
