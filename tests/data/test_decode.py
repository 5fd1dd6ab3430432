"""Everything that stands in for an image in the wild, through the pipeline, with exact counts."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from helpers.batches import data_options, eval_batches, train_batches
from helpers.small_shards import picture, samples, write_tar
from PIL import Image, ImageOps

from bigalign import sharding
from bigalign.data.image import transforms
from bigalign.data.image.decode import decode
from bigalign.data.order.permutation import philox, sample_index
from bigalign.data.samples.rejects import REASONS
from bigalign.data.sources.base import open_source
from bigalign.evals.embed import Context
from bigalign.evals.embed import open_data as open_evaluation
from bigalign.inputs import open_data

B = 8
OPTIONS = dict(
  batch_size=B, rows=np.arange(B), image_size=16, tokenizer=dict(name="byte", length=32)
)


def pixels(height: int, width: int) -> Image.Image:
  return Image.open(io.BytesIO(picture(0, size=(height, width), kind="png")))


def encoded(image: Image.Image, kind: str, **save) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **save)
  return file.getvalue()


def wild() -> dict[str, tuple[bytes, str | None]]:
  """{name: (bytes, reason of the rejection or None)}."""
  whole, image = picture(0, size=(200, 300)), pixels(60, 80)
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 4  # in the scan: no decoder can tell
  header = bytearray(encoded(image, "png"))
  header[20] ^= 255  # in the size, which has a checksum
  bomb = bytearray(encoded(Image.new("L", (60_000, 1)), "bmp"))
  bomb[22:26] = (60_000).to_bytes(4, "little")
  frames = [image.rotate(angle) for angle in (0, 90, 180)]
  exif = Image.Exif()
  exif[0x0112] = 6
  animated = dict(save_all=True, append_images=frames[1:])
  wide = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
  return {
    "truncated jpeg": (whole[: len(whole) // 2], "truncated"),
    "truncated png": (encoded(image, "png")[:-600], "truncated"),
    "bit flip in the scan": (bytes(flipped), None),
    "bit flip in a png's header": (bytes(header), "undecodable"),
    "html": (b"<!DOCTYPE html><html>404</html>", "undecodable"),
    "an empty file": (b"", "empty"),
    "unknown format": (b"\x89HDF\r\n\x1a\n" + bytes(512), "undecodable"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "undecodable"),
    "cmyk": (encoded(image.convert("CMYK"), "jpeg"), None),
    "grey": (encoded(image.convert("L"), "jpeg"), None),
    "palette": (encoded(image.quantize(16), "png"), None),
    "1 bit": (encoded(image.convert("1"), "png"), None),
    "16 bits": (encoded(wide, "png"), None),
    "transparent": (encoded(image.convert("RGBA"), "png"), None),
    "animated gif": (encoded(frames[0], "gif", **animated), None),
    "animated webp": (encoded(frames[0], "webp", **animated), None),
    "exif rotation": (encoded(image, "jpeg", exif=exif), None),
    "exif that is cut off": (encoded(image, "jpeg", exif=b"Exif\0\0MM\0*\0\0"), None),
    "pixel bomb": (bytes(bomb), "too_large"),
    "1 x 1": (encoded(pixels(1, 1), "jpeg"), None),
    "1 x 3000": (encoded(pixels(1, 3000), "png"), None),
    "3000 x 1": (encoded(pixels(3000, 1), "jpeg"), None),
  }


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_unusual_and_broken_images_are_counted_by_reason(tmp_path, workers):
  cases = wild()
  write_tar(
    tmp_path / "0.tar",
    [
      member
      for i, (data, _) in enumerate(cases.values())
      for member in ((f"{i:03d}.jpg", data), (f"{i:03d}.txt", b"caption"))
    ],
  )
  with contextlib.closing(
    eval_batches(open_source(f"{tmp_path}/0.tar"), workers=workers, **OPTIONS)
  ) as batches:
    found = list(batches)
  valid = np.concatenate([batch["valid"] for batch in found])[: len(cases)]
  assert dict(zip(cases, valid.tolist())) == {
    name: reason is None for name, (_, reason) in cases.items()
  }
  counts = sum(batch["rejects"].sum(0) for batch in found)
  reasons = [reason for _, reason in cases.values()]
  assert dict(zip(REASONS, counts.tolist())) == {each: reasons.count(each) for each in REASONS}


def test_missing_long_and_broken_captions(tmp_path):
  """Samples with blank or no captions are replaced; long and broken captions are cut and kept."""
  members = samples(0, 200)
  image = members[0][1]
  members[3 * 7 + 1] = ("000007.txt", b" \n\t ")
  del members[3 * 11 + 1]  # sample 11 has no caption at all
  members += [
    ("000200.jpg", image),
    ("000200.txt", "é".encode() * 500_000),
    ("000201.jpg", image),
    ("000201.txt", b"caf\xe9"),
  ]
  write_tar(tmp_path / "0.tar", members)
  source = open_source(f"{tmp_path}/0.tar")
  stop = 2 * len(source)
  with contextlib.closing(train_batches(source, seed=0, stop=stop, **OPTIONS)) as batches:
    found = list(batches)
  ids = np.concatenate([batch["image_id"][:, 1] for batch in found])
  tried = sample_index(np.arange(len(ids)), size=len(source), seed=0)
  blank = np.isin(tried, [7, 11])
  assert blank.sum() >= 3 and not np.isin(ids, [7, 11]).any()
  np.testing.assert_array_equal(ids[~blank], tried[~blank])
  counts = dict(zip(REASONS, sum(batch["rejects"].sum(0) for batch in found).tolist()))
  assert counts == dict.fromkeys(REASONS, 0) | dict(no_caption=int(blank.sum()))
  masks = np.concatenate([batch["text_mask"] for batch in found])
  assert masks[ids == 200].all() and (masks[ids == 201].sum(1) == 7).all()  # caf + 3 bytes + end
  assert (ids == 200).sum() >= 1 and (ids == 201).sum() >= 1
  np.testing.assert_array_equal(np.concatenate([batch["repaired"] for batch in found]), ids == 201)


def tagged(orientation: int, kind: str, **save) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encoded(pixels(24, 40), kind, exif=exif, **save)


@pytest.mark.parametrize(
  "kind,save",
  [("jpeg", dict(subsampling=0)), ("png", {}), ("webp", dict(lossless=True)), ("tiff", {})],
)
def test_exif_orientations_are_those_of_pillow(kind, save):
  seen = set()
  for orientation in range(1, 9):
    data = tagged(orientation, kind, **save)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = decode(data, apply_exif=True)
    np.testing.assert_array_equal(found, np.asarray(expected))
    seen.add(found.tobytes())
  assert len(seen) == 8


@pytest.mark.parametrize(
  "data",
  [
    encoded(pixels(24, 40), "jpeg"),
    tagged(0, "jpeg"),
    tagged(9, "png"),
    encoded(pixels(24, 40), "jpeg", exif=b"Exif\0\0MM\0*\0\0"),
    encoded(pixels(24, 40), "jpeg", exif=b"Exif\0\0nothing of the kind"),
  ],
)
def test_missing_or_broken_exif_does_not_change_an_image(data):
  np.testing.assert_array_equal(decode(data, apply_exif=True), decode(data))


def test_exif_is_read_only_on_request(monkeypatch):
  data = tagged(6, "jpeg")
  monkeypatch.setattr("PIL.Image.open", None)  # would fail if called
  assert decode(data).shape == (24, 40, 3)


@pytest.mark.parametrize("apply_exif,expected", [(True, [False, True]), (False, [True, True])])
def test_exif_in_training_and_evaluation(tmp_path, apply_exif, expected):
  """Two images: one with a black left half to be rotated clockwise, and one that is upright."""
  image = Image.new("RGB", (64, 64), (255, 255, 255))
  image.paste((0, 0, 0), (0, 0, 32, 64))
  exif = Image.Exif()
  exif[0x0112] = 6
  write_tar(
    tmp_path / "0.tar",
    [
      ("0.jpg", encoded(image, "jpeg", exif=exif)),
      ("0.txt", b"turned"),
      ("1.jpg", encoded(image, "jpeg")),
      ("1.txt", b"upright"),
    ],
  )
  data = data_options(
    source=f"{tmp_path}/0.tar",
    image_size=16,
    tokenizer=OPTIONS["tokenizer"],
    apply_exif=apply_exif,
    augment=dict(crop="squash"),
    shuffle=False,
  )
  context = Context("val", None, None, sharding.make_mesh(), data)
  evaluated = open_evaluation(context, data.source, batch_size=2, captions=0).batches()
  with contextlib.closing(
    open_data(data).batches(rejected_log="", batch_size=2, rows=np.arange(2), seed=0, stop=2)
  ) as batches:
    found = [next(iter(batches)), next(iter(evaluated))]
  for batch in found:
    black_left = (batch["image"][:2, :, 0] < 100).all((1, 2))
    assert black_left.tolist() == expected


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_shrunk_jpeg_equals_the_smaller_image(factor):
  def shrunk(image: Image.Image, kind: str) -> np.ndarray:
    return decode(encoded(image, kind, quality=95), shrink=lambda height, width: factor)

  image = pixels(600, 800)
  small = shrunk(image, "jpeg")
  exact = np.asarray(image.resize(small.shape[1::-1], Image.Resampling.BOX)).astype(int)
  assert np.abs(small - exact).mean() < 1
  assert shrunk(pixels(601, 803), "jpeg").shape == (-(-601 // factor), -(-803 // factor), 3)
  assert shrunk(image, "png").shape == (600, 800, 3)


def test_shrinking_keeps_twice_the_pixels_of_every_view():
  views = dict(size=64, scale=(0.5, 1.0))
  assert [transforms.shrink(side, side, **views) for side in (300, 418, 419, 836, 840, 5000)] == [
    1,
    1,
    2,
    2,
    4,
    8,
  ]
  for crop in ("center", "squash"):
    assert transforms.shrink(256, 900, size=64, crop=crop, flip=0.5) == 2
  for height, width in ((840, 840), (700, 1500), (3000, 500)):
    factor = transforms.shrink(height, width, **views)
    assert factor > 1
    for position in range(200):
      _, _, h, w = transforms._random_box(
        philox(0, position),
        height=height // factor,
        width=width // factor,
        scale=views["scale"],
        ratio=(3 / 4, 4 / 3),
      )
      assert min(h, w) >= 2 * 64 - 1  # a pixel of rounding


def test_training_reads_large_photos_shrunk():
  """The view of a photo of 1200 x 1600 equals that of the full-size photo, within one level."""
  image = pixels(1200, 1600)
  small = decode(
    encoded(image, "jpeg", quality=95),
    shrink=lambda *sides: transforms.shrink(*sides, size=128, crop="squash"),
  )
  assert small.shape == (300, 400, 3)
  views = [
    transforms.train_image(view, philox(0, 0), size=128, crop="squash").astype(int)
    for view in (small, np.asarray(image))
  ]
  assert np.abs(views[0] - views[1]).mean() < 1
