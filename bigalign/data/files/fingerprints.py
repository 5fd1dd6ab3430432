"""Fingerprints show whether data changed, without reading all of it."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable

from bigalign.data.files import storage
from bigalign.data.files.regular import open_regular

_TAIL = 1 << 16  # bytes
_AT_ONCE = 256  # files whose last bytes are in memory


def of_names(*names: str, sep: str = " ") -> str:
  """Returns 32 hex digits for a sequence of fingerprints, or a fingerprint and options."""
  return hashlib.sha256(sep.join(names).encode()).hexdigest()[:32]


def of_files(paths: Iterable[str], *more: bytes) -> str:
  """Returns 32 hex digits for the names, sizes and last bytes of files.

  Parquet and ArrayRecord keep their index in the last bytes. The size of a remote file is left
  out, because object stores do not send it with a read.

  Args:
    paths: local or remote files.
    *more: bytes to include.
  """
  digest = hashlib.sha256()
  every = [*paths]
  with storage.requests(every) as pool:
    for start in range(0, len(every), _AT_ONCE):
      for part in pool.map(_of_file, every[start : start + _AT_ONCE]):
        digest.update(part)
  for extra in more:
    digest.update(extra)
  return digest.hexdigest()[:32]


def _of_file(path: str) -> bytes:
  """The name, size and last bytes of a file."""
  if storage.is_remote(path):
    return f"{os.path.basename(path)}\n".encode() + storage.tail(path, _TAIL)[0]
  with open_regular(path) as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _TAIL, 0))
    return f"{os.path.basename(path)}\n{size}\n".encode() + file.read()


@functools.cache
def of_code() -> str:
  """Hex digits of all modules of this package, as they were when this was first called."""
  code = hashlib.sha256()
  for file in sorted(pathlib.Path(__file__).parents[2].rglob("*.py")):
    code.update(file.read_bytes())
  return code.hexdigest()
