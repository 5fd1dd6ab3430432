"""Images as patches that keep the aspect ratio: NaFlex of SigLIP 2, https://arxiv.org/abs/2502.14786."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops
import numpy as np
from PIL import Image

# The fields of a batch that hold images, in the order of Patches.
FIELDS = ("image", "image_mask", "image_shapes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaflexOptions:
  """Images as patches of their own aspect ratio instead of squares.

  Args:
    lengths: numbers of patches of an image. Each step of training draws one of them, which all its
      images share: an image is resized to at most so many patches, also enlarged. One program is
      compiled for each.
    weights: how often each length is drawn, relative to the others; None: all equally.
    tokens_per_batch: T, patches and text tokens of a global batch: a batch of length n has T / (n +
      text tokens) pairs, rounded down to a multiple of `multiple`, at most config.batch_size. None:
      each batch has config.batch_size pairs.
    multiple: see tokens_per_batch. What mesh.data x mesh.fsdp x microbatches must divide.
    eval_length: patches of an image in evaluation, `bigalign embed`, export and the Python API;
      None: the largest of `lengths`.
    patch: pixels per side of a patch, as config.model.image.patch.
  """

  lengths: Sequence[int] = (128, 256, 576)
  weights: Sequence[float] | None = None
  tokens_per_batch: int | None = None
  multiple: int = 8
  eval_length: int | None = None
  patch: int = 16

  def __post_init__(self) -> None:
    where = "config.data.naflex"
    if not self.lengths or min(self.lengths) < 1 or len({*self.lengths}) < len(self.lengths):
      raise ValueError(
        f"{where}.lengths={tuple(self.lengths)}: one or more different numbers of patches"
      )
    if self.weights is not None and (
      len(self.weights) != len(self.lengths) or not all(0 < w < math.inf for w in self.weights)
    ):
      raise ValueError(
        f"{where}.weights={tuple(self.weights)}: one number above 0 for each of the"
        f" {len(self.lengths)} lengths"
      )
    for name in ("tokens_per_batch", "multiple", "eval_length", "patch"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{where}.{name}={value}: at least 1")

  @property
  def length(self) -> int:
    """The number of patches of an image in evaluation."""
    return self.eval_length or max(self.lengths)

  @property
  def side(self) -> int:
    """Pixels per side of a square image with more patches than `length`."""
    return self.patch * (math.isqrt(self.length) + 1)

  def fit(self, height: int, width: int) -> tuple[int, int]:
    """(H, W) in pixels to which an image of this size is resized."""
    rows, cols = grid(height, width, patch=self.patch, most=self.length)
    return rows * self.patch, cols * self.patch


class Patches(NamedTuple):
  """Images as patches; of one image without the first axis. Arrays of NumPy or JAX.

  pixels: [B, N, p * p * C], padded with zeros. mask: [B, N] bool, True for a patch.
  shapes: [B, 2] int32, rows and columns.
  """

  pixels: Any
  mask: Any
  shapes: Any


def grid(height: int, width: int, *, patch: int, most: int) -> tuple[int, int]:
  """Returns (rows, columns) of the largest image of this aspect ratio with at most `most` patches.

  Both sides are rounded up to full patches, so the scale is found by bisection, to 1e-5.

  Args:
    height: of the image in pixels.
    width: of the image in pixels.
    patch: side of a patch in pixels.
    most: patches.
  """

  def scaled(scale: float) -> tuple[int, int]:
    rows, cols = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
    return rows, cols

  low, high = 1e-6, 100.0
  while high - low >= 1e-5:
    scale = (low + high) / 2
    low, high = (scale, high) if math.prod(scaled(scale)) <= most else (low, scale)
  return scaled(low)


def batch_size(tokens: int, length: int, text_length: int, *, multiple: int = 8) -> int:
  """The largest multiple of `multiple` pairs that have at most `tokens` tokens, but at least one.

  Args:
    tokens: of a batch.
    length: patches of an image.
    text_length: tokens of a text.
    multiple: of the result.
  """
  return max(1, tokens // (length + text_length) // multiple) * multiple


def cut(image: np.ndarray, *, patch: int, most: int) -> Patches:
  """Cuts an image whose sides are multiples of a patch.

  Args:
    image: uint8 [H, W, 3].
    patch: side of a patch in pixels.
    most: N, patches with padding.
  """
  rows, cols = (side // patch for side in image.shape[:2])
  flat = einops.rearrange(image, "(h p) (w q) c -> (h w) (p q c)", p=patch, q=patch)
  padded = np.zeros((most, flat.shape[1]), np.uint8)
  padded[: len(flat)] = flat
  return Patches(padded, np.arange(most) < len(flat), np.asarray([rows, cols], np.int32))


def patches(image: np.ndarray, *, patch: int, most: int) -> Patches:
  """Resizes a whole image (Pillow, bilinear, antialiased) and cuts it into patches.

  Args:
    image: uint8 [H, W, 3].
    patch: side of a patch in pixels.
    most: N, patches with padding.
  """
  rows, cols = grid(*image.shape[:2], patch=patch, most=most)
  size = (cols * patch, rows * patch)
  pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
  return cut(pixels, patch=patch, most=most)


def joined(one: Patches, *, patch: int) -> np.ndarray:
  """uint8 [H, W, 3] of the patches of an image: the inverse of `cut`."""
  rows, cols = (int(n) for n in one.shapes)
  return einops.rearrange(
    one.pixels[: rows * cols], "(h w) (p q c) -> (h p) (w q) c", h=rows, p=patch, q=patch
  )


def to_fields(image: Any) -> dict[str, Any]:
  """The fields of a batch, or of one sample, that hold images: arrays or Patches."""
  return dict(zip(FIELDS, image)) if isinstance(image, Patches) else {FIELDS[0]: image}


def of_fields(batch: Mapping[str, Any]) -> Any:
  """The images of a batch as the model takes them: an array, or Patches; None for texts alone."""
  if FIELDS[1] not in batch:
    return batch.get(FIELDS[0])
  return Patches(*(batch[name] for name in FIELDS))


def only_images(batch: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a batch that hold images."""
  return {name: batch[name] for name in FIELDS if name in batch}
