"""Batches from worker processes through shared memory that is reused.

Grain allocates new shared memory for each batch, which both processes map page by page; that takes
several times as long as copying the batch. Here a worker has a few slots, writes its batches into
them in turn, and the program copies them out and frees the slots. A batch for which no slot is
free, or which fits into none, goes through grain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import ml_dtypes
import numpy as np

SLOTS = 4  # one batch is finished, two wait, and one is being copied
_HEADER = _ALIGNMENT = 64  # bytes; the header holds the number of batches that were copied out
_MOUNT = "/dev/shm"
HAS_FILES = os.path.isdir(_MOUNT)  # Linux; elsewhere names are short and cannot be listed


def remove_left_over(owner: str, mine: str) -> list[str]:
  """Removes the shared memory and semaphores that a killed run left; returns the names.

  Args:
    owner: how the names of this run's begin, in any of its starts. The caller makes sure that no
      other process uses them any more.
    mine: how the names of this process's begin; they stay.
  """
  names = [
    name
    for name in os.listdir(_MOUNT)
    if (plain := name.removeprefix("sem.")).startswith(owner) and not plain.startswith(mine)
  ]
  removed = []
  for name in names:
    with contextlib.suppress(FileNotFoundError, PermissionError):  # of another user
      os.unlink(os.path.join(_MOUNT, name))
      removed.append(name)
  return removed


@dataclasses.dataclass(frozen=True)
class SlotBatch:
  """Refers to a batch in a slot of a worker's shared memory."""

  memory: str  # name of the shared memory
  number: int  # of the batch, among those in this memory
  size: int  # bytes of a slot
  arrays: dict[str, tuple[tuple[int, ...], str]]  # {name: (shape, dtype)}, in order

  def layout(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Yields (name, shape, dtype, first byte) of each array."""
    first = _HEADER + self.number % SLOTS * self.size
    for (name, (shape, dtype)), length in zip(self.arrays.items(), _lengths(self.arrays.values())):
      yield name, shape, dtype, first
      first += length


def _lengths(arrays: Iterable[tuple[tuple[int, ...], str]]) -> list[int]:
  """The bytes from the start of each array to the start of the next one."""
  sizes = (math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
  return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]


def _written(dtype: np.dtype) -> str:
  """A dtype as text: "<i4", but "bfloat16", whose `str` is that of two bytes without a type."""
  return dtype.name if dtype == ml_dtypes.bfloat16 else dtype.str


def _view(memory: SharedMemory, shape: tuple[int, ...], dtype: str, first: int) -> np.ndarray:
  return np.ndarray(shape, dtype, memory.buf, first)


_CURRENT: list[Sender] = []  # the sender whose batch is being made, if any


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Returns an array like numpy.empty, in the slot of the batch that is being made if possible.

  The loader calls it for the largest array of a batch, which then need not be copied.

  Args:
    shape: of the array.
    dtype: of the array.
  """
  for sender in _CURRENT:
    return sender.reserve(shape, np.dtype(dtype))
  return np.empty(shape, dtype)


class Sender:
  """A worker's batches, in order; each is a SlotBatch if a slot is free.

  Args:
    batches: element k is a batch, {name: array}.
  """

  def __init__(self, batches: Any):
    self._batches = batches
    self._memory: SharedMemory | None = None
    self._size = self._sent = 0
    self._reserved: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self._batches)

  def __repr__(self) -> str:
    return repr(self._batches)

  def __getitem__(self, k: int) -> SlotBatch | dict[str, np.ndarray]:
    _CURRENT.append(self)
    try:
      arrays: dict[str, np.ndarray] = self._batches[k]
    finally:
      _CURRENT.clear()
      reserved, self._reserved = self._reserved, None
    # The reserved array is at the start of the slot, so it must come first.
    batch = dict(sorted(arrays.items(), key=lambda item: item[1] is not reserved))
    layout = {name: (x.shape, _written(x.dtype)) for name, x in batch.items()}
    size = sum(_lengths(layout.values()))
    if not self._size:  # once: if there is no room now, there will be none later
      self._memory, self._size = _allocate(size), size
    if self._memory is None or not self._fits(self._memory, size):
      # Copy the reserved array out of the slot, which the next batch may use.
      return {name: x.copy() if x is reserved else x for name, x in batch.items()}
    slot_batch = SlotBatch(self._memory.name, self._sent, self._size, layout)
    for name, shape, dtype, first in slot_batch.layout():
      if batch[name] is not reserved:
        _view(self._memory, shape, dtype, first)[...] = batch[name]
    self._sent += 1
    return slot_batch

  def reserve(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array at the start of the next slot, once per batch, else anywhere."""
    memory, size = self._memory, math.prod(shape) * dtype.itemsize
    if memory is None or self._reserved is not None or not self._fits(memory, size):
      return np.empty(shape, dtype)
    first = _HEADER + self._sent % SLOTS * self._size
    self._reserved = _view(memory, shape, _written(dtype), first)
    return self._reserved

  def _fits(self, memory: SharedMemory, size: int) -> bool:
    """Whether the next slot is free and has this many bytes."""
    return size <= self._size and self._sent - int(_view(memory, (), "<i8", 0)) < SLOTS


def _allocate(size: int) -> SharedMemory | None:
  """Shared memory with SLOTS slots of `size` bytes; None if there is no room for it."""
  memory = SharedMemory(create=True, size=_HEADER + SLOTS * size)
  path = os.path.join(_MOUNT, memory.name)
  if os.path.exists(path):
    # Allocate now: if there is no room, a later write would kill this process.
    descriptor = os.open(path, os.O_RDWR)
    try:
      os.posix_fallocate(descriptor, 0, memory.size)
    except OSError:
      memory.close()
      memory.unlink()
      return None
    finally:
      os.close(descriptor)
  return memory


class Receiver:
  """Copies the batches of all workers out of their slots, in the program."""

  def __init__(self) -> None:
    self._memories: dict[str, SharedMemory] = {}

  def unpack(self, batch: SlotBatch | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns copies of a batch's arrays, and frees its slot.

    Batches that went through grain are copied too: arrays in its shared memory do not outlive the
    workers safely, and jax would alias them on CPU.
    """
    if not isinstance(batch, SlotBatch):
      return {name: np.array(value) for name, value in batch.items()}
    if batch.memory not in self._memories:
      try:
        self._memories[batch.memory] = SharedMemory(batch.memory)
      except FileNotFoundError as error:
        raise RuntimeError(
          f"the shared memory {batch.memory} of a data worker is gone: something removed it from"
          f" {_MOUNT}, such as a script that cleans up there. Run the same command again: a run"
          " resumes from its last checkpoint"
        ) from error
    memory = self._memories[batch.memory]
    arrays = {
      name: _view(memory, shape, dtype, first).copy()
      for name, shape, dtype, first in batch.layout()
    }
    _view(memory, (), "<i8", 0)[...] = batch.number + 1
    return arrays

  def close(self) -> None:
    """Deletes the shared memory; the workers must have ended."""
    while self._memories:
      _, memory = self._memories.popitem()
      memory.close()
      with contextlib.suppress(FileNotFoundError):  # something else removed it
        memory.unlink()
