"""A field: arrays that a batch has in addition to image and text, because a config asks for them.

One file of this package per kind of field; loader/extra_fields.py lists them. A field says which
arrays it adds (`spec`), reads one sample at a time (`read`), and joins the values of a batch
(`stack`). Its random draws are named, so adding a field does not change what another one draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigalign.data.image.transforms import Part
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import REASONS, Rejected

# {name: (shape without the batch axis, dtype)}
Spec = Mapping[str, tuple[tuple[int, ...], Any]]


class Draws(NamedTuple):
  """The random draws of a position, by the name of the field."""

  seed: int
  position: int

  def of(self, name: str) -> np.random.Generator:
    """The generator of one field, which no other field advances."""
    return philox(self.seed, self.position, name)


@dataclasses.dataclass(frozen=True)
class Sample:
  """What fields read.

  Args:
    index: of the sample in the source.
    record: of the source, its image decoded to uint8 [H, W, 3], unless a store has its vector.
    captions: {field: captions} of the sample.
    places: of its texts among all captions, the first text first; -1 for a text that is not a
      caption (absent, or made from another one).
    second: the place of the second caption; -1 without one.
    replay: the number of the view that was drawn of those that teachers saw; -1 without such views.
    rejects: [R] int32, how many samples were rejected for its row, by reason; see `count`.
    part: of the image that the view of a batch shows; None if no field reads it.
  """

  index: int
  record: Mapping[str, Any]
  captions: Mapping[str, Sequence[Any]]
  places: tuple[int, ...]
  second: int = -1
  replay: int = -1
  rejects: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(REASONS), np.int32))
  part: Part | None = None

  @property
  def key(self) -> str:
    """The key of the sample."""
    return str(self.record["key"])

  def count(self, rejected: Rejected) -> None:
    """Counts another sample that was rejected for the row of this one."""
    self.rejects[REASONS.index(rejected.reason)] += 1

  def caption(self, place: int) -> tuple[str, int, int]:
    """The field of a caption, its place there, and how many captions that field has."""
    for field, texts in self.captions.items():
      if place < len(texts):
        return field, place, len(texts)
      place -= len(texts)
    raise IndexError(f"{self.key} has no caption {place}")


class Field(Protocol):
  """Arrays of a batch, read sample by sample. Picklable: workers get a copy.

  spec: {name: (shape without the batch axis, dtype)} of the arrays. Vectors of stores have the
    dtype of their store, whatever the spec says.
  """

  @property
  def spec(self) -> Spec: ...

  def read(self, sample: Sample, draws: Draws) -> Any:
    """The value of one sample; raises Rejected if it has none."""

  def stack(self, values: Sequence[Any]) -> dict[str, np.ndarray]:
    """{name: [b, ...]} of the values of a batch, in the order of its rows."""
