"""The block shuffle: every sample once per epoch, blocks read once, any position at once."""

from __future__ import annotations

import collections
import fractions

import numpy as np
import pytest

from bigalign.data.order import blocks
from bigalign.data.order.permutation import sample_index


def lanes_of(rows, block, **options):
  return blocks.make_lanes(fractions.Fraction(rows), block=block, **options)


@pytest.mark.parametrize(
  "size, rows, block",
  [
    (1, 8, 4),
    (5, 8, 8),
    (77, 10, 3),
    (96, 8, 8),
    (1000, 64, 8),
    (1003, 64, 8),
    (9973, 100, 32),
    (1003, fractions.Fraction(3, 10), 4),
    (1003, fractions.Fraction(1000, 7), 4),
  ],
)
def test_every_epoch_holds_each_index_once(size, rows, block):
  lanes = lanes_of(rows, block)
  for epoch in (0, 1, 10**6):
    positions = np.arange(epoch * size, (epoch + 1) * size)
    index = blocks.block_index(positions, size=size, seed=7, lanes=lanes)
    np.testing.assert_array_equal(np.sort(index), np.arange(size))


def test_a_million_samples_once_in_each_epoch():
  lanes, size = lanes_of(1024, 32), 10**6
  for epoch in (0, 3):
    index = np.concatenate(
      [
        blocks.block_index(np.arange(begin, begin + 10**5), size=size, seed=1, lanes=lanes)
        for begin in range(epoch * size, (epoch + 1) * size, 10**5)
      ]
    )
    assert (np.bincount(index, minlength=size) == 1).all()


def test_a_single_position_equals_the_position_in_a_batch():
  lanes = lanes_of(64, 8)
  positions = np.arange(10**12, 10**12 + 300)
  batch = blocks.block_index(positions, size=1003, seed=3, lanes=lanes)
  alone = [
    blocks.block_index(positions[i : i + 1], size=1003, seed=3, lanes=lanes)[0] for i in range(300)
  ]
  assert batch.tolist() == alone


def test_ten_billion_samples():
  size, lanes = 10**10 + 7, lanes_of(4096, 64)
  index = blocks.block_index(np.arange(10**5) + 3 * size, size=size, seed=1, lanes=lanes)
  assert len(np.unique(index)) == 10**5 and index.min() >= 0 and index.max() < size
  # Few blocks at a time, far apart: lanes * window / block of them.
  assert len(np.unique(index // 64)) < 10**5 / 8
  assert abs(np.unique(index // 64).mean() * 64 / size - 0.5) < 0.05


def reads(index: np.ndarray, *, batch: int, hosts: int, workers: int, block: int, held: int) -> int:
  """Counts the requests of one epoch if each worker of each host holds its `held` latest blocks."""
  rows, total = batch // hosts, 0
  for host in range(hosts):
    for worker in range(workers):
      latest: collections.OrderedDict[int, None] = collections.OrderedDict()
      for step in range(worker, len(index) // batch, workers):
        begin = step * batch + host * rows
        for which in (index[begin : begin + rows] // block).tolist():
          if which not in latest:
            total += 1
            if len(latest) == held:
              latest.popitem(last=False)
          latest[which] = None
          latest.move_to_end(which)
  return total


@pytest.mark.parametrize("hosts, workers", [(1, 1), (1, 3), (4, 2), (16, 4), (8, 12)])
def test_blocks_are_read_once(hosts, workers):
  size, batch, block = 400_000, 512, 32
  lanes = lanes_of(batch, block)
  index = blocks.block_index(np.arange(size), size=size, seed=5, lanes=lanes)
  own = lanes.lanes // (hosts * workers)  # of one worker
  held = own * (lanes.window // block + 2)
  found = reads(index, batch=batch, hosts=hosts, workers=workers, block=block, held=held)
  assert found / (size / block) <= 1.05
  # Samples of one block in a batch: more than 1, less than the share of a lane.
  same = np.mean(
    [
      np.unique(index[k : k + batch] // block, return_counts=True)[1].mean()
      for k in range(0, size - batch, 100 * batch)
    ]
  )
  assert 1 < same < 8


def test_the_exact_shuffle_would_read_blocks_often():
  """For comparison with the test above: the same reader with the other order."""
  index = sample_index(np.arange(100_000), size=100_000, seed=5)
  assert reads(index, batch=512, hosts=1, workers=1, block=32, held=1000) > 20 * 100_000 / 32


def test_epochs_and_seeds_differ():
  lanes, size = lanes_of(64, 8), 4096
  first, second, other = (
    blocks.block_index(np.arange(size) + size * epoch, size=size, seed=seed, lanes=lanes)
    for seed, epoch in ((0, 0), (0, 1), (1, 0))
  )
  assert (first == second).mean() < 0.02 and (first == other).mean() < 0.02
