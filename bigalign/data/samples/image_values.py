"""The bytes of an image that a table holds in one of several forms."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np

from bigalign.data.files import storage
from bigalign.data.samples import image_files
from bigalign.data.samples.rejects import Rejected
from bigalign.tree import cut

_LONGEST_PATH = 4096  # characters, PATH_MAX of Linux
_STARTS = (
  *(b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0"),
  *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
)


def image_bytes(value: Any, *, folder: str, root: str | None = None, key: str) -> bytes | None:
  """Returns the encoded image in a cell of a table.

  Args:
    value: bytes; a string: base64, a data URI or a path relative to `folder`; integers from 0 to
      255, or signed bytes; a mapping with "bytes" or "path", as Hugging Face's Image; or None.
    folder: of the table.
    root: another folder that image files may be in, as for image_files.read.
    key: names the sample in errors.

  Returns:
    The bytes; None if there are none.

  Raises:
    Rejected: for any other value, and for a file that cannot be read.
  """
  if isinstance(value, dict):
    value = value.get("path") if value.get("bytes") is None else value["bytes"]
  if value is None or isinstance(value, bytes):
    return value
  if isinstance(value, str):
    return _of_text(value, folder=folder, root=root, key=key)
  if isinstance(value, list | tuple | np.ndarray):
    numbers = np.asarray(value)
    if numbers.ndim == 1 and numbers.dtype == np.int8:
      return numbers.tobytes()
    whole = numbers.ndim == 1 and np.issubdtype(numbers.dtype, np.integer)
    if whole and (not numbers.size or (numbers.min() >= 0 and numbers.max() <= 255)):
      return numbers.astype(np.uint8).tobytes()
    raise Rejected("undecodable", f"{key}: a list of {numbers.dtype}, not of bytes")
  raise Rejected("undecodable", f"{key}: a {type(value).__name__}, not an encoded image")


def _of_text(text: str, *, folder: str, root: str | None = None, key: str) -> bytes | None:
  if not text.strip():
    return None
  head, comma, _ = text[:100].partition(",")
  if comma and head.startswith("data:") and head.endswith(";base64"):
    data = _from_base64(text[len(head) + 1 :])
    if data is None:
      raise Rejected("undecodable", f"{key}: a data URI whose base64 is broken")
    return data
  start = _from_base64(text.lstrip()[:64])
  if start and len(text) >= 64 and start.startswith(_STARTS):
    data = _from_base64(text)
    if data is None:
      raise Rejected("truncated", f"{key}: base64 that is broken or cut off")
    return data
  if len(text) > _LONGEST_PATH:
    raise Rejected("undecodable", f"{key}: a text that is neither an image in base64 nor a path")
  if "://" in text:
    raise Rejected("no_image", f"{key}: {cut(text, 200)!r} is not a path; URLs are not fetched")
  if storage.is_remote(folder):
    raise Rejected("no_image", f"{key}: a path, but paths are read next to local tables only")
  return image_files.read(text, folder=folder, root=root, key=key)


def _from_base64(text: str) -> bytes | None:
  compact = "".join(text.split()).translate(str.maketrans("-_", "+/"))
  try:
    return base64.b64decode(compact, validate=True)
  except (binascii.Error, ValueError):
    return None
