"""Samples of several images: config.data.frames."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from helpers.batches import data_options, eval_batches
from helpers.hosts import B, assert_equal_on_hosts, take
from helpers.small_shards import picture, write_tar
from PIL import Image

from bigalign.data.image import frames
from bigalign.data.image.decode import decode
from bigalign.data.loader.training import batch_spec
from bigalign.data.samples import members
from bigalign.data.samples.rejects import REASONS, Rejected
from bigalign.data.sources.base import open_source
from bigalign.inputs import open_data

SAMPLES, F = 20, 4
OPTIONS = dict(image_size=8, tokenizer=dict(name="byte", length=8))
CROP = dict(flip=0.5, scale=(0.3, 1.0))


def grey(level: int) -> Image.Image:
  return Image.fromarray(np.full((12, 16, 3), level, np.uint8))


def encoded(level: int) -> bytes:
  file = io.BytesIO()
  grey(level).save(file, "png")
  return file.getvalue()


def animation(levels, kind: str) -> bytes:
  file, (first, *others) = io.BytesIO(), [grey(x) for x in levels]
  first.save(
    file, kind, save_all=True, append_images=others, **dict(WEBP={"lossless": True}).get(kind, {})
  )
  return file.getvalue()


def count_of(i: int) -> int:
  """The images of sample i: 1 to 9."""
  return 1 + i % 9


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Image k of a sample has the grey level 20 k; every fifth sample is an animation, every seventh
  has no image."""
  written = []
  for i in range(SAMPLES):
    levels = [20 * k for k in range(count_of(i))]
    if i % 7 == 6:
      pass
    elif i % 5 == 4:
      written.append((f"{i:03}.gif", animation(levels, "GIF")))
    else:  # the numbers begin anywhere, and are numbers, not words
      written += [(f"{i:03}.{k + 8}.png", encoded(level)) for k, level in enumerate(levels)]
    written.append((f"{i:03}.txt", f"{i}".encode()))
  return write_tar(tmp_path_factory.mktemp("frames") / "0.tar", written)


def data_of(source, **changes) -> dict:
  return dict(OPTIONS, source=source, augment=CROP, frames=dict(count=F)) | changes


def levels_of(batch) -> np.ndarray:
  """[b, F]: which image of its sample each frame is."""
  pixels = batch["image"]
  assert (pixels == pixels[:, :, :1, :1]).all()
  return pixels[:, :, 0, 0, 0] // 20


def test_numbers_are_one_of_each_equal_part():
  assert frames.numbers(16, 4) == [2, 6, 10, 14] and frames.numbers(4, 4) == [0, 1, 2, 3]
  assert frames.numbers(1, 3) == [0, 0, 0] and frames.numbers(3, 6) == [0, 0, 1, 1, 2, 2]
  drawn = np.array([frames.numbers(16, 4, np.random.default_rng(s)) for s in range(400)])
  for part in range(4):
    assert {*drawn[:, part].tolist()} == {*range(4 * part, 4 * part + 4)}


def test_the_batch_is_as_the_spec_says_and_frames_are_drawn_by_position(source):
  data = data_of(source)
  batches = take(data, 8)
  spec = batch_spec(data_options(**data), batch_size=B)
  assert {k: (x.shape, x.dtype) for k, x in batches[0].items()} == {
    k: (shape, np.dtype(x)) for k, (shape, x) in spec.items()
  }
  assert spec["image"][0] == (B, F, 8, 8, 3)
  seen = {}
  for batch in batches:
    for i, levels in zip(batch["image_id"][:, 1].tolist(), levels_of(batch)):
      n = count_of(i)
      low = [np.floor(k * n / F) for k in range(F)]
      high = [np.ceil((k + 1) * n / F) - 1 for k in range(F)]
      assert (low <= levels).all() and (levels <= high).all(), (i, levels)
      seen.setdefault(i, set()).add(tuple(levels.tolist()))
  assert len(seen) == SAMPLES - 2 and sum(len(x) > 1 for x in seen.values()) > 8


def test_a_sample_without_a_frame_is_rejected(source):
  batches = take(data_of(source), 8)
  assert not {6, 13} & {i for x in batches for i in x["image_id"][:, 1].tolist()}
  rejects = np.concatenate([batch["rejects"] for batch in batches]).sum(0)
  assert rejects[REASONS.index("no_image")] == rejects.sum() > 0


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batches_are_equal_on_any_hosts_and_workers_and_after_a_resume(source, hosts, workers):
  assert_equal_on_hosts(data_of(source, columns=dict(n="txt")), hosts, workers)


