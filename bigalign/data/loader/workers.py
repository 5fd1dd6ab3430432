"""Makes batches ahead, in worker processes or in a thread of this process."""

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

from bigalign.data.files import processes
from bigalign.data.loader import shared_memory
from bigalign.private_apis import (
  free_grain_shared_memory,
  imports_main_of_parent,
  is_dead_grain_worker,
)


class BatchSource(Protocol):
  """Element k is a whole batch, which depends on nothing but k; picklable."""

  def __len__(self) -> int: ...
  def __getitem__(self, k: int, /) -> dict[str, np.ndarray]: ...


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
  dataset = grain.MapDataset.source(shared_memory.Sender(batches))
  read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  multiprocess = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  return Batches(iter(read.mp_prefetch(multiprocess, worker_init_fn=_start_worker)))


class Batches:
  """An iterator of batches that reads ahead as soon as it exists; `close` ends its workers.

  Args:
    iterator: of grain.

  Raises:
    RuntimeError: by __next__, if a worker was killed; names the process, a second after its last
      batch.
  """

  def __init__(self, iterator: grain.DatasetIterator):
    iterator.start_prefetch()
    self._iterators = [iterator]
    self._receiver = shared_memory.Receiver()
    self._children: list[BaseProcess] = []
    # Also runs when the object is collected, and at exit before the modules are torn down: grain's
    # own clean-up runs too late there and prints errors.
    self.close = weakref.finalize(self, _close, self._iterators, self._receiver)

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._iterators:
      raise ValueError("These batches are closed.")
    # Children that run or failed, remembered because active_children() forgets dead ones.
    known = [process for process in self._children if process.exitcode != 0]
    self._children = [*dict.fromkeys([*known, *multiprocessing.active_children()])]
    try:
      batch = next(self._iterators[0])
    except RuntimeError as error:
      if not is_dead_grain_worker(error):
        raise
      raise RuntimeError(
        f"The data's {processes.died(self._children)} (config.data.workers), and"
        " run the same command again: a run resumes from its last checkpoint"
      ) from error
    return self._receiver.unpack(batch)


def _close(iterators: list[grain.DatasetIterator], receiver: shared_memory.Receiver) -> None:
  while iterators:
    iterators.pop().close()
  receiver.close()
  gc.collect()  # grain's iterators are reference cycles, which would print errors at exit
  free_grain_shared_memory()


def _start_worker(worker: int, workers: int) -> None:
  """Prepares a worker process; the first call in it."""
  del worker, workers
  processes.start()
  # The program also gets SIGTERM. It trains for some more steps, and then closes the workers.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
