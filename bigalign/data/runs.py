"""Samples of remote shards, fetched in runs of consecutive ones with a request each."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import threading
from collections.abc import Iterable

from bigalign.data import storage
from bigalign.data.shards import Shards

RUN = 32  # samples of a request: a few MB, so that the bytes and not the wait take the time


class Runs:
  """The bytes of sample i. A run is dropped when each of its samples was read once.

  room         bytes held at most, if runs are read in part; then the least recently used go
  connections  requests under way at a time
  Pickles as empty: another process fetches for itself.
  """

  def __init__(self, shards: Shards, *, block: int, room: int = 1 << 30, connections: int = 16):
    self._shards, self._block, self._room, self._connections = shards, block, room, connections
    self._lock = threading.Lock()
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._held: collections.OrderedDict[int, concurrent.futures.Future] = collections.OrderedDict()
    self._left: dict[int, int] = {}  # run → samples not read yet
    self._used = 0

  def __reduce__(self):
    return functools.partial(Runs, self._shards, block=self._block, room=self._room,
                             connections=self._connections), ()

  def __getitem__(self, i: int) -> bytes:
    run = i // self._block
    with self._lock:
      fetched = self._fetch(run)
      self._left[run] -= 1
      if not self._left[run]:
        self._drop(run)
    return fetched.result()[i - run * self._block]

  def prefetch(self, ids: Iterable[int]) -> None:
    """Begins to fetch the runs of samples, as far as there is room."""
    with self._lock:
      for run in dict.fromkeys(i // self._block for i in ids):
        if run not in self._held and self._used + self._size(run) <= self._room:
          self._fetch(run)

  def _fetch(self, run: int) -> concurrent.futures.Future:
    if run not in self._held:
      self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(self._connections)
      self._used += self._size(run)
      while self._used > self._room and self._held:
        self._drop(next(iter(self._held)))
      self._held[run] = self._pool.submit(self._read, run)
      self._left[run] = len(self._ids(run))
    self._held.move_to_end(run)
    return self._held[run]

  def _drop(self, run: int) -> None:
    self._used -= self._size(run)
    del self._held[run], self._left[run]

  def _ids(self, run: int) -> range:
    return range(run * self._block, min((run + 1) * self._block, len(self._shards)))

  def _pieces(self, run: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """(shard, spans of its samples) of the shards in a run."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for i in self._ids(run):
      shard = self._shards.shard(i)
      spans.setdefault(shard, []).append(self._shards.span(i, shard))
    return list(spans.items())

  def _size(self, run: int) -> int:
    return sum(spans[-1][1] - spans[0][0] for _, spans in self._pieces(run))

  def _read(self, run: int) -> list[bytes]:
    samples = []
    for shard, spans in self._pieces(run):
      first = spans[0][0]
      data = storage.read(self._shards.paths[shard], first, spans[-1][1],
                          expect=self._shards.stat(shard))
      samples += [data[start - first:end - first] for start, end in spans]
    return samples
