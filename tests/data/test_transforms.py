"""Decoding and image transforms: bad bytes are told apart, good ones come out exact."""

from __future__ import annotations

import io
import json
import math
import time

import numpy as np
import pytest
from helpers.small_shards import picture
from helpers.tower_oracles import ROOT
from PIL import Image

from bigalign.data.image import naflex, transforms
from bigalign.data.image.decode import decode
from bigalign.data.image.reading import ImageReading
from bigalign.data.image.transforms import eval_image, train_image
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import REASONS, Rejected
from bigalign.model import PIXELS


def encoded(image: Image.Image, kind: str, **save) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **save)
  return file.getvalue()


def pixels(seed: int, height: int, width: int) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(picture(seed, size=(height, width), kind="png"))))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_every_kind_is_told_by_its_bytes(kind):
  data = picture(3, kind=kind)
  np.testing.assert_array_equal(
    decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  )


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_colours(mode):
  data = encoded(Image.fromarray(pixels(1, 33, 47)).convert(mode), "jpeg")
  expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
  assert np.abs(decode(data) - expected).max() <= 2


def test_transparency_lies_on_white():
  red = np.zeros((4, 4, 4), np.uint8)
  red[..., 0], red[:2, :, 3] = 255, 255
  out = decode(encoded(Image.fromarray(red), "png"))
  np.testing.assert_array_equal(out[0, 0], [255, 0, 0])
  np.testing.assert_array_equal(out[3, 3], [255, 255, 255])
  palette = Image.fromarray(red[..., :3]).quantize(4)
  out = decode(encoded(palette, "gif", transparency=palette.getpixel((0, 0))))
  np.testing.assert_array_equal(out[0, 0], [255, 255, 255])


def test_sixteen_bits_are_scaled_not_clipped():
  wide = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
  out = decode(encoded(Image.fromarray(wide), "png"))
  np.testing.assert_array_equal(out[..., 0], np.arange(256).reshape(16, 16))
  np.testing.assert_array_equal(out[..., 0], out[..., 2])


def test_first_frame_and_no_exif_rotation_unasked():
  frames = [Image.fromarray(pixels(i, 8, 12)) for i in range(3)]
  data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
  first = Image.open(io.BytesIO(data)).convert("RGB")
  np.testing.assert_array_equal(decode(data), np.asarray(first))
  exif = Image.Exif()
  exif[0x0112] = 6
  assert decode(encoded(frames[0], "jpeg", exif=exif)).shape == (8, 12, 3)


def bad_inputs() -> dict[str, tuple[bytes | np.ndarray, str]]:
  whole = picture(0, size=(200, 300))
  png = bytearray(picture(0, kind="png"))
  png[16:24] = (60000).to_bytes(4, "big") * 2  # width and height in the header
  return {
    "empty": (b"", "empty"),
    "half a jpeg": (whole[: len(whole) // 2], "truncated"),
    "half a png": (picture(0, size=(90, 90), kind="png")[:-3000], "truncated"),
    "a page": (b"<!DOCTYPE html><html>404</html>", "undecodable"),
    "a jpeg's first bytes": (whole[:20], "undecodable"),
    "too many pixels": (picture(0, size=(200, 300), kind="bmp"), "too_large"),
    "a large jpeg": (whole, "too_large"),
    "a bomb": (bytes(png), "undecodable"),
    "floats": (np.zeros((4, 4, 3)), "undecodable"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), "undecodable"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), "empty"),
  }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_rejected_with_its_reason(name):
  data, reason = bad_inputs()[name]
  with pytest.raises(Rejected) as error:
    decode(data, max_pixels=50_000 if reason == "too_large" else 64_000_000)
  assert error.value.reason == reason, str(error.value)


def test_the_header_is_read_before_the_pixels():
  """A bomb of 60,000 x 60,000 must be refused in the time of a header."""
  data = bytearray(encoded(Image.new("L", (60_000, 1)), "bmp"))
  data[22:26] = (60_000).to_bytes(4, "little")
  start = time.perf_counter()
  with pytest.raises(Rejected) as error:
    decode(bytes(data))
  assert error.value.reason == "too_large" and time.perf_counter() - start < 0.5


