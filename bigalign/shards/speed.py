"""How many samples a second a source gives to training, with and without decoding them."""

from __future__ import annotations

import contextlib
import math
import time

import numpy as np

from bigalign.data.loader.training import train_batches
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source
from bigalign.data.sources.mixture import Order

BATCH = 64


class _Reading:
  """Batches for which samples are read in the order of training, and no more."""

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
        self._source[i]
    return dict(indices=indices)


def speeds(source: Source, *, image_size: int, workers: int, seconds: float) -> dict[str, float]:
  """{"read", "decoded"}: samples a second, each over so many seconds.

  Decoding is all that training's workers do: decode, crop, resize, tokenise (into bytes).
  """
  batches = train_batches(
    source,
    batch_size=BATCH,
    rows=np.arange(BATCH),
    seed=0,
    image_size=image_size,
    tokenizer=dict(name="byte", length=64),
    workers=workers,
    captions_per_image=1 << 16,
    stop_at_bad_shard=False,
  )
  return dict(
    read=_rate(iterate(_Reading(source, workers), workers=workers), workers, seconds),
    decoded=_rate(batches, workers, seconds),
  )


def _rate(batches: Batches, workers: int, seconds: float) -> float:
  with contextlib.closing(batches):
    for _ in range(3 * max(workers, 1)):  # what the start has filled
      next(batches)
    begin, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - begin) < seconds or not count:
      next(batches)
      count += 1
  return count * BATCH / taken


def hosts(images_per_second: float, rate: float) -> int:
  """How many hosts of this rate give as many images a second."""
  return max(1, math.ceil(images_per_second / rate))
