"""The watcher of damaged inputs: what it counts as a fault, and how mutations are drawn.

Run as a program, this file tries inputs that fail in every way.
"""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from helpers import mutations

WHOLE = bytes(range(256)) * 4


def _every_fault(folder):
  def trial(n):
    if n == 1:
      raise SystemExit("an escape")
    if n == 2:
      os.abort()
    if n == 3:
      time.sleep(100)
    if n == 4:
      np.ones(1 << 25)  # 256 MiB
    return "read"

  return trial


def test_mutations_are_reproducible_and_of_every_kind():
  every = [mutations.mutated(WHOLE, np.random.default_rng([0, n])) for n in range(500)]
  assert every == [mutations.mutated(WHOLE, np.random.default_rng([0, n])) for n in range(500)]
  assert len(set(every)) > 480 and sum(x == WHOLE for x in every) < 10
  sizes = [len(x) for x in every]
  assert min(sizes) < 100 and max(sizes) > 1500 and 30 < sizes.count(len(WHOLE)) < 300
  for data in (b"", b"x"):
    assert all(
      isinstance(mutations.mutated(data, np.random.default_rng(n)), bytes) for n in range(200)
    )


def test_mutations_of_json_change_values():
  whole = json.dumps(dict(a=[1, dict(b="c")], d=None)).encode()
  every = [mutations.mutated_json(whole, np.random.default_rng(n)) for n in range(100)]
  assert len(set(every)) > 50 and every.count(whole) < 10


@pytest.mark.slow
def test_escapes_crashes_hangs_and_memory_are_counted():
  tally = mutations.tally(__file__, "faults", 6, seconds=6.0)
  assert tally.outcomes == {"read": 3} and len(tally.faults) == 3, tally
  for n, text in enumerate(["SystemExit: an escape", "ended with -6", "it hangs"], 1):
    assert tally.faults[n - 1].startswith(f"input {n}: ") and text in tally.faults[n - 1]
  assert tally.memory > 1 << 27
  with pytest.raises(AssertionError, match="3 faults"):
    tally.check(6, seconds=9, memory=1 << 40)


if __name__ == "__main__":
  mutations.serve(dict(faults=_every_fault))
