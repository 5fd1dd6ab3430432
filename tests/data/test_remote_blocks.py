"""Blocks of remote samples: fetched ahead, each byte once, within the limit of held samples."""

from __future__ import annotations

import fractions
import itertools

import numpy as np
import pytest

from bigalign.data.files import storage
from bigalign.data.order import blocks
from bigalign.data.tar.remote_blocks import RemoteBlocks

BLOCK = 32


class Bytes:
  """Shards of `count` samples in which sample i is byte i."""

  paths = ("far",)

  def __init__(self, count: int):
    self._count = count

  def __len__(self):
    return self._count

  def shard(self, i):
    return 0

  def span(self, i, shard):
    return i, i + 1

  def stat(self, shard):
    return None


@pytest.fixture
def sent(monkeypatch):
  """A list of the bytes of each request; the answer is the position of each byte modulo 251."""
  found = []

  def read(path, start, end, *, expect):
    found.append(end - start)
    return bytes(i % 251 for i in range(start, end))

  monkeypatch.setattr(storage, "read", read)
  return found


@pytest.mark.parametrize("hosts, workers", [(1, 1), (4, 2), (1, 3)])
def test_holding_what_the_order_asks_for_fetches_each_byte_once(sent, hosts, workers):
  """An epoch and a half of one worker, which prefetches its next batch as the pipeline does."""
  size, batch, own = 40_000, 256, 256 // hosts
  lanes = blocks.make_lanes(fractions.Fraction(batch), block=BLOCK)
  index = blocks.block_index(np.arange(3 * size // 2), size=size, seed=5, lanes=lanes)
  batches = [index[k : k + own].tolist() for k in range(0, len(index) - batch, batch * workers)]
  remote = RemoteBlocks(Bytes(size), block=BLOCK, hold=0)
  hold = blocks.held(lanes, 1 / hosts / workers)
  for now, coming in itertools.pairwise(batches):
    remote.prefetch(now + coming, hold=hold)
    assert [remote[i][0] for i in now] == [i % 251 for i in now]
  read = own * (len(batches) - 1)
  assert read <= sum(sent) - remote._unread <= 1.05 * read


def test_blocks_that_are_read_in_part_make_room_for_others(sent):
  """As with a view, or substitutes of bad samples: otherwise prefetching would stop after them."""
  remote = RemoteBlocks(Bytes(100_000), block=BLOCK, hold=320)
  for i in range(0, 3200, BLOCK):
    remote.prefetch([i, i + BLOCK])
    assert remote._unread == sum(len(block.unread) for block in remote._blocks.values()) <= 320
    assert {i // BLOCK, i // BLOCK + 1} <= remote._blocks.keys()
    assert remote[i] == bytes([i % 251])
  assert len(sent) == 101
  remote.prefetch(range(50_000))
  assert 288 < remote._unread <= 320 and len(sent) <= 111  # no more than can be held


def test_a_sample_is_dropped_once_it_was_read(sent):
  remote = RemoteBlocks(Bytes(40), block=BLOCK)
  assert [remote[5], remote[5], remote[39]] == [b"\5", b"\5", b"\x27"]
  assert sent == [32, 1, 8]
  assert len(remote._blocks[0].samples.result()) == 31 and 5 not in remote._blocks[0].unread
  for i in range(32):
    if i != 5:
      remote[i]
  assert remote._blocks.keys() == {1} and remote._unread == 7
