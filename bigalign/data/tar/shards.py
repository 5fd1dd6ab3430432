"""The samples of chosen shards: their numbers, in the order of the shards, and their bytes."""

from __future__ import annotations

import array
import bisect
import hashlib
import logging
import os
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.files import patterns, storage
from bigalign.data.files.draws import draw
from bigalign.data.tar import index

logger = logging.getLogger(__name__)

CHECKED = 1_000  # shards whose stamp is checked when they are opened; others when first read
UNASKED = 50e9  # bytes of local shards that opening them indexes by itself: about a minute


class Shards:
  """Where each sample of these shards is. Memory grows with the shards, not with the samples.

  Pickles as the paths; another process opens the indexes for itself.

  Args:
    paths: of the shards.
    pattern: names the shards in errors.
    refresh: whether local shards that changed are indexed again, if their index is not next to
      them: opening them made it. The log says so.

  Raises:
    ValueError: for remote shards, or many bytes of local ones, that are not indexed; gives the
      command.
    storage.FileChanged: if a shard changed since it was indexed.
  """

  def __init__(self, paths: Sequence[str], *, pattern: str, refresh: bool = True):
    self.paths = list(paths)
    self._pattern = pattern
    self._refresh = refresh
    self._indexes: list[index.Index] = [None] * len(self.paths)  # type: ignore[list-item]
    table, first = np.empty(len(self.paths), index.TABLE), np.empty(len(self.paths), np.int64)
    self.fields: set[str] = set()
    self.remote = False
    self._problems: dict[int, str] = {}
    for folder, (chosen, names) in patterns.by_folder(self.paths).items():
      opened = self._open(folder, names)
      rows = [opened.rows[name] for name in names]
      table[chosen], first[chosen] = opened.table[rows], opened.first[rows]
      self.fields.update(*(opened.fields[k] for k in set(opened.table["fields"][rows].tolist())))
      for n in chosen:
        self._indexes[n] = opened
      if opened.problems:
        self._problems |= {
          n: opened.problems[name] for n, name in zip(chosen, names) if name in opened.problems
        }
      self.remote = self.remote or storage.is_remote(folder)
    # array.array instead of numpy: bisect and indexing are several times faster.
    counts = table["entries"].astype(np.int64) - 1
    self.firsts = array.array("q", np.cumsum(np.append(0, counts)).tobytes())
    self._entries = array.array("q", first.tobytes())
    self._stats = [
      array.array(code, table[name].tobytes()) for code, name in (("q", "size"), ("Q", "stamp"))
    ]
    self.fingerprint = hashlib.sha256(table["digest"].tobytes()).hexdigest()[:32]
    self._check()
    self._warn()

  def __reduce__(self) -> tuple[Any, ...]:
    return _reopen, (self.paths, self._pattern, self.fingerprint)

  def __len__(self) -> int:
    return self.firsts[-1]

  def shard(self, i: int) -> int:
    """Returns the number of the shard of sample i."""
    return bisect.bisect_right(self.firsts, i) - 1

  def span(self, i: int, shard: int) -> tuple[int, int]:
    """Returns the bytes [start, end) of sample i in its shard."""
    return self._indexes[shard].span(self._entries[shard] + i - self.firsts[shard])

  def stat(self, shard: int) -> storage.Stat:
    """Returns the Stat that the shard had when it was indexed."""
    size, stamp = self._stats
    return storage.Stat(size[shard], stamp[shard])

  def index_folder(self, shard: int) -> str:
    """Returns the folder of the shard's index."""
    return os.path.dirname(self._indexes[shard].path)

  def changed(self, error: storage.FileChanged) -> storage.FileChanged:
    """Returns the error, with the command that indexes the shards again."""
    command = f"bigalign index {shlex.quote(self._pattern)}"
    return storage.FileChanged(f"{error}; index it again: {command}")

  def _open(self, folder: str, names: Sequence[str]) -> index.Index:
    """The index of a folder; makes it first if it is missing and takes little time."""
    best = _best_index(folder, names)
    own, remote = index.home(folder), storage.is_remote(folder)
    next_to_shards = best is not None and os.path.dirname(best.path) == folder
    missing = [os.path.join(folder, name) for name in names if not best or name not in best.rows]
    may_refresh = self._refresh and not remote and not next_to_shards
    stale = _changed(best, folder, names) if best and may_refresh else []
    size = 0 if remote else sum(storage.stat(path).size for path in [*missing, *stale])
    if best and not missing and (not stale or size > UNASKED):
      return best  # opening it reports a shard that changed
    if remote or next_to_shards or size > UNASKED:
      raise ValueError(
        f"{self._pattern!r}: {len(missing)} of {len(names)} shards in {folder or os.curdir} are"
        f" not in an index, neither next to them nor in {own} (the first: "
        f"{os.path.basename(missing[0])}). Build it, once: "
        f"bigalign index {shlex.quote(self._pattern)}; after --out DIR, also set "
        "BIGALIGN_INDEX=DIR"
      )
    number = len(missing) + len(stale)
    logger.info("Indexing %d shards of %s, %.2g GB, into %s", number, folder, size / 1e9, own)
    if stale:
      logger.warning(
        "%d of %d shards in %s changed since they were indexed (the first: %s); they are indexed"
        " again",
        len(stale),
        len(names),
        folder or os.curdir,
        os.path.basename(stale[0]),
      )
    for path in [*missing, *stale]:
      index.index_shard(path, own)
    index.merge(folder, own)
    return index.Index(os.path.join(own, index.FILE))

  def _check(self) -> None:
    """Raises FileChanged if a local shard changed; looks at CHECKED of them."""
    try:
      for n in draw(len(self.paths), CHECKED):
        if not storage.is_remote(self.paths[n]):  # one request per shard would take minutes
          storage.check(self.paths[n], self.stat(n))
    except storage.FileChanged as error:
      raise self.changed(error) from None

  def _warn(self) -> None:
    """Logs which shards are cut off."""
    for n, problem in list(self._problems.items())[: tree.SHOWN]:
      logger.warning(
        "%s: %s; its first %d samples, which are complete, are used; the rest is lost",
        self.paths[n],
        problem,
        self.firsts[n + 1] - self.firsts[n],
      )
    if len(self._problems) > tree.SHOWN:
      logger.warning(
        "%s: %d more of %d shards are cut off",
        self._pattern,
        len(self._problems) - tree.SHOWN,
        len(self.paths),
      )


