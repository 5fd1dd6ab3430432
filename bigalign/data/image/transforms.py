"""uint8 [H, W, 3] → uint8 [S, S, 3]: random views for training, exact ones for evaluation.

Pixels stay uint8; the model normalises them on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image

from bigalign.data.image import augment
from bigalign.options import Call, Component

_kornia: Any
try:
  from kornia_rs import imgproc as _kornia
except ImportError:  # no wheel for this platform: Pillow differs from it by at most 2 levels
  _kornia = None

_BICUBIC = Image.Resampling.BICUBIC
IMAGE_AND_DRAWS = ("image", "rng")  # what an augmentation gets besides its options
# Below this output size kornia's fixed cost eats what its kernel saves.
_KORNIA_FROM = 96
# Pixels of an image between two steps of a resize. A photo stays far below; a line of a million
# pixels would take gigabytes.
_MOST_BETWEEN = 1 << 26


def train_image(
  image: np.ndarray,
  rng: np.random.Generator,
  *,
  size: int | Callable[[int, int], tuple[int, int]],
  crop: str = "random_resized",
  scale: tuple[float, float] = (0.9, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  flip: float = 0.0,
  rotate: float = 0.0,
  shift: float = 0.0,
  rand_augment: Annotated[Component | None, Call(augment.rand_augment, IMAGE_AND_DRAWS)] = None,
  color_jitter: Annotated[Component | None, Call(augment.color_jitter, IMAGE_AND_DRAWS)] = None,
  grayscale: float = 0.0,
) -> np.ndarray:
  """A random view of an image.

  The steps follow the order of the arguments and draw from `rng` only if they are on. Rotation and
  shift fill uncovered pixels with the colour of the top left pixel.

  Args:
    image: uint8 [H, W, 3].
    rng: the random numbers of this sample.
    size: pixels per side of the view; or a function from (height, width) of the box to those of the
      view, which keeps the aspect of the box.
    crop: "random_resized": a box of `scale` times the area and an aspect within `ratio`, as
      torchvision draws it; "center": the middle square; "squash": the whole image;
      "evaluation": the view of evaluation, as config.data.resize and resize_edge say.
    scale: smallest and largest share of the area of a random box.
    ratio: smallest and largest aspect (width / height) of a random box; with config.data.naflex,
      relative to the aspect of the image.
    flip: probability of a mirror image; off by default, because it mirrors text too.
    rotate: the angle is uniform in [-rotate, rotate] degrees.
    shift: the translation is uniform in [-shift, shift] of the side, in both directions.
    rand_augment: RandAugment, {} for its defaults; None for none.
    color_jitter: random brightness, contrast, saturation and hue; None for none.
    grayscale: probability of a view without colours.

  Returns:
    uint8 [size, size, 3].

  Raises:
    ValueError: for an unknown `crop`.
  """
  height, width = image.shape[:2]
  if callable(size):
    ratio = (ratio[0] * width / height, ratio[1] * width / height)
  box = _box(height, width, rng, crop=crop, scale=scale, ratio=ratio)
  image = _natural(image, box, size) if callable(size) else _resize(image, box, size)
  if rotate or shift:
    image = _move(image, rng, rotate=rotate, shift=shift)
  if flip and rng.random() < flip:
    image = image[:, ::-1]
  if rand_augment is not None:
    image = rand_augment.make(image, rng)
  if color_jitter is not None:
    image = color_jitter.make(image, rng)
  if grayscale:
    image = augment.to_grayscale(image, rng, probability=grayscale)
  return image


class Part(NamedTuple):
  """The part of an image that a view shows, in pixels of the image.

  Args:
    top, left, box_height, box_width: of the part.
    height, width: of the image.
    mirrored: whether left and right are exchanged.
  """

  top: int
  left: int
  box_height: int
  box_width: int
  height: int
  width: int
  mirrored: bool


def part_of_view(
  height: int,
  width: int,
  rng: np.random.Generator,
  *,
  crop: str = "random_resized",
  scale: tuple[float, float] = (0.9, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  flip: float = 0.0,
  **_: Any,
) -> Part:
  """What `train_image` shows of an image, without rotation and shift.

  Args:
    height: pixels of the image.
    width: pixels of the image.
    rng: in the state in which `train_image` gets it; it draws as that does.
    crop, scale, ratio, flip: as of `train_image`.
  """
  box = _box(height, width, rng, crop=crop, scale=scale, ratio=ratio)
  return Part(*box, height, width, bool(flip and rng.random() < flip))


def _box(
  height: int,
  width: int,
  rng: np.random.Generator,
  *,
  crop: str,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """(top, left, height, width) of what a crop keeps."""
  if crop == "random_resized":
    return _random_box(rng, height=height, width=width, scale=scale, ratio=ratio)
  if crop == "center":
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side
  if crop in ("squash", "evaluation"):  # the latter is size x size already
    return 0, 0, height, width
  raise ValueError(
    f"Unknown crop {crop!r}; known: 'random_resized', 'center', 'squash', 'evaluation'"
  )


def shrink(
  height: int,
  width: int,
  *,
  size: int,
  crop: str = "random_resized",
  scale: tuple[float, float] = (0.9, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  natural: bool = False,
  **_: Any,
) -> int:
  """8, 4, 2 or 1: by how much a JPEG may be reduced when it is decoded for `train_image`.

  Every box that can be drawn keeps at least twice the pixels per side of the view, so the DCT cuts
  off only frequencies that the bicubic filter removes anyway.

  Args:
    height: pixels of the image.
    width: pixels of the image.
    size, crop, scale, ratio: as of `train_image`.
    natural: whether the view keeps the aspect of its box; `size` is then that of a square view.
  """
  if crop == "evaluation":  # equal to evaluation to the bit, whose JPEGs are decoded whole
    return 1
  smallest: float = min(height, width)
  if crop == "random_resized":
    side = math.sqrt(height * width * scale[0])
    smallest = min(smallest, side * math.sqrt(ratio[0]), side / math.sqrt(ratio[1]))
    smallest = side if natural else smallest  # both sides are reduced by the same factor
  elif natural and crop == "squash":
    smallest = math.sqrt(height * width)
  return next((factor for factor in (8, 4, 2) if smallest >= 2 * size * factor), 1)


def eval_image(
  image: np.ndarray,
  *,
  size: int,
  resize: str = "squash",
  edge: int | None = None,
  bilinear: bool = False,
  rounding: str = "round",
) -> np.ndarray:
  """An image as evaluation sees it; equal to Pillow's antialiased filters to the bit.

  Args:
    image: uint8 [H, W, 3].
    size: pixels per side of the result.
    resize: "squash": straight to the square, as SigLIP does; "shortest": the shorter edge to
      `edge`, then the centre, as CLIP does; "longest": the longer edge to `size`, then black bars,
      as open_clip offers.
    edge: pixels of the shorter edge; None: `size`. DINOv2 uses 256 for a size of 224.
    bilinear: a bilinear filter instead of a bicubic one, as Hugging Face's ViT.
    rounding: of the offset of the centre: "round" half to even, as torchvision; "floor", as Hugging
      Face.

  Returns:
    uint8 [size, size, 3].

  Raises:
    ValueError: for an unknown `resize` or `rounding`.
  """
  height, width = image.shape[:2]
  pixels = Image.fromarray(image)
  kernel = Image.Resampling.BILINEAR if bilinear else _BICUBIC
  if resize == "squash":
    return np.asarray(pixels.resize((size, size), kernel))
  if resize == "longest":
    ratio = max(height, width) / size  # in this order, so that halves are rounded as in open_clip
    inner = tuple(max(1, round(side / ratio)) for side in (width, height))
    return _padded(pixels.resize(inner, kernel), size)
  if resize != "shortest":
    raise ValueError(f"Unknown resize {resize!r}; known: 'squash', 'shortest', 'longest'")
  if rounding not in ("round", "floor"):
    raise ValueError(f"Unknown rounding {rounding!r}; known: 'round', 'floor'")
  edge = edge or size
  if height < width:
    height, width = edge, int(edge * width / height)
  else:
    height, width = int(edge * height / width), edge
  half = round if rounding == "round" else math.floor
  top, left = half((height - size) / 2), half((width - size) / 2)
  if width * height > _MOST_BETWEEN:  # resize only what the crop keeps
    x, y = pixels.width / width, pixels.height / height
    right, bottom = min((left + size) * x, pixels.width), min((top + size) * y, pixels.height)
    return np.asarray(pixels.resize((size, size), kernel, box=(left * x, top * y, right, bottom)))
  pixels = pixels.resize((width, height), kernel)
  return np.asarray(pixels.crop((left, top, left + size, top + size)))


def _padded(pixels: Image.Image, size: int) -> np.ndarray:
  """In the middle of a black square; the larger half of an odd margin is below and right."""
  square = np.zeros((size, size, 3), np.uint8)
  top, left = (size - pixels.height) // 2, (size - pixels.width) // 2
  square[top : top + pixels.height, left : left + pixels.width] = np.asarray(pixels)
  return square


def _random_box(
  rng: np.random.Generator,
  *,
  height: int,
  width: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """(top, left, height, width) of torchvision's RandomResizedCrop."""
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(10):
    area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
    aspect = math.exp(low + (high - low) * rng.random())
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  # The image is narrower than every ratio asked for: the widest box that fits, in the middle.
  w = min(width, round(height * ratio[1]))
  h = min(height, round(width / ratio[0]))
  w, h = max(w, 1), max(h, 1)
  return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
  top, left, height, width = box
  image = image[top : top + height, left : left + width]
  if height == width == size:
    return image
  # kornia resizes rows first, and ends the process if it finds no memory for them.
  small = size * max(height, width) <= _MOST_BETWEEN
  if _kornia is not None and size >= _KORNIA_FROM and small:
    image = np.ascontiguousarray(image)
    return np.asarray(_kornia.resize(image, (size, size), "bicubic", antialias=True))
  return np.asarray(Image.fromarray(image).resize((size, size), _BICUBIC))


