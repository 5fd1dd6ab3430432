"""Small embedding stores of given samples."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from bigalign.data.samples.ids import sample_id
from bigalign.data.stores import reader, writer
from bigalign.data.stores.reader import Store


def write_store(
  folder: pathlib.Path,
  rows: Mapping[str, np.ndarray],
  *,
  dtype: str = "float32",
  labels: Mapping[str, int] | None = None,
) -> str:
  """A store; rows: {key of a sample: [N, D], the vectors of its captions, or [D] of its image}."""
  captions = any(np.ndim(x) == 2 for x in rows.values())
  every = {key: np.atleast_2d(x) for key, x in rows.items()}
  width = next(iter(every.values())).shape[1]
  writer.begin(folder, dict(side="text" if captions else "image", width=width, dtype=dtype))
  held = writer.claim(folder, "a", len(rows), "a", batch_size=len(rows), batches=1, write=True)
  ids = np.array([sample_id(key) for key in rows], np.uint64)
  owner = np.repeat(np.arange(len(rows)), [len(x) for x in every.values()])
  samples = np.stack([ids[owner], owner.astype(np.uint64) + np.uint64(held.place)], 1)
  vectors = np.concatenate([*every.values()]).astype(reader.DTYPES[dtype])
  given = None if labels is None else np.array([labels[key] for key in rows], np.int32)
  writer.write(folder, held.first, vectors, samples, labels=given, part=0, parts=1)
  writer.finish(folder, captions=captions)
  assert len(Store(folder)) == len(owner)
  return str(folder)
