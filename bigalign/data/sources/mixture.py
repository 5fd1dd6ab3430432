"""Several sources by shares of the stream, in closed form, and the order of any source.

Position p of a mixture belongs to one source, and is the c-th position that does; c is that
source's own position, so that each source is read without replacement and has epochs of its own.
Among the first n positions of a phase a source with share w has n w of them, to within a few.

An epoch of a mixture, which losses see and durations count in, is as many positions as all sources
have samples together. Ids are places in the concatenation of the sources: they stay when a source
is added at the end.
"""

from __future__ import annotations

import bisect
import fractions
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints
from bigalign.data.order import blocks, order
from bigalign.data.sources.base import Concatenation, Source, prefetch, where

SHARES = 1 << 30  # shares are multiples of its inverse
UNITS = ("samples", "steps", "epochs")
ORDERS = ("auto", "exact", "block")
BLOCK = 32  # samples, for "block" on a source that reads them one by one

Weights = Mapping[str, float]


class Mixture(Concatenation):
  """Named sources, and from when on they are read by which weights.

  phases  ((start, {name: weight}), …), the first start being 0; a source that is not named in a
          phase is not read in it
  """

  def __init__(self, sources: Mapping[str, Source], phases: Sequence[tuple[int | str, Weights]]):
    super().__init__(list(sources.values()))
    self.names = tuple(sources)
    self.phases = tuple(phases)
    for _, weights in self.phases:
      for name, weight in weights.items():
        if name not in sources:
          raise ValueError(f"config.data.schedule: no source {name!r}; there are {self.names}")
        if not 0 < weight < np.inf:
          raise ValueError(
            f"config.data.mixture: {name!r} has weight {weight}; it must be above 0"
            " (leave a source out of a phase in which it is not read)"
          )

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = super().__getitem__(i)
    name = self.names[bisect.bisect_right(self._firsts, i) - 1]
    return {**record, "key": f"{name}/{record['key']}"}

  def __repr__(self) -> str:
    return f"Mixture({', '.join(f'{n}={s!r}' for n, s in zip(self.names, self.sources))})"


