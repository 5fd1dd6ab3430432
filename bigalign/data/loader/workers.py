"""Makes batches ahead, in worker processes or in a thread of this process."""

from __future__ import annotations

import functools
import gc
import hashlib
import multiprocessing
import os
import pickle
import queue
import secrets
import signal
import threading
import time
import types
import weakref
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, BinaryIO, Protocol

import cloudpickle
import grain
import numpy as np
from absl import flags, logging

from bigalign.data.files import processes
from bigalign.data.loader import shared_memory
from bigalign.private_apis import (
  exit_code_of_grain_worker,
  free_grain_shared_memory,
  imports_main_of_parent,
  name_shared_memory,
)

GRACE = 5.0  # seconds in which grain notices a dead worker itself


class BatchSource(Protocol):
  """Element k is a whole batch, which depends on nothing but k; picklable."""

  def __len__(self) -> int: ...
  def __getitem__(self, k: int, /) -> dict[str, np.ndarray]: ...


_START = secrets.token_hex(4)  # distinguishes this process from others; ids repeat in containers
_PREFIX = [f"bigalign-0-{_START}-"]  # of the names of shared memory


def own_shared_memory(owner: str) -> None:
  """Names the shared memory of workers after its owner, and removes what a killed run left.

  A local folder is identified by its device and inode: containers that share /dev/shm can each have
  another folder with the same path.

  Args:
    owner: the folder of the run, local or gs://…. No other process uses its shared memory now.
  """
  if not shared_memory.HAS_FILES:
    return
  if os.path.isdir(owner):
    status = os.stat(owner)
    owner = f"{status.st_dev}/{status.st_ino}"
  name = f"bigalign-{hashlib.sha256(owner.encode()).hexdigest()[:16]}-"
  _PREFIX[0] = f"{name}{_START}-"
  name_shared_memory(_PREFIX[0])  # the semaphores of the queues are made in this process
  removed = shared_memory.remove_left_over(name, _PREFIX[0])
  if removed:
    logging.info("Removed %d pieces of shared memory that a killed run left", len(removed))


def iterate(batches: BatchSource, *, workers: int) -> Batches:
  """Returns an iterator of the batches in order.

  Args:
    batches: to iterate over.
    workers: processes; 0 for a thread. They change when a batch is made, but not its content.

  Raises:
    RuntimeError: if a worker calls this while it imports the program's main file.
  """
  # One thread per process, because the workers are the parallelism. The Rust libraries of this
  # process read these variables on first use, and the workers inherit them.
  os.environ.setdefault("RAYON_NUM_THREADS", "1")
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  if not workers:
    dataset = grain.MapDataset.source(batches)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return Batches(iter(dataset.to_iter_dataset(options)))
  if imports_main_of_parent():
    raise RuntimeError(
      "Data workers import the program's main file, and this import starts data workers again. "
      'Put the call under `if __name__ == "__main__":`, or use workers=0.'
    )
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags; notebooks and tests never parse them
  # Each worker makes one batch while two wait; grain's default would hold 500.
  spool = _Spool(batches)
  dataset = grain.MapDataset.source(shared_memory.Sender(spool))
  read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  start = functools.partial(_start_worker, prefix=_PREFIX[0])
  multiprocess = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  return Batches(iter(read.mp_prefetch(multiprocess, worker_init_fn=start)), spool)


class _Spool:
  """Batches that each worker reads from one file in memory.

  multiprocessing sends them through a pipe, and this process waits until the worker has read all of
  it. If the worker dies before that, or is stopped, it would wait for ever, because it holds the
  reading end itself. What goes through the pipe must therefore fit into its buffer.
  """

  def __init__(self, batches: BatchSource):
    self._batches = batches
    self._file: BinaryIO | None = None
    self._path = ""  # of the file, for other processes and for the copies that grain makes
    if hasattr(os, "memfd_create"):  # Linux
      self._file = os.fdopen(os.memfd_create("bigalign-batches", os.MFD_CLOEXEC), "wb")
      cloudpickle.dump(batches, self._file)
      self._file.flush()
      self._path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    return self._batches[k]

  def __repr__(self) -> str:
    return repr(self._batches)

  def __getstate__(self) -> tuple[str, BatchSource | None]:
    return self._path, None if self._path else self._batches

  def __setstate__(self, state: tuple[str, BatchSource | None]) -> None:
    path, batches = state
    self._file, self._path = None, path
    if path:
      with open(path, "rb") as file:  # of the parent process
        batches = pickle.load(file)
    assert batches is not None
    self._batches = batches

  def close(self) -> None:
    """Frees the memory; no worker may start any more."""
    if self._file is not None:
      self._file.close()


