"""Embedding stores: rows of vectors in flat files, found by the id of their sample.

A store is a folder. While it is written, it holds for each piece of the source and each process:

  00012.3-of-8.vectors.npy   [N, D] float16, float32, or bfloat16 as its 16 bits; with the tokens of
                             a tower [N, 1 + T, D]: the pooled vector, then the tokens, zero-padded
  00012.3-of-8.crc.npy       [N] uint32: the CRC-32 of each row's vectors, checked when it is read
  00012.3-of-8.samples.npy   [N, 2] uint64: the id of each row's sample, and its place in the source
  00012.3-of-8.labels.npy    [N] int32, for images: the label of each, -1 for none
  00012.3-of-8.sizes.npy     [N, 2] int32, of augmented views: height and width of each image
  00012.3-of-8.json          rows, checksums of the files, and what was left out; written last

Once all pieces exist, it also holds:

  manifest.json              the sources, how they were embedded, and the list of files
  ids-….npy, rows-….npy      [rows] uint64: the ids in ascending order, and the row of each

Rows of one sample (the captions of an image) are adjacent, in their order. Each file is written
atomically, so a process may be killed at any time; a piece is embedded again unless all of its
parts exist. The files are mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pathlib
import resource
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from bigalign import tree
from bigalign.data.files import checksums
from bigalign.data.files.cache import LRUCache

logger = logging.getLogger(__name__)

DTYPES = {name: np.dtype(name) for name in ("float16", "float32")} | {
  "bfloat16": np.dtype(ml_dtypes.bfloat16)
}
CHUNK = 1 << 22  # rows sorted or compared at a time
# Files that stay mapped. Each takes a descriptor, and a process with two stores has few of them.
OPEN = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)


def check_header(folder: pathlib.Path, expected: Mapping[str, Any]) -> None:
  """Raises ValueError if the header of a store differs from `expected`; lists what differs."""
  header = dict(tokens=0) | checksums.read_json(folder / "header.json")
  wanted = json.loads(json.dumps(expected))
  differing = [name for name in wanted if header.get(name) != wanted[name]]
  if differing:
    text = "\n".join(
      f"  {name}: {header.get(name)!r} there, {wanted[name]!r} here" for name in differing
    )
    raise ValueError(
      f"{folder} holds vectors that were made another way:\n{text}\nEmbed into"
      " another folder, or use the same towers and preprocessing."
    )


def row_shape(header: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the shape of a row: (D,), or (1 + T, D) if the header has a number of `tokens`."""
  tokens = header.get("tokens", 0)
  return (1 + tokens, header["width"]) if tokens else (header["width"],)


def finite(vectors: np.ndarray) -> np.ndarray:
  """Returns which rows hold neither NaN nor infinity: [N, ...] of a dtype of DTYPES → [N] bool."""
  is_finite = np.isfinite(vectors.astype(np.float32))
  return np.asarray(is_finite.all(tuple(range(1, vectors.ndim))))