def test_an_unknown_reason_cannot_be_counted():
  with pytest.raises(ValueError, match="Unknown reject reason 'tired'"):
    Rejected("tired")
  assert len(set(REASONS)) == len(REASONS)


def test_grey_arrays_become_colour():
  grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
  np.testing.assert_array_equal(decode(grey), np.stack([grey] * 3, axis=-1))
  np.testing.assert_array_equal(decode(grey[:, :, None]), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("shape", [(61, 83), (97, 45), (32, 32), (19, 27), (1, 300), (33, 32)])
def test_eval_image_is_pillow(shape):
  image = pixels(0, *shape)
  squash = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(eval_image(image, size=32), np.asarray(squash))
  for resize in ("shortest", "longest"):
    out = eval_image(image, size=32, resize=resize)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8


@pytest.mark.parametrize("height,width", [(576, 9), (9, 576), (704, 33), (100, 61), (3000, 1)])
def test_the_longest_edge_is_resized_as_by_open_clip(height, width):
  """ResizeKeepRatio(size, longest=1), whose order of operations decides halves."""
  for size in (224, 288):
    ratio = max(height / size, width / size)
    theirs = [max(1, round(side / ratio)) for side in (height, width)]
    image = eval_image(np.full((height, width, 3), 255, np.uint8), size=size, resize="longest")
    white = (image > 0).all(-1)
    assert [white.any(1).sum(), white.any(0).sum()] == theirs
    # CenterCropOrPad: the larger half of an odd margin is below and right.
    first = [(size - side) // 2 for side in theirs]
    assert [white.any(1).argmax(), white.any(0).argmax()] == first


def test_stores_of_the_former_rounding_are_not_those_of_the_longest_edge():
  for resize in ("squash", "shortest", "longest"):
    depends = ImageReading(image_size=8, resize=resize).preprocessing()
    assert (depends.pop("rounding", "") == "open_clip") == (resize == "longest")
    assert depends == dict(image_size=8, resize=resize, resize_edge=None, apply_exif=False)


@pytest.fixture(scope="module")
def vectors():
  meta = json.loads((ROOT / "preprocess/meta.json").read_text())
  return np.load(ROOT / "preprocess/io.npz"), meta["size"], meta["dinov2_resize"]


@pytest.mark.parametrize(
  "name,statistics,options",
  [
    ("oc_squash", "half", {}),
    ("hf_siglip", "half", {}),
    ("hf_vit", "half", dict(bilinear=True)),
    ("oc_shortest", "clip", dict(resize="shortest")),
    ("oc_longest", "clip", dict(resize="longest")),
    ("hf_clip", "clip", dict(resize="shortest", rounding="floor")),
    ("hf_dinov2", "imagenet", dict(resize="shortest", rounding="floor", edge=True)),
  ],
)
def test_eval_image_oracles(vectors, name, statistics, options):
  """The crops of uneven margins included, where open_clip and Hugging Face part."""
  arrays, size, edge = vectors
  if "edge" in options:
    options = options | dict(edge=edge)
  mean, std = (np.array(x) for x in PIXELS[statistics])
  images = [x for x in arrays.files if x.startswith("image_")]
  for image in images:
    out = eval_image(arrays[image], size=size, **options) / 255
    # A level is 1/255/0.27; float32 rounding is far below it, another crop far above.
    np.testing.assert_allclose(
      ((out - mean) / std).transpose(2, 0, 1),
      arrays[image.replace("image", f"out_{name}")],
      atol=1e-5,
      err_msg=image,
    )
  assert len(images) >= 4


def test_eval_image_oracle_of_grey(vectors):
  arrays, size, _ = vectors
  out = eval_image(decode(arrays["gray_image"]), size=size) / 127.5 - 1
  np.testing.assert_allclose(out.transpose(2, 0, 1), arrays["out_oc_squash_gray"], atol=1e-5)


def test_naflex_oracle(vectors):
  """Patches of pictures of four aspects; padding is zero after normalisation."""
  arrays, _, _ = vectors
  images = [x for x in arrays.files if x.startswith("image_")]
  for i in (x.removeprefix("image_") for x in images):
    expected = arrays[f"out_hf_siglip2_pixel_values_{i}"]
    most, patch = len(expected), math.isqrt(expected.shape[1] // 3)
    flat, mask, shape = naflex.patches(arrays[f"image_{i}"], patch=patch, most=most)
    np.testing.assert_array_equal(shape, arrays[f"out_hf_siglip2_spatial_shapes_{i}"])
    np.testing.assert_array_equal(mask, arrays[f"out_hf_siglip2_pixel_attention_mask_{i}"])
    np.testing.assert_allclose((flat / 127.5 - 1) * mask[:, None], expected, atol=1e-5)


def test_train_image_is_a_function_of_its_generator():
  image = pixels(1, 50, 70)
  options = dict(size=24, scale=(0.3, 1.0), flip=0.5, rotate=10.0, shift=0.1)
  first = train_image(image, philox(0, 5), **options)
  assert first.shape == (24, 24, 3) and first.dtype == np.uint8
  np.testing.assert_array_equal(first, train_image(image, philox(0, 5), **options))
  assert (first != train_image(image, philox(0, 6), **options)).any()


def test_boxes_keep_to_scale_and_ratio():
  areas, aspects = [], []
  for position in range(2000):
    top, left, h, w = transforms._random_box(
      philox(0, position), height=300, width=400, scale=(0.2, 0.8), ratio=(3 / 4, 4 / 3)
    )
    assert min(top, left) >= 0 and top + h <= 300 and left + w <= 400
    areas.append(h * w / 120_000)
    aspects.append(w / h)
  assert 0.19 < min(areas) < 0.22 and 0.75 < max(areas) < 0.81
  assert 0.74 < min(aspects) < 0.77 and 1.3 < max(aspects) < 1.35


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 700)])
def test_extreme_shapes_survive(shape):
  for crop in ("random_resized", "center", "squash"):
    assert train_image(pixels(0, *shape), philox(0, 0), size=16, crop=crop).shape == (16, 16, 3)


