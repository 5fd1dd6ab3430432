"""Batches of a source for tests that write the options of config.data as keywords."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from helpers.shipped import load

from bigalign.data.loader import evaluation, training
from bigalign.data.loader.options import DataOptions, resolve_data
from bigalign.data.loader.workers import Batches
from bigalign.data.sources.base import Source
from bigalign.inputs import open_data
from bigalign.options import plain

PHOTO_SHARDS = "::".join(
  f"$BIGALIGN_DATA/{name}/train/00000.tar" for name in ("coco2k", "flickr8k", "emoji")
)


def data_options(**values: Any) -> DataOptions:
  """config.data with these values, every default filled in."""
  return resolve_data(values)


def train_batches(
  source: Source,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  seed: int,
  start: int = 0,
  stop: int | None = None,
  lane_rows: int = 0,
  rejected_log: str = "",
  **options: Any,
) -> Batches:
  """Train batches of an opened source; options: config.data."""
  return training.train_batches(
    source,
    data_options(**options),
    batch_size=batch_size,
    rows=rows,
    seed=seed,
    start=start,
    stop=stop,
    lane_rows=lane_rows,
    rejected_log=rejected_log,
  )


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  captions: int = 1,
  images: bool = True,
  start: int = 0,
  **options: Any,
) -> Batches:
  """Evaluation batches of an opened source; options: config.data."""
  return evaluation.eval_batches(
    source,
    data_options(**options),
    batch_size=batch_size,
    rows=rows,
    captions=captions,
    images=images,
    start=start,
  )


def first_photo_batches(source: str, captions, **source_options) -> list[dict]:
  """The first batches of configs/photos.py from another source, whatever order it prefers."""
  data = plain(load("photos"))["data"] | dict(
    source=source, captions=captions, source_options=source_options, workers=0, order="exact"
  )
  inputs = open_data(data_options(**data))
  with contextlib.closing(
    inputs.batches(rejected_log="", batch_size=128, rows=np.arange(128), seed=0, stop=400)
  ) as batches:
    return list(batches)
