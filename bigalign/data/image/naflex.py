"""Images as patches that keep the aspect ratio: NaFlex of SigLIP 2, https://arxiv.org/abs/2502.14786."""

from __future__ import annotations

import math

import einops
import numpy as np
from PIL import Image


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


def patches(
  image: np.ndarray, *, patch: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Resizes an image (Pillow, bilinear, antialiased) and cuts it into patches.

  Args:
    image: [H, W, 3] uint8.
    patch: side of a patch in pixels.
    most: patches.

  Returns:
    patches [most, patch * patch * 3] uint8, padded with zeros; mask [most] bool, True for a patch;
    shape [2] int32: (rows, columns).
  """
  rows, cols = grid(*image.shape[:2], patch=patch, most=most)
  pixels = Image.fromarray(image).resize((cols * patch, rows * patch), Image.Resampling.BILINEAR)
  flat = einops.rearrange(np.asarray(pixels), "(h p) (w q) c -> (h w) (p q c)", p=patch, q=patch)
  padded = np.zeros((most, flat.shape[1]), np.uint8)
  padded[: len(flat)] = flat
  return padded, np.arange(most) < len(flat), np.asarray([rows, cols], np.int32)
