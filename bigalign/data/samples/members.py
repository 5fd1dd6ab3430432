"""Image and captions of a sample that consists of the members of a tar.

`members` is {extension: bytes}, such as {"jpg": ..., "txt": ..., "json": ...}.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.samples.rejects import Rejected

logger = logging.getLogger(__name__)

# The formats that are decoded, as Pillow names them. Others are refused: Pillow would start
# Ghostscript for EPS, and other plugins are neither needed nor checked for their use of memory.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
# Their extensions, in order of preference.
IMAGES = (
  *("jpg", "jpeg", "png", "webp", "gif", "bmp"),
  *("jpe", "jfif", "tif", "tiff", "avif", "ppm", "pgm", "pbm", "pnm", "jp2"),
)
# Extensions of videos, which config.data.frames reads with the extra `video`.
VIDEOS = ("mp4", "webm", "mkv", "mov")
_SURROGATE = re.compile("[\ud800-\udfff]")


def image(
  members: Mapping[str, bytes], wanted: str | None = None, *, formats: Sequence[str] = IMAGES
) -> bytes | None:
  """Returns the member that holds the image; None if there is none.

  Args:
    members: of the sample.
    wanted: an extension, "jpg" or "image.jpg", or the part before the format, "image"; None: an
      extension of IMAGES, or else "image" before it (KEY.image.jpg).
    formats: the extensions, in order of preference.
  """
  if wanted is not None and wanted in members:
    return members[wanted]
  for stem in ("", "image.") if wanted is None else (f"{wanted}.",):
    for extension in formats:
      if stem + extension in members:
        return members[stem + extension]
  return None


def frames(members: Mapping[str, bytes], wanted: str | None = None) -> list[bytes]:
  """Returns the images of a sample in the order of their numbers: KEY.0.jpg, KEY.1.jpg, ...

  Args:
    members: of the sample.
    wanted: the part before the number, "camera" for KEY.camera.0.jpg; None: no such part. Without
      numbered members, as of `image`, or a video: KEY.mp4.

  Returns:
    The images; [] if there is none.
  """
  numbered = {frame_number(name, wanted): data for name, data in members.items()}
  if found := sorted(number for number in numbered if number >= 0):
    return [numbered[number] for number in found]
  one = image(members, wanted, formats=(*IMAGES, *VIDEOS))
  return [] if one is None else [one]


def frame_number(extension: str, wanted: str | None = None) -> int:
  """Returns the number of a frame: 7 of "7.jpg", or of "camera.007.jpg"; -1 of another member."""
  stem, _, format = extension.rpartition(".")
  before, _, number = stem.rpartition(".")
  known = format in IMAGES and before == (wanted or "") and number.isdecimal()
  return int(number) if known else -1


def image_stems(extensions: Iterable[str], formats: Sequence[str] = IMAGES) -> set[str]:
  """Returns what stands before the format in extensions of images: {"", "image", "seg"}."""
  parts = [extension.rpartition(".") for extension in extensions]
  return {stem for stem, _, format in parts if format in formats}


def read_json(data: bytes, *, key: str) -> dict[str, Any]:
  """Returns the object in a .json member.

  Raises:
    Rejected: if it holds something else; names `key`.
  """
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise Rejected("bad_metadata", f"{key}.json: {error}") from None
  if not isinstance(value, dict):
    raise Rejected("bad_metadata", f"{key}.json holds a {type(value).__name__}, expected an object")
  return value


def clean(text: str) -> str:
  """Returns a text without blanks and byte order marks before and after it.

  Half a surrogate pair becomes U+FFFD: JSON can hold it (``"\\ud83d"``), but it cannot be encoded,
  and tokenizers refuse it.
  """
  return _SURROGATE.sub("\ufffd", text.strip().strip("\ufeff").strip())


def captions(texts: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
  """Returns dict(captions=...) of the first field that has any; of several fields also `texts`.

  Args:
    texts: {field: captions}, in order of preference.
  """
  first = next(filter(None, texts.values()), ())
  return dict(captions=first, texts=dict(texts)) if len(texts) > 1 else dict(captions=first)


def field_texts(members: Mapping[str, bytes], name: str, *, key: str) -> tuple[str, ...]:
  """Returns the captions of one field, stripped, without blank ones.

  Args:
    members: of the sample.
    name: "txt" for the member .txt; "json.a.b" for the entry b of a in .json, a string, a list
      of strings, or an entry of each object of a list a.
    key: names the sample in errors.

  Raises:
    Rejected: if .json does not hold an object.
  """
  extension, _, path = name.partition(".")
  value: Any = None
  if extension == "json" and path:
    value = entry(read_json(members["json"], key=key), path) if "json" in members else None
  elif name in members:
    value = _decode_text(members[name], key=f"{key}.{name}")
  return strings(value)


def strings(value: Any) -> tuple[str, ...]:
  """Returns the texts in a value, cleaned, without blank ones.

  Args:
    value: a string, UTF-8 bytes, or nested sequences of them; anything else holds no texts.
  """
  texts, left = list[str](), [value]  # not recursive: JSON nests up to a thousand lists
  while left:
    part = left.pop()
    if isinstance(part, bytes):
      part = part.decode("utf-8", "replace")
    if isinstance(part, str):
      texts.append(clean(part))
    elif isinstance(part, np.ndarray):
      left += reversed(part.ravel().tolist())
    elif isinstance(part, list | tuple):
      left += reversed(part)
  return tuple(filter(None, texts))


def entry(row: Any, path: str) -> Any:
  """Returns row["a.b"] if it exists, else row["a"]["b"], for the path "a.b"; None if missing.

  Of a list of objects, as Karpathy's captions {"sentences": [{"raw": ...}]}, the entries of all.
  """
  if isinstance(row, list | tuple | np.ndarray):
    return [entry(part, path) for part in row]
  if isinstance(row, Mapping) and path in row:
    return row[path]
  first, dot, rest = path.partition(".")
  return entry(row[first], rest) if dot and isinstance(row, Mapping) and first in row else None


def _decode_text(data: bytes, *, key: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    logger.warning("%s: invalid UTF-8 (%s); replaced by U+FFFD", key, error.reason)
    return data.decode("utf-8", "replace")
