"""What the tests of damaged files share."""

from __future__ import annotations

import os
import tracemalloc

import jax
import pytest
from checkpoints import IDS, PICTURE

from bigalign import tree, weights
from bigalign.towers import TOWERS

HUGE = 2**40
PYTHON = 100_000  # bytes that Python itself takes to look at the names of a file


class Harm:
  """Makes a folder when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def shapes_of(checkpoint):
  """Of both towers."""
  shapes = {}
  for side, example in (("image", PICTURE), ("text", IDS)):
    given = dict(checkpoint.model[side])
    tower = TOWERS[given.pop("name")](**given)
    made = jax.eval_shape(tower.init, jax.random.key(0), example)["params"]
    shapes |= tree.flatten(made, f"{side}_tower/")
  return shapes


def refused(path, shapes=None):
  """The message with which reading it all is refused."""
  size = sum(x.stat().st_size for x in (path.iterdir() if path.is_dir() else [path]))
  tracemalloc.start()
  try:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
      checkpoint = weights.describe(path)
      checkpoint.load(shapes or shapes_of(checkpoint))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 2 * size + PYTHON, (peak, size, str(error.value))
  return str(error.value)
