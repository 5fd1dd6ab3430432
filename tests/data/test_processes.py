"""A pool whose process is killed says so at once, and by name."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from bigalign.data.files import processes


def square(n):
  return n * n


def end_at_three(n):
  if n == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  return n


def test_results_come_in_order_and_a_killed_process_is_named():
  assert list(processes.run(square, range(9), workers=2)) == [n * n for n in range(9)]
  begin = time.monotonic()
  with pytest.raises(RuntimeError) as caught:
    list(processes.run(end_at_three, range(400), workers=2))
  assert time.monotonic() - begin < 20
  assert re.fullmatch(
    r"worker process \d+ was killed by SIGKILL, which is what the system does when memory runs out"
    r" \(see dmesg\): use fewer workers, and run the same command again",
    str(caught.value),
  )
