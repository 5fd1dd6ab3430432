"""RandAugment and colour jitter: each operation is what its name says, drawn by the position."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.small_shards import picture, samples, write_tar
from PIL import Image

from bigalign.data.image import augment
from bigalign.data.image.transforms import train_image
from bigalign.data.order.permutation import philox
from bigalign.inputs import open_data

JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
LUMA = np.array([0.299, 0.587, 0.114])


def pixels(seed: int, side: int = 32) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(picture(seed, size=(side, side), kind="png"))))


def operate(name: str, image: np.ndarray, strength: float) -> np.ndarray:
  return np.asarray(augment.OPERATIONS[name](Image.fromarray(image), strength)).astype(float)


def gathered(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Maps the centre of each pixel by `matrix` [2, 3] and takes the nearest pixel; black outside."""
  y, x = np.mgrid[:32, :32] + 0.5
  column, row = np.floor(np.einsum("ij,jyx->iyx", matrix, np.stack([x, y, x * 0 + 1]))).astype(int)
  inside = (row >= 0) & (row < 32) & (column >= 0) & (column < 32)
  return np.where(inside[..., None], image[row.clip(0, 31), column.clip(0, 31)], 0)


def test_rand_augment_draws_from_the_named_operations():
  image = pixels(0)
  views = {
    augment.rand_augment(
      image, philox(0, position), num_ops=1, magnitude=30, operations=("identity", "equalize")
    ).tobytes()
    for position in range(20)
  }
  assert views == {image.tobytes(), operate("equalize", image, 1).astype(np.uint8).tobytes()}


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_strength_zero_changes_nothing(name):
  image = pixels(0)
  image = np.where(image > 200, 255, image)  # white too
  changed = (operate(name, image, 0.0) != image).any()
  assert changed == (name in ("autocontrast", "equalize"))  # which have no strength


