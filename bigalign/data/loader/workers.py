"""Batches made ahead in worker processes, or in a thread of this one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import weakref
from multiprocessing.process import BaseProcess
from typing import Protocol

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from bigalign.data.files import processes
from bigalign.data.loader import shared_memory


class BatchSource(Protocol):
  """Element k is a whole batch, a function of k alone; picklable."""

  def __len__(self) -> int: ...
  def __getitem__(self, k: int, /) -> dict[str, np.ndarray]: ...


def iterate(batches: BatchSource, *, workers: int) -> Batches:
  """The batches in order; `workers` processes change when they are made, not what they hold."""
  # One thread each: the workers are the parallelism. Read on first use by the Rust libraries of
  # this process and, inherited, of the workers.
  os.environ.setdefault("RAYON_NUM_THREADS", "1")
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  if not workers:
    dataset = grain.MapDataset.source(batches)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return Batches(iter(dataset.to_iter_dataset(options)))
  if getattr(multiprocessing.current_process(), "_inheriting", False):
    raise RuntimeError(
      "Data workers import the program's main file, and this import starts data workers again. "
      'Put the call under `if __name__ == "__main__":`, or use workers=0.'
    )
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags; notebooks and tests never parse them
  # A batch per worker in the making and two waiting: grain's default would hold 500.
  dataset = grain.MapDataset.source(shared_memory.Sender(batches))
  made = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  return Batches(iter(made.mp_prefetch(options, worker_init_fn=_start_worker)))


class Batches:
  """An iterator of batches. It reads ahead from its making on; `close` ends its workers.

  A worker that was killed is a RuntimeError with its number, a second after its last batch.
  """

  def __init__(self, iterator: grain.DatasetIterator):
    iterator.start_prefetch()
    self._iterators = [iterator]
    self._received = shared_memory.Receiver()
    self._processes: list[BaseProcess] = []
    # Also when forgotten, and at exit before the modules are torn down: grain's own clean-up comes
    # too late there and fails in noise.
    self.close = weakref.finalize(self, _close, self._iterators, self._received)

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._iterators:
      raise ValueError("These batches are closed.")
    # All that were ever seen alive: of a dead one multiprocessing itself keeps nothing.
    left = [process for process in self._processes if process.exitcode != 0]
    self._processes = [*dict.fromkeys([*left, *multiprocessing.active_children()])]
    try:
      batch = next(self._iterators[0])
    except RuntimeError as error:
      if "terminated unexpectedly" not in str(error):  # grain's word for it
        raise
      raise RuntimeError(
        f"The data's {processes.died(self._processes)} (config.data.workers), and"
        " run the same command again: a run goes on from its last checkpoint"
      ) from error
    return self._received.unpack(batch)


def _close(iterators: list[grain.DatasetIterator], received: shared_memory.Receiver) -> None:
  while iterators:
    iterators.pop().close()
  received.close()
  gc.collect()  # grain's iterators are cycles; what is left of them would speak up at exit
  # grain frees shared memory in a thread that ends with the program, and what it has not come to is
  # reported as leaked. It works in order: once it has done this nothing, it has done all before.
  freeing = getattr(SharedMemoryArray, "_del_thread_pool", None)
  if freeing is not None:
    freeing.apply(bool)


def _start_worker(worker: int, workers: int) -> None:
  """Runs first in every worker process."""
  del worker, workers
  processes.start()
  # The program's too, which goes on for some steps after it and then closes the workers.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
