"""Which source of a mixture a position belongs to, in closed form.

Position p of a mixture belongs to one source, and is the c-th position of that source. c is the
source's own position, so each source is read without replacement and has its own epochs. Among the
first n positions of a phase, a source with share w has n * w positions, within a few. In a mixture
of pure batches the same holds for batches instead of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigalign.data.sources.base import Source
from bigalign.data.sources.mixture import Mixture

SHARES = 1 << 30  # a share is a multiple of 1 / SHARES
UNITS = ("samples", "steps", "epochs")


class MixtureSchedule:
  """Maps a position of the stream to its source and the position within that source.

  Args:
    mixture: the sources, and the phases with their weights.
    batch_size: rows of a global batch, for phases that start at a step, and for pure batches.

  Raises:
    ValueError: for phases that do not start at 0, or not in ascending order.
  """

  def __init__(self, mixture: Mixture, *, batch_size: int):
    self.starts = np.array(
      [_samples(start, batch_size=batch_size, size=len(mixture)) for start, _ in mixture.phases],
      np.int64,
    )
    if self.starts[0] != 0 or (np.diff(self.starts) <= 0).any():
      raise ValueError(
        f"config.data.schedule: the phases start at samples {self.starts.tolist()};"
        " the first must start at 0, and each other one after the one before"
      )
    self.unit = batch_size if mixture.pure else 1  # positions that have one source
    if (self.starts % self.unit).any():
      raise ValueError(
        f"config.data.schedule: the phases start at samples {self.starts.tolist()}, but with"
        f" pure_batches they must start with a batch, at multiples of {self.unit}"
      )
    self.starts //= self.unit
    self.shares = np.stack(
      [_shares([weights.get(name, 0) for name in mixture.names]) for _, weights in mixture.phases]
    )  # [phases, sources]
    lengths = np.diff(self.starts)
    counts = [np.zeros(len(mixture.names), np.int64)]
    for shares, length in zip(self.shares, lengths):
      counts.append(counts[-1] + _counts(shares, int(length)))
    self.counts = np.stack(counts)  # [phases, sources], positions before each phase

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of each position [N], and the position within that source [N]."""
    source, own = self._of_units(positions // self.unit)
    return source, own * self.unit + positions % self.unit

  def _of_units(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The source of each unit, and the number of the unit within that source."""
    phases = np.searchsorted(self.starts, units, side="right") - 1
    left = units - self.starts[phases]
    source = np.full(units.shape, -1)
    own = np.zeros_like(units)
    rest = np.full(units.shape, SHARES)
    # One source after the other takes its share of the positions that are left.
    for s in range(self.shares.shape[1]):
      share = self.shares[phases, s]
      below = _times(left, share, np.maximum(rest, 1))
      taken = _times(left + 1, share, np.maximum(rest, 1)) - below
      belongs = (source < 0) & (taken > 0)
      source[belongs] = s
      own[belongs] = (below + self.counts[phases, s])[belongs]
      left, rest = left - below, rest - share
    return source, own

  def before(self, position: int) -> np.ndarray:
    """Returns how many positions below this one belong to each source, [sources] int64."""
    units, rest = divmod(position, self.unit)
    phase = int(np.searchsorted(self.starts, units, side="right")) - 1
    in_phase = _counts(self.shares[phase], units - int(self.starts[phase]))
    counts: np.ndarray = (self.counts[phase] + in_phase) * self.unit
    if rest:
      counts[self._of_units(np.array([units]))[0][0]] += rest
    return counts


def epochs(source: Source, position: int, *, batch_size: int) -> dict[str, float]:
  """Returns {name of a source: its epochs before this position} of a mixture; {} of one source."""
  if not isinstance(source, Mixture):
    return {}
  counts = MixtureSchedule(source, batch_size=batch_size).before(position)
  return {
    name: count / len(part)
    for name, part, count in zip(source.names, source.sources, counts.tolist())
  }


def check_sizes(
  source: Source, *, batch_size: int, lane_rows: int = 0, span: tuple[int, int] | None = None
) -> None:
  """Raises ValueError if a batch takes more samples of a source than the source has.

  Args:
    source: one source or a mixture.
    batch_size: rows of the global batches.
    lane_rows: of Order: the batch size of phases that start at a step; the batch size if 0.
    span: the positions of the stream, first and last + 1, that are read in such batches; None: all.
  """
  if not isinstance(source, Mixture):
    if len(source) < batch_size:
      raise ValueError(f"{source!r} has {len(source)} samples, fewer than a batch of {batch_size}")
    return
  schedule = MixtureSchedule(source, batch_size=lane_rows or batch_size)
  shares = schedule.shares
  if span:
    first, last = np.searchsorted(schedule.starts, span, side="left")
    begins = first < len(schedule.starts) and schedule.starts[first] == span[0]
    shares = shares[first if begins else first - 1 : last]
  most = (shares.max(0) > 0 if source.pure else shares.max(0) / SHARES) * batch_size
  if schedule.unit > 1 and schedule.unit % batch_size:
    raise ValueError(
      f"config.batch_size={batch_size}: with config.data.pure_batches it must divide"
      f" {schedule.unit}, the batch size of the first stage, or batches would mix sources"
    )
  for name, part, rows in zip(source.names, source.sources, most.tolist()):
    if len(part) < rows:
      raise ValueError(
        f"config.data.mixture: {name!r} has {len(part)} samples, fewer than the"
        f" {rows:.0f} that a batch of {batch_size} takes of it"
      )


def _samples(start: int | str, *, batch_size: int, size: int) -> int:
  """The start of a phase in samples: from 0, "1e6 samples", "1000 steps" or "2 epochs"."""
  number, _, unit = str(start).strip().partition(" ")
  scale = dict(zip(UNITS, (1, batch_size, size))).get(unit, 1 if number == "0" else 0)
  try:
    return round(float(number) * scale) if scale else int("")
  except ValueError:
    raise ValueError(
      f"config.data.schedule: {start!r} is not a start; write 0, '1e6 samples', '1000"
      " steps' or '2 epochs'"
    ) from None


def _shares(weights: Sequence[float]) -> np.ndarray:
  """[S] weights → [S] int64 in the same proportions, with sum SHARES; 0 stays 0."""
  edges = np.rint(np.cumsum(weights) / np.sum(weights) * SHARES).astype(np.int64)
  return np.diff(edges, prepend=0)


def _times(x: np.ndarray, share: np.ndarray, rest: np.ndarray) -> np.ndarray:
  """floor(x * share / rest), for share <= rest <= SHARES and x below 2**62."""
  product: np.ndarray = x // rest * share + x % rest * share // rest
  return product


def _counts(shares: np.ndarray, length: int) -> np.ndarray:
  """[S]: how many of a phase's first `length` positions each source has."""
  counts, rest = [], SHARES
  for share in shares.tolist():
    counts.append(length * share // max(rest, 1))
    length, rest = length - counts[-1], rest - share
  return np.array(counts, np.int64)
