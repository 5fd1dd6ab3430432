"""The values that were made or used last, within a bounded size."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


# cachetools.LRUCache has no lock, refuses a value larger than its capacity, and pickles its values.
class LRUCache(Generic[Key, Value]):
  """Makes values on first use, and drops the least recently used ones beyond a capacity.

  The value used last always stays, however large it is. Threads make different values at the same
  time, and wait for one that another thread is making. A copy that was pickled starts empty,
  because open files cannot be pickled.

  Args:
    make: takes a key, returns (value, size of the value).
    capacity: the largest sum of sizes, in the unit of these sizes.
  """

  def __init__(self, make: Callable[[Key], tuple[Value, int]], *, capacity: int):
    self._make, self._capacity = make, capacity
    self._clear()

  def __getitem__(self, key: Key) -> Value:
    with self._lock:
      if key in self._values:
        self._values.move_to_end(key)
        return self._values[key][0]
      turn = self._turns.setdefault(key, threading.Lock())
    with turn:
      with self._lock:
        if key in self._values:  # another thread made it in the meantime
          self._values.move_to_end(key)
          return self._values[key][0]
      try:
        made = self._make(key)
        with self._lock:
          self._keep(key, made)
      finally:
        with self._lock:
          self._turns.pop(key, None)
    return made[0]

  def _keep(self, key: Key, made: tuple[Value, int]) -> None:
    """Adds a value, and drops old ones."""
    if key in self._values:  # made twice, after an error in another thread
      self._used -= self._values.pop(key)[1]
    self._values[key] = made
    self._used += made[1]
    while self._used > self._capacity and len(self._values) > 1:
      self._used -= self._values.popitem(last=False)[1][1]

  def __getstate__(self) -> dict[str, Any]:
    return dict(_make=self._make, _capacity=self._capacity)

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._clear()

  def _clear(self) -> None:
    self._values: collections.OrderedDict[Key, tuple[Value, int]] = collections.OrderedDict()
    self._turns: dict[Key, threading.Lock] = {}  # of the values that are being made
    self._used = 0
    self._lock = threading.Lock()
