"""Samples of remote shards, fetched in runs of consecutive ones with a request each."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import threading
from collections.abc import Iterable
from typing import NamedTuple

from bigalign.data.files import storage
from bigalign.data.tar.shards import Shards

RUN = 32  # samples of a request: a few MB, so that the bytes and not the wait take the time


class _Run(NamedTuple):
  samples: concurrent.futures.Future[dict[int, bytes]]
  unread: set[int]


class Runs:
  """The bytes of sample i. Each is held until it was read once; then another request brings it.

  hold         unread samples held at most; beyond it the least recently used runs go
  connections  requests under way at a time
  Pickles as empty: another process fetches for itself.
  """

  def __init__(self, shards: Shards, *, block: int, hold: int = 1024, connections: int = 16):
    self._shards, self._block, self._hold, self._connections = shards, block, hold, connections
    self._lock = threading.Lock()
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._runs: collections.OrderedDict[int, _Run] = collections.OrderedDict()
    self._unread = 0  # of all runs

  def __reduce__(self):
    return functools.partial(
      Runs, self._shards, block=self._block, hold=self._hold, connections=self._connections
    ), ()

  def __getitem__(self, i: int) -> bytes:
    with self._lock:
      run = self._fetch(i // self._block)
      if first := i in run.unread:
        run.unread.remove(i)
        self._unread -= 1
      if not run.unread:
        del self._runs[i // self._block]
    return run.samples.result().pop(i) if first else self._read(range(i, i + 1))[i]

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Begins to fetch the runs of samples, as many as can be held; `hold` widens that for good."""
    with self._lock:
      self._hold = max(self._hold, hold)
      wanted = dict.fromkeys(i // self._block for i in ids)
      # Those that are there come first, so that they are not the ones that go to make room.
      for n in sorted(wanted, key=lambda n: n not in self._runs)[: self._hold // self._block]:
        self._fetch(n)

  def _fetch(self, n: int) -> _Run:
    if n not in self._runs:
      self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(self._connections)
      ids = range(n * self._block, min((n + 1) * self._block, len(self._shards)))
      while self._runs and self._unread + len(ids) > self._hold:
        self._unread -= len(self._runs.popitem(last=False)[1].unread)
      self._runs[n] = _Run(self._pool.submit(self._read, ids), set(ids))
      self._unread += len(ids)
    self._runs.move_to_end(n)
    return self._runs[n]

  def _read(self, ids: range) -> dict[int, bytes]:
    """The bytes of consecutive samples, with a request for each shard that they lie in."""
    spans: dict[int, dict[int, tuple[int, int]]] = {}
    for i in ids:
      shard = self._shards.shard(i)
      spans.setdefault(shard, {})[i] = self._shards.span(i, shard)
    samples: dict[int, bytes] = {}
    for shard, own in spans.items():
      (first, _), (_, end) = own[min(own)], own[max(own)]
      data = storage.read(self._shards.paths[shard], first, end, expect=self._shards.stat(shard))
      samples |= {i: data[start - first : stop - first] for i, (start, stop) in own.items()}
    return samples