class Store:
  """A complete store, read-only. Picklable: holds paths; files are mapped on first use.

  Attributes:
    header: the towers, the preprocessing, and the dtype and width of the vectors.
    ids: hex digits that are equal for two stores of the same samples.
    fingerprint: hex digits that change if a file changes.
    sources: the sources that were embedded, in order: the name of each, its number of `samples`,
      and the `place` of its first sample.

  Args:
    folder: of the store.

  Raises:
    FileNotFoundError: if the folder is not a store, or not a complete one.
    ValueError: if its manifest is damaged.
  """

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(os.path.expandvars(folder))
    path = self.folder / "manifest.json"
    if not path.exists():
      begun = (self.folder / "header.json").exists()
      raise FileNotFoundError(
        f"{self.folder} is not a complete store yet: run the same `bigalign embed` again to resume"
        if begun
        else f"{self.folder} is not an embedding store; `bigalign embed` makes one"
      )
    manifest = checksums.read_json(path)
    missing = {"header", "ids", "left_out", "sources", "files", "index"} - {*manifest}
    if missing:
      raise checksums.Damaged(f"{path} is not the manifest of a store: it has no {min(missing)!r}")
    self.header, self.ids, self.left_out, self.sources = (
      manifest[name] for name in ("header", "ids", "left_out", "sources")
    )
    self._files, self._index = manifest["files"], manifest["index"]
    self._file_of = {file["stem"]: file for file in self._files}
    self._firsts = np.cumsum([0, *(file["rows"] for file in self._files)])
    self._checks_rows = all("crc" in file["sums"] for file in self._files)
    if not self._checks_rows:
      logger.info(
        "%s has no checksums of rows: an older version wrote it, so rows are not checked when they"
        " are read; `bigalign embed --verify` checks its files",
        self.folder,
      )
    self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    self.dtype, self.width = DTYPES[self.header["dtype"]], self.header["width"]
    self.shape = row_shape(self.header)
    self._mapped = LRUCache(self._map, capacity=OPEN)
    # The index stays mapped, because two appends delete its files.
    self._sorted = LRUCache(self._map_index, capacity=2)

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __repr__(self) -> str:
    return f"Store({str(self.folder)!r})"

  def read(self, rows: np.ndarray) -> np.ndarray:
    """Returns rows by their numbers: [N] → [N, D], or [N, 1 + T, D], in the store's dtype.

    Raises:
      ValueError: if a row changed since it was written; names the file.
    """
    vectors = self._unchecked(rows)
    if self._checks_rows:
      recorded = self._gather("crc", rows, np.empty(len(rows), np.uint32))
      wrong = np.flatnonzero(row_sums(vectors) != recorded)
      if len(wrong):
        number = int(np.searchsorted(self._firsts, rows[wrong[0]], "right")) - 1
        stem, row = self._files[number]["stem"], int(rows[wrong[0]] - self._firsts[number])
        raise checksums.Damaged(
          f"{self.folder / stem}.vectors.npy: row {row} changed after it was written: its checksum"
          f" differs from that in {stem}.crc.npy. `bigalign embed --verify` lists all damaged"
          f" files; delete {stem}.json of each, and `bigalign embed` writes them again."
        )
    return vectors

  def tiles(self, rows: int) -> Iterator[np.ndarray]:
    """Yields all vectors in the order of their rows, mapped and not checked.

    Args:
      rows: of a tile, at most; a tile does not span two files.
    """
    for file in self._files:
      array = self._mapped[file["stem"], "vectors"]
      for start in range(0, len(array), rows):
        yield array[start : start + rows]

  def _unchecked(self, rows: np.ndarray) -> np.ndarray:
    return self._gather("vectors", rows, np.empty((len(rows), *self.shape), self.dtype))

  def samples(self, rows: np.ndarray) -> np.ndarray:
    """Returns [N, 2] uint64: the id of each row's sample, and its place in all sources."""
    return self._gather("samples", rows, np.empty((len(rows), 2), np.uint64))

  @property
  def has_labels(self) -> bool:
    """Whether rows have labels: those of images, unless another program wrote the store."""
    return all("labels" in file["sums"] for file in self._files)

  def labels(self, rows: np.ndarray) -> np.ndarray:
    """Returns the labels of rows of images, [N] int32; -1 without a label.

    Raises:
      ValueError: for a store without labels, such as a store of texts; for a file of labels that
        changed after it was written.
    """
    if not self.has_labels:
      raise ValueError(f"{self.folder} holds no labels; `bigalign embed` writes them for images")
    return self._gather("labels", rows, np.empty(len(rows), np.int32))

  def sizes(self, rows: np.ndarray) -> np.ndarray:
    """Returns [N, 2] int32: height and width of the images that rows of views were cut from."""
    return self._gather("sizes", rows, np.empty((len(rows), 2), np.int32))

  def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows of samples.

    Args:
      ids: [N] uint64, from sample_id.

    Returns:
      The first row of each sample [N], and its number of rows [N], int64; 0 rows if it is not in
      the store.
    """
    known, rows = self._sorted["ids"], self._sorted["rows"]
    first = np.searchsorted(known, ids, "left")
    count = np.searchsorted(known, ids, "right") - first
    return rows[np.minimum(first, len(known) - 1)].astype(np.int64), count

  def sorted_ids(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields ids in ascending order and their rows, a chunk at a time."""
    ids, rows = self._sorted["ids"], self._sorted["rows"]
    for start in range(0, len(ids), CHUNK):
      yield np.asarray(ids[start : start + CHUNK]), np.asarray(rows[start : start + CHUNK])

  def verify(self) -> Iterator[str]:
    """Yields a sentence for each fault of the store: files that changed, rows that are not finite.

    Reads all files.
    """
    sums = dict(self._index)
    for file in self._files:
      sums |= {f"{file['stem']}.{name}.npy": digest for name, digest in file["sums"].items()}
    for name, expected in sums.items():
      path = self.folder / name
      if not path.exists():
        yield f"{path} is missing"
      elif checksum(path) != expected:
        yield f"{path} changed after it was written: its checksum differs"
    for number in range(len(self._files)):
      try:
        yield from self._not_finite(number)
      except (OSError, ValueError) as error:
        yield f"{self._files[number]['stem']} cannot be read: {error}"

  def _not_finite(self, number: int) -> Iterator[str]:
    """Yields a sentence for rows of a file that hold NaN or infinity."""
    first, end = (int(x) for x in self._firsts[number : number + 2])
    step = max(1, (1 << 26) // math.prod(self.shape))
    for start in range(first, end, step):
      rows = np.arange(start, min(start + step, end))
      bad = rows[~finite(self._unchecked(rows))]
      if len(bad):
        places = self.samples(bad[: tree.SHOWN])[:, 1].tolist()
        rows_hold = "row holds" if len(bad) == 1 else "rows hold"
        yield (
          f"{self._files[number]['stem']}: {len(bad)} {rows_hold} NaN or infinity; the first"
          f" samples: {places}"
        )

  def _gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Copies rows of an array of the files into `out`."""
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(f"{self!r} has {len(self)} rows; asked for {rows.min()} to {rows.max()}")
    which = np.searchsorted(self._firsts, rows, "right") - 1
    by_file = np.argsort(which, kind="stable")
    edges = np.flatnonzero(np.diff(which[by_file])) + 1
    for chosen in np.split(by_file, edges) if len(rows) else ():
      number = which[chosen[0]]
      array = self._mapped[self._files[number]["stem"], name]
      out[chosen] = array[rows[chosen] - self._firsts[number]]
    return out

  def _map_index(self, name: str) -> tuple[np.ndarray, int]:
    path = self.folder / dict(zip(("ids", "rows"), self._index))[name]
    return load(path, len(self)), 1

  def _map(self, key: tuple[str, str]) -> tuple[np.ndarray, int]:
    stem, name = key
    file, path = self._file_of[stem], self.folder / f"{stem}.{name}.npy"
    # Labels are small, unlike vectors, so the whole file is checked.
    if name in ("labels", "sizes") and checksum(path) != file["sums"][name]:
      raise checksums.Damaged(f"{path} changed after it was written: its checksum differs")
    array = load(path, file["rows"])
    return array.view(self.dtype) if name == "vectors" else array, 1


def load(path: pathlib.Path, rows: int | None = None) -> np.ndarray:
  """Returns a mapped array of a store.

  Args:
    path: of the file.
    rows: that the array must have; None if they are not known.

  Raises:
    FileNotFoundError, ValueError: if the file is missing, is not an array, or was cut; names it.
  """
  try:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, SyntaxError, OverflowError) as error:
    raise checksums.Damaged(f"{path} is damaged: {error}") from error
  if rows is not None and array.shape[:1] != (rows,):
    raise checksums.Damaged(f"{path} is damaged: its shape is {array.shape}, not {rows} rows")
  return array


def row_sums(vectors: np.ndarray) -> np.ndarray:
  """Returns the CRC-32 of each row's bytes: [N, ...] → [N] uint32."""
  length = math.prod(vectors.shape[1:]) * vectors.itemsize
  flat = np.ascontiguousarray(vectors).view(np.uint8).reshape(len(vectors), length)
  return np.fromiter((zlib.crc32(row.data) for row in flat), np.uint32, len(flat))


def checksum(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, in hex."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
