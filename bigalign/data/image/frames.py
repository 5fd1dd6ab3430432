"""Samples of several images: which of their frames are seen: config.data.frames."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigalign.data.image import decode
from bigalign.data.samples.rejects import Rejected


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameOptions:
  """Several images of a sample, whose embeddings the model averages: frame pooling of ViFi-CLIP.

  Args:
    count: F, the frames of a sample that the model sees: its images are divided into F equal parts
      in their order, and training draws one of each, evaluation takes the middle one. Of a sample
      with fewer images some are seen several times. https://arxiv.org/abs/2212.03640
  """

  count: int = 8

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f"config.data.frames.count={self.count}: at least 1")


def numbers(available: int, count: int, rng: np.random.Generator | None = None) -> list[int]:
  """Which of the images of a sample are seen, in their order.

  Args:
    available: images of the sample.
    count: F, frames that are seen.
    rng: draws one of each part; None: the middle ones.

  >>> numbers(16, 4), numbers(3, 6)
  ([2, 6, 10, 14], [0, 0, 1, 1, 2, 2])
  """
  inside = np.full(count, 0.5) if rng is None else rng.random(count)
  places = np.floor((np.arange(count) + inside) * available / count).astype(int)
  return [int(x) for x in np.minimum(places, available - 1)]


def read(
  data: bytes | np.ndarray | Sequence[bytes | np.ndarray],
  count: int,
  rng: np.random.Generator | None = None,
  **options: Any,
) -> list[np.ndarray]:
  """Decodes the frames of a sample that are seen.

  Args:
    data: an animation or another image, or the images of the sample in their order; arrays are
      uint8 [H, W, 3], or [T, H, W, 3] for T images.
    count: F.
    rng: of `numbers`.
    **options: of decode.decode.

  Returns:
    F images, uint8 [H, W, 3] each.

  Raises:
    Rejected: if there is none, or one of those that are seen is not a whole image.
  """
  if isinstance(data, np.ndarray) and data.ndim == 4:
    data = list(data)
  if isinstance(data, bytes | np.ndarray):
    return decode.decode_frames(data, lambda n: numbers(n, count, rng), **options)
  if not data:
    raise Rejected("no_image", "the sample has no frame")
  if len(data) == 1:  # which may be an animation
    return read(data[0], count, rng, **options)
  chosen = numbers(len(data), count, rng)
  decoded = {i: decode.decode(data[i], **options) for i in {*chosen}}
  return [decoded[i] for i in chosen]


def same_view(
  view: Callable[[np.ndarray, np.random.Generator], np.ndarray],
  images: Sequence[np.ndarray],
  rng: np.random.Generator,
) -> np.ndarray:
  """[F, ...]: the view of each frame by the same draws, those that a single image would have."""
  draws = [rng, *(copy.deepcopy(rng) for _ in images[1:])]
  return np.stack([view(image, own) for image, own in zip(images, draws)])
