"""Why a sample is rejected. Rejected samples are counted in every batch, logged, and replaced."""

from __future__ import annotations

import collections
import json
import logging
import os
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.private_apis import tensorstore_status
from bigalign.tree import cut

logger = logging.getLogger(__name__)

# The columns of batch["rejects"], in this order. A public format: append only.
REASONS = (
  "no_image",  # the sample has no member with a known image extension
  "empty",  # the image has no bytes
  "truncated",  # the image ends too early
  "undecodable",  # not an image, or a broken one
  "too_large",  # more pixels than max_pixels
  "no_caption",  # every caption field is missing or blank
  "bad_metadata",  # a .json or .cls member that cannot be read
  "no_vector",  # the embedding store that is read with the source has no row for it
  "failed",  # reading, decoding, tokenising or augmenting it raised another error
  "no_column",  # the sample has no value of a column of config.data.columns
)
# Errors of an object store, which tensorstore raises as ValueError.
_STATUSES = {
  *("CANCELLED", "UNKNOWN", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "ABORTED"),
  *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "INTERNAL", "UNAVAILABLE"),
  *("UNAUTHENTICATED", "DATA_LOSS", "UNIMPLEMENTED", "INVALID_ARGUMENT", "OUT_OF_RANGE"),
}
DETAIL = 500  # characters of a detail; the rest may be the data itself


class Rejected(Exception):
  """A sample cannot be used.

  Args:
    reason: one of REASONS.
    detail: what is wrong with it, for the log; cut at DETAIL characters.
  """

  def __init__(self, reason: str, detail: str = ""):
    if reason not in REASONS:
      raise ValueError(f"Unknown reject reason {reason!r}; known: {REASONS}")
    detail = cut(detail, DETAIL)
    super().__init__(reason, detail)
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    return f"{self.reason}: {self.detail}" if self.detail else self.reason


def rejection(error: Exception) -> Rejected:
  """Returns why a sample is rejected whose reading, decoding or augmenting raised an error.

  Args:
    error: with its traceback.

  Returns:
    `error` if it is a Rejected; else one with the reason "failed", which names the error and the
    line of code that raised it.

  Raises:
    Exception: `error` itself if it is not the fault of one sample: errors of the disk, of a store,
      of the memory, and missing modules.
  """
  if isinstance(error, Rejected):
    return error
  if isinstance(error, OSError | MemoryError | ImportError):
    raise error
  if isinstance(error, ValueError) and tensorstore_status(error) in _STATUSES:
    raise error
  frame = traceback.extract_tb(error.__traceback__)[-1]
  place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
  return Rejected("failed", f"{type(error).__name__}: {cut(str(error), DETAIL // 2)} ({place})")


def append_json_line(path: str, **line: Any) -> None:
  """Appends a line of JSON to a file that all workers of a host share."""
  file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
  try:
    os.write(file, json.dumps(line).encode() + b"\n")  # one write, so that lines do not mix
  finally:
    os.close(file)


class Watch:
  """Tracks the share of rejected samples of each source, over its last samples.

  Args:
    names: of the sources.
    warn: the share of tried samples above which a warning is logged, once for each source.
    stop: the share above which `check` raises; 1 never does.
    last: the number of samples over which a share is taken.
    after: the number of samples of a source below which no share is taken.
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
    """Adds a global batch.

    Args:
      tally: [sources, 2]: rows of each source in the batch, and samples rejected for them.

    Returns:
      {name: rejected samples} of several sources; {} of a single one.
    """
    for sums, steps, (rows, bad) in zip(self._sums, self._steps, tally.tolist()):
      steps.append((rows, bad))
      sums += (rows, bad)
      while sums[0] - steps[0][0] >= self._last:
        sums -= steps.popleft()
    several = len(self._names) > 1
    return dict(zip(self._names, tally[:, 1].tolist())) if several else {}

  def check(self) -> None:
    """Raises ValueError if too many samples of a source are rejected; names the source."""
    for name, (positions, bad) in zip(self._names, self._sums.tolist()):
      share = bad / max(positions + bad, 1)
      if positions < self._after or share <= self._warn:
        continue
      text = (
        f"{name}: {share:.1%} of the last {positions + bad} samples tried cannot be used;"
        " rejected-*.jsonl in the run's folder lists them with the reasons"
      )
      if share > self._stop:
        raise ValueError(
          f"{text}. Fix or leave out the broken samples, or set config.data.rejects ="
          f" dict(stop=…), now {self._stop}"
        )
      if name not in self._warned:
        self._warned.add(name)
        logger.warning("%s", text)