def _natural(
  image: np.ndarray,
  box: tuple[int, int, int, int],
  fit: Callable[[int, int], tuple[int, int]],
) -> np.ndarray:
  """A part of an image in its own aspect; the filter is that of evaluation, bilinear."""
  top, left, height, width = box
  pixels = Image.fromarray(image[top : top + height, left : left + width])
  return np.asarray(pixels.resize(fit(height, width)[::-1], Image.Resampling.BILINEAR))


def _move(
  image: np.ndarray, rng: np.random.Generator, *, rotate: float, shift: float
) -> np.ndarray:
  angle = math.radians(rotate * (2 * rng.random() - 1))
  height, width = image.shape[:2]
  dx, dy = (size * shift * (2 * rng.random() - 1) for size in (width, height))
  cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
  # Pillow wants the map from output to input pixels: back by the shift, then turned about the
  # middle.
  matrix = (
    cos,
    sin,
    x - cos * (x + dx) - sin * (y + dy),
    -sin,
    cos,
    y + sin * (x + dx) - cos * (y + dy),
  )
  moved = Image.fromarray(image).transform(
    (width, height),
    Image.Transform.AFFINE,
    matrix,
    _BICUBIC,
    fillcolor=tuple(image[0, 0].tolist()),
  )
  return np.asarray(moved)
