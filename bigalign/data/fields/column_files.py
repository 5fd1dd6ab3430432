"""Files of one number per sample of a source, such as the scores that `bigalign score` writes.

NAME.npy holds [N] float32, in the order of the source, NaN for a sample without a value; NAME.json
says which source, and what the numbers are. 10^10 samples take 40 GB, mapped into memory.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.lib import format as npy

from bigalign.data.files import storage
from bigalign.data.files.patterns import expand_variables
from bigalign.data.sources.base import Source
from bigalign.data.sources.views import View


class Samples(Protocol):
  """What a column has a number for each of: a source, or another column."""

  @property
  def fingerprint(self) -> str: ...
  def __len__(self) -> int: ...


def write(
  out: str, source: Samples, parts: Iterable[np.ndarray], *, made_by: dict[str, Any]
) -> dict[str, Any]:
  """Writes a column in parts; returns its manifest.

  Args:
    out: path without an ending.
    source: of the samples.
    parts: [n] float32 each, in the order of the source; together as many as it has samples.
    made_by: what the numbers are, for the manifest.

  Raises:
    ValueError: if there are more or fewer numbers than samples.
  """
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  manifest = dict(**made_by, fingerprint=source.fingerprint, samples=len(source))
  count = 0
  with storage.atomic_write(f"{out}.npy") as file:
    npy.write_array_header_1_0(  # type: ignore[no-untyped-call]
      file, dict(descr="<f4", fortran_order=False, shape=(len(source),))
    )
    for part in parts:
      count += len(part)
      file.write(part.astype("<f4").tobytes())
    if count != len(source):
      raise ValueError(f"{out}: {count} numbers for {len(source)} samples of {source!r}")
  with storage.atomic_write(f"{out}.json") as file:  # last: a column is valid once this exists
    file.write(json.dumps(manifest, indent=1).encode() + b"\n")
  return manifest


class Unfinished:
  """A column of which a part is written: OUT.part holds the numbers, OUT.part.json says of what.

  Args:
    out: path of the column, without an ending.
    source: of the samples.
    made_by: what the numbers are; with other ones, or another source, the column begins again.
    write: whether this process writes; True in exactly one.
  """

  def __init__(self, out: str, source: Samples, *, made_by: dict[str, Any], write: bool = True):
    self._out, self._source, self._made_by, self._write = out, source, made_by, write
    self._part, manifest = pathlib.Path(f"{out}.part"), pathlib.Path(f"{out}.part.json")
    self.count = 0  # numbers that are there
    if not write:
      return
    text = json.dumps(dict(**made_by, fingerprint=source.fingerprint, samples=len(source)))
    if manifest.is_file() and manifest.read_text() == text and self._part.is_file():
      self.count = min(self._part.stat().st_size // 4, len(source))
      return
    manifest.parent.mkdir(parents=True, exist_ok=True)
    self._part.unlink(missing_ok=True)
    with storage.atomic_write(manifest) as file:
      file.write(text.encode())

  def put(self, first: int, numbers: np.ndarray) -> None:
    """Stores [n] float32, of the samples from `first` on; all before them are there."""
    if not self._write:
      return
    with open(self._part, "r+b" if self._part.exists() else "w+b") as file:
      file.seek(4 * first)
      file.write(numbers.astype("<f4").tobytes())
      file.truncate()
      file.flush()
      os.fsync(file.fileno())  # after a loss of power too, the size says what is there
    self.count = first + len(numbers)

  def finish(self, **more: Any) -> None:
    """Makes the column, with `more` in its manifest, and removes the parts."""
    if not self._write:
      return
    write(self._out, self._source, self._chunks(), made_by={**self._made_by, **more})
    self._part.unlink()
    pathlib.Path(f"{self._out}.part.json").unlink()

  def _chunks(self) -> Iterator[np.ndarray]:
    with self._part.open("rb") as file:
      while content := file.read(1 << 22):
        yield np.frombuffer(content, "<f4")


class ColumnFile:
  """The numbers of the samples of a source. Picklable: holds paths.

  Attributes:
    numbers: [N] float32, mapped.
    manifest: what they are.

  Args:
    path: of the column, without an ending; may hold $NAME.
    source: that it was made of, or a view of it; None if it does not matter.
    where: the option that names it, for errors.

  Raises:
    FileNotFoundError: if it does not exist.
    ValueError: if it was made of another source, or the source changed since.
  """

  def __init__(self, path: str, source: Source | None, where: str):
    self._name = expand_variables(path, what=where)
    manifest_path = pathlib.Path(f"{self._name}.json")
    if not manifest_path.is_file():
      raise FileNotFoundError(f"{where}={path!r}: no {manifest_path}; `bigalign score` writes one")
    self.manifest: dict[str, Any] = json.loads(manifest_path.read_text())
    self.fingerprint: str = self.manifest["fingerprint"]
    self._view = source if isinstance(source, View) else None
    if self._view and self.fingerprint == self._view.fingerprint:
      self._view = None  # made of the view itself
    of = self._view.source if self._view else source
    if of is not None and self.fingerprint != of.fingerprint:
      raise ValueError(
        f"{where}={path!r} was made of samples with the fingerprint {self.fingerprint}, but"
        f" {of!r} has {of.fingerprint}: it is another source, or changed since; write the"
        " column again"
      )
    self._map()

  def _map(self) -> None:
    self.numbers: np.ndarray = np.load(f"{self._name}.npy", mmap_mode="r", allow_pickle=False)

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, i: int) -> float:
    return float(self.numbers[self._view.index(i) if self._view else i])

  def __getstate__(self) -> dict[str, Any]:
    return {name: x for name, x in self.__dict__.items() if name != "numbers"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._map()
