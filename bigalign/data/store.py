"""Embedding stores: rows of vectors in flat files, found by the id of their sample.

A store is a folder. While it is written it holds, for each piece of the source and each process,

  00012.3-of-8.vectors.npy   [N, D] float16, float32, or bfloat16 as its 16 bits
  00012.3-of-8.samples.npy   [N, 2] uint64: the id of each row's sample, and its place in the source
  00012.3-of-8.json          rows, sums of the two files, and what was left out; written last

and once all pieces are there

  manifest.json              what was embedded with what, and the list of files
  ids.npy, rows.npy          [rows] uint64: the ids in ascending order, and the row of each

Rows of one sample (the captions of an image) stand side by side, in their order. Files are moved
into place when they are whole, so a process may be killed at any time; a piece is redone unless all
of its parts are there. All is mapped into memory and read where it is needed.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from bigalign.data.recent import Recent

DTYPES = {name: np.dtype(name) for name in ("float16", "float32")} | {
  "bfloat16": np.dtype(ml_dtypes.bfloat16)
}
CHUNK = 1 << 22  # rows sorted or compared at a time
OPEN = 4096  # files that stay mapped


class Range(NamedTuple):
  """Where a source lies in a store.

  first: its first piece. place: of its first sample, among those of all sources. next: the first
  piece of its own that is missing. done: none is.
  """

  first: int
  place: int
  next: int
  done: bool


def sample_id(key: str) -> int:
  """64 bits of the key of a sample: the same in every store, wherever its shards lie."""
  return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def begin(folder: pathlib.Path, header: Mapping[str, Any]) -> None:
  """Makes the folder, or finds it made for the same vectors; `header` is what tells them apart.

  Raises:
    ValueError: if it holds vectors of another tower or preprocessing; lists what differs.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "header.json"
  if not path.exists():
    _write_json(path, header)
  check_header(folder, header)


def check_header(folder: pathlib.Path, expected: Mapping[str, Any]) -> None:
  """Raises ValueError if the vectors in a store are not what `expected` says."""
  found = json.loads((folder / "header.json").read_text())
  wanted = json.loads(json.dumps(expected))
  differ = [name for name in wanted if found.get(name) != wanted[name]]
  if differ:
    told = "\n".join(f"  {name}: {found.get(name)!r} there, {wanted[name]!r} here"
                     for name in differ)
    raise ValueError(f"{folder} holds vectors that were made another way:\n{told}\nEmbed into"
                     " another folder, or use what they were made with.")


def write(folder: pathlib.Path, piece: int, vectors: np.ndarray, samples: np.ndarray, *,
          part: int = 0, parts: int = 1, left_out: Mapping[str, int] | None = None) -> None:
  """Writes this process's rows of a piece.

  vectors [N, D] of one of DTYPES; samples [N, 2] uint64; left_out  how many samples, by reason.
  """
  stem = f"{piece:05}.{part}-of-{parts}"
  bits = vectors.view(np.uint16) if vectors.dtype == DTYPES["bfloat16"] else vectors
  arrays = {"vectors": bits, "samples": np.asarray(samples, np.uint64)}
  for name, array in arrays.items():
    with _whole(folder / f"{stem}.{name}.npy") as file:
      np.save(file, array, allow_pickle=False)
  sums = {name: _sum(folder / f"{stem}.{name}.npy") for name in arrays}
  _write_json(folder / f"{stem}.json", dict(
    piece=piece, part=part, parts=parts, rows=len(vectors), sums=sums,
    left_out=dict(left_out or {})))


def pieces(folder: pathlib.Path) -> dict[int, list[dict[str, Any]]]:
  """{piece: its parts, in order} of the pieces of which all parts are there."""
  found: dict[tuple[int, int], list[dict[str, Any]]] = {}
  for path in folder.glob("*-of-*.json"):
    one = json.loads(path.read_text()) | dict(stem=path.stem)
    found.setdefault((one["piece"], one["parts"]), []).append(one)
  return {piece: sorted(some, key=lambda x: x["part"])
          for (piece, parts), some in sorted(found.items()) if len(some) == parts}


