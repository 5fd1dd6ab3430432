"""uint8 [H, W, 3] → uint8 [H, W, 3]: random colours and RandAugment, for transforms.train_image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_MOST = 30  # the largest magnitude


def rand_augment(
  image: np.ndarray, rng: np.random.Generator, *, num_ops: int = 2, magnitude: float = 9.0
) -> np.ndarray:
  """RandAugment, https://arxiv.org/abs/1909.13719: num_ops operations drawn from OPERATIONS.

  magnitude  0 to 30 on torchvision's scale, where 30 shears by 0.3 and turns by 30 degrees; on
             timm's and the paper's scale 10 does. What is uncovered becomes black.
  """
  where = "config.data.augment.rand_augment"
  if num_ops < 1:
    raise ValueError(
      f"{where}.num_ops={num_ops}: it must be at least 1; leave rand_augment out for none"
    )
  if not 0 <= magnitude <= _MOST:
    raise ValueError(f"{where}.magnitude={magnitude}: it must lie in 0 to {_MOST}")
  pixels, names = Image.fromarray(image), list(OPERATIONS)
  for _ in range(num_ops):
    name = names[rng.integers(len(names))]
    strength = magnitude / _MOST if rng.random() < 0.5 else -magnitude / _MOST
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
  """Other colours in random order, with this probability, as torchvision's ColorJitter.

  brightness, contrast, saturation  s: a factor uniform in [max(0, 1 - s), 1 + s]
  hue                               s: turns uniform in [-s, s], s at most a half
  """
  where = "config.data.augment.color_jitter"
  strengths = dict(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
  for name, value in strengths.items():
    if value < 0:
      raise ValueError(f"{where}.{name}={value} is negative; 0 leaves it as it is")
  if hue > 0.5:
    raise ValueError(f"{where}.hue={hue}: it must lie in 0 to 0.5, half a turn")
  check_probability(probability, f"{where}.probability")
  if rng.random() >= probability:
    return image
  pixels, names = Image.fromarray(image), list(strengths)
  for i in rng.permutation(len(names)):
    name, strength = names[i], strengths[names[i]]
    low = -strength if name == "hue" else max(0.0, 1 - strength)
    high = strength if name == "hue" else 1 + strength
    drawn = low + (high - low) * rng.random()
    if strength:  # there and back, hue changes even what it does not turn
      pixels = _JITTER[name](pixels, drawn)
  return np.asarray(pixels)


def to_grayscale(image: np.ndarray, rng: np.random.Generator, *, probability: float) -> np.ndarray:
  """Three times the luma of ITU-R 601, with this probability."""
  check_probability(probability, "config.data.augment.grayscale")
  if rng.random() >= probability:
    return image
  return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def check_probability(value: float, where: str) -> None:
  """Raises ValueError unless it is one."""
  if not 0 <= value <= 1:
    raise ValueError(f"{where}={value}: a probability lies in 0 to 1")


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
  # Pillow's hue of 255 is that of 0: with the wrap of uint8 a turn would be 256 of them.
  turned = (np.asarray(hue, np.int32) + round(255 * turns)) % 255
  hue = Image.fromarray(turned.astype(np.uint8))
  return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _affine(pixels: Image.Image, *matrix: float) -> Image.Image:
  """The first two rows of the map from output to input pixels; black outside."""
  return pixels.transform(pixels.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _translate(s: float, side: int) -> int:
  return int(s * side * 150 / 331)  # the paper's 150 pixels of its 331


def _posterize(pixels: Image.Image, s: float) -> Image.Image:
  return ImageOps.posterize(pixels, 8 - round(4 * abs(s)))


def _solarize(pixels: Image.Image, s: float) -> Image.Image:
  # From 256, as in the paper: with torchvision's 255, white turns black even at magnitude 0.
  return ImageOps.solarize(pixels, 256 * (1 - abs(s)))  # type: ignore[arg-type]


_JITTER: dict[str, Callable[[Image.Image, float], Image.Image]] = {
  "brightness": _scale_brightness,
  "contrast": _scale_contrast,
  "saturation": _scale_saturation,
  "hue": _turn_hue,
}
# name → (image, strength in [-1, 1]) → image; the ranges are torchvision's. RandAugment draws by
# the order: a change here changes the stream.
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
  "autocontrast": lambda x, s: ImageOps.autocontrast(x),  # these two know no strength
  "equalize": lambda x, s: ImageOps.equalize(x),
}
