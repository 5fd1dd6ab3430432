"""Small files whose images would take much time or memory are rejected, or read within bounds."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from bigalign.data.image import transforms
from bigalign.data.image.decode import decode
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import Rejected


def tiff(tile: int, side: int = 10) -> bytes:
  """A TIFF of side x side pixels in one compressed tile, 234 bytes."""
  fields = [(256, side), (257, side), (258, 8), (259, 5), (262, 1), (277, 1)]
  fields += [(322, tile), (323, tile), (324, 200), (325, 50)]
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
  head = b"II*\0" + struct.pack("<IH", 8, len(fields))
  return head + entries + bytes(4) + b"x" * 100


def test_a_tile_that_is_much_larger_than_its_image_is_rejected():
  with pytest.raises(Rejected, match="too_large: tiles of 40000 x 40000"):
    decode(tiff(40_000))
  with pytest.raises(Rejected, match=r"undecodable|truncated"):  # a usual tile, and broken data
    decode(tiff(512))


def test_a_side_of_more_than_a_million_pixels_is_rejected():
  file = io.BytesIO()
  Image.new("L", (1, (1 << 20) + 1)).save(file, "png")
  with pytest.raises(Rejected, match="too_large: 1 x 1048577 pixels, a side has"):
    decode(file.getvalue())


def test_tiles_of_a_usual_size_are_read():
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8))
  file = io.BytesIO()
  image.save(file, "tiff", compression="tiff_lzw", tiffinfo={})
  np.testing.assert_array_equal(decode(file.getvalue()), np.asarray(image))


def progressive(side: int, scans: int) -> bytes:
  file = io.BytesIO()
  Image.new("L", (side, side)).save(file, "jpeg", progressive=True)
  data = file.getvalue()
  last = data[data.rindex(b"\xff\xda") : -2]
  return data[:-2] + last * scans + data[-2:]


def test_a_progressive_jpeg_of_many_scans_is_rejected():
  with pytest.raises(Rejected, match=r"too_large: a JPEG of 4000000 pixels with about \d+ scans"):
    decode(progressive(2_000, 1_000))
  assert decode(progressive(2_000, 8)).shape == (2_000, 2_000, 3)
  assert decode(progressive(64, 1_000)).shape == (64, 64, 3)  # cheap


def test_a_photo_with_a_video_behind_it_is_no_jpeg_of_many_scans():
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  file = io.BytesIO()
  image.save(file, "jpeg")
  data = file.getvalue() + b"\xff\xda" * 1_000
  assert decode(data, max_pixels=64 * 64).shape == (64, 64, 3)


@pytest.mark.parametrize("shape", [(300_000, 1), (1, 300_000)])
@pytest.mark.parametrize("view", ["random_resized", "squash", "shortest", "longest"])
def test_a_line_of_pixels_is_resized_within_a_second(shape, view):
  image = np.full((*shape, 3), 77, np.uint8)
  began = time.process_time()
  if view == "random_resized":  # kornia would end the process, for 10 million pixels
    found = transforms.train_image(image, philox(0, 0), size=224)
  else:
    found = transforms.eval_image(image, size=224, resize=view)
  assert found.shape == (224, 224, 3) and time.process_time() - began < 1
  assert found.max() == 77 and (view == "longest" or found.min() == 77)


def test_the_crop_of_a_long_image_equals_that_of_the_whole(monkeypatch):
  image = np.random.default_rng(0).integers(0, 256, (900, 40, 3), np.uint8)
  for pixels in (image, image.swapaxes(0, 1)):
    whole = transforms.eval_image(pixels, size=32, resize="shortest", edge=36)
    monkeypatch.setattr(transforms, "_MOST_BETWEEN", 0)
    part = transforms.eval_image(pixels, size=32, resize="shortest", edge=36)
    monkeypatch.undo()
    assert np.abs(whole.astype(int) - part).max() <= 1
