"""Writes embedding stores, piece by piece; reader.py documents the files."""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign import tree
from bigalign.data.files import checksums
from bigalign.data.files.storage import atomic_write
from bigalign.data.stores import reader

_ROW = 24  # bytes of an id, a row and a place


class Range(NamedTuple):
  """The pieces of a source in a store."""

  first: int  # its first piece, counted over all sources
  place: int  # of its first sample, counted over all sources
  next: int  # its first piece that is missing, counted from its own first one
  done: bool  # no piece is missing


def begin(folder: pathlib.Path, header: Mapping[str, Any]) -> None:
  """Makes the folder of a store, or checks that it was made for the same vectors.

  Args:
    folder: of the store.
    header: the towers and the preprocessing; needs `dtype` and `width`.

  Raises:
    ValueError: if the folder holds vectors of another tower or preprocessing (lists what differs),
      or the header lacks `dtype` or `width`.
  """
  if header.get("dtype") not in reader.DTYPES or not isinstance(header.get("width"), int):
    raise ValueError(
      f"the header of {folder} needs `dtype`, one of {[*reader.DTYPES]}, and `width`,"
      f" of its vectors; it is {dict(header)}"
    )
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "header.json"
  if not path.exists():
    _write_json(path, header)
  reader.check_header(folder, header)


