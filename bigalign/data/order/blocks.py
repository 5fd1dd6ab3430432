"""The block shuffle: samples in random order that are read from a store many at a time.

A source is cut into blocks of consecutive samples; one request reads one block. An epoch puts the
blocks into a random sequence, and gives a piece of that sequence to each *lane*. A lane shuffles
its piece in windows of a few blocks. One worker of one host reads a lane, so a worker holds few
blocks at a time:

  cycle: the positions in which every lane has its turn once: `step_lanes` batches.
  lane: a contiguous range of the places in a cycle: some rows of every step_lanes-th batch.

Hosts own contiguous rows, and worker w of n makes the batches w, w + n, ... So no two of them share
a lane if the number of hosts divides row_lanes and the number of workers divides step_lanes.
Otherwise the order is the same, but some blocks are read more than once. The number of places that
a lane has in an epoch is known in closed form. Its piece of the sequence has exactly that length,
so every sample occurs exactly once in an epoch, without state and without a table.
"""

from __future__ import annotations

import fractions
import math
from typing import NamedTuple

import numpy as np

from bigalign.data.order.permutation import BLOCK, WINDOW, hash_words, permute

POOL = 50  # batches over which a sample may move
STEP_LANES = 12


class Lanes(NamedTuple):
  """How positions and samples are cut; `make_lanes` returns it."""

  block: int  # samples that one request reads
  window: int  # samples among which a lane is shuffled
  lanes: int
  cycle: tuple[int, int]  # positions of a cycle, as numerator and denominator


def make_lanes(
  rows: fractions.Fraction,
  *,
  block: int,
  row_lanes: int = 64,
  step_lanes: int = STEP_LANES,
  pool: int = POOL,
) -> Lanes:
  """Returns the lanes for a source that fills `rows` of every batch.

  Args:
    rows: of every batch; a fraction if the source is a part of a mixture.
    block: samples that one request reads.
    row_lanes: the largest number of lanes within a batch. Small batches get fewer, because this
      many lanes would hold more than the pool.
    step_lanes: lanes in successive batches; the number of workers of a host should divide it.
    pool: batches whose samples are mixed. All hosts together hold about rows * pool samples.
  """
  cycle = (rows * step_lanes).limit_denominator(4096)
  while row_lanes > 1 and 2 * row_lanes * step_lanes * block > pool * rows:
    row_lanes //= 2
  lanes = row_lanes * step_lanes
  window = block * max(2, int(pool * rows / (lanes * block)))
  return Lanes(block, window, lanes, (max(cycle.numerator, cycle.denominator), cycle.denominator))


def held(lanes: Lanes, share: float) -> int:
  """Returns the largest number of samples that are fetched and not read yet.

  Args:
    lanes: of the source.
    share: of all positions, the part that is read here.
  """
  # Rows of a host may cut a lane at either end, in each batch of a cycle. A window begins and ends
  # inside of blocks.
  own = min(math.ceil(lanes.lanes * share) + 2 * STEP_LANES, lanes.lanes)
  return own * (lanes.window + lanes.block)


def block_index(positions: np.ndarray, *, size: int, seed: int, lanes: Lanes) -> np.ndarray:
  """Returns the index at each position; like sample_index, each index occurs once per epoch.

  Args:
    positions: [N] integers.
    size: samples in the source.
    seed: of the shuffle.
    lanes: from make_lanes.

  Returns:
    [N] int64, each below `size`.
  """
  positions = np.asarray(positions, np.int64)
  epoch = positions // size
  begin, end = epoch * size, (epoch + 1) * size
  places = lanes.cycle[0] // lanes.cycle[1]  # per cycle; the last lane of some has one more
  lane = np.minimum(_in_cycle(positions, lanes)[1], places - 1) * lanes.lanes // places
  low, high = -(-lane * places // lanes.lanes), -(-(lane + 1) * places // lanes.lanes)

  def before(x: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Counts the positions below x whose place in their cycle is below `edge`."""
    cycles, place = _in_cycle(x, lanes)
    return np.where(edge >= places, x, cycles * edge + np.minimum(place, edge))

  first = before(end, low) - before(begin, low)  # where the lane's piece of the sequence begins
  length = before(end, high) - before(begin, high) - first
  own = before(positions, high) - before(positions, low) - before(begin, high) + before(begin, low)
  window = own // lanes.window
  start = window * lanes.window
  key = hash_words(WINDOW, seed, epoch, lane, window)
  window_size = np.minimum(length - start, lanes.window)
  inside = permute((own - start).astype(np.uint64), size=window_size, key=key).astype(np.int64)
  return _shuffled_blocks(first + start + inside, epoch, size=size, seed=seed, block=lanes.block)


def _in_cycle(x: np.ndarray, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
  """Returns the number of each position's cycle, and its place there from 0.

  Cycle k begins at ceil(k * a / b). Multiples are split off so that no product exceeds 64 bits.
  """
  a, b = lanes.cycle
  cycles = x // a * b + x % a * b // a
  return cycles, x - (cycles // b * a - (-(cycles % b) * a // b))


def _shuffled_blocks(
  places: np.ndarray,
  epoch: np.ndarray,
  *,
  size: int,
  seed: int,
  block: int,
) -> np.ndarray:
  """Returns the sample at each place of an epoch's sequence of blocks, [N] int64."""
  full, rest = divmod(size, block)  # the last block of a source has only `rest` samples
  key = hash_words(BLOCK, seed, epoch)
  # The short block may be anywhere among the full ones.
  short = (key % np.uint64(full + 1)).astype(np.int64) * block if rest else size
  in_short = (places >= short) & (places < short + rest)
  place = np.where(places < short, places, np.maximum(places - rest, 0))
  which = np.minimum(place // block, max(full - 1, 0)).astype(np.uint64)
  blocks = permute(which, size=max(full, 1), key=key).astype(np.int64)
  return np.where(in_short, full * block + places - short, blocks * block + place % block)
