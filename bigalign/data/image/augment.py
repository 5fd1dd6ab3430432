"""Random colours and RandAugment for transforms.train_image: uint8 [H, W, 3] → uint8 [H, W, 3]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from bigalign import tree

_LARGEST_MAGNITUDE = 30


def rand_augment(
  image: np.ndarray,
  rng: np.random.Generator,
  *,
  num_ops: int = 2,
  magnitude: float = 9.0,
  operations: Sequence[str] = (),
) -> np.ndarray:
  """Applies random operations to an image: RandAugment, https://arxiv.org/abs/1909.13719.

  Args:
    image: [H, W, 3] uint8.
    rng: draws the operations and their signs.
    num_ops: how many operations are drawn.
    magnitude: 0 to 30 on torchvision's scale. 30 shears by 0.3 and rotates by 30 degrees, as 10
      does on the scale of timm and the paper. Pixels from outside of the image are black.
    operations: names of OPERATIONS that are drawn from; (): all of them.

  Returns:
    [H, W, 3] uint8.

  Raises:
    ValueError: for an option outside of its range.
  """
  where = "config.data.augment.rand_augment"
  if num_ops < 1:
    raise ValueError(
      f"{where}.num_ops={num_ops}: it must be at least 1; leave rand_augment out for none"
    )
  if not 0 <= magnitude <= _LARGEST_MAGNITUDE:
    raise ValueError(f"{where}.magnitude={magnitude}: it must be in 0 to {_LARGEST_MAGNITUDE}")
  pixels, names = Image.fromarray(image), list(operations or OPERATIONS)
  for name in names:
    if name not in OPERATIONS:
      raise ValueError(
        f"{where}.operations: unknown {name!r}.{tree.nearest(name, OPERATIONS)} Known:"
        f" {[*OPERATIONS]}"
      )
  for _ in range(num_ops):
    name = names[rng.integers(len(names))]
    strength = magnitude / _LARGEST_MAGNITUDE
    strength = strength if rng.random() < 0.5 else -strength
    pixels = OPERATIONS[name](pixels, strength)
  return np.asarray(pixels)


def color_jitter(
  image: np.ndarray,
  rng: np.random.Generator,
  *,
  brightness: float,
  contrast: float,
  saturation: float,
  hue: float,
  probability: float = 1.0,
) -> np.ndarray:
  """Changes the colours of an image in random order, like torchvision's ColorJitter.

  Args:
    image: [H, W, 3] uint8.
    rng: draws whether and how.
    brightness: s; the factor is uniform in [max(0, 1 - s), 1 + s].
    contrast: as brightness.
    saturation: as brightness.
    hue: s, at most 0.5; the rotation is uniform in [-s, s] turns.
    probability: of a change.

  Returns:
    [H, W, 3] uint8.

  Raises:
    ValueError: for an option outside of its range.
  """
  where = "config.data.augment.color_jitter"
  strengths = dict(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
  for name, value in strengths.items():
    if value < 0:
      raise ValueError(f"{where}.{name}={value} is negative; 0 does not change it")
  if hue > 0.5:
    raise ValueError(f"{where}.hue={hue}: it must be in 0 to 0.5, half a turn")
  check_probability(probability, f"{where}.probability")
  if rng.random() >= probability:
    return image
  pixels, names = Image.fromarray(image), list(strengths)
  for i in rng.permutation(len(names)):
    name, strength = names[i], strengths[names[i]]
    low = -strength if name == "hue" else max(0.0, 1 - strength)
    high = strength if name == "hue" else 1 + strength
    drawn = low + (high - low) * rng.random()
    if strength:  # the way to HSV and back changes pixels even without a rotation
      pixels = _JITTER[name](pixels, drawn)
  return np.asarray(pixels)


def to_grayscale(image: np.ndarray, rng: np.random.Generator, *, probability: float) -> np.ndarray:
  """Returns the luma (ITU-R 601) in all three channels with this probability, else the image."""
  check_probability(probability, "config.data.augment.grayscale")
  if rng.random() >= probability:
    return image
  return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def check_probability(value: float, where: str) -> None:
  """Raises ValueError unless `value` is a probability; `where` names the option."""
  if not 0 <= value <= 1:
    raise ValueError(f"{where}={value}: a probability is in 0 to 1")


def _scale_brightness(pixels: Image.Image, factor: float) -> Image.Image:
  return ImageEnhance.Brightness(pixels).enhance(factor)


def _scale_contrast(pixels: Image.Image, factor: float) -> Image.Image:
  return ImageEnhance.Contrast(pixels).enhance(factor)


def _scale_saturation(pixels: Image.Image, factor: float) -> Image.Image:
  return ImageEnhance.Color(pixels).enhance(factor)


def _scale_sharpness(pixels: Image.Image, factor: float) -> Image.Image:
  return ImageEnhance.Sharpness(pixels).enhance(factor)


def _turn_hue(pixels: Image.Image, turns: float) -> Image.Image:
  hue, saturation, value = pixels.convert("HSV").split()
  # In Pillow hue 255 equals hue 0, so a turn is 255 steps and not the 256 of uint8.
  turned = (np.asarray(hue, np.int32) + round(255 * turns)) % 255
  hue = Image.fromarray(turned.astype(np.uint8))
  return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _affine(pixels: Image.Image, *matrix: float) -> Image.Image:
  """Applies the first two rows of a matrix from output to input pixels; black outside."""
  return pixels.transform(pixels.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _translate(s: float, side: int) -> int:
  return int(s * side * 150 / 331)  # the paper's 150 pixels of its 331


def _posterize(pixels: Image.Image, s: float) -> Image.Image:
  return ImageOps.posterize(pixels, 8 - round(4 * abs(s)))


def _solarize(pixels: Image.Image, s: float) -> Image.Image:
  # From 256, as in the paper: with torchvision's 255, white becomes black even at magnitude 0.
  return ImageOps.solarize(pixels, 256 * (1 - abs(s)))  # type: ignore[arg-type]


_JITTER: dict[str, Callable[[Image.Image, float], Image.Image]] = {
  "brightness": _scale_brightness,
  "contrast": _scale_contrast,
  "saturation": _scale_saturation,
  "hue": _turn_hue,
}
# {name: function of an image and a strength in [-1, 1]}; the ranges are torchvision's. RandAugment
# draws by the order of this table, so another order changes the augmented images.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
  "identity": lambda x, s: x,
  "shear_x": lambda x, s: _affine(x, 1, 0.3 * s, 0, 0, 1, 0),
  "shear_y": lambda x, s: _affine(x, 1, 0, 0, 0.3 * s, 1, 0),
  "translate_x": lambda x, s: _affine(x, 1, 0, _translate(s, x.width), 0, 1, 0),
  "translate_y": lambda x, s: _affine(x, 1, 0, 0, 0, 1, _translate(s, x.height)),
  "rotate": lambda x, s: x.rotate(30 * s, Image.Resampling.NEAREST),
  "brightness": lambda x, s: _scale_brightness(x, 1 + 0.9 * s),
  "saturation": lambda x, s: _scale_saturation(x, 1 + 0.9 * s),
  "contrast": lambda x, s: _scale_contrast(x, 1 + 0.9 * s),
  "sharpness": lambda x, s: _scale_sharpness(x, 1 + 0.9 * s),
  "posterize": _posterize,
  "solarize": _solarize,
  "autocontrast": lambda x, s: ImageOps.autocontrast(x),  # these two have no strength
  "equalize": lambda x, s: ImageOps.equalize(x),
}