def _best_index(folder: str, names: Sequence[str]) -> index.Index | None:
  """Of the indexes of a folder, the one that is wrong about the fewest of these shards.

  An index in a read-only folder can be old; a newer one can only be elsewhere.
  """
  indexes = [index.Index(os.path.join(path, index.FILE)) for path in index.index_folders(folder)]
  if len(indexes) < 2:
    return next(iter(indexes), None)

  def count_wrong(candidate: index.Index) -> int:
    known = [name for name in names if name in candidate.rows]
    checked = [known[n] for n in draw(len(known), CHECKED)]
    return (
      len(names)
      - len(known)
      + sum(
        candidate.part(candidate.rows[name]).stat != storage.stat(os.path.join(folder, name))
        for name in checked
      )
    )

  return min(indexes, key=count_wrong)  # on a tie, the one next to the shards


def _changed(opened: index.Index, folder: str, names: Sequence[str]) -> list[str]:
  """The paths of local shards that changed; looks at CHECKED of them, at all if one did."""

  def changed(name: str) -> bool:
    stat = opened.part(opened.rows[name]).stat
    return stat != storage.stat(os.path.join(folder, name))

  known = [name for name in names if name in opened.rows]
  if not any(changed(known[n]) for n in draw(len(known), CHECKED)):
    return []
  return [os.path.join(folder, name) for name in known if changed(name)]


def _reopen(paths: Sequence[str], pattern: str, fingerprint: str) -> Shards:
  shards = Shards(paths, pattern=pattern, refresh=False)
  if shards.fingerprint != fingerprint:
    raise OSError(f"{pattern!r}: the shards were indexed again, and differ; start again")
  return shards
