"""Text files: UTF-8 with or without a byte order mark, and the lines of a text."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import IO

from bigalign.data.files import storage
from bigalign.data.files.regular import open_regular

MARK = b"\xef\xbb\xbf"  # U+FEFF, the byte order mark, in UTF-8
LONGEST = 1 << 24  # bytes of a line that is read by itself
_LARGEST = 1 << 30  # bytes of a text that is read at once
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16, and of UTF-32 in little-endian


def split(text: str) -> list[str]:
  r"""Returns the lines of a text, without their ends.

  A line ends at "\n" or "\r\n"; at "\r" only in a text without any "\n", as old Macs wrote. All
  other characters belong to the line. str.splitlines also splits at U+2028, U+0085 and others,
  which are pieces of real vocabularies and occur in captions.

  >>> split("one\u2028line\r\ntwo\n")
  ['one\u2028line', 'two']
  """
  end = "\n" if "\n" in text else "\r"
  lines = text.split(end)
  if not lines[-1]:
    lines.pop()
  return [line.removesuffix("\r") for line in lines] if end == "\n" else lines


def iterate(file: IO[bytes] | io.BufferedIOBase, *, name: str) -> Iterator[bytes]:
  r"""Yields the lines of a file of any length, without their ends "\n" and "\r\n".

  Byte order marks before lines, as in concatenated files, are left out.

  Args:
    file: to read from; texts in UTF-8.
    name: of the file, for errors.

  Raises:
    ValueError: for UTF-16, and for a line above 16 MiB.
  """
  number = 0
  while line := file.readline(LONGEST + 1):
    number += 1
    if number == 1:
      check_encoding(line, name=name)
    if len(line) > LONGEST:
      raise ValueError(
        f"{name}: line {number} has more than {LONGEST} bytes; a line must end with a line feed"
      )
    yield line.removeprefix(MARK).removesuffix(b"\n").removesuffix(b"\r")


def decode(data: bytes, *, name: str) -> str:
  """Returns a text in UTF-8 without its byte order mark.

  Args:
    data: the bytes of the text.
    name: of its file, for the error.

  Raises:
    ValueError: for another encoding; names the file and the first wrong byte.
  """
  check_encoding(data, name=name)
  try:
    return data.removeprefix(MARK).decode("utf-8")
  except UnicodeDecodeError as error:
    place = error.start + len(data) - len(data.removeprefix(MARK))
    raise ValueError(
      f"{name}: not UTF-8: byte {place} is {data[place]:#04x} ({error.reason}). Write the file in"
      " UTF-8: iconv -f ENCODING -t UTF-8"
    ) from None


def check_encoding(data: bytes, *, name: str) -> None:
  """Raises ValueError if the first bytes of a text are a byte order mark of UTF-16 or UTF-32."""
  if data.startswith(_WIDE):
    raise ValueError(
      f"{name}: the text is in UTF-16 or UTF-32; write it in UTF-8: iconv -f UTF-16 -t UTF-8"
    )


def read_text(path: str | os.PathLike[str]) -> str:
  """Returns the text in a file, local or remote, as `decode` does.

  Raises:
    ValueError: for another encoding than UTF-8, or a file above 1 GiB.
    OSError: if the file is missing or not a regular file.
  """
  if storage.is_remote(os.fspath(path)):
    data = storage.read(os.fspath(path), 0, _LARGEST + 1)
  else:
    with open_regular(path) as file:
      data = file.read(_LARGEST + 1)
  if len(data) > _LARGEST:
    raise ValueError(f"{path}: more than {_LARGEST} bytes, too many for a text that is read whole")
  return decode(data, name=str(path))


def read_names(path: str | os.PathLike[str]) -> list[str]:
  """Returns the lines of a file, local or remote, without white space at their ends.

  Byte order marks before lines, as in concatenated files, and blank lines at the end are left out.
  """
  lines = [line.strip().removeprefix("\ufeff").strip() for line in split(read_text(path))]
  while lines and not lines[-1]:
    lines.pop()
  return lines