def claim(
  folder: pathlib.Path,
  fingerprint: str,
  samples: int,
  name: str,
  *,
  batch_size: int,
  batches: int,
  write: bool,
) -> Range:
  """Returns the pieces of a source in a store: existing ones, or new ones after all others.

  All processes must claim before one of them writes a piece.

  Args:
    folder: of the store.
    fingerprint: of the source.
    samples: of the source.
    name: of the source.
    batch_size: rows of a global batch.
    batches: per piece.
    write: whether to write the claim; True in exactly one process.

  Raises:
    ValueError: if another source is incomplete, or this one was begun with another batch size.
  """
  path, piece = folder / "sources.json", batch_size * batches
  entries = _sources(path) if path.exists() else []
  complete = pieces(folder)
  entry = next((x for x in entries if x["fingerprint"] == fingerprint), None)
  if entry is None:
    if entries and not any(entries[-1]["first"] <= number for number in complete):
      entries.pop()  # it was claimed but never begun
    for before in entries:
      if missing := len(_missing(before, complete)):
        raise ValueError(
          f"{folder}: {missing} {'piece' if missing == 1 else 'pieces'} of {before['source']}"
          " still missing; embed it again to resume, then append another source"
        )
    last = entries[-1] if entries else dict(first=0, samples=0, piece=1, place=0)
    entry = dict(
      source=name,
      fingerprint=fingerprint,
      samples=samples,
      piece=piece,
      batch_size=batch_size,
      first=last["first"] + -(-last["samples"] // last["piece"]),
      place=last["place"] + last["samples"],
    )
    if write:
      _write_json(path, [*entries, entry])
  if entry["batch_size"] != batch_size:
    raise ValueError(
      f"{folder} was begun with batch size {entry['batch_size']}, which decides what is in which"
      f" file; the batch size is now {batch_size}"
    )
  left = _missing(entry, complete)
  count = -(-samples // piece)
  return Range(entry["first"], entry["place"], left[0] if left else count, not left)


def begun(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the sources that a store was begun with, in order, as the attribute `Store.sources`."""
  path = folder / "sources.json"
  return _sources(path) if path.exists() else []


def fingerprints(folder: pathlib.Path) -> list[str]:
  """Returns the fingerprints of the sources that a store was begun with."""
  return [entry["fingerprint"] for entry in begun(folder)]


def _missing(entry: Mapping[str, Any], complete: Mapping[int, Any]) -> list[int]:
  """The pieces of a source that are missing, counted from its first one."""
  count = -(-entry["samples"] // entry["piece"])
  return [i for i in range(count) if entry["first"] + i not in complete]


def write(
  folder: pathlib.Path,
  piece: int,
  vectors: np.ndarray,
  samples: np.ndarray,
  *,
  labels: np.ndarray | None = None,
  sizes: np.ndarray | None = None,
  part: int = 0,
  parts: int = 1,
  left_out: Mapping[str, int] | None = None,
) -> None:
  """Writes this process's rows of a piece.

  Args:
    folder: of the store.
    piece: its number, counted over all sources.
    vectors: [N, D] or [N, 1 + T, D], of a dtype of reader.DTYPES.
    samples: [N, 2] uint64: the id of each row's sample, and its place.
    labels: [N] int32, for images.
    sizes: [N, 2] int32, height and width of the images that views were cut from.
    part: the number of this process.
    parts: the number of processes.
    left_out: {reason: number of samples without a row}.

  Raises:
    ValueError: if the dtype or shape differs from the header.
  """
  header = checksums.read_json(folder / "header.json")
  shape = reader.row_shape(header)
  if (vectors.dtype, vectors.shape[1:]) != (reader.DTYPES[header["dtype"]], shape):
    raise ValueError(
      f"{folder} holds rows of {header['dtype']} and shape {shape}; got"
      f" {vectors.dtype} and {vectors.shape[1:]}"
    )
  stem = f"{piece:05}.{part}-of-{parts}"
  bits = vectors.view(np.uint16) if vectors.dtype == reader.DTYPES["bfloat16"] else vectors
  (folder / f"{stem}.json").unlink(missing_ok=True)  # marks the old files as complete
  arrays = {
    "vectors": bits,
    "crc": reader.row_sums(bits),
    "samples": np.asarray(samples, np.uint64),
  }
  if labels is not None:
    arrays["labels"] = np.asarray(labels, np.int32)
  if sizes is not None:
    arrays["sizes"] = np.asarray(sizes, np.int32)
  for name, array in arrays.items():
    with atomic_write(folder / f"{stem}.{name}.npy") as file:
      np.save(file, array, allow_pickle=False)
  sums = {name: reader.checksum(folder / f"{stem}.{name}.npy") for name in arrays}
  _write_json(
    folder / f"{stem}.json",
    dict(
      piece=piece,
      part=part,
      parts=parts,
      rows=len(vectors),
      sums=sums,
      left_out=dict(left_out or {}),
    ),
  )


def pieces(folder: pathlib.Path) -> dict[int, list[dict[str, Any]]]:
  """Returns {piece: its parts, in order} of the pieces of which all parts exist."""
  by_piece: dict[tuple[int, int], list[dict[str, Any]]] = {}
  for path in folder.glob("*-of-*.json"):
    part = checksums.read_json(path) | dict(stem=path.stem)
    by_piece.setdefault((part["piece"], part["parts"]), []).append(part)
  return {
    piece: sorted(existing, key=lambda part: part["part"])
    for (piece, parts), existing in sorted(by_piece.items())
    if len(existing) == parts
  }


def finish(folder: pathlib.Path, *, captions: bool) -> None:
  """Makes a store of the pieces in a folder; other files in it stay.

  Args:
    folder: of the store.
    captions: whether a sample may have several rows.

  Raises:
    ValueError: if a piece is missing, an id belongs to two samples, or there are no rows.
  """
  header, sources = checksums.read_json(folder / "header.json"), _sources(folder / "sources.json")
  complete = pieces(folder)
  for entry in sources:
    if missing := _missing(entry, complete):
      raise ValueError(
        f"{folder}: pieces {tree.shown(missing)} of {entry['source']} are missing;"
        " do all processes write to the same disk?"
      )
  files = [part for parts in complete.values() for part in parts]
  path = folder / "manifest.json"
  before = checksums.read_json(path) if path.exists() else None
  if before and before["files"] == files:
    return
  left_out: collections.Counter[str] = collections.Counter()
  for file in files:
    left_out.update(file["left_out"])
  if not any(file["rows"] for file in files):
    raise ValueError(f"{folder}: no sample has a vector; left out: {dict(left_out)}")
  digest, index = _index(folder, files, captions=captions)
  _write_json(
    path,
    dict(
      header=header,
      sources=sources,
      rows=sum(file["rows"] for file in files),
      ids=digest,
      index=index,
      left_out=left_out,
      files=files,
    ),
  )
  # A process that reads the store as it was before may still open the index of that time.
  known = {*index, *(before or dict(index={}))["index"]}
  for index_file in [*folder.glob("ids-*.npy"), *folder.glob("rows-*.npy")]:
    if index_file.name not in known:
      index_file.unlink()


def _index(
  folder: pathlib.Path, files: Sequence[Mapping[str, Any]], *, captions: bool
) -> tuple[str, dict[str, str]]:
  """Writes the index of these files; returns hex digits of the ids, and {file: checksum}."""
  count = sum(file["rows"] for file in files)
  files_hash = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
  paths = [folder / f"{name}-{files_hash}.npy" for name in ("ids", "rows")]
  ids, rows = (
    np.lib.format.open_memmap(f"{path}.part", "w+", np.uint64, (count,)) for path in paths
  )
  digest, done = hashlib.sha256(), 0
  for chunk in _by_high_bits(folder, files, count):
    chunk = chunk[np.argsort(chunk[:, 0], kind="stable")]
    repeated = chunk[1:, 0] == chunk[:-1, 0]
    wrong = repeated & (chunk[1:, 2] != chunk[:-1, 2]) if captions else repeated
    if wrong.any():
      i, number = int(np.flatnonzero(wrong)[0]), int(wrong.sum())
      raise ValueError(
        f"{folder}: {number} {'row has' if number == 1 else 'rows have'} the id of another sample,"
        f" first samples {int(chunk[i, 2])} and {int(chunk[i + 1, 2])}, so their pairs cannot be"
        " told apart. Give each of several sources a name, as parts of config.data.mixture: delete"
        " the folder and embed them again."
      )
    ids[done : done + len(chunk)], rows[done : done + len(chunk)] = chunk[:, 0], chunk[:, 1]
    digest.update(chunk[:, 0][np.append(True, ~repeated)[: len(chunk)]].tobytes())
    done += len(chunk)
  for path, array in zip(paths, (ids, rows)):
    array.flush()
    pathlib.Path(f"{path}.part").replace(path)
  return digest.hexdigest()[:32], {path.name: reader.checksum(path) for path in paths}


def _by_high_bits(
  folder: pathlib.Path, files: Sequence[Mapping[str, Any]], count: int
) -> Iterator[np.ndarray]:
  """Yields (id, row, place) of all rows, [N, 3] uint64, by ascending ranges of ids.

  Each range fits in memory. One scratch file holds the ranges one after another, because a file for
  each would be more files than a process can have open, from a billion rows on.
  """
  bits = max(0, (count // reader.CHUNK).bit_length())
  sizes = np.zeros(1 << bits, np.int64)
  for chunk in _samples(folder, files):
    sizes += np.bincount(_high(chunk[:, 0], bits), minlength=len(sizes))
  ends = np.cumsum(sizes)
  place, row = ends - sizes, 0  # where the next row of each range goes
  with tempfile.TemporaryFile(dir=folder) as scratch:
    for chunk in _samples(folder, files):
      rows = np.arange(row, row + len(chunk), dtype=np.uint64)
      row += len(chunk)
      high = _high(chunk[:, 0], bits)
      order = np.argsort(high, kind="stable")
      table = np.stack([chunk[:, 0], rows, chunk[:, 1]], 1)[order]
      numbers, first = np.unique(high[order], return_index=True)
      for number, part in zip(numbers.tolist(), np.split(table, first[1:])):
        scratch.seek(int(place[number]) * _ROW)
        scratch.write(part.tobytes())
        place[number] += len(part)
    for end, size in zip(ends.tolist(), sizes.tolist()):
      scratch.seek((end - size) * _ROW)
      yield np.frombuffer(scratch.read(size * _ROW), np.uint64).reshape(-1, 3)


def _samples(folder: pathlib.Path, files: Sequence[Mapping[str, Any]]) -> Iterator[np.ndarray]:
  """Yields the id and the place of all rows, [n, 2] uint64, n <= reader.CHUNK."""
  for file in files:
    samples = reader.load(folder / f"{file['stem']}.samples.npy")
    for start in range(0, len(samples), reader.CHUNK):
      yield np.asarray(samples[start : start + reader.CHUNK])


def _high(ids: np.ndarray, bits: int) -> np.ndarray:
  """The range that each id belongs to: its highest bits, [n] int64."""
  return (ids >> np.uint64(64 - bits) if bits else np.zeros_like(ids)).astype(np.int64)


def _sources(path: pathlib.Path) -> list[dict[str, Any]]:
  """The content of sources.json, a list; the manifest has the same list with a checksum.

  Raises:
    checksums.Damaged: if it is not JSON, or not a list.
  """
  entries = checksums.load_json(path)
  if not isinstance(entries, list):
    raise checksums.Damaged(f"{path} is damaged: it is not a list")
  return entries


def _write_json(path: pathlib.Path, value: Any) -> None:
  if isinstance(value, Mapping):
    value = checksums.seal(value)
  with atomic_write(path) as file:
    file.write((json.dumps(value, indent=1) + "\n").encode())
