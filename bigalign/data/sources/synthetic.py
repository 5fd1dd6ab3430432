"""Random images with captions, for benchmarks without I/O: "synthetic:1000000"."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints

_SHIFTS = 64  # in each direction, of one plane of noise
_SEED = 0xF6B97E3C1935ADE9  # decides the pixels


@functools.cache
def _plane(size: int) -> np.ndarray:
  """uint8 [size + _SHIFTS, size + _SHIFTS, 3]."""
  generator = np.random.Generator(np.random.Philox(key=np.array([_SEED, size], np.uint64)))
  return generator.integers(0, 256, (size + _SHIFTS, size + _SHIFTS, 3), np.uint8)


class Synthetic:
  """Random images. Nothing is read or decoded: each costs a slice of an array.

  4,096 images differ. Sample i has the caption "synthetic picture number i", and no label.

  Args:
    count: samples, as the text after "synthetic:"; 10,000 if it is empty.
    size: pixels of a side. Crops and resizing follow as for any image.

  Raises:
    ValueError: if one of them is not a number above 0.

  Example:
    >>> source = Synthetic("1000000", size=32)
    >>> source[7]["key"], source[7]["image"].shape
    ('synthetic/7', (32, 32, 3))
  """

  def __init__(self, count: str = "", *, size: int = 256):
    if not (count or "1").isdecimal() or int(count or 1) < 1 or size < 1:
      raise ValueError(
        f"source 'synthetic:{count}' of size {size}: write how many samples,"
        " 'synthetic:1000000', and pixels above 0"
      )
    self._count, self._size = int(count or 10_000), size
    self.fingerprint = fingerprints.of_names("synthetic", str(self._count), str(size))

  def __repr__(self) -> str:
    return f"Synthetic({self._count}, size={self._size})"

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i: int) -> dict[str, Any]:
    if not 0 <= i < self._count:
      raise IndexError(f"{self!r} has {self._count} samples; asked for {i}")
    top, left = divmod(i % _SHIFTS**2, _SHIFTS)
    image = _plane(self._size)[top : top + self._size, left : left + self._size]
    return dict(
      image=image, key=f"synthetic/{i}", label=-1, captions=(f"synthetic picture number {i}",)
    )
