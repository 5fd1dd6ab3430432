"""Why a sample cannot be used: counted in every batch, written down, never silent."""

from __future__ import annotations

import collections
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# A column of batch["rejects"] each, in this order; append only, it is a public format.
REASONS = (
  "no_image",  # the sample has no member with a known image extension
  "empty",  # the image has no bytes
  "truncated",  # the image ends too early
  "undecodable",  # not an image, or a broken one
  "too_large",  # more pixels than max_pixels
  "no_caption",  # none of the caption fields is there and not blank
  "bad_metadata",  # a .json or .cls member that cannot be read
  "no_vector",  # the embedding store that is read beside the source has no row of it
)


class Rejected(Exception):
  """This sample cannot be used, for a reason out of REASONS."""

  def __init__(self, reason: str, detail: str = ""):
    if reason not in REASONS:
      raise ValueError(f"Unknown reject reason {reason!r}; known: {REASONS}")
    super().__init__(reason, detail)
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    return f"{self.reason}: {self.detail}" if self.detail else self.reason


def write_down(path: str, **line: Any) -> None:
  """Appends a line of JSON. All workers of a host share the file: a line is one write."""
  file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
  try:
    os.write(file, json.dumps(line).encode() + b"\n")
  finally:
    os.close(file)


class Watch:
  """The share of rejected samples of each source, over its last samples.

  names  of the sources
  warn   share of the samples tried above which a warning is logged, once for each source
  stop   share above which `check` raises; 1 never does
  last   samples over which a share is taken
  after  samples of a source below which no share is taken
  """

  def __init__(
    self,
    names: Sequence[str],
    *,
    warn: float = 0.01,
    stop: float = 0.02,
    last: int = 100_000,
    after: int = 10_000,
  ):
    self._names, self._warn, self._stop = names, warn, stop
    self._last, self._after = last, after
    self._steps: list[collections.deque[tuple[int, int]]] = [collections.deque() for _ in names]
    self._sums = np.zeros((len(names), 2), np.int64)  # positions, rejected
    self._warned: set[str] = set()

  def add(self, tally: np.ndarray) -> dict[str, int]:
    """A global batch: rows of each source, and samples rejected for them, [sources, 2].

    Returns the number of those of each source; of one source alone nothing.
    """
    for sums, steps, (rows, bad) in zip(self._sums, self._steps, tally.tolist()):
      steps.append((rows, bad))
      sums += (rows, bad)
      while sums[0] - steps[0][0] >= self._last:
        sums -= steps.popleft()
    several = len(self._names) > 1
    return dict(zip(self._names, tally[:, 1].tolist())) if several else {}

  def check(self) -> None:
    """Raises ValueError, naming the source, if too many of its samples cannot be used."""
    for name, (positions, bad) in zip(self._names, self._sums.tolist()):
      share = bad / max(positions + bad, 1)
      if positions < self._after or share <= self._warn:
        continue
      told = (
        f"{name}: {share:.1%} of the last {positions + bad} samples tried cannot be used;"
        " rejected-*.jsonl in the run's folder names them and tells why"
      )
      if share > self._stop:
        raise ValueError(
          f"{told}. Mend or leave out what is broken, or set config.data.rejects ="
          f" dict(stop=…), now {self._stop}"
        )
      if name not in self._warned:
        self._warned.add(name)
        logger.warning("%s", told)
