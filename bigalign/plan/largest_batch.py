"""The largest batch that fits: predicted from the memory of a few plans, verified by compiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigalign.plan import chips

ROWS = 8  # the rows of a device in a predicted batch are a multiple of this
TRIES = 3


def predict(plans: Sequence[Mapping[str, Any]]) -> int:
  """Returns the largest batch that should fit, or 0 if memory cannot be extrapolated.

  Memory is extrapolated on the line through the last two plans. With a single plan, the line starts
  at the memory that does not grow with the batch.

  Args:
    plans: of one config with different batch sizes, from compile_step.measure.
  """
  last = plans[-1]
  needed = _needed(last)
  if needed is None:
    return 0
  rows, others = last["batch_per_chip"], [x for x in plans[:-1] if _needed(x) is not None]
  if others:
    slope = (needed - _needed(others[-1])) / (rows - others[-1]["batch_per_chip"])
  else:
    kinds = last["memory_bytes_per_chip"]
    slope = (needed - sum(x for k, x in kinds.items() if k not in ("batch", "activations"))) / rows
  room = chips.CHIPS[chips.kind(last["topology"])].memory - needed
  parts = last["mesh"]["data"] * last["mesh"]["fsdp"]
  largest = (last["batch_size"] + room / slope * last["devices"]) / parts if slope > 0 else 0
  unit = ROWS * last["microbatches"]
  return int(largest // unit * unit) * int(parts)


def search(plan: Mapping[str, Any], plan_batch: Callable[[int], Mapping[str, Any]]) -> int:
  """Returns the largest batch that was compiled and fits, or 0 if none does.

  Args:
    plan: the first plan, from compile_step.measure.
    plan_batch: returns the plan of the same config with another batch size; called at most TRIES
      times.
  """
  plans = [plan]
  for _ in range(TRIES):
    guess = predict(plans)
    if guess < 2 or guess in [x["batch_size"] for x in plans]:
      break
    plans.append(plan_batch(guess))
  return max((x["batch_size"] for x in plans if x["fits"]), default=0)


def _needed(plan: Mapping[str, Any]) -> Any:
  """Bytes that a device needs; None if the compiler did not say."""
  return plan["peak_bytes_per_chip"] if plan["fits"] else plan["required_bytes_per_chip"]
