"""Embedding stores: rows of vectors in flat files, found by the id of their sample.

A store is a folder. While it is written it holds, for each piece of the source and each process,

  00012.3-of-8.vectors.npy   [N, D] float16, float32, or bfloat16 as its 16 bits; of towers' tokens
                             [N, 1 + T, D]: the pooled vector, then the tokens, padding as zeros
  00012.3-of-8.samples.npy   [N, 2] uint64: the id of each row's sample, and its place in the source
  00012.3-of-8.labels.npy    [N] int32, of images: the label of each, -1 for none
  00012.3-of-8.json          rows, sums of the files, and what was left out; written last

and once all pieces are there

  manifest.json              what was embedded with what, and the list of files
  ids-….npy, rows-….npy      [rows] uint64: the ids in ascending order, and the row of each

Rows of one sample (the captions of an image) stand side by side, in their order. Files are moved
into place when they are whole, so a process may be killed at any time; a piece is redone unless all
of its parts are there. All is mapped into memory and read where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import resource
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from bigalign.data.files.cache import Recent

DTYPES = {name: np.dtype(name) for name in ("float16", "float32")} | {
  "bfloat16": np.dtype(ml_dtypes.bfloat16)
}
CHUNK = 1 << 22  # rows sorted or compared at a time
# Files that stay mapped; each takes a descriptor, of which two stores and all else share a few.
OPEN = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)


def sample_id(key: str) -> int:
  """64 bits of the key of a sample: the same in every store, wherever its shards lie."""
  return int.from_bytes(
    hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
  )


def check_header(folder: pathlib.Path, expected: Mapping[str, Any]) -> None:
  """Raises ValueError if the vectors in a store are not what `expected` says."""
  found = dict(tokens=0) | json.loads((folder / "header.json").read_text())
  wanted = json.loads(json.dumps(expected))
  differ = [name for name in wanted if found.get(name) != wanted[name]]
  if differ:
    told = "\n".join(
      f"  {name}: {found.get(name)!r} there, {wanted[name]!r} here" for name in differ
    )
    raise ValueError(
      f"{folder} holds vectors that were made another way:\n{told}\nEmbed into"
      " another folder, or use what they were made with."
    )


def row_shape(header: Mapping[str, Any]) -> tuple[int, ...]:
  """(D,), or (1 + T, D) where the header says of how many `tokens`."""
  tokens = header.get("tokens", 0)
  return (1 + tokens, header["width"]) if tokens else (header["width"],)


def finite(vectors: np.ndarray) -> np.ndarray:
  """[N, ...] of any dtype of DTYPES → [N] bool: which rows hold neither NaN nor infinity."""
  whole = np.isfinite(vectors.astype(np.float32))
  return np.asarray(whole.all(tuple(range(1, vectors.ndim))))


class Store:
  """A store that is whole, read only. Picklable: paths only, files are mapped on first use.

  header  what was embedded with what. ids  hex digits that two stores of the same samples share.
  fingerprint  hex digits that change if a file does. sources  what was embedded, one behind the
  other: of each its name, how many `samples` it has and the `place` of the first.

  Raises:
    FileNotFoundError: for a folder that is none, or not whole yet.
  """

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(os.path.expandvars(folder))
    path = self.folder / "manifest.json"
    if not path.exists():
      begun = (self.folder / "header.json").exists()
      raise FileNotFoundError(
        f"{self.folder} is no store yet: run the same `bigalign embed` again, it goes on"
        if begun
        else f"{self.folder} is no embedding store; `bigalign embed` makes one"
      )
    manifest = json.loads(path.read_text())
    self.header, self.ids, self.left_out, self.sources = (
      manifest[name] for name in ("header", "ids", "left_out", "sources")
    )
    self._files, self._index = manifest["files"], manifest["index"]
    self._firsts = np.cumsum([0, *(file["rows"] for file in self._files)])
    self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    self.dtype, self.width = DTYPES[self.header["dtype"]], self.header["width"]
    self.shape = row_shape(self.header)
    self._mapped = Recent(self._map, room=OPEN)
    self._sorted = Recent(self._map_index, room=2)  # stays: its files may go after two appends

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __repr__(self) -> str:
    return f"Store({str(self.folder)!r})"

  def read(self, rows: np.ndarray) -> np.ndarray:
    """[N] → [N, D], or [N, 1 + T, D], in the store's dtype."""
    return self._gather("vectors", rows, np.empty((len(rows), *self.shape), self.dtype))

  def samples(self, rows: np.ndarray) -> np.ndarray:
    """[N] → [N, 2] uint64: the id of each row's sample, and its place in what was embedded."""
    return self._gather("samples", rows, np.empty((len(rows), 2), np.uint64))

  def labels(self, rows: np.ndarray) -> np.ndarray:
    """[N] → [N] int32, of images: -1 without a label.

    Raises:
      ValueError: for a store of texts, or one that was written without labels.
    """
    if any("labels" not in file["sums"] for file in self._files):
      raise ValueError(f"{self.folder} holds no labels; `bigalign embed` writes those of images")
    return self._gather("labels", rows, np.empty(len(rows), np.int32))

  def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] uint64 → the first row of each sample, and how many it has, [N] int64; 0 if none."""
    known, rows = self._sorted["ids"], self._sorted["rows"]
    first = np.searchsorted(known, ids, "left")
    count = np.searchsorted(known, ids, "right") - first
    return rows[np.minimum(first, len(known) - 1)].astype(np.int64), count

  def sorted_ids(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids in ascending order and their rows, a chunk at a time."""
    ids, rows = self._sorted["ids"], self._sorted["rows"]
    for start in range(0, len(ids), CHUNK):
      yield np.asarray(ids[start : start + CHUNK]), np.asarray(rows[start : start + CHUNK])

  def verify(self) -> Iterator[str]:
    """What is wrong with the store, a sentence each: files that changed, rows that are no numbers.

    Reads all of it.
    """
    sums = dict(self._index)
    for file in self._files:
      sums |= {f"{file['stem']}.{name}.npy": found for name, found in file["sums"].items()}
    for name, expected in sums.items():
      path = self.folder / name
      if not path.exists():
        yield f"{path} is missing"
      elif checksum(path) != expected:
        yield f"{path} is not what was written: its sum differs"
    for number in range(len(self._files)):
      try:
        yield from self._not_finite(number)
      except (OSError, ValueError) as error:
        yield f"{self._files[number]['stem']} cannot be read: {error}"

  def _not_finite(self, number: int) -> Iterator[str]:
    """About the rows of a file that hold NaN or infinity."""
    first, end = (int(x) for x in self._firsts[number : number + 2])
    step = max(1, (1 << 26) // math.prod(self.shape))
    for start in range(first, end, step):
      rows = np.arange(start, min(start + step, end))
      bad = rows[~finite(self.read(rows))]
      if len(bad):
        places = self.samples(bad[:8])[:, 1].tolist()
        yield (
          f"{self._files[number]['stem']}: {len(bad)} rows hold NaN or infinity, of samples"
          f" {places} first"
        )

  def _gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(f"{self!r} has {len(self)} rows; asked for {rows.min()} to {rows.max()}")
    which = np.searchsorted(self._firsts, rows, "right") - 1
    by_file = np.argsort(which, kind="stable")
    edges = np.flatnonzero(np.diff(which[by_file])) + 1
    for mine in np.split(by_file, edges) if len(rows) else ():
      number = which[mine[0]]
      array = self._mapped[self._files[number]["stem"], name]
      out[mine] = array[rows[mine] - self._firsts[number]]
    return out

  def _map_index(self, name: str) -> tuple[np.ndarray, int]:
    path = self.folder / dict(zip(("ids", "rows"), self._index))[name]
    return np.load(path, mmap_mode="r", allow_pickle=False), 1

  def _map(self, key: tuple[str, str]) -> tuple[np.ndarray, int]:
    stem, name = key
    array = np.load(self.folder / f"{stem}.{name}.npy", mmap_mode="r", allow_pickle=False)
    return array.view(self.dtype) if name == "vectors" else array, 1


def checksum(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hex."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