class Prefixed:
  """A source whose captions begin with a text: a language, or the name of a collection."""

  def __init__(self, source: Source, prefix: str):
    self._source, self._prefix = source, prefix
    self.fingerprint = fingerprints.of_names(source.fingerprint, prefix)
    self.classnames = getattr(source, "classnames", ())
    self.block = getattr(source, "block", 1)

  def __repr__(self) -> str:
    return repr(self._source)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = self._source[i]
    found = dict(record, captions=self._with_prefix(record["captions"]))
    if "texts" in record:
      found["texts"] = {name: self._with_prefix(x) for name, x in record["texts"].items()}
    return found

  def where(self, i: int) -> tuple[str, int, int]:
    return where(self._source, i)

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    prefetch(self._source, ids, hold=hold)

  def _with_prefix(self, captions: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(self._prefix + caption for caption in captions)


class Split:
  """Which source a position of a mixture belongs to, and the how-manieth of it."""

  def __init__(self, mixture: Mixture, *, batch_size: int):
    self.starts = np.array(
      [_samples(start, batch_size=batch_size, size=len(mixture)) for start, _ in mixture.phases],
      np.int64,
    )
    if self.starts[0] != 0 or (np.diff(self.starts) <= 0).any():
      raise ValueError(
        f"config.data.schedule: the phases start at samples {self.starts.tolist()};"
        " they must start at 0 and each after the one before"
      )
    self.shares = np.stack(
      [_shares([weights.get(name, 0) for name in mixture.names]) for _, weights in mixture.phases]
    )  # [phases, sources]
    lengths = np.diff(self.starts)
    counts = [np.zeros(len(mixture.names), np.int64)]
    for shares, length in zip(self.shares, lengths):
      counts.append(counts[-1] + _counts(shares, int(length)))
    self.counts = np.stack(counts)  # [phases, sources], positions before each phase

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] positions → the source of each, [N], and its own position there, [N]."""
    phases = np.searchsorted(self.starts, positions, side="right") - 1
    left = positions - self.starts[phases]
    source = np.full(positions.shape, -1)
    own = np.zeros_like(positions)
    rest = np.full(positions.shape, SHARES)
    # One source after the other takes its share of the positions that are left.
    for s in range(self.shares.shape[1]):
      share = self.shares[phases, s]
      below = _times(left, share, np.maximum(rest, 1))
      taken = _times(left + 1, share, np.maximum(rest, 1)) - below
      mine = (source < 0) & (taken > 0)
      source[mine] = s
      own[mine] = (below + self.counts[phases, s])[mine]
      left, rest = left - below, rest - share
    return source, own

  def before(self, position: int) -> np.ndarray:
    """[sources]: how many positions below this one belong to each."""
    phase = int(np.searchsorted(self.starts, position, side="right")) - 1
    return self.counts[phase] + _counts(self.shares[phase], position - int(self.starts[phase]))


class Order:
  """The index at each position of a source, and what stands in for a sample that is rejected.

  kind        "exact": each epoch a permutation of all samples; "block": blocks.py, for sources that
              read many samples in one request (their `block`); "auto": "block" for those
  lane_rows   the batch size that the lanes of "block" fit; the order depends on it, so a run that
              goes on with another batch size keeps it
  """

  def __init__(
    self, source: Source, *, seed: int, lane_rows: int, shuffle: bool = True, kind: str = "auto"
  ):
    if kind not in ORDERS:
      raise ValueError(f"config.data.order={kind!r}; known: {ORDERS}")
    self._split = Split(source, batch_size=lane_rows) if isinstance(source, Mixture) else None
    self._parts = source.sources if isinstance(source, Mixture) else (source,)
    self._sizes = [len(part) for part in self._parts]
    self._firsts = np.array([0, *itertools.accumulate(self._sizes)])
    self._seeds = (
      [seed]
      if self._split is None
      else [int(order.hash_words(order.SOURCE, seed, s)[0]) for s in range(len(self._parts))]
    )
    self._shuffle = shuffle
    self._lanes = [self._make_lanes(part, s, kind, lane_rows) for s, part in enumerate(self._parts)]

  def _make_lanes(self, part: Source, s: int, kind: str, rows: int) -> blocks.Lanes | None:
    block = getattr(part, "block", 1)
    if kind == "exact" or (kind == "auto" and block < 2) or not self._shuffle:
      return None
    # The last phase is the longest; in others lanes drift from worker to worker.
    share = SHARES if self._split is None else int(self._split.shares[-1, s] or SHARES)
    own_rows = fractions.Fraction(rows * share, SHARES)
    return blocks.make_lanes(own_rows, block=block if block > 1 else BLOCK)

  def __call__(self, positions: np.ndarray) -> np.ndarray:
    """[N] int64 → [N] int64, below the number of samples."""
    if self._split is None:
      return self._own(0, positions)
    source, own = self._split(positions)
    indices = np.empty_like(positions)
    for s in np.unique(source):
      mine = source == s
      indices[mine] = self._firsts[s] + self._own(s, own[mine])
    return indices

  def source_of(self, indices: np.ndarray) -> np.ndarray:
    """[N] → [N]: the place in `names` of the source that each index belongs to."""
    return np.searchsorted(self._firsts, indices, side="right") - 1

  def prefetch(self, indices: np.ndarray, *, share: float) -> None:
    """Has the sources fetch what comes at positions; `share` of all positions are read here."""
    for s, (part, lanes) in enumerate(zip(self._parts, self._lanes)):
      own = indices - self._firsts[s]
      prefetch(
        part,
        own[(own >= 0) & (own < self._sizes[s])].tolist(),
        hold=blocks.held(lanes, share) if lanes else 0,
      )

  def _own(self, s: int, positions: np.ndarray) -> np.ndarray:
    size, seed, lanes = self._sizes[s], self._seeds[s], self._lanes[s]
    if lanes is not None:
      return blocks.block_index(positions, size=size, seed=seed, lanes=lanes)
    return order.sample_index(positions, size=size, seed=seed, shuffle=self._shuffle)

  def substitute(self, position: int, attempt: int, index: int) -> int:
    """The index that replaces a rejected one, out of the same source; attempt counts from 1."""
    s = int(self.source_of(np.asarray(index)))
    return int(self._firsts[s]) + order.substitute(
      position, attempt, self._sizes[s], self._seeds[s]
    )


def epochs(source: Source, position: int, *, batch_size: int) -> dict[str, float]:
  """{name: passes over it done before this position} of each source of a mixture; {} of others."""
  if not isinstance(source, Mixture):
    return {}
  counts = Split(source, batch_size=batch_size).before(position)
  return {
    name: count / len(part)
    for name, part, count in zip(source.names, source.sources, counts.tolist())
  }


def names(source: Source) -> tuple[str, ...]:
  """Of the sources of a mixture; of another source, what it calls itself."""
  return source.names if isinstance(source, Mixture) else (repr(source),)


def check_sizes(source: Source, *, batch_size: int) -> None:
  """Raises ValueError if a batch takes more samples of a source than it has."""
  if not isinstance(source, Mixture):
    if len(source) < batch_size:
      raise ValueError(f"{source!r} has {len(source)} samples, fewer than a batch of {batch_size}")
    return
  most = Split(source, batch_size=batch_size).shares.max(0) * batch_size / SHARES
  for name, part, rows in zip(source.names, source.sources, most.tolist()):
    if len(part) < rows:
      raise ValueError(
        f"config.data.mixture: {name!r} has {len(part)} samples, fewer than the"
        f" {rows:.0f} that a batch of {batch_size} takes of it"
      )


def _samples(start: int | str, *, batch_size: int, size: int) -> int:
  number, _, unit = str(start).strip().partition(" ")
  scale = dict(zip(UNITS, (1, batch_size, size))).get(unit, 1 if number == "0" else 0)
  try:
    return round(float(number) * scale) if scale else int("")
  except ValueError:
    raise ValueError(
      f"config.data.schedule: {start!r} is no start; write 0, '1e6 samples', '1000"
      " steps' or '2 epochs'"
    ) from None


def _shares(weights: Sequence[float]) -> np.ndarray:
  """[S] weights → [S] int64 in the same proportions, adding up to SHARES; 0 stays 0."""
  edges = np.rint(np.cumsum(weights) / np.sum(weights) * SHARES).astype(np.int64)
  return np.diff(edges, prepend=0)


def _times(x: np.ndarray, share: np.ndarray, rest: np.ndarray) -> np.ndarray:
  """floor(x * share / rest), for share <= rest <= SHARES and x below 2**62."""
  return x // rest * share + x % rest * share // rest


def _counts(shares: np.ndarray, length: int) -> np.ndarray:
  """[S]: how many of a phase's first `length` positions each source has."""
  found, rest = [], SHARES
  for share in shares.tolist():
    found.append(length * share // max(rest, 1))
    length, rest = length - found[-1], rest - share
  return np.array(found, np.int64)
