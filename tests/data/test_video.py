"""Frames of short videos, written here with PyAV."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.hosts import take
from helpers.small_shards import write_tar
from PIL import Image

from bigalign.data.image import decode, frames, video
from bigalign.data.samples.rejects import REASONS, Rejected
from bigalign.data.sources.base import open_source

av = pytest.importorskip("av", reason="PyAV is not installed: the extra video")

KINDS = dict(mp4="libx264", mov="mpeg4", webm="libvpx", mkv="libvpx-vp9")
COUNT, GOP, WIDTH, HEIGHT = 50, 10, 64, 48


def clip(kind="mp4", count=COUNT, codec=None, sound=False) -> bytes:
  """A dark video with a bright column that moves by a pixel in each frame."""
  file = io.BytesIO()
  form = dict(mkv="matroska").get(kind, kind)
  with av.open(file, "w", format=form) as container:
    stream = container.add_stream(codec or KINDS[kind], rate=25)
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    stream.gop_size, stream.codec_context.thread_count = GOP, 1
    stream.bit_rate = 800_000
    heard = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
    for i in range(count):
      pixels = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
      pixels[:, i : i + 4] = 220
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode(None))
    if heard:
      silence = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
      silence.sample_rate = 8000
      container.mux([*heard.encode(silence), *heard.encode(None)])
  return file.getvalue()


def place(pixels: np.ndarray) -> int:
  """Where the column begins, which is the number of the frame."""
  bright = pixels[..., 1].mean(0)
  return round(float((bright > 120).nonzero()[0].mean() - 1.5))


@pytest.mark.parametrize("kind,sound", [(kind, False) for kind in KINDS] + [("mkv", True)])
def test_the_frames_that_are_seen_are_those_of_a_whole_decoding(kind, sound):
  data = clip(kind, sound=sound)
  with av.open(io.BytesIO(data)) as container:
    whole = [x.to_ndarray(format="rgb24") for x in container.decode(video=0)]
  assert len(whole) == COUNT and video.is_video(data)
  for count in (1, 3, 8, COUNT):
    found = frames.read(data, count)
    expected = frames.numbers(COUNT, count)
    assert [place(x) for x in found] == expected
    for i, pixels in zip(expected, found):
      assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8
      np.testing.assert_array_equal(pixels, whole[i], err_msg=f"{kind} {i}")
  found = frames.read(data, 4, np.random.default_rng(3))
  assert [place(x) for x in found] == frames.numbers(COUNT, 4, np.random.default_rng(3))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_lies_behind_a_key_frame_is_decoded(kind):
  """The sizes that are checked: that of the header, and one of each frame that is decoded."""
  sizes = []
  (only,) = video.decode(clip(kind), lambda n: [n - 2], check_size=lambda *x: sizes.append(x))
  assert place(only) == COUNT - 2
  assert {*sizes} == {(WIDTH, HEIGHT)} and len(sizes) <= 1 + GOP + 1


def test_a_broken_video_is_rejected(monkeypatch):
  for kind in KINDS:
    data = clip(kind)
    with pytest.raises(Rejected, match="truncated: a video of"):
      frames.read(data[: len(data) * 3 // 4], 4)
  damaged = bytearray(clip("mp4"))
  start = damaged.index(b"mdat") + 4
  damaged[start : start + 2000] = bytes(2000)
  with pytest.raises(Rejected, match=r"truncated|undecodable"):
    frames.read(bytes(damaged), 4)
  with pytest.raises(Rejected, match="undecodable: a video that FFmpeg cannot decode"):
    frames.read(struct.pack(">I", 600) + b"ftypisom" + bytes(588), 4)
  with pytest.raises(Rejected, match="too_large: 64 x 48 pixels"):
    frames.read(clip(), 4, max_pixels=3000)
  monkeypatch.setattr(video, "_MOST_PIXELS", 5 * WIDTH * HEIGHT)
  with pytest.raises(Rejected, match="too_large: more than 15360 pixels"):
    frames.read(clip(), 1)


def test_a_video_is_turned_as_it_says_if_images_are():
  """A quarter turn to the right, as phones write it, in the header of the track of an MP4."""
  plain = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 0x40000000)
  turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, HEIGHT << 16, 0, 0x40000000)
  data = clip()
  at = data.index(plain, data.index(b"tkhd"))
  data = data[:at] + turned + data[at + len(plain) :]
  (stored,), (upright,) = frames.read(data, 1), frames.read(data, 1, apply_exif=True)
  assert stored.shape == (HEIGHT, WIDTH, 3) and upright.shape == (WIDTH, HEIGHT, 3)
  np.testing.assert_array_equal(upright, np.rot90(stored, -1))


def test_without_the_extra_the_error_names_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(ImportError, match=r"pip install 'bigalign\[video\]'"):
    frames.read(b"\x1a\x45\xdf\xa3" + bytes(20), 4)


def test_an_image_of_the_same_family_of_files_is_no_video():
  file = io.BytesIO()
  Image.new("RGB", (8, 8)).save(file, "avif")
  assert not video.is_video(file.getvalue())
  assert decode.decode(file.getvalue()).shape == (8, 8, 3)


def test_training_reads_videos_from_tars_and_counts_broken_ones(tmp_path):
  members = []
  for i in range(12):
    kind = [*KINDS][i % 4]
    data = clip(kind, count=10 + i) if i != 5 else clip(kind)[:700]
    members += [(f"{i:02}.{kind}", data), (f"{i:02}.txt", b"a clip")]
  source = write_tar(tmp_path / "0.tar", members)
  data = dict(
    source=source,
    frames=dict(count=3),
    image_size=48,
    tokenizer=dict(name="byte", length=8),
    augment=dict(crop="squash"),
  )
  whole = take(data, 6)
  assert all(batch["image"].shape[1:] == (3, 48, 48, 3) for batch in whole)
  assert 5 not in {i for batch in whole for i in batch["image_id"][:, 1].tolist()}
  rejects = np.concatenate([batch["rejects"] for batch in whole]).sum(0)
  assert rejects[REASONS.index("truncated")] == rejects.sum() > 0
  view = data_options(**data)
  record = open_source(source, frames=True)[0]
  assert [place(x) for x in view.decode(record["image"])] == frames.numbers(10, 3)
  with pytest.raises(ValueError, match=r"hold videos and no images.* config\.data\.frames=dict"):
    open_source(source)
