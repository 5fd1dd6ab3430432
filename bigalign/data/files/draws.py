"""Which of many things are looked at, where looking at all would take too long."""

from __future__ import annotations

import random


def draw(count: int, most: int) -> list[int]:
  """Returns `most` numbers below `count`, ascending; all of them if there are not more.

  They are drawn at random, because data are often periodic: at even strides, every one of them may
  be an exception, or none. They are the same in each process and after each restart.
  """
  return sorted(random.Random(0).sample(range(count), min(count, most)))
