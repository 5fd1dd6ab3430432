"""Makes towers/preprocess/: images and what other libraries' preprocessing makes of them.

After a change here, run: python tests/expected/make_images.py

Pillow does the resizing, as it does in Hugging Face's image processors and in open_clip; sizes,
margins and padding follow their rules. Outputs are [3, size, size], normalised.
"""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
from PIL import Image

FOLDER = pathlib.Path(__file__).parent / "towers/preprocess"
SIZE, DINOV2_RESIZE, PATCH, MOST_PATCHES = 20, 23, 5, 12
# The first has an uneven margin after the resize, where floor and round differ.
SHAPES = [(45, 62), (70, 33), (20, 20), (13, 19)]
STATISTICS = dict(
  half=([0.5] * 3, [0.5] * 3),
  clip=([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
  imagenet=([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def resize(image, height, width, method=BICUBIC):
  return np.asarray(Image.fromarray(image).resize((width, height), method))


def normalised(image, statistics):
  mean, std = (np.array(x) for x in STATISTICS[statistics])
  return ((image / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)


def shortest_edge(image, size):
  """The shorter side becomes `size`; the other is rounded down."""
  height, width = image.shape[:2]
  short = min(height, width)
  return resize(image, int(size * height / short), int(size * width / short))


def crop(image, size, margin):
  """The middle; margin: how half of an odd difference is rounded."""
  top, left = (margin((n - size) / 2) for n in image.shape[:2])
  return image[top : top + size, left : left + size]


def longest_edge(image, size):
  """open_clip: the longer side becomes `size`, the rest is black, more of it at the end."""
  height, width = image.shape[:2]
  ratio = max(height, width) / size
  image = resize(image, round(height / ratio), round(width / ratio))
  before = [(size - n) // 2 for n in image.shape[:2]]
  after = [(size - n + 1) // 2 for n in image.shape[:2]]
  return np.pad(image, [*zip(before, after), (0, 0)])


def naflex_size(height, width, patch, most):
  """Hugging Face's Siglip2: the largest scale, by bisection, with at most so many patches."""

  def scaled(scale):
    return tuple(max(patch, math.ceil(n * scale / patch) * patch) for n in (height, width))

  low, high = 1e-6, 100.0
  while high - low >= 1e-5:
    scale = (low + high) / 2
    h, w = scaled(scale)
    low, high = (scale, high) if (h // patch) * (w // patch) <= most else (low, scale)
  return scaled(low)


def naflex(image, patch, most):
  """(patches flattened as row, column, channel; mask; rows and columns), padded with zeros."""
  height, width = naflex_size(*image.shape[:2], patch, most)
  x = normalised(resize(image, height, width, BILINEAR), "half").transpose(1, 2, 0)
  grid = (height // patch, width // patch)
  x = x.reshape(grid[0], patch, grid[1], patch, 3).transpose(0, 2, 1, 3, 4)
  x = x.reshape(grid[0] * grid[1], -1)
  mask = (np.arange(most) < len(x)).astype(np.int64)
  return np.pad(x, [(0, most - len(x)), (0, 0)]), mask, np.array(grid)


def every_output(image, size=SIZE, edge=DINOV2_RESIZE, patch=PATCH, most=MOST_PATCHES):
  """{name: array} for one image [height, width, 3] uint8."""
  squashed = normalised(resize(image, size, size), "half")
  short = shortest_edge(image, size)
  values, mask, shape = naflex(image, patch, most)
  return dict(
    oc_squash=squashed,
    hf_siglip=squashed,
    hf_vit=normalised(resize(image, size, size, BILINEAR), "half"),
    oc_shortest=normalised(crop(short, size, round), "clip"),
    hf_clip=normalised(crop(short, size, math.floor), "clip"),
    hf_dinov2=normalised(crop(shortest_edge(image, edge), size, math.floor), "imagenet"),
    oc_longest=normalised(longest_edge(image, size), "clip"),
    hf_siglip2_pixel_values=values,
    hf_siglip2_pixel_attention_mask=mask,
    hf_siglip2_spatial_shapes=shape,
  )


def main():
  rng, arrays = np.random.default_rng(11), {}
  for i, shape in enumerate(SHAPES):
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    arrays[f"image_{i}"] = image
    arrays |= {f"out_{name}_{i}": x for name, x in every_output(image).items()}
  grey = rng.integers(0, 256, (31, 26), dtype=np.uint8)
  arrays["gray_image"] = grey
  arrays["out_oc_squash_gray"] = every_output(np.stack([grey] * 3, -1))["oc_squash"]
  FOLDER.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(FOLDER / "io.npz", **arrays)
  about = dict(size=SIZE, dinov2_resize=DINOV2_RESIZE)
  (FOLDER / "meta.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
  main()