def claim(folder: pathlib.Path, fingerprint: str, samples: int, name: str, *, piece: int,
          write: bool) -> Range:
  """The pieces of a source in a store: those that it has, or new ones behind all others.

  piece  samples of a piece. write: only one process may; all must claim before one fills.

  Raises:
    ValueError: if another source is not whole yet, or this one was begun in other pieces.
  """
  path = folder / "sources.json"
  entries = json.loads(path.read_text()) if path.exists() else []
  whole = pieces(folder)

  def missing(entry: Mapping[str, Any]) -> list[int]:
    count = -(-entry["samples"] // entry["piece"])
    return [i for i in range(count) if entry["first"] + i not in whole]

  entry = next((x for x in entries if x["fingerprint"] == fingerprint), None)
  if entry is None:
    for before in entries:
      if missing(before):
        raise ValueError(f"{folder}: {len(missing(before))} pieces of {before['source']} are still"
                         " missing; embed it again to go on, then append another source")
    last = entries[-1] if entries else dict(first=0, samples=0, piece=1, place=0)
    entry = dict(source=name, fingerprint=fingerprint, samples=samples, piece=piece,
                 first=last["first"] + -(-last["samples"] // last["piece"]),
                 place=last["place"] + last["samples"])
    if write:
      _write_json(path, [*entries, entry])
  if entry["piece"] != piece:
    raise ValueError(f"{folder} was begun in pieces of {entry['piece']} samples, and now they would"
                     f" have {piece}; use the batch size that it was begun with")
  left = missing(entry)
  count = -(-samples // piece)
  return Range(entry["first"], entry["place"], left[0] if left else count, not left)


def finish(folder: pathlib.Path, *, captions: bool) -> None:
  """Makes a store of the pieces; what lies there beside them stays.

  captions  a sample may have several rows

  Raises:
    ValueError: if an id belongs to two samples.
  """
  header, sources = (
      json.loads((folder / f"{name}.json").read_text()) for name in ("header", "sources"))
  files = [part for parts in pieces(folder).values() for part in parts]
  path = folder / "manifest.json"
  if path.exists() and json.loads(path.read_text())["files"] == files:
    return
  digest = _index(folder, files, captions=captions)
  left_out: collections.Counter[str] = collections.Counter()
  for file in files:
    left_out.update(file["left_out"])
  _write_json(path, dict(
      header=header, sources=sources, rows=sum(file["rows"] for file in files), ids=digest,
      left_out=left_out, files=files))


class Store:
  """A store that is whole, read only. Picklable: paths only, files are mapped on first use.

  header  what was embedded with what. ids  hex digits that two stores of the same samples share.
  fingerprint  hex digits that change if a file does.

  Raises:
    FileNotFoundError: for a folder that is none, or not whole yet.
  """

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(os.path.expandvars(folder))
    path = self.folder / "manifest.json"
    if not path.exists():
      begun = (self.folder / "header.json").exists()
      raise FileNotFoundError(
          f"{self.folder} is no store yet: run the same `bigalign embed` again, it goes on" if begun
          else f"{self.folder} is no embedding store; `bigalign embed` makes one")
    manifest = json.loads(path.read_text())
    self.header, self.ids, self.left_out = (
        manifest[name] for name in ("header", "ids", "left_out"))
    self._files = manifest["files"]
    self._firsts = np.cumsum([0, *(file["rows"] for file in self._files)])
    self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    self.dtype, self.width = DTYPES[self.header["dtype"]], self.header["width"]
    self._mapped = Recent(self._map, room=OPEN)

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __repr__(self) -> str:
    return f"Store({str(self.folder)!r})"

  def read(self, rows: np.ndarray) -> np.ndarray:
    """[N] → [N, D], in the store's dtype."""
    return self._gather("vectors", rows, np.empty((len(rows), self.width), self.dtype))

  def samples(self, rows: np.ndarray) -> np.ndarray:
    """[N] → [N, 2] uint64: the id of each row's sample, and its place in what was embedded."""
    return self._gather("samples", rows, np.empty((len(rows), 2), np.uint64))

  def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] uint64 → the first row of each sample, and how many it has, [N] int64; 0 if none."""
    known = self._mapped["", "ids"]
    first = np.searchsorted(known, ids, "left")
    count = np.searchsorted(known, ids, "right") - first
    rows = self._mapped["", "rows"][np.minimum(first, len(known) - 1)].astype(np.int64)
    return rows, count

  def sorted_ids(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids in ascending order and their rows, a chunk at a time."""
    ids, rows = self._mapped["", "ids"], self._mapped["", "rows"]
    for start in range(0, len(ids), CHUNK):
      yield np.asarray(ids[start:start + CHUNK]), np.asarray(rows[start:start + CHUNK])

  def verify(self) -> Iterator[str]:
    """What is wrong with the store, a sentence each: files that changed, rows that are no numbers.

    Reads all of it.
    """
    for number, file in enumerate(self._files):
      for name, expected in file["sums"].items():
        path = self.folder / f"{file['stem']}.{name}.npy"
        if not path.exists():
          yield f"{path} is missing"
        elif _sum(path) != expected:
          yield f"{path} is not what was written: its sum differs"
      first = int(self._firsts[number])
      for start in range(first, first + file["rows"], 1 << 16):
        rows = np.arange(start, min(start + (1 << 16), first + file["rows"]))
        bad = rows[~np.isfinite(self.read(rows).astype(np.float32)).all(1)]
        if len(bad):
          places = self.samples(bad[:8])[:, 1].tolist()
          yield f"{file['stem']}: {len(bad)} rows hold NaN or infinity, of samples {places} first"

  def _gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(f"{self!r} has {len(self)} rows; asked for {rows.min()} to {rows.max()}")
    which = np.searchsorted(self._firsts, rows, "right") - 1
    for number in np.unique(which):
      mine = np.flatnonzero(which == number)
      array = self._mapped[self._files[number]["stem"], name]
      out[mine] = array[rows[mine] - self._firsts[number]]
    return out

  def _map(self, key: tuple[str, str]) -> tuple[np.ndarray, int]:
    stem, name = key
    path = self.folder / (f"{stem}.{name}.npy" if stem else f"{name}.npy")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(self.dtype) if name == "vectors" else array, 1


def _index(folder: pathlib.Path, files: Sequence[Mapping[str, Any]], *, captions: bool) -> str:
  """Writes ids.npy and rows.npy; returns digits of the ids, each once."""
  count = sum(file["rows"] for file in files)
  ids, rows = (np.lib.format.open_memmap(folder / f"{name}.npy.part", "w+", np.uint64, (count,))
               for name in ("ids", "rows"))
  digest, done = hashlib.sha256(), 0
  for some in _by_high_bits(folder, files, count):
    some = some[np.argsort(some[:, 0], kind="stable")]
    again = some[1:, 0] == some[:-1, 0]
    wrong = again & (some[1:, 2] != some[:-1, 2]) if captions else again
    if wrong.any():
      at = int(np.flatnonzero(wrong)[0])
      raise ValueError(
          f"{folder}: {int(wrong.sum())} rows have the id of another sample, first samples"
          f" {int(some[at, 2])} and {int(some[at + 1, 2])}, so nobody could tell their pairs apart."
          " Samples of several sources need names: a part of config.data.mixture each.")
    ids[done:done + len(some)], rows[done:done + len(some)] = some[:, 0], some[:, 1]
    digest.update(some[:, 0][np.append(True, ~again)[:len(some)]].tobytes())
    done += len(some)
  for name, array in (("ids", ids), ("rows", rows)):
    array.flush()
    (folder / f"{name}.npy.part").replace(folder / f"{name}.npy")
  return digest.hexdigest()[:32]


def _by_high_bits(folder: pathlib.Path, files: Sequence[Mapping[str, Any]],
                  count: int) -> Iterator[np.ndarray]:
  """[N, 3] uint64 (id, row, place) of all rows, by ascending ranges of ids that fit in memory."""
  bits = max(0, (count // CHUNK).bit_length())
  with contextlib.ExitStack() as scratch:
    heaps = [scratch.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(1 << bits)]
    row = 0
    for file in files:
      samples = np.load(folder / f"{file['stem']}.samples.npy", mmap_mode="r", allow_pickle=False)
      for start in range(0, len(samples), CHUNK):
        some = np.asarray(samples[start:start + CHUNK])
        table = np.stack([some[:, 0], np.arange(row, row + len(some), dtype=np.uint64),
                          some[:, 1]], 1)
        row += len(some)
        heap = some[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(len(some), np.uint64)
        for i in np.unique(heap).tolist():
          heaps[i].write(table[heap == i].tobytes())
    for heap_file in heaps:
      heap_file.seek(0)
      yield np.frombuffer(heap_file.read(), np.uint64).reshape(-1, 3)


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file that gets its name when all of it is on the disk."""
  part = path.with_name(f"{path.name}.part")
  with part.open("wb") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def _write_json(path: pathlib.Path, value: Any) -> None:
  with _whole(path) as file:
    file.write((json.dumps(value, indent=1) + "\n").encode())


def _sum(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
