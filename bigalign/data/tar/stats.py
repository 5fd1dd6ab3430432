"""Statistics to filter by: one row of columns per sample, in the order of the samples of a shard.

`bigalign index --stats` writes one file per shard next to the index: a numpy structured array [N]
(.npy, little-endian, no pickle) whose row i belongs to sample i of the shard.

  bigalign.stats/00000.tar.STAMP.npy   STAMP: 16 hex digits, the time stamp of the shard in the
                                       index. If a shard changes, its statistics must be written
                                       again.

  image_bytes      uint32          size of the image member; 0 if the sample has no image
  width, height    uint32          pixels, from the header of the image; 0 if it is not understood
  sha256           uint8 [32]      of the bytes of the image member, as img2dataset computes it
  length.FIELD     uint32          characters of the first caption of a caption field ("txt",
                                   "json.caption", as in WebDataset), stripped; 0 if none
  json.KEY         float64         each number or boolean at the top of the .json members, NaN if a
                                   sample has none, or an integer beyond float64; the keys are
                                   those of the shard, sorted
  word.json.KEY    uint64          for keys of the shard with a number from 2**53 on, which float64
                                   rounds: `words` of the numbers; 0 if a sample has none

`WebDataset.columns()` yields these arrays, mapped into memory, shard by shard in the order of the
source. Shards may differ in their json.KEY columns, but not in the others.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from bigalign.data.files import storage
from bigalign.data.samples import members
from bigalign.data.samples.rejects import Rejected
from bigalign.data.tar import index, parse

FOLDER = "bigalign.stats"
_LARGEST = 1 << 1023  # float64 holds no larger integer
EXACT = 2**53  # float64 holds all integers below


def path_of(name: str, index_folder: str, stat: storage.Stat) -> str:
  """Returns the path of the statistics of a shard."""
  return os.path.join(index_folder, FOLDER, f"{name}.{stat.stamp:016x}.npy")


def load(
  name: str, index_folder: str, stat: storage.Stat, *, pattern: str = "SHARDS"
) -> np.ndarray:
  """Returns the statistics of a shard, [N] of columns, mapped into memory.

  Args:
    name: of the shard.
    index_folder: of its index.
    stat: of the shard, from the index.
    pattern: names the source in the error.

  Raises:
    FileNotFoundError: if they were not written; gives the command that writes them.
  """
  path = path_of(name, index_folder, stat)
  if not os.path.exists(path):
    # Where the index is, so that a folder of data stays as it is.
    apart = os.path.dirname(index_folder.rstrip("/")) == index.homes().rstrip("/")
    out = f" --out {shlex.quote(index.homes())}" if apart else ""
    raise FileNotFoundError(
      f"{name} has no stats ({path}); write them:"
      f" bigalign index --stats {shlex.quote(pattern)}{out}"
    )
  statistics: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
  return statistics


def is_current(name: str, index_folder: str, stat: storage.Stat, captions: Sequence[str]) -> bool:
  """Returns whether the statistics exist and can be read, with the lengths of these fields."""
  try:
    have = load(name, index_folder, stat).dtype.names or ()
  except (OSError, ValueError, EOFError):
    return False
  return {f"length.{field}" for field in captions} <= set(have)


def write(path: str, index_folder: str, *, captions: Sequence[str]) -> None:
  """Writes the statistics of an indexed shard.

  Args:
    path: of the shard.
    index_folder: of its index.
    captions: caption fields, of which lengths are written.

  Raises:
    ValueError: if the shard is not indexed.
  """
  name = os.path.basename(path)
  located = index.locate(name, index_folder)
  if located is None:
    raise ValueError(f"{path} is not in the index in {index_folder}")
  shard_index, row = located
  part, first = shard_index.part(row), int(shard_index.first[row])
  rows = []
  for entry in range(first, first + part.entries - 1):
    buffer = storage.read(path, *shard_index.span(entry), expect=part.stat)
    rows.append(_row(parse.sample(buffer)[1], captions))
  scores = sorted({key for row in rows for key in row if key.startswith("json.")})
  fixed = [("image_bytes", "<u4"), ("width", "<u4"), ("height", "<u4"), ("sha256", "u1", (32,))]
  lengths = [(f"length.{field}", "<u4") for field in captions]
  large = [score for score in scores if any(_is_large(row.get(score, 0)) for row in rows)]
  numbers = [(score, "<f8") for score in scores] + [(f"word.{score}", "<u8") for score in large]
  table = np.zeros(len(rows), [*fixed, *lengths, *numbers])
  for score in scores:
    table[score] = np.nan
  for i, values in enumerate(rows):
    for column, value in values.items():
      table[column][i] = value
  for score in large:
    for i, values in enumerate(rows):
      if score in values:
        table[f"word.{score}"][i] = _word(values[score])
  os.makedirs(os.path.join(index_folder, FOLDER), exist_ok=True)
  target = path_of(name, index_folder, part.stat)
  with storage.atomic_write(target, suffix=storage.unique_suffix()) as file:
    np.save(file, table, allow_pickle=False)


def words(values: np.ndarray) -> np.ndarray:
  """Returns 64 bits for each number that float64 holds: [N] numbers → [N] uint64.

  Equal numbers have equal bits; those of NaN say nothing.
  """
  return (np.asarray(values, np.float64) + 0.0).view(np.uint64)  # + 0.0: -0.0 equals 0.0


def _word(value: int | float) -> int:
  """The bits of one number as `words` gives them; of an integer that float64 rounds, a hash."""
  if isinstance(value, int) and float(value) != value:
    return int.from_bytes(hashlib.sha256(b"%x" % value).digest()[:8])
  return int(words(np.array([value]))[0])


def _is_large(value: int | float) -> bool:
  return abs(value) >= EXACT and value not in (math.inf, -math.inf)


def _row(fields: Mapping[str, bytes], captions: Sequence[str]) -> dict[str, Any]:
  """The columns of one sample, from its members; columns that it does not have are missing."""
  image = members.image(fields) or b""
  width, height = size_of(image)
  row: dict[str, Any] = dict(image_bytes=len(image), width=width, height=height)
  if image:
    row["sha256"] = np.frombuffer(hashlib.sha256(image).digest(), np.uint8)
  try:
    entries = members.read_json(fields["json"], key="") if "json" in fields else {}
  except Rejected:  # the loader counts it; a filter sees NaN
    entries = {}
    fields = {name: data for name, data in fields.items() if name != "json"}
  for name in captions:
    row[f"length.{name}"] = len(next(iter(members.field_texts(fields, name, key="")), ""))
  return row | {
    f"json.{key}": value
    for key, value in entries.items()
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)
  }


def size_of(image: bytes) -> tuple[int, int]:
  """Returns (width, height) from the header of an image; zeros if it is not understood."""
  try:
    if image.startswith(b"\xff\xd8\xff"):
      height, width, _, _ = simplejpeg.decode_jpeg_header(image)
      return width, height
    if image.startswith(b"\x89PNG") and len(image) >= 24:  # Pillow refuses decompression bombs
      return int.from_bytes(image[16:20]), int.from_bytes(image[20:24])
    with Image.open(io.BytesIO(image), formats=members.FORMATS) as opened:
      return opened.size
  except Exception:  # whatever a plugin raises for a broken header
    return 0, 0
