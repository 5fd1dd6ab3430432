"""How many patches the images of a step have, and how many pairs: config.data.naflex.

Both are functions of the seed and the number of the step, so they do not depend on hosts, workers
or restarts.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from bigalign.data.order.permutation import LENGTH, hash_words

_STEPS = 1 << 20  # that are drawn at a time


@dataclasses.dataclass(frozen=True)
class LengthSchedule:
  """The lengths and batch sizes of all steps.

  Args:
    seed: of the run.
    lengths: patches of an image.
    weights: how often each is drawn, relative to the others.
    sizes: pairs of a batch of each length.
  """

  seed: int
  lengths: tuple[int, ...]
  weights: tuple[float, ...]
  sizes: tuple[int, ...]

  def draw(self, steps: np.ndarray) -> np.ndarray:
    """[N] -> [N]: which of `lengths` each step has; steps count from 0."""
    uniform = (hash_words(LENGTH, self.seed, steps) >> np.uint64(11)) / float(1 << 53)
    ends = np.cumsum(self.weights) / np.sum(self.weights)
    return np.minimum(np.searchsorted(ends, uniform, side="right"), len(self.lengths) - 1)

  def at(self, step: int) -> tuple[int, int]:
    """(length, batch size) of a step."""
    (number,) = self.draw(np.array([step])).tolist()
    return self.lengths[number], self.sizes[number]

  def samples(self, begin: int, end: int) -> int:
    """The pairs of the steps `begin` <= step < `end`."""
    sizes = np.array(self.sizes)
    firsts = range(begin, end, _STEPS)
    parts = (np.arange(first, min(first + _STEPS, end)) for first in firsts)
    return sum(int(sizes[self.draw(steps)].sum()) for steps in parts)

  @property
  def mean_size(self) -> float:
    """The mean number of pairs of a batch."""
    return float(np.average(self.sizes, weights=self.weights))
