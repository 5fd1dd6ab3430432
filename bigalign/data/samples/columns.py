"""What sources of named columns share: a row → the captions, the label, the columns to take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.samples.members import IMAGES, entry
from bigalign.data.samples.rejects import Rejected


def texts(row: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
  """`captions` of a record, the first of the paths' texts that are not blank, and all its `texts`.

  A path is a column, or "a.b" for the entry b of the mapping in column a. It holds a string, UTF-8
  bytes, or a nest of sequences of them.
  """
  found = {path: _stripped(entry(row, path)) for path in paths}
  return dict(captions=next(filter(None, found.values()), ()), texts=found)


def _stripped(value: Any) -> tuple[str, ...]:
  if isinstance(value, bytes):
    value = value.decode("utf-8", "replace")
  if isinstance(value, str):
    return (value.strip(),) if value.strip() else ()
  if isinstance(value, np.ndarray):
    value = value.ravel().tolist()
  if isinstance(value, list | tuple):
    return tuple(text for entry in value for text in _stripped(entry))
  return ()


def label(value: Any, *, column: str, key: str) -> int:
  """An integer, as a number, as text or alone in a sequence; -1 for None."""
  if isinstance(value, list | tuple) and len(value) == 1:
    value = value[0]
  if value is None:
    return -1
  try:
    return int(value)
  except (ValueError, TypeError):
    raise Rejected(
      "bad_metadata", f"{key}: the column {column!r} holds {value!r}, no integer"
    ) from None


def image_column(columns: Iterable[str], wanted: str | None, *, what: str) -> str:
  """`wanted`, or else "image" or the first of jpg, png, …; a ValueError if it is not there."""
  columns = list(columns)
  candidates = ("image", *IMAGES) if wanted is None else (wanted,)
  for name in candidates:
    if name in columns:
      return name
  raise ValueError(
    f"{what}: no image column {' or '.join(map(repr, candidates))}; the columns "
    f"there are: {sorted(columns)}. Set image= to the one that holds the images."
  )


def check_captions(
  columns: Iterable[str], captions: Sequence[str], *, label: str, what: str
) -> None:
  """Raises ValueError if none of the captions' columns is there, nor that of the label."""
  columns = set(columns)
  # The entries of a nested column are not known here: its own name stands for them.
  if (
    captions
    and label not in columns
    and not any(path in columns or path.partition(".")[0] in columns for path in captions)
  ):
    raise ValueError(
      f"{what}: no caption column {list(captions)}; the columns there are: "
      f"{sorted(columns)}. Set captions=(...) to one of them."
    )
