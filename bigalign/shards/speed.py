"""Samples per second of the training data loader, with and without decoding."""

from __future__ import annotations

import contextlib
import math
import time

import numpy as np

from bigalign.data.loader.options import resolve_data
from bigalign.data.loader.training import train_batches
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.order.order import Order
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, read

BATCH = 64


class _Reading:
  """Batches whose samples are read in the order of training, but not decoded."""

  def __init__(self, source: Source, workers: int):
    self._source = source
    self._workers = max(workers, 1)
    self._places = Order(source, seed=0, lane_rows=BATCH)

  def __len__(self) -> int:
    return 1 << 40

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    indices, coming = (
      self._places(np.arange(n * BATCH, (n + 1) * BATCH)) for n in (k, k + self._workers)
    )
    self._places.prefetch(np.append(indices, coming), share=1 / self._workers)
    for i in indices.tolist():
      with contextlib.suppress(Rejected):
        read(self._source, i)
    return dict(indices=indices)


def loader_speeds(
  source: Source, *, image_size: int, workers: int, seconds: float
) -> dict[str, float]:
  """Measures the data loader.

  Args:
    source: to read.
    image_size: of training, pixels.
    workers: processes of the loader.
    seconds: length of each measurement.

  Returns:
    Samples per second: "read", and "decoded" with all the work of training: decoding, cropping,
    resizing and tokenising into bytes.
  """
  data = resolve_data(
    dict(
      image_size=image_size,
      tokenizer=dict(name="byte", length=64),
      workers=workers,
      captions_per_image=1 << 16,
      stop_at_bad_shard=False,
    )
  )
  batches = train_batches(source, data, batch_size=BATCH, rows=np.arange(BATCH), seed=0)
  return dict(
    read=_rate(iterate(_Reading(source, workers), workers=workers), workers, seconds),
    decoded=_rate(batches, workers, seconds),
  )


def _rate(batches: Batches, workers: int, seconds: float) -> float:
  with contextlib.closing(batches):
    for _ in range(3 * max(workers, 1)):  # skip the batches that were prefetched at the start
      next(batches)
    begin, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - begin) < seconds or not count:
      next(batches)
      count += 1
  return count * BATCH / taken


def hosts_needed(images_per_second: float, rate: float) -> int:
  """Returns how many hosts with this rate deliver this many images per second."""
  return max(1, math.ceil(images_per_second / rate))