class _Puller:
  """Takes elements of an iterator in a thread, so that the caller never waits without a limit."""

  def __init__(self, iterator: grain.DatasetIterator):
    self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    # A daemon: at the end of the program it may wait for a worker that has died.
    self._thread = threading.Thread(target=self._run, args=(iterator,), daemon=True)
    self._thread.start()

  def ask(self) -> None:
    """Begins to take one element."""
    self._requests.put(True)

  def answer(self, seconds: float) -> tuple[Any, BaseException | None] | None:
    """Returns the element and its error, or None if it takes longer."""
    try:
      return self._answers.get(timeout=seconds)
    except queue.Empty:
      return None

  def close(self) -> None:
    """Ends the thread, without waiting for a worker that has died."""
    self._requests.put(False)
    self._thread.join(0.1)

  def _run(self, iterator: grain.DatasetIterator) -> None:
    while self._requests.get():
      try:
        self._answers.put((next(iterator), None))
      except BaseException as error:  # also StopIteration; the caller raises it
        self._answers.put((None, error))


class Batches:
  """An iterator of batches that reads ahead as soon as it exists; `close` ends its workers.

  Args:
    iterator: of grain.
    spool: what the workers read; None without workers.

  Raises:
    RuntimeError: by __next__, if a worker was killed; names the process, a second after its last
      batch.
  """

  def __init__(self, iterator: grain.DatasetIterator, spool: _Spool | None = None):
    # A scheduler or a terminal signals all processes. Workers inherit the mask, and ignore these
    # signals once they run.
    resource_tracker.ensure_running()  # its own start would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
      iterator.start_prefetch()
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    self._iterators = [iterator]
    self._puller = _Puller(iterator) if spool else None
    self._receiver = shared_memory.Receiver()
    self._children: list[BaseProcess] = []
    # Also runs when the object is collected, and at exit before the modules are torn down: grain's
    # own clean-up runs too late there and prints errors.
    self.close = weakref.finalize(
      self, _close, self._iterators, self._receiver, self._puller, spool
    )

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._iterators:
      raise ValueError("These batches are closed.")
    self._remember_children()
    try:
      batch = self._pull(self._puller) if self._puller else next(self._iterators[0])
    except RuntimeError as error:
      code = exit_code_of_grain_worker(error)
      if code is None:
        raise
      raise self._dead(code) from error
    return self._receiver.unpack(batch)

  def _remember_children(self) -> None:
    """Keeps children that run or failed, because active_children() forgets dead ones."""
    known = [process for process in self._children if process.exitcode != 0]
    self._children = [*dict.fromkeys([*known, *multiprocessing.active_children()])]

  def _pull(self, puller: _Puller) -> Any:
    """The next element; raises if a worker is dead for GRACE seconds and grain has not noticed."""
    puller.ask()
    seen = 0.0
    while (answer := puller.answer(1.0)) is None:
      self._remember_children()
      if any(process.exitcode for process in self._children):
        seen = seen or time.monotonic()
        if time.monotonic() - seen > GRACE:
          raise self._dead(1)
    element, error = answer
    if error is not None:
      raise error
    return element

  def _dead(self, code: int) -> RuntimeError:
    """The error for a dead worker. `code`: of a worker that died before its process was known."""
    dead: list[Any] = [process for process in self._children if process.exitcode]
    dead = dead or [types.SimpleNamespace(pid="(still starting)", exitcode=code)]
    return RuntimeError(
      f"The data's {processes.died(dead)} (config.data.workers), and"
      " run the same command again: a run resumes from its last checkpoint"
    )


def _close(
  iterators: list[grain.DatasetIterator],
  receiver: shared_memory.Receiver,
  puller: _Puller | None,
  spool: _Spool | None,
) -> None:
  closed = [weakref.ref(iterator) for iterator in iterators]
  while iterators:
    iterators.pop().close()
  if puller:
    puller.close()
  if spool:
    spool.close()
  receiver.close()
  # One that is in a reference cycle, as after an error, would print errors at exit. Otherwise
  # nothing is left to collect. A collection looks through all that JAX holds, and every evaluation
  # closes batches.
  if any(iterator() is not None for iterator in closed):
    gc.collect()
  free_grain_shared_memory()


def _start_worker(worker: int, workers: int, *, prefix: str) -> None:
  """Prepares a worker process; the first call in it."""
  del worker, workers
  processes.start()
  if shared_memory.HAS_FILES:
    name_shared_memory(prefix)
  # The program also gets SIGTERM. It trains for some more steps, and then closes the workers.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
