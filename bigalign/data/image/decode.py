"""Decodes images: bytes or arrays → uint8 [H, W, 3]; Rejected if that fails."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from bigalign.data.image import video
from bigalign.data.samples.image_files import describe
from bigalign.data.samples.members import FORMATS
from bigalign.data.samples.rejects import Rejected

_JPEG = b"\xff\xd8\xff"
_MOST_SIDE = 1 << 20  # pixels; JPEG has at most 65,535
_MOST_SCANS = 16  # of a progressive JPEG of max_pixels; smaller images may have more
_MOST_FRAMES = 16  # of an animation of max_pixels that are decoded; smaller ones may have more
_TILE = (322, 323)  # TIFF: width and height of a tile
_MOST_TILE = 1 << 24  # pixels of a tile that is larger than its image
# {EXIF orientation: function from pixels as stored to upright ones}; 1 is upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),  # a quarter turn clockwise
  7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
  8: np.rot90,
}


def decode(
  data: bytes | np.ndarray,
  *,
  max_pixels: int = 64_000_000,
  shrink: Callable[[int, int], int] | None = None,
  apply_exif: bool = False,
  pillow_rgb: bool = False,
) -> np.ndarray:
  """Decodes one image.

  The content decides the format, not a file name; samples/members.py lists the formats. The size
  is read from the header and checked before any pixel is decoded. Transparent pixels are blended
  with white, 16 bits are scaled to 8, and the first frame of an animation is used.

  Args:
    data: an encoded image, or uint8 [H, W], [H, W, 1] or [H, W, 3].
    max_pixels: larger images are rejected.
    shrink: (H, W) → 1, 2, 4 or 8: a JPEG is decoded to a size this many times smaller, which uses
      only a part of its DCT: [ceil(H / 8), ceil(W / 8), 3] for 8. Other formats keep their size.
    apply_exif: rotate and mirror by the EXIF orientation, after `shrink`. By default pixels stay as
      they are stored, as in img2dataset, open_clip and big_vision.
    pillow_rgb: convert all modes as Pillow's convert("RGB"), which open_clip calls: the colours
      under transparent pixels show, and 16 bits are cut off at 255.

  Returns:
    uint8 [H, W, 3], RGB.

  Raises:
    Rejected: for anything that is not a complete image.
  """
  if isinstance(data, np.ndarray):
    return _from_array(data)
  if not data:
    raise Rejected("empty", "0 bytes")
  if data.startswith(_JPEG):
    try:
      height, width, _, _ = simplejpeg.decode_jpeg_header(data)
      _check_pixels(width, height, max_pixels=max_pixels)
      _check_scans(data, width * height, max_pixels=max_pixels)
      factor = shrink(height, width) if shrink else 1
      # Without strict, a truncated file gives a half grey image and no error.
      pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="RGB",
        strict=True,
        min_factor=factor,
        min_height=-(-height // factor),
        min_width=-(-width // factor),
      )
      return _upright(pixels, orientation_of(data)) if apply_exif else pixels
    except Rejected:
      raise
    except Exception:
      pass  # Pillow reads a few files that libjpeg-turbo warns about, and has better errors.
  (only,) = _decode_pillow(
    data, max_pixels=max_pixels, apply_exif=apply_exif, pillow_rgb=pillow_rgb
  )
  return only


def decode_frames(
  data: bytes | np.ndarray, choose: Callable[[int], Sequence[int]], **options: Any
) -> list[np.ndarray]:
  """Decodes some frames of an animation (GIF, WebP, PNG, AVIF) or a video, or pages of a TIFF.

  Any other image has one frame. A frame is the whole picture that is shown at its time.

  Args:
    data: as of `decode`.
    choose: from the number of frames to those that are returned; some may be there several times.
    **options: of `decode`.

  Returns:
    uint8 [H, W, 3] each, RGB.

  Raises:
    Rejected: as of `decode`.
  """
  if isinstance(data, np.ndarray) or not data or data.startswith(_JPEG):
    only = decode(data, **options)
    return [only for _ in choose(1)]
  known = dict(max_pixels=64_000_000, apply_exif=False, pillow_rgb=False)
  known |= {name: x for name, x in options.items() if name in known}
  if video.is_video(data):
    check_size = functools.partial(_check_pixels, max_pixels=known["max_pixels"])
    return video.decode(data, choose, check_size=check_size, rotate=bool(known["apply_exif"]))
  return _decode_pillow(data, choose=choose, **known)  # type: ignore[arg-type]


def from_pillow(
  image: Image.Image, *, apply_exif: bool = False, pillow_rgb: bool = False
) -> np.ndarray:
  """Returns the pixels of an image that Pillow has opened, as `decode` does.

  Args:
    image: of any mode.
    apply_exif, pillow_rgb: as of `decode`.

  Returns:
    uint8 [H, W, 3], RGB.

  Raises:
    Rejected: if the pixels cannot be read.
  """
  try:
    image.load()
    orientation = _orientation(image) if apply_exif else 1
    return _upright(_to_rgb(image, pillow_rgb), orientation)
  except Rejected:
    raise
  except Exception as error:
    reason = "truncated" if "truncated" in str(error) else "undecodable"
    raise Rejected(reason, str(error)) from error


def _check_pixels(width: int, height: int, *, max_pixels: int) -> None:
  if width * height > max_pixels:
    raise Rejected("too_large", f"{width} x {height} pixels, max_pixels is {max_pixels}")
  if max(width, height) > _MOST_SIDE:  # each row takes memory besides its pixels
    raise Rejected("too_large", f"{width} x {height} pixels, a side has at most {_MOST_SIDE}")


def _check_scans(data: bytes, pixels: int, *, max_pixels: int) -> None:
  """Rejects a progressive JPEG with many scans: each costs time for all pixels, and few bytes."""
  scans = data.count(b"\xff\xda")  # inside of a scan, 0xff is followed by 0 or a restart marker
  if scans > _MOST_SCANS and scans * pixels > _MOST_SCANS * max_pixels and _is_progressive(data):
    raise Rejected("too_large", f"a JPEG of {pixels} pixels with about {scans} scans")


def _is_progressive(data: bytes) -> bool:
  """Whether the first frame header of a JPEG is SOF2; trailing data of cameras do not count."""
  place = 2
  while place + 4 <= len(data) and data[place] == 0xFF:
    marker = data[place + 1]
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      return marker in (0xC2, 0xC6, 0xCA, 0xCE)
    place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4])
  return False


def _check_tiles(image: Image.Image) -> None:
  """Rejects a TIFF whose tiles are far larger than the image: libtiff decodes whole tiles."""
  tags = getattr(image, "tag_v2", {})
  width, height = (int(tags.get(tag, 0) or 0) for tag in _TILE)
  if width * height > max(_MOST_TILE, 4 * image.width * image.height):
    raise Rejected("too_large", f"tiles of {width} x {height} pixels")


def _from_array(image: np.ndarray) -> np.ndarray:
  if image.dtype != np.uint8:
    raise Rejected("undecodable", f"an array of {image.dtype}, expected uint8")
  if image.ndim == 2:
    image = image[:, :, None]
  if image.ndim != 3 or image.shape[2] not in (1, 3):
    raise Rejected("undecodable", f"an array of shape {image.shape}, expected [H, W, 3]")
  if 0 in image.shape:
    raise Rejected("empty", f"an array of shape {image.shape}")
  return np.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[2] == 1 else image


def _decode_pillow(
  data: bytes,
  *,
  max_pixels: int,
  apply_exif: bool,
  pillow_rgb: bool,
  choose: Callable[[int], Sequence[int]] = lambda frames: [0],
) -> list[np.ndarray]:
  """The frames that are chosen."""
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      _check_pixels(*image.size, max_pixels=max_pixels)
      _check_tiles(image)
      if image.format in ("JPEG", "MPO"):
        _check_scans(data, image.width * image.height, max_pixels=max_pixels)
      chosen = choose(getattr(image, "n_frames", 1))
      # The pictures between two frames are decoded too, one on top of the other.
      if max(chosen) and max(chosen) * image.width * image.height > _MOST_FRAMES * max_pixels:
        raise Rejected("too_large", f"{max(chosen) + 1} frames of {image.width} x {image.height}")
      frames = {}
      for number in sorted({*chosen}):
        if number:
          image.seek(number)
          _check_pixels(*image.size, max_pixels=max_pixels)
          _check_tiles(image)
        image.load()  # rotates a TIFF itself, and then reports orientation 1
        orientation = _orientation(image) if apply_exif else 1
        frames[number] = _upright(_to_rgb(image, pillow_rgb), orientation)
      return [frames[number] for number in chosen]
  # Pillow's own limit is above our default, but a caller may raise ours above it.
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise Rejected("too_large", str(error)) from error
  except Rejected:
    raise
  except MemoryError as error:
    raise Rejected("too_large", "decoding it takes more memory than there is") from error
  # The data are in memory, so whatever Pillow's plugins raise is the fault of the image.
  except Exception as error:
    if isinstance(error, UnidentifiedImageError):
      raise Rejected("undecodable", f"{describe(data)}, not a {', '.join(FORMATS)}") from error
    reason = "truncated" if "truncated" in str(error) else "undecodable"
    raise Rejected(reason, str(error)) from error


def orientation_of(data: bytes) -> int:
  """Returns the EXIF orientation, 1 to 8, of what `decode` returns without apply_exif.

  Reads only the header.
  """
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      return 1 if image.format == "TIFF" else _orientation(image)  # Pillow rotates a TIFF itself
  except Exception:  # but simplejpeg could decode the image
    return 1


def _orientation(image: Image.Image) -> int:
  """1 to 8; 1 (upright) also for broken EXIF data, because the pixels are fine."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation)
  except Exception:
    return 1
  return value if value in _UPRIGHT else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
  return pixels if orientation == 1 else np.ascontiguousarray(_UPRIGHT[orientation](pixels))


def _to_rgb(image: Image.Image, pillow_rgb: bool) -> np.ndarray:
  if pillow_rgb:
    return np.array(image.convert("RGB"))
  if image.mode.startswith("I"):  # I;16 and its byte orders; I from 16-bit PNG in old Pillows
    wide = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
    grey = ((wide + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
  if image.mode == "F":
    raise Rejected("undecodable", "floating-point pixels have no standard range")
  if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"))
