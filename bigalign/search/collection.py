"""What the rows of a store stand for: keys, captions and images, read from the source."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from bigalign.data.image.decode import decode
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, read
from bigalign.data.stores.reader import Store


class Item(NamedTuple):
  """A row as it is shown.

  row: of the store. place: of its sample in the source. key: of the sample; "" if there is no
  source. captions: of the sample; of a row of a text store only its own. note: why the sample, or
  its caption, is missing.
  """

  row: int
  place: int
  key: str
  captions: tuple[str, ...]
  note: str = ""


class Collection:
  """The rows of a store and the samples that they stand for.

  Args:
    store: of the embeddings.
    source: of the samples; None: results have positions only.

  Raises:
    ValueError: if the first samples of the source have other keys than those of the store.
  """

  def __init__(self, store: Store, source: Source | None):
    self.store, self.source = store, source
    if source is not None:
      for row in range(min(3, len(store))):
        with contextlib.suppress(Rejected):
          self._record(row)

  def __len__(self) -> int:
    return len(self.store)

  def item(self, row: int) -> Item:
    """Returns what is shown of a row; a sample that cannot be read any more has a note."""
    place = self._place(row)
    if self.source is None:
      return Item(row, place, "", (), "no source")
    try:
      record = self._record(row)
    except (Rejected, OSError) as error:
      return Item(row, place, "", (), str(error))
    captions = tuple(map(str, record["captions"]))
    if self.store.header.get("side") == "text":
      (first,), (rows,) = self.store.find(self.store.samples(np.array([row]))[:, 0])
      if len(captions) != rows:  # which of them the row is, is unknown
        note = (
          f"the source has {len(captions)} captions of this sample and the store {rows}: do"
          " --captions name the fields that were embedded?"
        )
        return Item(row, place, record["key"], (), note)
      captions = captions[row - int(first) :][:1]
    return Item(row, place, record["key"], captions or self._class(record))

  def encoded(self, row: int) -> bytes | np.ndarray:
    """Returns the image of a row as the source holds it.

    Raises:
      Rejected: if it cannot be read, or the source is not known.
    """
    if self.source is None:
      raise Rejected("no_image", "the search was started without the source of the images")
    image: bytes | np.ndarray = self._record(row)["image"]
    return image

  def image(self, row: int, *, size: int) -> np.ndarray:
    """Returns the image of a row to be shown, upright, uint8 [H, W, 3].

    Args:
      row: of the store.
      size: pixels of the longer side as it is shown; a large JPEG is decoded to at least twice as
        many, which takes a fraction of its time and memory.

    Raises:
      Rejected: if it cannot be read, or the source is not known.
    """
    shrink = functools.partial(_shrink, size=size)
    return decode(self.encoded(row), shrink=shrink, apply_exif=True)

  def _place(self, row: int) -> int:
    return int(self.store.samples(np.array([row]))[0, 1])

  def _class(self, record: dict[str, Any]) -> tuple[str, ...]:
    """The name of the class of a sample without captions."""
    names = getattr(self.source, "classnames", ())
    label = record.get("label", -1)
    return (str(names[label]),) if 0 <= label < len(names) else ()

  def _record(self, row: int) -> dict[str, Any]:
    """The record of a row; ValueError if the source has another sample there."""
    assert self.source is not None
    sample, place = (int(x) for x in self.store.samples(np.array([row]))[0])
    if place < len(self.source):
      record = read(self.source, place)
      if sample_id(record["key"]) == sample:
        return record
      there = f"sample {place} there has the key {record['key'][:80]!r}"
    else:
      there = f"it has {len(self.source)} samples"
    raise ValueError(
      f"{self.source!r} is not the source of {self.store.folder}: row {row} is sample {place} and"
      f" {there}; name the source that was embedded"
    )


def _shrink(height: int, width: int, *, size: int) -> int:
  """8, 4, 2 or 1: by how much a JPEG may be reduced when it is decoded."""
  return next((x for x in (8, 4, 2) if max(height, width) >= 2 * size * x), 1)


def is_store(path: str) -> bool:
  """Whether a path is a folder of stores, or one store, complete or not."""
  folder = pathlib.Path(path).expanduser()
  names = ("header.json", "image/header.json", "text/header.json")
  return any((folder / name).exists() for name in names)


def store_folder(path: str) -> pathlib.Path:
  """Returns the store that a path names: itself, or that of images in a folder of stores."""
  folder = pathlib.Path(path).expanduser()
  for name in (".", "image", "text"):
    if (folder / name / "header.json").exists():
      return folder / name
  return folder
