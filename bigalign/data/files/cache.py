"""What was opened or read last, in a bounded room."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
  """Values made on first use; the least recently used go when their sizes exceed the room.

  The last one always stays, however large. Pickles as empty: open files do not travel.

  make  key → (value, its size)
  """

  def __init__(self, make: Callable[[Any], tuple[Any, int]], *, room: int):
    self._make, self._room = make, room
    self._clear()

  def __getitem__(self, key: Hashable) -> Any:
    with self._lock:
      if key not in self._values:
        self._values[key] = self._make(key)
        self._used += self._values[key][1]
        while self._used > self._room and len(self._values) > 1:
          self._used -= self._values.popitem(last=False)[1][1]
      self._values.move_to_end(key)
      return self._values[key][0]

  def __getstate__(self) -> dict[str, Any]:
    return dict(_make=self._make, _room=self._room)

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._clear()

  def _clear(self) -> None:
    self._values: collections.OrderedDict[Hashable, tuple[Any, int]] = collections.OrderedDict()
    self._used = 0
    self._lock = threading.Lock()
