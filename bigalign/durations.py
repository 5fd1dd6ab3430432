"""Durations: stretches of training in steps, samples, epochs, or a share of all steps."""

from __future__ import annotations

import re
from typing import NamedTuple


class Duration(NamedTuple):
  """A stretch of training: 18 of unit "epoch", or "step", "sample", "%" of all updates."""

  number: float
  unit: str


def duration(value: int | str, where: str) -> Duration:
  """500, "500 steps", "1e9 samples", "18 epochs" or "50%", as a Duration.

  >>> duration("1e9 samples", "config.total_steps")
  Duration(number=1000000000.0, unit='sample')

  Raises:
    ValueError: for any other text.
  """
  match = re.fullmatch(
    r"\s*(\d[\d_]*\.?\d*(?:[eE]\+?\d+)?)\s*(steps?|samples?|epochs?|%)?\s*", str(value)
  )
  if not match:
    raise ValueError(
      f"{where}: {value!r} is not a duration; write a number of steps, '1e9 samples', '3 epochs' or"
      " '2%'"
    )
  return Duration(float(match.group(1)), (match.group(2) or "step").rstrip("s"))


def steps(
  value: int | str, where: str, *, batch_size: float, dataset_size: int, total_steps: int = 0
) -> int:
  """A duration in updates: 500, "500 steps", "1e9 samples", "3 epochs" or "2%" of total_steps.

  Rounded to the nearest step, never below 1 unless the duration is 0.

  >>> steps("2%", "config.warmup", batch_size=8, dataset_size=0, total_steps=1000)
  20

  Raises:
    ValueError: for any other text, or a percentage if the total is not known.
  """
  if isinstance(value, int):
    return value
  number, unit = duration(value, where)
  length = {
    "step": 1.0,
    "sample": 1 / batch_size,
    "epoch": dataset_size / batch_size,
    "%": total_steps / 100,
  }[unit]
  if not length and unit == "epoch":
    raise ValueError(
      f"{where}: {value!r} needs the size of the dataset, which is not known here;"
      " `bigalign plan` takes it as --samples"
    )
  if not length:
    raise ValueError(f"{where}: {value!r} is a share of all steps, whose number is not known here")
  return max(1, round(number * length)) if number else 0
