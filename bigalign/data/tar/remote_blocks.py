"""Samples of remote shards, fetched in blocks of consecutive ones with one request each."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from bigalign.data.files import storage
from bigalign.data.tar.shards import Shards

BLOCK = (
  32  # samples of a request: a few MB, so that the transfer and not the latency takes the time
)


class _Block(NamedTuple):
  samples: concurrent.futures.Future[dict[int, bytes]]
  unread: set[int]


# LRUCache does not serve here: a block shrinks while its samples are read, and goes after the last.
class RemoteBlocks:
  """The bytes of samples of remote shards.

  A sample is held until it was read once; reading it again takes another request. A copy that was
  pickled starts empty: each process fetches for itself.

  Args:
    shards: where the samples are.
    block: consecutive samples that one request fetches.
    hold: the most unread samples that are held. Beyond it the least recently used blocks are
      dropped.
    connections: the most concurrent requests.
  """

  def __init__(self, shards: Shards, *, block: int, hold: int = 1024, connections: int = 16):
    self._shards, self._block, self._hold, self._connections = shards, block, hold, connections
    self._lock = threading.Lock()
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._blocks: collections.OrderedDict[int, _Block] = collections.OrderedDict()
    self._unread = 0  # in all blocks

  def __reduce__(self) -> tuple[Any, ...]:
    return functools.partial(
      RemoteBlocks, self._shards, block=self._block, hold=self._hold, connections=self._connections
    ), ()

  def __getitem__(self, i: int) -> bytes:
    """Returns the bytes of sample i."""
    with self._lock:
      block = self._fetch(i // self._block)
      if first_read := i in block.unread:
        block.unread.remove(i)
        self._unread -= 1
      if not block.unread:
        del self._blocks[i // self._block]
    return block.samples.result().pop(i) if first_read else self._read(range(i, i + 1))[i]

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Begins to fetch the blocks of samples, as many as can be held.

    Args:
      ids: of the samples that are read next.
      hold: raises the most unread samples that are held, for good.
    """
    with self._lock:
      self._hold = max(self._hold, hold)
      wanted = dict.fromkeys(i // self._block for i in ids)
      # Blocks that are held come first, so that they are not dropped to make room for the others.
      for n in sorted(wanted, key=lambda n: n not in self._blocks)[: self._hold // self._block]:
        self._fetch(n)

  def _fetch(self, n: int) -> _Block:
    if n not in self._blocks:
      self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(self._connections)
      ids = range(n * self._block, min((n + 1) * self._block, len(self._shards)))
      while self._blocks and self._unread + len(ids) > self._hold:
        self._unread -= len(self._blocks.popitem(last=False)[1].unread)
      self._blocks[n] = _Block(self._pool.submit(self._read, ids), set(ids))
      self._unread += len(ids)
    self._blocks.move_to_end(n)
    return self._blocks[n]

  def _read(self, ids: range) -> dict[int, bytes]:
    """The bytes of consecutive samples, with one request for each shard that they are in."""
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
