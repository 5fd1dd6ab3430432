"""The order in which a run reads a source, or the sources of a mixture."""

from __future__ import annotations

import fractions
import itertools

import numpy as np

from bigalign.data.order.blocks import Lanes, block_index, held, make_lanes
from bigalign.data.order.permutation import SOURCE, hash_words, sample_index, substitute
from bigalign.data.order.schedule import SHARES, MixtureSchedule
from bigalign.data.sources.base import Source, prefetch
from bigalign.data.sources.mixture import Mixture

ORDERS = ("auto", "exact", "block")
BLOCK = 32  # samples, for "block" on a source that reads them one by one


class Order:
  """Maps positions to the indices of samples, and rejected samples to their substitutes.

  Args:
    source: one source, or a Mixture.
    seed: of the shuffle.
    lane_rows: the batch size that the lanes of "block" are made for. The order depends on it, so a
      run that resumes with another batch size keeps it.
    shuffle: False reads the samples in the order of the source.
    kind: "exact": each epoch is a permutation of all samples; "block": the block shuffle of
      blocks.py, for sources that read many samples in one request (their `block`); "auto":
      "block" for those sources, "exact" for others.

  Raises:
    ValueError: for an unknown kind, or a mixture whose phases are wrong.
  """

  def __init__(
    self, source: Source, *, seed: int, lane_rows: int, shuffle: bool = True, kind: str = "auto"
  ):
    if kind not in ORDERS:
      raise ValueError(f"config.data.order={kind!r}; known: {ORDERS}")
    self._schedule = (
      MixtureSchedule(source, batch_size=lane_rows) if isinstance(source, Mixture) else None
    )
    self._parts = source.sources if isinstance(source, Mixture) else (source,)
    self._sizes = [len(part) for part in self._parts]
    self._firsts = np.array([0, *itertools.accumulate(self._sizes)])
    self._seeds = (
      [seed]
      if self._schedule is None
      else [int(hash_words(SOURCE, seed, s)[0]) for s in range(len(self._parts))]
    )
    self._shuffle = shuffle
    self._lanes = [self._make_lanes(part, s, kind, lane_rows) for s, part in enumerate(self._parts)]

  def _make_lanes(self, part: Source, s: int, kind: str, rows: int) -> Lanes | None:
    block = getattr(part, "block", 1)
    if kind == "exact" or (kind == "auto" and block < 2) or not self._shuffle:
      return None
    # Lanes are sized for the shares of the last phase, usually the longest. In another phase
    # several workers may read one lane and its blocks again, but the order stays the same.
    share = SHARES if self._schedule is None else int(self._schedule.shares[-1, s] or SHARES)
    rows_of_part = fractions.Fraction(rows * share, SHARES)
    return make_lanes(rows_of_part, block=block if block > 1 else BLOCK)

  def __call__(self, positions: np.ndarray) -> np.ndarray:
    """Returns the index at each position: [N] int64 → [N] int64, below the number of samples."""
    if self._schedule is None:
      return self._own(0, positions)
    source, own = self._schedule(positions)
    indices = np.empty_like(positions)
    for s in np.unique(source):
      belongs = source == s
      indices[belongs] = self._firsts[s] + self._own(s, own[belongs])
    return indices

  def source_of(self, indices: np.ndarray) -> np.ndarray:
    """Returns the number of the source that each index belongs to, [N] → [N]."""
    return np.searchsorted(self._firsts, indices, side="right") - 1

  def size(self, part: int) -> int:
    """Returns the samples of a source, by its number from `source_of`."""
    return self._sizes[part]

  def prefetch(self, indices: np.ndarray, *, share: float) -> None:
    """Lets the sources begin to fetch samples.

    Args:
      indices: [N], of the samples that are read next.
      share: of all positions, the part that is read here.
    """
    for s, (part, lanes) in enumerate(zip(self._parts, self._lanes)):
      own = indices - self._firsts[s]
      prefetch(
        part,
        own[(own >= 0) & (own < self._sizes[s])].tolist(),
        hold=held(lanes, share) if lanes else 0,
      )

  def _own(self, s: int, positions: np.ndarray) -> np.ndarray:
    """Returns the indices within source s at its own positions."""
    size, seed, lanes = self._sizes[s], self._seeds[s], self._lanes[s]
    if lanes is not None:
      return block_index(positions, size=size, seed=seed, lanes=lanes)
    return sample_index(positions, size=size, seed=seed, shuffle=self._shuffle)

  def substitute(self, position: int, attempt: int, index: int) -> int:
    """Returns the index that replaces a rejected one, from the same source.

    Args:
      position: of the rejected sample.
      attempt: counts from 1.
      index: of the rejected sample.
    """
    s = int(self.source_of(np.asarray(index)))
    return int(self._firsts[s]) + substitute(position, attempt, self._sizes[s], self._seeds[s])
