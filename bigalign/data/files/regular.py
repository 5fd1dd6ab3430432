"""Opens local files that are regular: reading a FIFO or a device can wait or run for ever."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a FIFO",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
}


class NotRegular(OSError):
  """A path names a folder, FIFO, device or socket where a regular file is expected."""


def check(path: str | os.PathLike[str]) -> None:
  """Raises NotRegular if a local path is not a regular file, for libraries that open it."""
  _check(path, os.stat(path))


def open_descriptor(path: str | os.PathLike[str], *, follow: bool = True) -> int:
  """Returns a descriptor to read a regular file.

  Args:
    path: of the file.
    follow: whether the file may be a symbolic link.

  Raises:
    NotRegular: if it is something else.
    OSError: if it cannot be opened.
  """
  _check(path, os.stat(path, follow_symlinks=follow))  # before a device or FIFO is opened
  flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
  descriptor = os.open(path, flags)
  try:
    _check(path, os.fstat(descriptor))  # it may have been replaced
  except NotRegular:
    os.close(descriptor)
    raise
  return descriptor


def open_regular(path: str | os.PathLike[str], *, buffering: int = -1) -> BinaryIO:
  """Opens a regular file to read its bytes.

  Raises:
    NotRegular: if it is something else.
    OSError: if it cannot be opened.
  """
  return os.fdopen(open_descriptor(path), "rb", buffering)


def _check(path: str | os.PathLike[str], status: os.stat_result) -> None:
  if not stat.S_ISREG(status.st_mode):
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
    raise NotRegular(f"{os.fspath(path)}: {kind}, expected a regular file")
