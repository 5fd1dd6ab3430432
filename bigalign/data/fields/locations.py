"""Texts with boxes that a decoder predicts from the image, as in LocCa: config.data.locations.

  data.locations = dict(field="json.regions", grid=1000)

LocCa, https://arxiv.org/abs/2403.19596, trains one decoder on three tasks, which the beginning of
the text names: "Cap: a dog on a beach", "ARef: the dog : 120 430 655 980" (a phrase, then its box)
and "GCap: 120 430 655 980 : the dog". Each position of a run draws a task, and a region for the
last two. A box is left, top, right and bottom of the view that is trained on, as whole numbers that
the tokenizer spells like any text. A batch then has

  task          [B] int32, a number of TASKS
  task_text     [B, L] int32, the text
  task_counted  [B, L] bool, its tokens after the beginning, which the loss counts

A sample without a region that the view shows has the task "cap".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bigalign.data.fields.base import Draws, Sample, Spec
from bigalign.data.fields.regions import shown
from bigalign.data.sources.base import Source
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.options import DEFAULTS

TASKS = ("cap", "aref", "gcap")
BEGINNINGS = ("Cap:", "ARef:", "GCap:")
NAMES = ("task", "task_text", "task_counted")
TASK, TEXT, COUNTED = NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
  """How often each task is drawn, relative to the others.

  Args:
    cap: the caption.
    aref: a box from its phrase.
    gcap: a phrase from its box.
  """

  cap: float = 1.0
  aref: float = 1.0
  gcap: float = 1.0

  def __post_init__(self) -> None:
    if min(self.each) < 0 or not sum(self.each):
      raise ValueError(
        f"config.data.locations.shares={dict(zip(TASKS, self.each))}: at least 0, one of them above"
      )

  @property
  def each(self) -> tuple[float, float, float]:
    """In the order of TASKS."""
    return self.cap, self.aref, self.gcap


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocationOptions:
  """The texts with boxes.

  Args:
    field: of the list of regions, as in config.data.regions.
    grid: sides of a box are whole numbers from 0 to grid - 1. The paper's number was not
      found; 1000 is ours.
    shares: of the tasks. LocCa gives every image all three in each step; here a draw chooses one.
    visible: a region is left out if the view shows a smaller share of its area.
  """

  field: str
  grid: int = 1000
  shares: Shares = DEFAULTS
  visible: float = 0.5

  def __post_init__(self) -> None:
    if self.grid < 2:
      raise ValueError(f"config.data.locations.grid={self.grid}: at least 2")
    if not 0 < self.visible <= 1:
      raise ValueError(f"config.data.locations.visible={self.visible}: above 0 and at most 1")


def spec(options: LocationOptions | None, length: int) -> Spec:
  """The arrays of the texts; length: L."""
  if options is None:
    return {}
  return {
    TASK: ((), np.dtype(np.int32)),
    TEXT: ((length,), np.dtype(np.int32)),
    COUNTED: ((length,), np.dtype(bool)),
  }


def spelled(box: np.ndarray, grid: int) -> str:
  """A box [4] of shares as text.

  >>> spelled(np.array([0.0, 0.25, 0.5, 1.0]), 1000)
  '0 250 500 999'
  """
  return " ".join(str(min(int(side * grid), grid - 1)) for side in box.tolist())


class Locations:
  """The texts with boxes of a source, as a field.

  Args:
    options: config.data.locations.
    source: of the samples.
    tokenizer: of the texts.
  """

  def __init__(self, options: LocationOptions, source: Source, tokenizer: Tokenizer):
    self._options, self._source, self._tokenizer = options, source, tokenizer
    self.spec = spec(options, tokenizer.length)
    ids, mask = tokenizer.encode_batch(list(BEGINNINGS))
    end = int(tokenizer.adds_end)
    self._beginnings = [row[seen][: seen.sum() - end] for row, seen in zip(ids, mask)]

  def read(self, sample: Sample, draws: Draws) -> tuple[int, str]:
    """(task, text) of a sample; raises Rejected as data/fields/regions.py."""
    options = self._options
    regions = shown(self._source, sample, options.field, options.visible)
    rng = draws.of("locations")
    shares = np.array(options.shares.each)
    task = int(rng.choice(len(TASKS), p=shares / shares.sum()))
    if not task or not regions:
      field, place, _ = sample.caption(sample.places[0])
      return 0, f"{BEGINNINGS[0]} {sample.captions[field][place]}"
    box, phrase, _ = regions[int(rng.integers(len(regions)))]
    parts = phrase, spelled(box, options.grid)
    return task, f"{BEGINNINGS[task]} {' : '.join(parts if task == 1 else parts[::-1])}"

  def stack(self, values: Sequence[tuple[int, str]]) -> dict[str, np.ndarray]:
    """{name: [b, …]}."""
    tasks, texts = zip(*values)
    ids, mask = self._tokenizer.encode_batch(list(texts))
    counted = mask.copy()
    for row, own, task in zip(counted, ids, tasks):
      # A tokenizer may join the last characters of the beginning with those that follow.
      known = self._beginnings[task]
      same = own[: len(known)] == known[: len(own)]
      row[: len(same) if same.all() else int(np.argmin(same))] = False
    return {TASK: np.array(tasks, np.int32), TEXT: ids, COUNTED: counted}
