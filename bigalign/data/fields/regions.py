"""Boxes of an image and the phrases that describe them: config.data.regions.

  data.regions = dict(field="json.regions", count=4)

A sample has a list of regions, {"box": [left, top, right, bottom], "phrase": "a red kite"}, whose
sides are shares of those of the image as it is stored. A batch then has region_boxes [B, M, 4]
float32 of the view that is trained on, region_mask [B, M] bool, which of them there are, and
region_phrases [B, M, L] int32 with region_phrases_mask [B, M, L] bool. Boxes follow the crop and
the mirror of the view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from bigalign.data.fields.base import Draws, Sample, Spec
from bigalign.data.image.transforms import Part
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, value
from bigalign.data.text.tokenizers import Tokenizer

NAMES = ("region_boxes", "region_mask", "region_phrases", "region_phrases_mask")
BOXES, MASK, PHRASES, PHRASES_MASK = NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionOptions:
  """The regions of each image.

  Args:
    field: of the list of regions, such as "json.regions".
    count: M, regions of an image in a batch, drawn without replacement from those that the view
      shows. CLOC draws 4.
    visible: a region is left out if the view shows a smaller share of its area.
  """

  field: str
  count: int = 4
  visible: float = 0.5

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f"config.data.regions.count={self.count}: at least 1")
    if not 0 < self.visible <= 1:
      raise ValueError(f"config.data.regions.visible={self.visible}: above 0 and at most 1")


def spec(options: RegionOptions | None, length: int) -> Spec:
  """The arrays of the regions; length: L."""
  if options is None:
    return {}
  m = options.count
  return {
    BOXES: ((m, 4), np.dtype(np.float32)),
    MASK: ((m,), np.dtype(bool)),
    PHRASES: ((m, length), np.dtype(np.int32)),
    PHRASES_MASK: ((m, length), np.dtype(bool)),
  }


def of_view(box: np.ndarray, part: Part) -> tuple[np.ndarray, float]:
  """A box as shares of the sides of a view, cut at its border, and the share of it that is left.

  Args:
    box: [4], left, top, right, bottom as shares of the sides of the image.
    part: of the image that the view shows.
  """
  low = np.array([part.left / part.width, part.top / part.height])
  size = np.array([part.box_width / part.width, part.box_height / part.height])
  corners = (box.reshape(2, 2) - low) / size
  cut = np.clip(corners, 0.0, 1.0)
  whole, left = (np.prod(x[1] - x[0]) for x in (corners, cut))
  if part.mirrored:
    cut[:, 0] = 1 - cut[::-1, 0]
  return cut.reshape(4).astype(np.float32), float(left / whole)


class Regions:
  """The regions of a source, as a field.

  Args:
    options: config.data.regions.
    source: of the samples.
    tokenizer: of the phrases.
  """

  def __init__(self, options: RegionOptions, source: Source, tokenizer: Tokenizer):
    self._options, self._source, self._tokenizer = options, source, tokenizer
    self.spec = spec(options, tokenizer.length)

  def read(self, sample: Sample, draws: Draws) -> tuple[np.ndarray, list[str]]:
    """([n, 4] boxes of the view, n phrases), n <= M.

    Raises:
      Rejected: "no_column" for a sample without the field; "bad_metadata" for regions that are not
        as the module says.
    """
    options = self._options
    regions = shown(self._source, sample, options.field, options.visible)
    chosen = draws.of("regions").permutation(len(regions))[: options.count]
    boxes = np.array([regions[i][0] for i in chosen], np.float32).reshape(-1, 4)
    return boxes, [regions[i][1] for i in chosen]

  def stack(self, values: Sequence[tuple[np.ndarray, list[str]]]) -> dict[str, np.ndarray]:
    """{name: [b, …]}."""
    m = self._options.count
    arrays = {
      name: np.zeros((len(values), *shape), dtype) for name, (shape, dtype) in self.spec.items()
    }
    texts = [phrases + [""] * (m - len(phrases)) for _, phrases in values]
    ids, mask = self._tokenizer.encode_batch([text for row in texts for text in row])
    arrays[PHRASES], arrays[PHRASES_MASK] = (
      rearrange(x, "(b m) l -> b m l", m=m) for x in (ids, mask)
    )
    for row, (boxes, _) in enumerate(values):
      arrays[BOXES][row, : len(boxes)] = boxes
      arrays[MASK][row, : len(boxes)] = True
    return arrays


def shown(
  source: Source, sample: Sample, field: str, visible: float
) -> list[tuple[np.ndarray, str]]:
  """The regions of which the view of a sample shows enough: boxes [4] of the view, and phrases.

  Args:
    source: of the sample.
    sample: with its part.
    field: as of RegionOptions, and so is `visible`.

  Raises:
    Rejected: as regions_of.
  """
  assert sample.part is not None, "the loader gives it"
  found = []
  for box, phrase in regions_of(source, sample.index, field):
    seen, share = of_view(box, sample.part)
    if share >= visible:
      found.append((seen, phrase))
  return found


def regions_of(source: Source, i: int, field: str) -> list[tuple[np.ndarray, str]]:
  """The regions of a sample: boxes [4] float64, as shares of the sides of the image, and phrases.

  Raises:
    Rejected: "no_column" for a sample without the field; "bad_metadata" for regions that are not as
      the module says.
  """
  where = f"the regions of sample {i} ({field})"
  stored = value(source, i, field)
  if stored is None:
    raise Rejected("no_column", f"{where} are missing; an image without regions has an empty list")
  if not isinstance(stored, Sequence) or isinstance(stored, str | bytes):
    raise Rejected("bad_metadata", f"{where} are a {type(stored).__name__}, expected a list")
  return [_checked(region, where) for region in stored]


def _checked(region: Any, where: str) -> tuple[np.ndarray, str]:
  """(box [4] float64, phrase) of a stored region; raises Rejected."""
  if not isinstance(region, Mapping) or not {"box", "phrase"} <= region.keys():
    raise Rejected("bad_metadata", f"{where}: {region!r} is not a dict with box and phrase")
  try:
    box = np.asarray(region["box"], np.float64)
  except (TypeError, ValueError) as error:
    raise Rejected("bad_metadata", f"{where}: the box {region['box']!r}: {error}") from None
  phrase = region["phrase"]
  fits = box.shape == (4,) and np.isfinite(box).all() and (box[2:] > box[:2]).all()
  if not fits or box.min() < -1e-3 or box.max() > 1 + 1e-3:
    raise Rejected(
      "bad_metadata",
      f"{where}: the box {region['box']!r} is not left, top, right, bottom as shares of the image's"
      " sides, from 0 to 1",
    )
  if not isinstance(phrase, str) or not phrase.strip():
    raise Rejected("bad_metadata", f"{where}: the phrase {phrase!r} is not a text")
  return np.clip(box, 0.0, 1.0), phrase
