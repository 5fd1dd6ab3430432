"""Files of one number per sample of a source, such as the scores that `bigalign score` writes.

NAME.npy holds [N] float32, in the order of the source, NaN for a sample without a value; NAME.json
says which source, and what the numbers are. 10^10 samples take 40 GB, mapped into memory.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.lib import format as npy

from bigalign.data.files import storage
from bigalign.data.files.patterns import expand_variables
from bigalign.data.sources.base import Source


def write(
  out: str, source: Source, parts: Iterable[np.ndarray], *, made_by: dict[str, Any]
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


class ColumnFile:
  """The numbers of the samples of a source. Picklable: holds paths.

  Args:
    path: of the column, without an ending; may hold $NAME.
    source: that it was made of.
    where: the option that names it, for errors.

  Raises:
    FileNotFoundError: if it does not exist.
    ValueError: if it was made of another source, or the source changed since.
  """

  def __init__(self, path: str, source: Source, where: str):
    self._name = expand_variables(path, what=where)
    manifest_path = pathlib.Path(f"{self._name}.json")
    if not manifest_path.is_file():
      raise FileNotFoundError(f"{where}={path!r}: no {manifest_path}; `bigalign score` writes one")
    manifest = json.loads(manifest_path.read_text())
    if manifest["fingerprint"] != source.fingerprint:
      raise ValueError(
        f"{where}={path!r} was made of samples with the fingerprint {manifest['fingerprint']}, but"
        f" {source!r} has {source.fingerprint}: it is another source, or changed since; write the"
        " column again"
      )
    self._map()

  def _map(self) -> None:
    self.numbers: np.ndarray = np.load(f"{self._name}.npy", mmap_mode="r", allow_pickle=False)

  def __getitem__(self, i: int) -> float:
    return float(self.numbers[i])

  def __getstate__(self) -> dict[str, Any]:
    return {"_name": self._name}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._map()
