"""Boxes of an image and the phrases that describe them: config.data.regions.

  data.regions = dict(field="json.regions", count=4)

A sample has a list of regions, {"box": [left, top, right, bottom], "phrase": "a red kite"}, whose
sides are shares of those of the image as it is stored. A batch then has region_boxes [B, M, 4]
float32 of the view that is trained on, region_mask [B, M] bool, which of them there are, and
region_phrases [B, M, L] int32 with region_phrases_mask [B, M, L] bool. Boxes follow the crop and
the mirror of the view.

With `negatives=K`, a region may also list phrases that are wrong for it, "negatives": ["a blue
kite", ...]. A batch then has up to K of them in region_negatives [B, M, K, L] int32 with
region_negatives_mask [B, M, K, L] bool, and region_negatives_count [B, M] int32, how many there
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from bigalign.data.fields.base import Draws, Sample, Spec
from bigalign.data.image.transforms import Part
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, value
from bigalign.data.text.tokenizers import Tokenizer

NAMES = ("region_boxes", "region_mask", "region_phrases", "region_phrases_mask")
BOXES, MASK, PHRASES, PHRASES_MASK = NAMES
OF_NEGATIVES = ("region_negatives", "region_negatives_mask", "region_negatives_count")
NEGATIVES, NEGATIVES_MASK, NEGATIVES_COUNT = OF_NEGATIVES


class Region(NamedTuple):
  """A region of a sample: box [4], shares of the sides of an image; its phrase; wrong phrases."""

  box: np.ndarray
  phrase: str
  negatives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionOptions:
  """The regions of each image.

  Args:
    field: of the list of regions, such as "json.regions".
    count: M, regions of an image in a batch, drawn without replacement from those that the view
      shows. CLOC draws 4.
    visible: a region is left out if the view shows a smaller share of its area.
    negatives: K, phrases of the list "negatives" of a region in a batch, drawn without replacement;
      FG-CLIP has 10. A region may have fewer, or none. 0: the list is not read.
  """

  field: str
  count: int = 4
  visible: float = 0.5
  negatives: int = 0

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f"config.data.regions.count={self.count}: at least 1")
    if self.negatives < 0:
      raise ValueError(f"config.data.regions.negatives={self.negatives}: at least 0")
    if not 0 < self.visible <= 1:
      raise ValueError(f"config.data.regions.visible={self.visible}: above 0 and at most 1")


def spec(options: RegionOptions | None, length: int) -> Spec:
  """The arrays of the regions; length: L."""
  if options is None:
    return {}
  m, k = options.count, options.negatives
  found: dict[str, tuple[tuple[int, ...], Any]] = {
    BOXES: ((m, 4), np.dtype(np.float32)),
    MASK: ((m,), np.dtype(bool)),
    PHRASES: ((m, length), np.dtype(np.int32)),
    PHRASES_MASK: ((m, length), np.dtype(bool)),
  }
  if k:
    found[NEGATIVES] = (m, k, length), np.dtype(np.int32)
    found[NEGATIVES_MASK] = (m, k, length), np.dtype(bool)
    found[NEGATIVES_COUNT] = (m,), np.dtype(np.int32)
  return found


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

  def read(self, sample: Sample, draws: Draws) -> list[Region]:
    """Up to M regions, with boxes of the view and up to K negatives each.

    Raises:
      Rejected: "no_column" for a sample without the field; "bad_metadata" for regions that are not
        as the module says.
    """
    options = self._options
    most = options.negatives
    regions = shown(self._source, sample, options.field, options.visible, negatives=most > 0)
    chosen = draws.of("regions").permutation(len(regions))[: options.count]
    rng = draws.of("region_negatives")
    found = []
    for region in (regions[i] for i in chosen):
      own = rng.permutation(len(region.negatives))[:most]
      found.append(region._replace(negatives=tuple(region.negatives[i] for i in own)))
    return found

  def stack(self, values: Sequence[list[Region]]) -> dict[str, np.ndarray]:
    """{name: [b, …]}."""
    m, k = self._options.count, self._options.negatives
    arrays = {
      name: np.zeros((len(values), *shape), dtype) for name, (shape, dtype) in self.spec.items()
    }
    padded = [[*row, *[_NOTHING] * (m - len(row))] for row in values]
    arrays[PHRASES], arrays[PHRASES_MASK] = (
      rearrange(x, "(b m) l -> b m l", m=m)
      for x in self._tokenizer.encode_batch([region.phrase for row in padded for region in row])
    )
    for row, regions in enumerate(values):
      for i, region in enumerate(regions):
        arrays[BOXES][row, i] = region.box
        arrays[MASK][row, i] = True
    if k:
      texts = [
        [*region.negatives, *[""] * (k - len(region.negatives))] for row in padded for region in row
      ]
      arrays[NEGATIVES], arrays[NEGATIVES_MASK] = (
        rearrange(x, "(b m k) l -> b m k l", m=m, k=k)
        for x in self._tokenizer.encode_batch([text for own in texts for text in own])
      )
      counts = [[len(region.negatives) for region in row] for row in padded]
      arrays[NEGATIVES_COUNT] = np.array(counts, np.int32)
    return arrays


_NOTHING = Region(np.zeros(4), "")


def shown(
  source: Source, sample: Sample, field: str, visible: float, *, negatives: bool = False
) -> list[Region]:
  """The regions of which the view of a sample shows enough, with boxes of the view.

  Args:
    source: of the sample.
    sample: with its part.
    field: as of RegionOptions, and so is `visible`.
    negatives: whether wrong phrases are read.

  Raises:
    Rejected: as regions_of.
  """
  assert sample.part is not None, "the loader gives it"
  found = []
  for region in _stored(source, sample.index, field, negatives=negatives):
    seen, share = of_view(region.box, sample.part)
    if share >= visible:
      found.append(region._replace(box=seen))
  return found


def regions_of(source: Source, i: int, field: str) -> list[tuple[np.ndarray, str]]:
  """The regions of a sample: boxes [4] float64, as shares of the sides of the image, and phrases.

  Raises:
    Rejected: "no_column" for a sample without the field; "bad_metadata" for regions that are not as
      the module says.
  """
  return [(region.box, region.phrase) for region in _stored(source, i, field, negatives=False)]


def _stored(source: Source, i: int, field: str, *, negatives: bool) -> list[Region]:
  """The regions of a sample, with boxes of the image; raises Rejected."""
  where = f"the regions of sample {i} ({field})"
  stored = value(source, i, field)
  if stored is None:
    raise Rejected("no_column", f"{where} are missing; an image without regions has an empty list")
  if not isinstance(stored, Sequence) or isinstance(stored, str | bytes):
    raise Rejected("bad_metadata", f"{where} are a {type(stored).__name__}, expected a list")
  return [
    _checked(region, where)._replace(negatives=_negatives(region, where) if negatives else ())
    for region in stored
  ]


def _negatives(region: Mapping[str, Any], where: str) -> tuple[str, ...]:
  """The wrong phrases of a stored region; raises Rejected."""
  stored = region.get("negatives", ())
  listed = isinstance(stored, Sequence) and not isinstance(stored, str | bytes)
  if not listed or not all(isinstance(text, str) and text.strip() for text in stored):
    raise Rejected("bad_metadata", f"{where}: the negatives {stored!r} are not a list of texts")
  return tuple(stored)


def _checked(region: Any, where: str) -> Region:
  """The box [4] float64 and the phrase of a stored region; raises Rejected."""
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
  return Region(np.clip(box, 0.0, 1.0), phrase)
