"""Small images and webdataset shards for the data tests."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed: int = 0, *, size: tuple[int, int] = (20, 24), kind: str = "jpeg") -> bytes:
  """An encoded image of smooth colours, [H, W] = size."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
  file = io.BytesIO()
  small.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(file, kind)
  return file.getvalue()


def write_tar(path, members, *, format: int = tarfile.USTAR_FORMAT) -> str:
  """A tar of (name, bytes) pairs; bytes None makes a folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=format) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      if data is None:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
      else:
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  return str(path)


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
  """Members KEY.jpg, KEY.txt, KEY.cls of `count` samples."""
  members = []
  for i in range(first, first + count):
    members += [
      (f"{i:06d}.jpg", picture(i)),
      (f"{i:06d}.txt", f"picture number {i}".encode()),
      (f"{i:06d}.cls", str(i % 3).encode()),
    ]
  return members