@pytest.mark.parametrize("sign", [1, -1])
def test_geometry(sign):
  """Uses an image whose pixels all differ, and the largest strength."""
  image = np.zeros((32, 32, 3), np.uint8)
  image[..., 0], image[..., 1], image[..., 2] = np.arange(32)[:, None], np.arange(32), 99
  angle, by = np.deg2rad(30 * sign), sign * (32 * 150 // 331)
  cos, sin = np.cos(angle), np.sin(angle)
  cases = dict(
    shear_x=[[1, 0.3 * sign, 0], [0, 1, 0]],
    shear_y=[[1, 0, 0], [0.3 * sign, 1, 0]],
    translate_x=[[1, 0, by], [0, 1, 0]],
    translate_y=[[1, 0, 0], [0, 1, by]],
    rotate=[[cos, -sin, 16 - 16 * (cos - sin)], [sin, cos, 16 - 16 * (sin + cos)]],
  )
  for name, matrix in cases.items():
    same = (operate(name, image, sign) == gathered(image, np.array(matrix))).all(-1)
    assert same.mean() > 0.99, name  # a middle may fall on the edge of a pixel


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.3, -1.0])
def test_colours(strength):
  """Compares with real numbers; Pillow truncates to integers, twice if it computes a grey value."""
  image, factor = pixels(1), 1 + 0.9 * strength
  grey = image @ LUMA
  towards = dict(brightness=0.0, saturation=grey[..., None], contrast=grey.mean())
  for name, other in towards.items():
    expected = (other + factor * (image - other)).clip(0, 255)
    assert np.abs(operate(name, image, strength) - expected).max() <= 2, name
  soft = sum(np.roll(image.astype(float), (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
  soft = (soft + 4.0 * image) / 13
  expected = (soft + factor * (image - soft)).clip(0, 255)[1:-1, 1:-1]
  assert np.abs(operate("sharpness", image, strength)[1:-1, 1:-1] - expected).max() <= 2


def test_levels():
  image = pixels(2)
  np.testing.assert_array_equal(operate("posterize", image, -1.0), image & 0xF0)
  np.testing.assert_array_equal(operate("posterize", image, 0.5), image & 0xFC)
  np.testing.assert_array_equal(operate("solarize", image, 1.0), 255 - image)
  np.testing.assert_array_equal(
    operate("solarize", image, -0.25), np.where(image >= 192, 255 - image, image)
  )
  steps = np.repeat(np.array([50, 60, 70, 80], np.uint8), 256).reshape(32, 32, 1).repeat(3, axis=2)
  np.testing.assert_allclose(operate("autocontrast", steps, 0.3), (steps - 50.0) * 255 / 30, atol=1)
  np.testing.assert_allclose(operate("equalize", steps, 0.3), (steps - 50.0) * 255 / 30, atol=1)


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
  drawn: list[tuple[str, float]] = []
  monkeypatch.setattr(
    augment,
    "OPERATIONS",
    {name: lambda x, s, name=name: drawn.append((name, s)) or x for name in augment.OPERATIONS},
  )
  image = pixels(0, 2)
  for position in range(1400):
    augment.rand_augment(image, philox(0, position), num_ops=3, magnitude=15)
  assert len(drawn) == 3 * 1400 and {s for _, s in drawn} == {0.5, -0.5}
  counts = np.unique([f"{name} {s}" for name, s in drawn], return_counts=True)[1]
  assert len(counts) == 28 and counts.min() > 100 and counts.max() < 200  # 150 each


def test_jitter_draws_between_its_bounds():
  grey, red = np.full((2, 2, 3), 100, np.uint8), np.zeros((2, 2, 3), np.uint8)
  red[..., 0] = 255
  off = dict.fromkeys(JITTER, 0.0)

  def jittered(image: np.ndarray, **options) -> np.ndarray:
    return np.array(
      [augment.color_jitter(image, philox(0, i), **{**off, **options})[0, 0] for i in range(300)]
    )

  bright = jittered(grey, brightness=0.4)[:, 0]
  assert 59 <= bright.min() <= 63 and 137 <= bright.max() <= 140
  assert jittered(grey, brightness=3.0).min() <= 4  # a factor is not negative
  assert (jittered(grey, saturation=0.9) == 100).all()
  turned = jittered(red, hue=0.1)  # by 36 degrees: to orange or pink; red stays the largest
  assert (turned[:, 0] == 255).all()
  assert all(140 <= most <= 155 for most in turned[:, 1:].max(0))
  pale = jittered(red, saturation=0.5)
  assert pale[:, 1].max() in range(34, 39) and pale[:, 0].min() in range(163, 169)  # half of 76


def test_a_third_of_a_turn_makes_red_green():
  red = Image.new("RGB", (1, 1), (255, 0, 0))
  assert augment._turn_hue(red, 1 / 3).getpixel((0, 0)) == (0, 255, 0)
  assert augment._turn_hue(red, -1 / 3).getpixel((0, 0)) == (0, 0, 255)


def test_probabilities():
  image = pixels(0, 8)
  changed = [
    (augment.color_jitter(image, philox(0, i), **JITTER, probability=0.25) != image).any()
    for i in range(800)
  ]
  assert 0.2 < np.mean(changed) < 0.3
  grey = [augment.to_grayscale(image, philox(0, i), probability=0.25) for i in range(800)]
  assert 0.2 < np.mean([(x != image).any() for x in grey]) < 0.3
  made = augment.to_grayscale(image, philox(0, 0), probability=1.0)
  assert np.abs(made - (image @ LUMA)[..., None]).max() <= 1


def test_options_that_are_off_draw_nothing():
  """Configs without these options give the same images as before the options existed."""
  image = pixels(1, 16)
  for position in range(100):
    rng = philox(3, position)
    flipped = train_image(image, rng, size=16, crop="center", flip=0.5)
    draws = philox(3, position)
    np.testing.assert_array_equal(flipped, image[:, ::-1] if draws.random() < 0.5 else image)
    assert rng.random() == draws.random()


def test_batches_are_functions_of_the_position(tmp_path):
  write_tar(tmp_path / "0.tar", samples(0, 40))
  augmented = dict(rand_augment={}, color_jitter=dict(JITTER, probability=0.8), grayscale=0.2)

  def images(rows, *, start: int = 0, **options) -> np.ndarray:
    inputs = open_data(
      data_options(
        source=f"{tmp_path}/0.tar",
        image_size=24,
        augment=options,
        tokenizer=dict(name="byte", length=8),
      )
    )
    with contextlib.closing(
      inputs.batches(rejected_log="", batch_size=8, rows=rows, seed=0, start=start, stop=24)
    ) as batches:
      return np.stack([batch["image"] for batch in batches])

  whole = images(range(8), **augmented)
  assert whole.shape == (3, 8, 24, 24, 3)
  np.testing.assert_array_equal(whole[:, 4:], images(range(4, 8), **augmented))
  np.testing.assert_array_equal(whole[1:], images(range(8), start=8, **augmented))
  assert (whole != images(range(8))).any((2, 3, 4)).mean() > 0.8


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(color_jitter=dict(JITTER, hew=1)), r"augment\.color_jitter: unknown option 'hew'"),
    (dict(color_jitter=dict(hue=0.1)), r"augment\.color_jitter: option 'brightness' is missing"),
    (dict(color_jitter=dict(JITTER, hue=0.6)), r"augment\.color_jitter\.hue=0\.6: .* 0 to 0\.5"),
    (dict(color_jitter=dict(JITTER, contrast=-1)), r"color_jitter\.contrast=-1 is negative"),
    (dict(color_jitter=dict(JITTER, probability=8)), r"color_jitter\.probability=8: .* 0 to 1"),
    (dict(color_jitter=0.4), r"augment\.color_jitter=0\.4 is of type float"),
    (dict(rand_augment=dict(magnitude=31)), r"rand_augment\.magnitude=31: .* 0 to 30"),
    (dict(rand_augment=dict(num_ops=0)), r"rand_augment\.num_ops=0: .*at least 1"),
    (dict(rand_augment=dict(operations=["shear"])), r"operations: unknown 'shear'\. Did you mean"),
    (dict(rand_augment=dict(num_ops=2.5)), r"rand_augment\.num_ops=2\.5 is of type float"),
    (dict(grayscale=1.5), r"augment\.grayscale=1\.5: .* 0 to 1"),
  ],
)
def test_a_wrong_option_is_named(options, message):
  with pytest.raises((TypeError, ValueError), match=r"config\.data\." + f".*{message}"):
    open_data(
      data_options(
        source="glyphs", image_size=24, augment=options, tokenizer=dict(name="byte", length=8)
      )
    )
