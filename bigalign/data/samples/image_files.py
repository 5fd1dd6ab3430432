"""Reads image files whose paths are data: rows of a table can name any file of the machine.

Only regular files are read, up to MAX_BYTES, and only below the folder of the table or a folder
that the user allows. Links count as what they lead to.
"""

from __future__ import annotations

import errno
import functools
import os

from bigalign.data.files.regular import NotRegular, open_descriptor
from bigalign.data.samples.rejects import Rejected

MAX_BYTES = 1 << 29  # of an image file: 64 million pixels of 16 bits in four channels
# Errors of a row, not of the disk.
_NO_FILE = (
  *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
  *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV),
)
_CHUNK = 1 << 12  # bytes of a read beyond the size of the file
_FOLDERS = 4096  # whose real paths are kept


def read(name: str, *, folder: str, root: str | None = None, key: str) -> bytes:
  """Returns the bytes of an image file.

  Args:
    name: the path in the row, absolute or relative to `folder`.
    folder: of the table.
    root: another folder that images may be in; None for none, "/" for any.
    key: names the sample in the error.

  Raises:
    Rejected: if the file does not exist, or must not be read.
    OSError: if the disk fails.
  """
  try:
    descriptor = _open(name, folder, root, key)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
      size = os.fstat(descriptor).st_size
      parts = list[bytes]()
      read_bytes = 0
      while size <= MAX_BYTES and (part := file.read(max(size - read_bytes, _CHUNK))):
        parts.append(part)
        read_bytes += len(part)
        size = max(size, read_bytes)  # it may grow, or be larger than the system says
  except (OSError, ValueError) as error:  # ValueError: a zero byte or half a surrogate in the name
    if isinstance(error, NotRegular):
      raise Rejected("no_image", f"{key}: {error}") from None
    if isinstance(error, OSError) and error.errno not in _NO_FILE:
      raise
    reason = error.strerror if isinstance(error, OSError) else str(error)
    raise Rejected("no_image", f"{key}: {name!r}: {reason}") from None
  if size > MAX_BYTES:
    raise Rejected("too_large", f"{key}: {size} bytes; image files have at most {MAX_BYTES}")
  return b"".join(parts)


def _open(name: str, folder: str, root: str | None, key: str) -> int:
  path = os.path.join(folder, name)
  base = os.path.basename(path)
  place = os.path.join(_real_folder(os.path.dirname(path)), base)
  if base in ("", os.curdir, os.pardir):
    place = os.path.realpath(path)
  for _ in range(2):
    if not _is_inside(place, folder, root):
      raise Rejected("no_image", f"{key}: {outside(name, folder)}")
    try:
      return open_descriptor(place, follow=False)
    except NotRegular:
      if not os.path.islink(place):
        raise
      place = os.path.realpath(place)
  raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))  # a loop, or changed in between


def _is_inside(place: str, folder: str, root: str | None) -> bool:
  """Whether a path without links is below the folder of a table, or below `root`."""
  folders = [folder] if root is None else [folder, root]
  return any(
    os.path.join(place, "").startswith(os.path.join(_real_folder(folder), "")) for folder in folders
  )


def leads_outside(name: str, *, folder: str, root: str | None = None) -> bool:
  """Returns whether the path in a row leads out of the folders that images may be in."""
  try:
    place = os.path.realpath(os.path.join(folder, name))
  except (OSError, ValueError):
    return False
  return not _is_inside(place, folder, root)


def outside(name: str, folder: str) -> str:
  """Says that a path leads out of the folder of a table, and how to allow it."""
  return (
    f"{name!r} is not below {folder or os.curdir!r}, the folder of the table. If its images may be"
    " elsewhere, name that folder: data.source_options=dict(root=...) (command line tools:"
    " --source_options root=...)"
  )


@functools.lru_cache(_FOLDERS)
def _real_folder(folder: str) -> str:
  """The folder without links; "" is the current one."""
  return os.path.realpath(folder)


def describe(data: bytes) -> str:
  """Returns what bytes look like that are not an image, without showing them."""
  start = data[:512].lstrip().lower()
  if not data.strip(b"\0"):
    return f"{len(data)} zero bytes" if data else "0 bytes"
  for beginning, name in (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML text"),
    (b"%pdf", "a PDF"),
    (b"%!ps", "a PostScript program"),
    (b"\x1f\x8b", "a gzip file"),
    (b"pk\x03\x04", "a zip file"),
    (b"version https://git-lfs", "a pointer of Git LFS"),
  ):
    if start.startswith(beginning):
      return name
  text = all(byte >= 32 or byte in b"\t\n\r" for byte in data[:512])
  return f"{len(data)} bytes of {'text' if text else 'an unknown format'}"
