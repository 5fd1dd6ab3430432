"""The train batches of a run, through its stages."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign import stages
from bigalign.data.loader import training
from bigalign.data.loader.pairs import Pairs, pair_batches, stored_sides
from bigalign.data.loader.workers import Batches
from bigalign.data.sources.base import Source
from bigalign.data.sources.mixture import check_sizes
from bigalign.inputs import check_augment, check_tokenizer


def make_batches(
  source: Source | Pairs, reading: Mapping[str, Any], *, rejected_log: str, **where: Any
) -> Batches:
  """The train batches of what open_data gave, from a position on; arguments as of train_batches."""
  if isinstance(source, Pairs):
    return pair_batches(source, **where, **reading)
  return training.train_batches(source, rejected_log=rejected_log, **where, **reading)


def staged_batches(
  course: Sequence[stages.Stage],
  source: Source | Pairs,
  reading: Mapping[str, Any],
  *,
  rows: Sequence[np.ndarray],
  step: int,
  start: int,
  **where: Any,
) -> Generator[tuple[stages.Stage, dict[str, np.ndarray]], None, None]:
  """(stage, train batch) of every update behind the first `step` ones, up to the end of the run.

  The first stage's batches are read ahead from here on, those of the others from when they begin.
  Close the iterator to end the workers.

  Args:
    course: the stages of the run.
    source, reading: as open_data gave them.
    rows: of each stage's global batch, which this host owns.
    start: position in the data of the first sample; a stage goes on where the one before stopped.
    where: other arguments of train_batches.
  """
  batches = _staged(course, source, reading, rows, step, start, where)
  next(batches, None)  # the first stage's are made, and read ahead
  return batches


def _staged(course, source, reading, rows, step, start, where) -> Generator[Any, None, None]:
  first = True
  for stage, own in zip(course, rows):
    if stage.end <= step:
      continue
    stop = start + (stage.end - step) * stage.batch_size
    data = (
      {}
      if isinstance(source, Pairs)
      else {name: stage.config["data"].get(name) for name in ("image_size", "tokenizer", "augment")}
    )
    made = make_batches(
      source,
      {**reading, **data},
      batch_size=stage.batch_size,
      rows=own,
      start=start,
      stop=stop,
      **where,
    )
    with contextlib.closing(made):
      if first:
        yield
      first = False
      for batch in made:
        yield stage, batch
    step, start = stage.end, stop


def check_stages(course: Sequence[stages.Stage], source: Source | Pairs, text_tower: Any) -> None:
  """Raises ValueError or TypeError, naming the stage, for one that its data does not fit."""
  check_stored(course)
  for stage in course:
    data = stage.config["data"]
    with stages.named(stage):
      check_sizes(source, batch_size=stage.batch_size)
      check_tokenizer(text_tower, data["tokenizer"])
      check_augment(data.get("augment") or {})


def check_stored(course: Sequence[stages.Stage]) -> None:
  """Raises ValueError, naming the stage, for one that changes what is read from stores."""
  own = course[-1].config["data"]
  of = {"image": ("image_size", "augment"), "text": ("tokenizer",)}
  stored = [name for side in stored_sides(own.get("stores")) for name in of[side]]
  for stage in course:
    for name in (x for x in stored if stage.config["data"].get(x) != own.get(x)):
      raise ValueError(
        f"{stage.where}.data.{name} has no effect on what is in config.data.stores; leave it out"
      )
