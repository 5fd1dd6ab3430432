"""Batches of augmented views of images for a teacher: every sample once, in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigalign.data.fields.replay import Replay
from bigalign.data.loader.evaluation import prefetch_two
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.training import SampleReader, checked_rows, words
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import REASONS, rejection
from bigalign.data.sources.base import Source


def view_batches(
  source: Source,
  data: DataOptions,
  replay: Replay,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  start: int = 0,
) -> Batches:
  """The views of every sample from `start` on, in the same number of batches on every host.

  Fields: `view` [A, b, S, S, 3] uint8, `pixels` [b, 2] int32 (height and width of the image), and
  `label`, `image_id`, `sample_id`, `valid` and `rejects` as of eval_batches.

  Args:
    source: the samples.
    data: how they are read; its `augment` and `image_size` make the views.
    replay: the number and the seed of the views.
    batch_size: of the global batch.
    rows: the rows of the global batch that this host owns.
    start: the first sample.
  """
  own = checked_rows(rows, batch_size=batch_size)
  batches = _ViewBatches(source, data, replay, batch_size=batch_size, rows=own, start=start)
  return iterate(batches, workers=data.workers)


class _ViewBatches(SampleReader):
  """Element k is this host's part of the k-th batch in source order."""

  def __init__(
    self,
    source: Source,
    data: DataOptions,
    replay: Replay,
    *,
    batch_size: int,
    rows: np.ndarray,
    start: int,
  ):
    super().__init__(source, data)
    self._replay, self._batch_size, self._rows, self._start = replay, batch_size, rows, start
    self._ahead = max(data.workers, 1)  # batches until this worker's next one

  def __len__(self) -> int:
    return -(-(len(self._source) - self._start) // self._batch_size)

  def __repr__(self) -> str:
    return f"views of {self._source!r}"

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    indices = self._start + k * self._batch_size + self._rows
    prefetch_two(self._source, indices, self._ahead * self._batch_size)
    b, size = len(indices), self._data.image_size
    seen = np.zeros((self._replay.views, b, size, size, 3), np.uint8)
    pixels = np.zeros((b, 2), np.int32)
    labels, ids = np.full(b, -1, np.int32), np.zeros(b, np.uint64)
    valid = np.zeros(b, bool)
    rejects = np.zeros((b, len(REASONS)), np.int32)
    for r in np.flatnonzero(indices < len(self._source)).tolist():
      record = self._sample(int(indices[r]), rejects=rejects[r])
      if record is None:
        continue
      image, key = record["image"], record["key"]
      try:
        for number in range(self._replay.views):
          seen[number, r] = self._data.training_view(image, self._replay.rng(key, number))
      except Exception as error:
        self._reject(int(indices[r]), key, rejection(error), rejects=rejects[r])
        seen[:, r] = 0
        continue
      valid[r], labels[r], ids[r] = True, record["label"], sample_id(key)
      pixels[r] = image.shape[:2]
    return dict(
      view=seen,
      pixels=pixels,
      label=labels,
      image_id=words(indices),
      sample_id=words(ids),
      valid=valid,
      rejects=rejects,
    )
