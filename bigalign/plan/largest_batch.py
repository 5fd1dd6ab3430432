"""The largest batch that fits: guessed from the memory of a few plans, and compiled to be sure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigalign.plan import chips

ROWS = 8  # of a device: batches are multiples of these
TRIES = 3


def likely(points: Sequence[Mapping[str, Any]]) -> int:
  """The largest batch that should fit, on the line through the last two plans; 0 if none.

  Through a single one the line begins at what does not grow with the batch.
  """
  last = points[-1]
  needed = _needed(last)
  if needed is None:
    return 0
  rows, others = last["batch_per_chip"], [x for x in points[:-1] if _needed(x) is not None]
  if others:
    slope = (needed - _needed(others[-1])) / (rows - others[-1]["batch_per_chip"])
  else:
    kinds = last["memory_bytes_per_chip"]
    slope = (needed - sum(x for k, x in kinds.items() if k not in ("batch", "activations"))) / rows
  room = chips.CHIPS[chips.kind(last["topology"])].memory - needed
  parts = last["mesh"]["data"] * last["mesh"]["fsdp"]
  most = (last["batch_size"] + room / slope * last["devices"]) / parts if slope > 0 else 0
  unit = ROWS * last["microbatches"]
  return int(most // unit * unit) * parts


def largest(found: Mapping[str, Any], at: Callable[[int], Mapping[str, Any]]) -> int:
  """The largest batch that was compiled and fits, by TRIES more plans, of `at`; 0 if none does."""
  points = [found]
  for _ in range(TRIES):
    guess = likely(points)
    if guess < 2 or guess in [x["batch_size"] for x in points]:
      break
    points.append(at(guess))
  return max((x["batch_size"] for x in points if x["fits"]), default=0)


def _needed(found: Mapping[str, Any]) -> Any:
  return found["peak_bytes_per_chip"] if found["fits"] else found["required_bytes_per_chip"]
