"""Whether data is still what it was, without reading it through."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from bigalign.data.files import storage

_TAIL = 1 << 16  # bytes


def of_names(*names: str, sep: str = " ") -> str:
  """32 hex digits of some fingerprints, or of a fingerprint and what is done with it, in order."""
  return hashlib.sha256(sep.join(names).encode()).hexdigest()[:32]


def of_files(paths: Iterable[str], *more: bytes) -> str:
  """32 hex digits of names, sizes, and the ends, where Parquet and ArrayRecord keep their index."""
  digest = hashlib.sha256()
  for path in paths:
    if storage.is_remote(path):  # stores do not tell the size with what they send
      digest.update(f"{os.path.basename(path)}\n".encode() + storage.tail(path, _TAIL)[0])
      continue
    with open(path, "rb") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(size - _TAIL, 0))
      digest.update(f"{os.path.basename(path)}\n{size}\n".encode() + file.read())
  for each in more:
    digest.update(each)
  return digest.hexdigest()[:32]
