"""Stored vectors instead of one side of each pair, found by the key of the sample."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import Rejected
from bigalign.data.stores.reader import Store


class OneSide:
  """The vectors of images or of captions, from stores; the source gives the other side.

  Args:
    image: folder of the store of images; "" for none.
    text: folder of the store of captions; "" for none. A caption of a record is then the number of
      its row.
    second: folder of a second store of captions, or that of `text` once more; "" for none.

  Raises:
    ValueError: for both sides, which would leave nothing to read; for `second` without `text`.
  """

  def __init__(
    self,
    image: str | pathlib.Path = "",
    text: str | pathlib.Path = "",
    *,
    second: str | pathlib.Path = "",
  ):
    if bool(image) == bool(text) or (second and not text):
      raise ValueError(
        f"config.data.stores of one side take image or text, or text and second; got"
        f" image={str(image)!r}, text={str(text)!r}, second={str(second)!r}"
      )
    self.image, self.text, self.second = (
      Store(folder) if folder else None for folder in (image, text, second)
    )
    every = [one for one in (self.image, self.text, self.second) if one]
    self.sides = {"image" if self.image else "text": every}
    names = [one.fingerprint for one in every]
    self.second_is_text = bool(second) and names[0] == names[1]
    self.fingerprint = fingerprints.of_names(*names)

  def replace(self, record: dict[str, Any]) -> dict[str, Any]:
    """A record with numbers of rows instead of its image, or instead of its captions.

    Raises:
      Rejected: if a store has no row of it.
      ValueError: if the store is damaged.
    """
    if self.image:
      return record | dict(image=_rows(self.image, record["key"])[0])
    text, *others = self.sides["text"]
    captions = _rows(text, record["key"])
    texts = dict(text=captions)
    if others and not self.second_is_text:
      texts["second"] = _rows(others[0], record["key"])
    return record | dict(captions=captions, texts=texts)


def _rows(store: Store, key: str) -> tuple[int, ...]:
  ids = np.array([sample_id(key)], np.uint64)
  (first,), (count,) = store.find(ids)
  if not count:
    raise Rejected("no_vector", f"no row in {store.folder}")
  if store.samples(np.array([first]))[0, 0] != ids[0]:
    raise ValueError(
      f"{store.folder}: the index gives row {int(first)} for the key {key[:80]!r}, and that row"
      " belongs to another sample: the store is damaged. `bigalign embed --verify` lists the files."
    )
  return tuple(range(int(first), int(first + count)))
