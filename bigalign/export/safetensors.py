"""Tensors as a safetensors file, without the library of that name."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

import numpy as np

from bigalign.weights.files import DTYPES

_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def save(file: pathlib.Path, arrays: Iterable[tuple[str, np.ndarray]], **about: str) -> None:
  """Writes (key, array) pairs; `about` is the file's metadata, format="pt" for transformers."""
  found = list(arrays)
  header: dict[str, object] = {"__metadata__": about} if about else {}
  start = 0
  for key, x in found:
    end = start + x.nbytes
    header[key] = dict(dtype=_NAMES[x.dtype], shape=list(x.shape), data_offsets=[start, end])
    start = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
  with file.open("wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for _, x in found:
      f.write(np.ascontiguousarray(x).data)
