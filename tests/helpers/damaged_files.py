"""What the tests of damaged files share."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from helpers.small_checkpoints import IDS, PICTURE

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


def shapes_of(checkpoint, picture=PICTURE):
  """Of its towers; `picture` is an example of the images."""
  shapes = {}
  for side, example in (("image", picture), ("text", IDS)):
    if side not in checkpoint.model:
      continue
    given = dict(checkpoint.model[side])
    tower = TOWERS[given.pop("name")](**given).build()
    made = jax.eval_shape(tower.init, jax.random.key(0), example)["params"]
    shapes |= tree.flatten(made, f"{side}_tower/")
  return shapes


def members(file):
  """{name: bytes} of an npz."""
  with zipfile.ZipFile(file) as archive:
    return {x.filename: archive.read(x) for x in archive.infolist()}


def put_members(file, content):
  """The inverse of `members`."""
  with zipfile.ZipFile(file, "w") as archive:
    for name, data in content.items():
      archive.writestr(name, data)


def array_bytes(descr, shape, data=b"", columns=False):
  """An npy file whose header need not be true."""
  text = repr(dict(descr=descr, fortran_order=columns, shape=shape)).encode()
  return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def untrue(true, trap):
  """npy files in the place of a float32 array: with lies, cut, or objects that make `trap`."""
  harm, data, objects = pickle.dumps(Harm(trap)), true.tobytes(), io.BytesIO()
  np.save(objects, np.array([Harm(trap)], object), allow_pickle=True)
  whole = array_bytes("<f4", true.shape, data)
  return [
    objects.getvalue(),
    array_bytes("|O", true.shape, harm),
    *(array_bytes("<f4", x, data) for x in ((HUGE,), (2**62, 2**62), (-1, 4), (1.5,))),
    array_bytes("<f4", true.shape, data[:-4]),
    array_bytes("<f4", true.shape, data + b"\0"),
    array_bytes("<f4", (*true.shape, 1), data),
    array_bytes("<i4", true.shape, data),
    array_bytes([("a", "<f4")], true.shape, data),
    array_bytes(",f4,O", true.shape, data),
    whole[:20],
    b"",
    b"\x93NUMPY\x09\x00",
    harm,
    b"\x93NUMPY\x02\x00" + b"\xff" * 4 + whole[10:],
    b"\x93NUMPY\x01\x00\x20\x00__import__('os').mkdir('harm')  " + data,
  ]


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
