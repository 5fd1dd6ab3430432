"""The block shuffle: samples in random order that are read from a store many at a time.

A source is cut into blocks of consecutive samples, each read in one request. An epoch lays its
blocks in a random line and hands each *lane* a piece of it; a lane shuffles its piece in windows of
a few blocks. A lane is what one worker of one host reads, so it holds few blocks at a time:

  cycle   the positions in which every lane has its turn once: `step_lanes` batches
  lane    a contiguous range of the places in a cycle: some rows of every step_lanes-th batch

Hosts own contiguous rows and worker w of n makes the batches w, w + n, …, so that no two of them
share a lane as long as their numbers divide row_lanes and step_lanes; if they do not, the order is
the same, but blocks are read more than once. How many places a lane has in an epoch is known in
closed form, so its piece of the line is exactly that long and every sample comes exactly once in an
epoch, with no state and no table.
"""

from __future__ import annotations

import fractions
import math
from typing import NamedTuple

import numpy as np

from bigalign.data.order import order

POOL = 50  # batches over which a sample may move
STEP_LANES = 12


class Lanes(NamedTuple):
  """How positions and samples are cut; of `make_lanes`."""

  block: int  # samples read in one request
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
  """Lanes for a source that fills `rows` of every batch.

  row_lanes   the most lanes side by side; fewer for small batches, whose pool they would outgrow
  step_lanes  lanes one after the other; the number of workers of a host should divide it
  pool        batches whose samples are mixed: rows * pool samples are held over all hosts
  """
  cycle = (rows * step_lanes).limit_denominator(4096)
  while row_lanes > 1 and 2 * row_lanes * step_lanes * block > pool * rows:
    row_lanes //= 2
  lanes = row_lanes * step_lanes
  window = block * max(2, int(pool * rows / (lanes * block)))
  return Lanes(block, window, lanes, (max(cycle.numerator, cycle.denominator), cycle.denominator))


def held(lanes: Lanes, share: float) -> int:
  """The most samples that are fetched and not read yet, where `share` of the positions is read."""
  # Rows of a host may cut a lane at either end, in each batch of a cycle. A window begins and ends
  # inside of blocks.
  own = min(math.ceil(lanes.lanes * share) + 2 * STEP_LANES, lanes.lanes)
  return own * (lanes.window + lanes.block)


def block_index(positions: np.ndarray, *, size: int, seed: int, lanes: Lanes) -> np.ndarray:
  """[N] positions → [N] int64 below `size`; each once per epoch, as order.sample_index."""
  positions = np.asarray(positions, np.int64)
  epoch = positions // size
  begin, end = epoch * size, (epoch + 1) * size
  places = lanes.cycle[0] // lanes.cycle[1]  # of a cycle; some have one more, of the last lane
  lane = np.minimum(_in_cycle(positions, lanes)[1], places - 1) * lanes.lanes // places
  low, high = -(-lane * places // lanes.lanes), -(-(lane + 1) * places // lanes.lanes)

  def before(x: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """How many positions below x have a place below `edge` in their cycle."""
    cycles, place = _in_cycle(x, lanes)
    return np.where(edge >= places, x, cycles * edge + np.minimum(place, edge))

  first = before(end, low) - before(begin, low)  # where the lane's piece of the line begins
  length = before(end, high) - before(begin, high) - first
  mine = before(positions, high) - before(positions, low) - before(begin, high) + before(begin, low)
  window = mine // lanes.window
  start = window * lanes.window
  key = order.hash_words(order.WINDOW, seed, epoch, lane, window)
  among = np.minimum(length - start, lanes.window)
  inside = order.permute((mine - start).astype(np.uint64), size=among, key=key).astype(np.int64)
  return _shuffled_line(first + start + inside, epoch, size=size, seed=seed, block=lanes.block)


def _in_cycle(x: np.ndarray, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
  """The number of a position's cycle, and its place there from 0.

  Cycle k begins at ceil(k * a / b); multiples are split off so that no product leaves 64 bits.
  """
  a, b = lanes.cycle
  cycles = x // a * b + x % a * b // a
  return cycles, x - (cycles // b * a - (-(cycles % b) * a // b))


def _shuffled_line(
  places: np.ndarray,
  epoch: np.ndarray,
  *,
  size: int,
  seed: int,
  block: int,
) -> np.ndarray:
  """The sample at each place of an epoch's line of blocks; the last block of a source is short."""
  whole, rest = divmod(size, block)
  key = order.hash_words(order.BLOCK, seed, epoch)
  # The short block stands anywhere among the others.
  short = (key % np.uint64(whole + 1)).astype(np.int64) * block if rest else size
  in_short = (places >= short) & (places < short + rest)
  place = np.where(places < short, places, np.maximum(places - rest, 0))
  which = np.minimum(place // block, max(whole - 1, 0)).astype(np.uint64)
  blocks = order.permute(which, size=max(whole, 1), key=key).astype(np.int64)
  return np.where(in_short, whole * block + places - short, blocks * block + place % block)
