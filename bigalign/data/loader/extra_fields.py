"""The fields that config.data adds to a batch. A new kind is a line in each function."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

from bigalign.data.fields import columns, locations, regions, teachers, text_pairs, texts, views
from bigalign.data.fields.base import Field, Spec
from bigalign.data.fields.columns import Columns
from bigalign.data.fields.locations import Locations
from bigalign.data.fields.regions import Regions
from bigalign.data.fields.teachers import Teachers
from bigalign.data.fields.text_pairs import TextPairs
from bigalign.data.fields.views import ImageViews
from bigalign.data.image import naflex
from bigalign.data.loader.options import DataOptions
from bigalign.data.sources.base import Source
from bigalign.data.text.captions import fields
from bigalign.options import plain

# The fields of a pair, whatever the options, and those of the other kinds.
_TAKEN = {
  *("text", "text_mask", "text_second", "text_second_mask", "image_id", "text_id"),
  *("label", "source", "rejects", "repaired"),
  *(*naflex.FIELDS, *texts.NAMES, *teachers.NAMES, *text_pairs.NAMES, *regions.NAMES),
  *(*regions.OF_NEGATIVES, *locations.NAMES),
}


def spec(data: DataOptions) -> Spec:
  """{name: (shape without the batch axis, dtype)}; reads at most the manifests of stores."""
  return {
    **texts.spec(data.texts, data.text_length),
    **teachers.spec(data.teachers, texts=data.text_count),
    **columns.spec(data.columns),
    **views.spec(data.views, data.image_size),
    **text_pairs.spec(data.text_pairs, data.text_length),
    **regions.spec(data.regions, data.text_length),
    **locations.spec(data.locations, data.text_length),
  }


def added(data: DataOptions) -> dict[str, frozenset[str]]:
  """{option of config.data: the fields of the batch that it adds for losses to read}."""
  second = "stores.second" if "text" in data.stores.sides else "second_captions"
  of_regions = regions.spec(data.regions, data.text_length)
  arrays: dict[str, Collection[str]] = {
    second: ("text_second", "text_second_mask") if data.has_second_text else (),
    "teachers": teachers.spec(data.teachers, texts=data.text_count),
    "text_pairs": text_pairs.spec(data.text_pairs, data.text_length),
    "regions": of_regions,
    "regions.negatives": of_regions.keys() & {*regions.OF_NEGATIVES},
    "locations": locations.spec(data.locations, data.text_length),
    **{f"columns.{name}": columns.spec({name: x}) for name, x in data.columns.items()},
    **{f"views.{name}": views.spec({name: x}, data.image_size) for name, x in data.views.items()},
  }
  return {f"config.data.{option}": frozenset(x) for option, x in arrays.items() if x}


def open_fields(data: DataOptions, source: Source) -> tuple[Field, ...]:
  """The fields that are read beside image and texts.

  Raises:
    FileNotFoundError, ValueError: for stores and columns that do not fit; names the option.
  """
  texts.check(data.texts, source, stored="text" in data.stores.sides)
  spec(data)  # names what the options say wrongly
  opened: list[Field] = []
  if data.teachers:
    if any("second" in one.folders for one in data.teachers.values()) and not data.second_columns:
      raise ValueError(
        "config.data.teachers has stores of second captions (`second`), but no sample has one; set"
        " config.data.second_captions, or leave the stores out"
      )
    by_side = dict(text=fields(data.first_columns), second=fields(data.second_columns))
    read = Teachers(
      data.teachers,
      texts=data.text_count,
      fields=by_side,
      augment=plain(data.augment),
      apply_exif=data.apply_exif,
    )
    if data.frames and read.replay:
      raise ValueError(
        "config.data.teachers has stores of views of one image (`bigalign reinforce`), but"
        " config.data.frames reads several; use stores that `bigalign embed` wrote"
      )
    opened.append(read)
  if data.columns:
    opened.append(Columns(data.columns, source, taken=_TAKEN))
  if data.views:
    if "image" in data.stores.sides:
      raise ValueError(
        "config.data.views are crops of images, but config.data.stores.image gives their vectors"
      )
    if data.frames:
      raise ValueError(
        "config.data.views are crops of one image, but config.data.frames reads several; leave one"
        " of them out"
      )
    opened.append(ImageViews(data.views, data.image_size))
  if data.text_pairs:
    if "text" in data.stores.sides:
      raise ValueError(
        "config.data.text_pairs are embedded by the text tower, but config.data.stores.text gives"
        " vectors in its place; leave one of the two out"
      )
    tokenizer = data.make_tokenizer()
    opened.append(TextPairs(data.text_pairs, tokenizer, shuffle=data.shuffle, order=data.order))
  if data.regions:
    _check_boxes("regions", data)
    opened.append(Regions(data.regions, source, data.make_tokenizer()))
  if data.locations:
    _check_boxes("locations", data)
    for name, given in (("code_switch", data.code_switch), ("stores.text", data.stores.text)):
      if given:
        raise ValueError(
          f"config.data.locations writes captions as the source has them, not those of config.data."
          f"{name}; leave one of the two out"
        )
    opened.append(Locations(data.locations, source, data.make_tokenizer()))
  return tuple(opened)


def _check_boxes(option: str, data: DataOptions) -> None:
  """Raises ValueError if boxes cannot follow the views of images."""
  moves = [name for name in ("rotate", "shift") if data.augment.option(name)]
  if data.augment.option("crop") == "evaluation" and data.resize != "squash":
    moves.append("crop")
  if moves:
    raise ValueError(
      f"config.data.{option}: boxes do not follow config.data.augment.{moves[0]}="
      f"{data.augment.option(moves[0])!r}; leave it out"
    )
  for name, given in (("naflex", data.naflex), ("frames", data.frames)):
    if given:
      raise ValueError(f"config.data.{option} is for squares of one image, not config.data.{name}")
  if "image" in data.stores.sides or not data.images:
    raise ValueError(f"config.data.{option} needs images, not stores of vectors or texts alone")


def stacked(fields: tuple[Field, ...], values: list[tuple[Any, ...]]) -> dict[str, Any]:
  """{name: array} of the values that each row of a batch has of each field."""
  parts = (field.stack(column) for field, column in zip(fields, zip(*values)))
  return dict(itertools.chain.from_iterable(part.items() for part in parts))