def test_deterministic_crops():
  image = pixels(2, 40, 60)
  middle = Image.fromarray(image[:, 10:50]).resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(
    train_image(image, philox(0, 0), size=16, crop="center"), np.asarray(middle)
  )
  np.testing.assert_array_equal(
    train_image(image, philox(0, 0), size=16, crop="squash"), eval_image(image, size=16)
  )
  np.testing.assert_array_equal(
    train_image(image, philox(0, 0), size=16, crop="squash", flip=1.0),
    eval_image(image, size=16)[:, ::-1],
  )


def test_the_fast_resize_stays_close_to_pillow():
  image = pixels(2, 240, 300)
  fast = train_image(image, philox(0, 0), size=128, crop="squash").astype(int)
  assert np.abs(fast - eval_image(image, size=128)).max() <= 2


def test_shift_and_rotation_move_the_middle_where_they_say():
  image = np.zeros((33, 33, 3), np.uint8)
  image[16, 20] = 255  # 4 right of the middle
  quarter = np.zeros(3)
  for position in range(200):
    out = train_image(image, philox(0, position), size=33, crop="squash", rotate=30.0)
    y, x = np.unravel_index(out[..., 0].argmax(), (33, 33))
    assert abs(np.hypot(y - 16, x - 16) - 4) < 0.8  # stays on its circle
    quarter[np.sign(y - 16)] += 1
  assert quarter[1] > 40 and quarter[-1] > 40  # both ways
  reach = [
    np.unravel_index(
      train_image(image, philox(0, position), size=33, crop="squash", shift=0.1)[..., 0].argmax(),
      (33, 33),
    )
    for position in range(200)
  ]
  moved = np.array(reach) - [16, 20]
  assert moved.min() == -3 and moved.max() == 3  # a tenth of 33 pixels each way


def test_unknown_options_are_named():
  with pytest.raises(ValueError, match=r"Unknown crop 'centre'.*'center'"):
    train_image(pixels(0, 8, 8), philox(0, 0), size=8, crop="centre")
  with pytest.raises(ValueError, match=r"Unknown resize 'tallest'.*'shortest'"):
    eval_image(pixels(0, 8, 8), size=8, resize="tallest")
  with pytest.raises(ValueError, match=r"Unknown rounding 'ceil'"):
    eval_image(pixels(0, 8, 8), size=8, resize="shortest", rounding="ceil")
  with pytest.raises(TypeError, match="flop"):
    train_image(pixels(0, 8, 8), philox(0, 0), size=8, flop=0.5)
