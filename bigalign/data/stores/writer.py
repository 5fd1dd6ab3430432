"""Writing embedding stores, piece by piece; store.py tells what they look like."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign.data.files.storage import whole
from bigalign.data.stores import reader


class Range(NamedTuple):
  """Where a source lies in a store.

  first: its first piece. place: of its first sample, among those of all sources. next: the first
  piece of its own that is missing. done: none is.
  """

  first: int
  place: int
  next: int
  done: bool


def begin(folder: pathlib.Path, header: Mapping[str, Any]) -> None:
  """Makes the folder, or finds it made for the same vectors; `header` is what tells them apart.

  Raises:
    ValueError: if it holds vectors of another tower or preprocessing; lists what differs. Without
      `dtype` and `width` in the header.
  """
  if header.get("dtype") not in reader.DTYPES or not isinstance(header.get("width"), int):
    raise ValueError(
      f"the header of {folder} needs `dtype`, one of {[*reader.DTYPES]}, and `width`,"
      f" of its vectors, and holds {dict(header)}"
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
  """The pieces of a source in a store: those that it has, or new ones behind all others.

  batches  of a piece. write: only one process may; all must claim before one fills.

  Raises:
    ValueError: if another source is not whole yet, or this one was begun in other batches.
  """
  path, piece = folder / "sources.json", batch_size * batches
  entries = json.loads(path.read_text()) if path.exists() else []
  whole = pieces(folder)
  entry = next((x for x in entries if x["fingerprint"] == fingerprint), None)
  if entry is None:
    if entries and not any(entries[-1]["first"] <= found for found in whole):
      entries.pop()  # it was named and never begun
    for before in entries:
      if _missing(before, whole):
        raise ValueError(
          f"{folder}: {len(_missing(before, whole))} pieces of {before['source']}"
          " are still missing; embed it again to go on, then append another source"
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
      f"{folder} was begun in batches of {entry['batch_size']}, which say what lies"
      f" in which file; now they would have {batch_size}"
    )
  left = _missing(entry, whole)
  count = -(-samples // piece)
  return Range(entry["first"], entry["place"], left[0] if left else count, not left)


def _missing(entry: Mapping[str, Any], whole: Mapping[int, Any]) -> list[int]:
  count = -(-entry["samples"] // entry["piece"])
  return [i for i in range(count) if entry["first"] + i not in whole]


def write(
  folder: pathlib.Path,
  piece: int,
  vectors: np.ndarray,
  samples: np.ndarray,
  *,
  labels: np.ndarray | None = None,
  part: int = 0,
  parts: int = 1,
  left_out: Mapping[str, int] | None = None,
) -> None:
  """Writes this process's rows of a piece.

  vectors [N, D], or [N, 1 + T, D], of store.DTYPES; samples [N, 2] uint64; labels [N] int32, of
  images; left_out  how many samples, by reason.
  """
  header = json.loads((folder / "header.json").read_text())
  shape = reader.row_shape(header)
  if (vectors.dtype, vectors.shape[1:]) != (reader.DTYPES[header["dtype"]], shape):
    raise ValueError(
      f"{folder} holds rows of {header['dtype']} and shape {shape}; got"
      f" {vectors.dtype} and {vectors.shape[1:]}"
    )
  stem = f"{piece:05}.{part}-of-{parts}"
  bits = vectors.view(np.uint16) if vectors.dtype == reader.DTYPES["bfloat16"] else vectors
  (folder / f"{stem}.json").unlink(missing_ok=True)  # what it says will not be so any more
  arrays = {"vectors": bits, "samples": np.asarray(samples, np.uint64)}
  if labels is not None:
    arrays["labels"] = np.asarray(labels, np.int32)
  for name, array in arrays.items():
    with whole(folder / f"{stem}.{name}.npy") as file:
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
  """{piece: its parts, in order} of the pieces of which all parts are there."""
  found: dict[tuple[int, int], list[dict[str, Any]]] = {}
  for path in folder.glob("*-of-*.json"):
    one = json.loads(path.read_text()) | dict(stem=path.stem)
    found.setdefault((one["piece"], one["parts"]), []).append(one)
  return {
    piece: sorted(some, key=lambda x: x["part"])
    for (piece, parts), some in sorted(found.items())
    if len(some) == parts
  }


def finish(folder: pathlib.Path, *, captions: bool) -> None:
  """Makes a store of the pieces; what lies there beside them stays.

  captions  a sample may have several rows

  Raises:
    ValueError: if a piece is missing, an id belongs to two samples, or there is no row at all.
  """
  header, sources = (
    json.loads((folder / f"{name}.json").read_text()) for name in ("header", "sources")
  )
  whole = pieces(folder)
  for entry in sources:
    if _missing(entry, whole):
      raise ValueError(
        f"{folder}: pieces {_missing(entry, whole)[:8]} of {entry['source']} are not"
        " there; do all processes write to the same disk?"
      )
  files = [part for parts in whole.values() for part in parts]
  path = folder / "manifest.json"
  before = json.loads(path.read_text()) if path.exists() else None
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
  # Who reads the store as it was before may still want to open the index of then.
  known = {*index, *(before or dict(index={}))["index"]}
  for one in [*folder.glob("ids-*.npy"), *folder.glob("rows-*.npy")]:
    if one.name not in known:
      one.unlink()


def _index(
  folder: pathlib.Path, files: Sequence[Mapping[str, Any]], *, captions: bool
) -> tuple[str, dict[str, str]]:
  """Writes the index of these files, beside that of others; (digits of the ids, {file: sum})."""
  count = sum(file["rows"] for file in files)
  told = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
  paths = [folder / f"{name}-{told}.npy" for name in ("ids", "rows")]
  ids, rows = (
    np.lib.format.open_memmap(f"{path}.part", "w+", np.uint64, (count,)) for path in paths
  )
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
        " Samples of several sources need names, a part of config.data.mixture each: delete the"
        " folder and embed them so."
      )
    ids[done : done + len(some)], rows[done : done + len(some)] = some[:, 0], some[:, 1]
    digest.update(some[:, 0][np.append(True, ~again)[: len(some)]].tobytes())
    done += len(some)
  for path, array in zip(paths, (ids, rows)):
    array.flush()
    pathlib.Path(f"{path}.part").replace(path)
  return digest.hexdigest()[:32], {path.name: reader.checksum(path) for path in paths}


def _by_high_bits(
  folder: pathlib.Path, files: Sequence[Mapping[str, Any]], count: int
) -> Iterator[np.ndarray]:
  """[N, 3] uint64 (id, row, place) of all rows, by ascending ranges of ids that fit in memory."""
  bits = max(0, (count // reader.CHUNK).bit_length())
  with contextlib.ExitStack() as scratch:
    heaps = [scratch.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(1 << bits)]
    row = 0
    for file in files:
      samples = np.load(folder / f"{file['stem']}.samples.npy", mmap_mode="r", allow_pickle=False)
      for start in range(0, len(samples), reader.CHUNK):
        some = np.asarray(samples[start : start + reader.CHUNK])
        table = np.stack(
          [some[:, 0], np.arange(row, row + len(some), dtype=np.uint64), some[:, 1]], 1
        )
        row += len(some)
        heap = some[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(len(some), np.uint64)
        for i in np.unique(heap).tolist():
          heaps[i].write(table[heap == i].tobytes())
    for heap_file in heaps:
      heap_file.seek(0)
      yield np.frombuffer(heap_file.read(), np.uint64).reshape(-1, 3)


def _write_json(path: pathlib.Path, value: Any) -> None:
  with whole(path) as file:
    file.write((json.dumps(value, indent=1) + "\n").encode())
