"""Pictures as patches that keep the aspect: SigLIP 2's NaFlex, https://arxiv.org/abs/2502.14786."""

from __future__ import annotations

import math

import einops
import numpy as np
from PIL import Image


def grid(height: int, width: int, *, patch: int, most: int) -> tuple[int, int]:
  """(rows, columns) of the largest picture of this aspect with at most `most` patches.

  Both sides are rounded up to whole patches, so the scale is found by halving, to 1e-5.
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
  """[H, W, 3] uint8 → patches [most, patch * patch * 3] uint8, mask [most] bool, shape [2] int32.

  True is a patch; shape is (rows, columns). Bilinear, antialiased, by Pillow.
  """
  rows, cols = grid(*image.shape[:2], patch=patch, most=most)
  pixels = Image.fromarray(image).resize((cols * patch, rows * patch), Image.Resampling.BILINEAR)
  flat = einops.rearrange(np.asarray(pixels), "(h p) (w q) c -> (h w) (p q c)", p=patch, q=patch)
  padded = np.zeros((most, flat.shape[1]), np.uint8)
  padded[: len(flat)] = flat
  return padded, np.arange(most) < len(flat), np.asarray([rows, cols], np.int32)
