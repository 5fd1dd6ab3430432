"""Batches out of worker processes through memory that is used again and again.

New shared memory for each batch, which is grain's way, is mapped page by page in both processes;
that takes several times as long as to copy the batch. Here a worker has a few slots, writes its
batches into them in turn, and the program copies them out and gives the slots back. A batch that
finds no slot free, or fits into none, goes grain's way.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

SLOTS = 4  # a worker is done with one batch, two wait, and one is being copied
_HEAD = _ALIGNED = 64  # bytes; the head counts the batches that were copied out
_MOUNT = "/dev/shm"


@dataclasses.dataclass(frozen=True)
class Packed:
  """Where a batch lies: the `number`-th of a worker's memory; {name: (shape, dtype)} in order."""

  memory: str
  number: int
  size: int  # bytes of a slot
  arrays: dict[str, tuple[tuple[int, ...], str]]

  def places(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """(name, shape, dtype, first byte) of each array."""
    first = _HEAD + self.number % SLOTS * self.size
    for (name, (shape, dtype)), length in zip(self.arrays.items(), _lengths(self.arrays.values())):
      yield name, shape, dtype, first
      first += length


def _lengths(arrays: Iterable[tuple[tuple[int, ...], str]]) -> list[int]:
  """Bytes of each, up to where the next one begins."""
  sizes = (math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
  return [-(-size // _ALIGNED) * _ALIGNED for size in sizes]


def _view(memory: SharedMemory, shape: tuple[int, ...], dtype: str, first: int) -> np.ndarray:
  return np.ndarray(shape, dtype, memory.buf, first)


_SENDING: list[Sender] = []  # the one whose batch is being made


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """numpy.empty for the largest array of a batch; where there is a slot for the batch, in there."""
  for sender in _SENDING:
    return sender.reserve(shape, np.dtype(dtype))
  return np.empty(shape, dtype)


class Sender:
  """Batches, each as `Packed` where a slot is free; for one worker process, in order."""

  def __init__(self, batches: Any):
    self._batches = batches
    self._memory: SharedMemory | None = None
    self._size = self._sent = 0
    self._reserved: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self._batches)

  def __repr__(self) -> str:
    return repr(self._batches)

  def __getitem__(self, k: int) -> Packed | dict[str, np.ndarray]:
    _SENDING.append(self)
    try:
      made: dict[str, np.ndarray] = self._batches[k]
    finally:
      _SENDING.clear()
      reserved, self._reserved = self._reserved, None
    # What was reserved lies where a slot begins.
    batch = dict(sorted(made.items(), key=lambda item: item[1] is not reserved))
    arrays = {name: (x.shape, x.dtype.str) for name, x in batch.items()}
    size = sum(_lengths(arrays.values()))
    if not self._size:  # once: where there was no room there will be none
      self._memory, self._size = _make(size), size
    if self._memory is None or not self._fits(self._memory, size):
      # Not the slot's own memory, which the next batch may take.
      return {name: x.copy() if x is reserved else x for name, x in batch.items()}
    packed = Packed(self._memory.name, self._sent, self._size, arrays)
    for name, shape, dtype, first in packed.places():
      if batch[name] is not reserved:
        _view(self._memory, shape, dtype, first)[...] = batch[name]
    self._sent += 1
    return packed

  def reserve(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Where the next slot begins, if it is free and this fits; once a batch."""
    memory, size = self._memory, math.prod(shape) * dtype.itemsize
    if memory is None or self._reserved is not None or not self._fits(memory, size):
      return np.empty(shape, dtype)
    first = _HEAD + self._sent % SLOTS * self._size
    self._reserved = _view(memory, shape, dtype.str, first)
    return self._reserved

  def _fits(self, memory: SharedMemory, size: int) -> bool:
    """Whether the next slot is free and takes so many bytes."""
    return size <= self._size and self._sent - int(_view(memory, (), "<i8", 0)) < SLOTS


def _make(size: int) -> SharedMemory | None:
  """Memory for SLOTS batches of a size, none of which was copied out; None if there is no room."""
  memory = SharedMemory(create=True, size=_HEAD + SLOTS * size)
  place = os.path.join(_MOUNT, memory.name)
  if os.path.exists(place):  # where no room is left, the one that writes is killed; so take it now
    descriptor = os.open(place, os.O_RDWR)
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
  """The program's side, of all its workers."""

  def __init__(self) -> None:
    self._memories: dict[str, SharedMemory] = {}

  def unpack(self, found: Packed | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies of a batch's arrays; its slot is free then.

    Copies too of what went grain's way: arrays in shared memory outlive the workers badly, and jax
    would alias them on CPU.
    """
    if not isinstance(found, Packed):
      return {name: np.array(value) for name, value in found.items()}
    if found.memory not in self._memories:
      self._memories[found.memory] = SharedMemory(found.memory)
    memory = self._memories[found.memory]
    batch = {
      name: _view(memory, shape, dtype, first).copy()
      for name, shape, dtype, first in found.places()
    }
    _view(memory, (), "<i8", 0)[...] = found.number + 1
    return batch

  def close(self) -> None:
    """Gives the memory back; the workers must have ended."""
    while self._memories:
      _, memory = self._memories.popitem()
      memory.close()
      memory.unlink()
