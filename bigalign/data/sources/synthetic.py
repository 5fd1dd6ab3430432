"""Noise with captions, to measure training without a disk: "synthetic:1000000"."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints
from bigalign.data.order.order import philox

_SHIFTS = 64  # in each direction; as many places squared of one plane of noise


@functools.cache
def _plane(size: int) -> np.ndarray:
  """uint8 [size + _SHIFTS, size + _SHIFTS, 3]."""
  return philox(0, size).integers(0, 256, (size + _SHIFTS, size + _SHIFTS, 3), np.uint8)


class Synthetic:
  """Pictures that are nobody's: nothing is read or decoded, each costs a slice of noise.

  count  samples, as the text behind "synthetic:"
  size   pixels of a side; crops and resizing follow as for any picture

  4,096 pictures differ; sample i has the caption "synthetic picture number i", and no label.
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
