"""Work in pieces by a pool of processes, which ends with the program and names one that died."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


def run(function: Callable[[T], Result], tasks: Sequence[T], *, workers: int) -> Iterator[Result]:
  """The result of each task, in order; with less than two workers or tasks from this process.

  Raises:
    RuntimeError: if a process ended by itself, with its number and how it ended.
  """
  workers = min(workers, len(tasks))
  if workers < 2:
    yield from map(function, tasks)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start) as pool:
    futures = collections.deque(pool.submit(function, task) for task in tasks)
    # The pool tells no one which of its processes died.
    started: dict[int, BaseProcess] = pool._processes  # type: ignore[assignment]
    try:
      while futures:
        yield futures.popleft().result()
    except BrokenProcessPool as error:
      deadline = time.monotonic() + 5
      while time.monotonic() < deadline and any(x.exitcode is None for x in started.values()):
        time.sleep(0.01)  # the pool is told of the end before anybody knows how it came
      raise RuntimeError(f"{died(started.values())}, and run the same command again") from error
    finally:  # also if nobody wants the rest
      pool.shutdown(wait=False, cancel_futures=True)


def died(processes: Iterable[BaseProcess]) -> str:
  """Which of some processes ended otherwise than they should, and the likely cause."""
  ended = [(process.pid, process.exitcode) for process in processes if process.exitcode]
  # Pools end with SIGTERM what is left of them.
  found = [(pid, code) for pid, code in ended if code != -signal.SIGTERM] or ended
  told = " and ".join(
    f"worker process {pid} "
    + (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}")
    for pid, code in found
  )
  memory = any(code == -signal.SIGKILL for _, code in found)
  return (told or "worker process ended by itself") + (
    ", which is what the system does when memory runs out (see dmesg): take fewer workers"
    if memory
    else ": mend what the log says"
  )


def start() -> None:
  """Runs first in a worker process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the program's, which ends the workers
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A killed program cannot end its workers, which would wait for it forever."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
