"""A pool of processes for work in pieces, which ends with the program and names dead processes."""

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

from bigalign.private_apis import pool_processes

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(
  function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int
) -> Iterator[Result]:
  """Yields the result of each task, in order.

  Args:
    function: of one task; picklable.
    tasks: picklable.
    workers: processes. With fewer than two workers or tasks, this process does the work.

  Raises:
    RuntimeError: if a worker process died; says which one and how.
  """
  workers = min(workers, len(tasks))
  if workers < 2:
    yield from map(function, tasks)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start) as pool:
    futures = collections.deque(pool.submit(function, task) for task in tasks)
    processes = pool_processes(pool)
    try:
      while futures:
        yield futures.popleft().result()
    except BrokenProcessPool as error:
      deadline = time.monotonic() + 5
      while time.monotonic() < deadline and any(x.exitcode is None for x in processes.values()):
        time.sleep(0.01)  # the pool learns of the death before the exit code is known
      raise RuntimeError(f"{died(processes.values())}, and run the same command again") from error
    finally:  # also if the caller does not take all results
      pool.shutdown(wait=False, cancel_futures=True)


def died(processes: Iterable[BaseProcess]) -> str:
  """Says which processes died, how, and what to do about the likely cause."""
  failed = [(process.pid, process.exitcode) for process in processes if process.exitcode]
  # A pool ends its other processes with SIGTERM.
  causes = [(pid, code) for pid, code in failed if code != -signal.SIGTERM] or failed
  text = " and ".join(
    f"worker process {pid} "
    + (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}")
    for pid, code in causes
  )
  memory = any(code == -signal.SIGKILL for _, code in causes)
  return (text or "worker process ended by itself") + (
    ", which is what the system does when memory runs out (see dmesg): use fewer workers"
    if memory
    else ": fix what the log reports"
  )


def start() -> None:
  """Prepares a worker process; the first call in it."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program handles Ctrl-C, and ends the workers
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends this process with its parent: a killed program cannot end its workers."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
