"""Decodes some frames of a short video: MP4, QuickTime, WebM and Matroska, with PyAV.

The packets are listed first, without decoding any: their number is that of the frames. The decoder
then begins at the key frame before each frame that is wanted, so a video is neither decoded as a
whole, nor are more frames in memory than are returned.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bigalign.data.samples.rejects import Rejected

_MOST_PIXELS = 1 << 34  # decoded for one sample: 8,000 frames of 1920 x 1080
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
# The first box of an MP4 or QuickTime file. AVIF and HEIF, which are images, have an "ftyp" too.
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_IMAGES = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"miaf")


def is_video(data: bytes) -> bool:
  """Whether the bytes begin as a video does."""
  if data.startswith(_EBML):
    return True
  return data[4:8] in _BOXES and not (data[4:8] == b"ftyp" and data[8:12] in _IMAGES)


def decode(
  data: bytes,
  choose: Callable[[int], Sequence[int]],
  *,
  check_size: Callable[[int, int], None],
  rotate: bool = False,
) -> list[np.ndarray]:
  """Decodes some frames of a video.

  Args:
    data: the file.
    choose: from the number of frames to those that are returned; some may be there several times.
    check_size: raises Rejected for frames of a width and height that are too large.
    rotate: rotate frames as the video says, as players do.

  Returns:
    uint8 [H, W, 3] each, RGB.

  Raises:
    Rejected: if it is not a whole video, or a frame that is chosen is damaged.
    ImportError: without PyAV.
  """
  try:
    import av
  except ImportError as error:
    raise ImportError("videos need PyAV: pip install 'bigalign[video]'") from error
  _check_whole(data)
  try:
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
      if not container.streams.video:
        raise Rejected("no_image", "the video file has no video stream")
      stream = container.streams.video[0]
      stream.codec_context.thread_count = 1  # the workers take all cores
      check_size(stream.codec_context.width, stream.codec_context.height)
      times, keys = _packets(container, stream)
      if not times:
        raise Rejected("no_image", "the video has no frame")
      chosen = choose(len(times))
      wanted = [times[i] for i in sorted({*chosen})]
      pixels = _at(container, stream, wanted, keys, times[0], check_size, rotate)
      frames = dict(zip(sorted({*chosen}), pixels))
      return [frames[i] for i in chosen]
  except MemoryError as error:
    raise Rejected("too_large", "decoding it takes more memory than there is") from error
  # The data are in memory, so FFmpeg's errors, some of which are OSErrors, are the video's fault.
  except (av.FFmpegError, ValueError) as error:
    raise Rejected("undecodable", f"a video that FFmpeg cannot decode: {error}") from error


def _packets(container: Any, stream: Any) -> tuple[list[int], list[int]]:
  """The times at which frames are shown, and those of key frames, ascending."""
  times, keys = list[int](), list[int]()
  for packet in container.demux(stream):
    if packet.pts is None or packet.size == 0 or packet.is_discard:
      continue
    if packet.is_corrupt:
      raise Rejected("truncated", f"a damaged packet at {float(packet.pts * stream.time_base):g} s")
    times.append(packet.pts)
    if packet.is_keyframe:
      keys.append(packet.pts)
  return sorted(times), sorted(keys)


def _at(
  container: Any,
  stream: Any,
  wanted: Sequence[int],
  keys: Sequence[int],
  first: int,
  check_size: Callable[[int, int], None],
  rotate: bool,
) -> Iterator[np.ndarray]:
  """Yields the frames that are shown at ascending times; keys: of key frames; first: of all."""

  def decoded() -> Iterator[Any]:
    total = 0
    for frame in container.decode(stream):
      check_size(frame.width, frame.height)
      total += frame.width * frame.height
      if total > _MOST_PIXELS:
        raise Rejected("too_large", f"more than {_MOST_PIXELS} pixels up to one frame of a video")
      if frame.pts is not None:
        yield frame

  frames: Iterator[Any] = iter(())
  last = None  # the frame that was decoded last
  for time in wanted:
    key = max((x for x in keys if x <= time), default=first)
    if last is None or last.pts < key:
      # A container that seeks by the order of decoding may go too far: then from the beginning.
      for start in (key, first):
        container.seek(start, stream=stream, backward=True)
        frames = decoded()
        last = next(frames, None)
        if last is not None and last.pts <= time:
          break
    while last is not None and last.pts < time:
      frame = next(frames, None)
      if frame is None:
        break
      last = frame
    # A packet without a picture of its own, as VP8 has: the next one, or at the end the last one.
    if last is None:
      raise Rejected("truncated", "the video ends before a frame that its index lists")
    if last.is_corrupt:
      raise Rejected("truncated", f"a damaged frame at {last.time:g} s")
    pixels = last.to_ndarray(format="rgb24")
    turns = round(last.rotation / 90) % 4 if rotate else 0
    yield np.ascontiguousarray(np.rot90(pixels, turns))


def _check_whole(data: bytes) -> None:
  """Raises Rejected if the file ends before its parts do: FFmpeg would give the frames so far."""
  if data.startswith(_EBML):
    size, start = _ebml_size(data, 4)
    start += size or 0
    if data[start : start + 4] != _SEGMENT:
      raise Rejected("truncated", "a Matroska file without a segment")
    size, start = _ebml_size(data, start + 4)
    end = start if size is None else start + size
  else:
    end = 0
    while end + 8 <= len(data):
      size = int.from_bytes(data[end : end + 4])
      if size == 1:
        size = int.from_bytes(data[end + 8 : end + 16])
      if size < 8:  # 0: to the end of the file
        return
      end += size
  if end > len(data):
    raise Rejected("truncated", f"a video of {len(data)} of {end} bytes")


def _ebml_size(data: bytes, start: int) -> tuple[int | None, int]:
  """The size that stands at a place, None if it is unknown, and where the content begins."""
  first = data[start] if start < len(data) else 0
  length = 9 - first.bit_length()  # bytes of the number: 1 to 8
  if length > 8:
    raise Rejected("truncated", "a Matroska file without the size of a part")
  bits = 7 * length
  value = int.from_bytes(data[start : start + length]) & ((1 << bits) - 1)
  return None if value == (1 << bits) - 1 else value, start + length