def test_one_frame_is_the_image_and_all_frames_have_one_crop(tmp_path):
  still = [(f"{i}.jpg", picture(i, size=(40, 60))) for i in range(12)]
  texts = [(f"{i}.txt", b"a") for i in range(12)]
  source = write_tar(tmp_path / "still.tar", sorted(still + texts))
  augment = dict(CROP, rotate=9.0, rand_augment={}, grayscale=0.5)
  single = take(data_of(source, augment=augment, frames=None))
  for count in (1, 3):
    for a, b in zip(take(data_of(source, augment=augment, frames=dict(count=count))), single):
      image = a.pop("image")
      for k in range(count):
        np.testing.assert_array_equal(image[:, k], b["image"])
      assert all((x == b[name]).all() for name, x in a.items())


def test_evaluation_sees_the_middle_of_each_part(source):
  with contextlib.closing(
    eval_batches(
      open_source(source, frames=True),
      batch_size=SAMPLES,
      rows=np.arange(SAMPLES),
      **{k: x for k, x in data_of(source).items() if k != "source"},
    )
  ) as batches:
    (batch,) = batches
  assert np.flatnonzero(~batch["valid"]).tolist() == [6, 13]
  for i, levels in enumerate(levels_of(batch)):
    assert not batch["valid"][i] or levels.tolist() == frames.numbers(count_of(i), F)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations(kind):
  data = animation([20 * k for k in range(10)], kind)
  found = frames.read(data, 5)
  assert [int(x[0, 0, 0]) for x in found] == [20 * k for k in (1, 3, 5, 7, 9)]
  np.testing.assert_array_equal(frames.read(data, 20)[0], decode(data))
  np.testing.assert_array_equal(frames.read([data], 5), found)
  with pytest.raises(Rejected):
    frames.read(data[: len(data) // 2], 5)


def test_an_animation_of_many_large_frames_is_refused_before_it_is_decoded():
  data = animation(range(100), "GIF")
  with pytest.raises(Rejected, match="too_large: 100 frames of 16 x 12"):
    frames.read(data, 100, max_pixels=192 * 6)
  assert len(frames.read(data, 1, max_pixels=192 * 6)) == 1


def test_a_list_in_a_column_of_parquet(tmp_path):
  import pyarrow
  from pyarrow import parquet

  cells = [[encoded(20 * k) for k in range(i)] or None for i in range(6)]
  pairs = [[dict(bytes=x, path="") for x in cell or []] for cell in cells]
  for kind, column in (("bytes", cells), ("struct", pairs)):
    table = pyarrow.table(dict(clip=column, caption=[f"{i}" for i in range(6)]))
    path = f"{tmp_path}/{kind}.parquet"
    parquet.write_table(table, path)
    options = dict(captions=("caption",), image="clip")
    opened = open_source(path, frames=True, **options)
    assert [opened[i]["image"] for i in range(1, 6)] == cells[1:]
    with pytest.raises(Rejected, match="no bytes in the column 'clip'"):
      opened[0]
    with pytest.raises(ValueError, match="the image column 'clip' has the type list"):
      open_source(path, **options)


def test_members_in_the_order_of_their_numbers():
  stored = {"10.jpg": b"b", "9.png": b"a", "cam.0.jpg": b"c", "txt": b"d", "011.webp": b"e"}
  assert members.frames(stored) == [b"a", b"b", b"e"]
  assert members.frames(stored, "cam") == [b"c"]
  assert members.frames({"jpg": b"f"}) == [b"f"] and members.frames({"txt": b"d"}) == []


def test_what_does_not_go_together_is_named(source):
  for changes, error in (
    (dict(frames=dict(count=0)), "config.data.frames.count=0: at least 1"),
    (dict(naflex={}), "naflex makes patches of one image, but config.data.frames"),
    (dict(views=dict(local={})), "views are crops of one image, but config.data.frames"),
    (dict(images=False, augment={}), "config.data.frames is about images"),
    (dict(stores=dict(image="x"), augment={}), "config.data.frames has no effect"),
  ):
    with pytest.raises(ValueError, match=error):
      open_data(data_options(**data_of(source, **changes)))
