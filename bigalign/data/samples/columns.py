"""Captions, label and image column of a sample that is a row of named columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.samples.members import IMAGES, entry
from bigalign.data.samples.rejects import Rejected


def texts(row: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
  """Returns the captions of a row.

  Args:
    row: {column: value}.
    paths: columns in order of preference, or "a.b" for the entry b of the mapping in column a. A
      value is a string, UTF-8 bytes, or nested sequences of them.

  Returns:
    dict(captions, texts): the captions of the first path that has any, and {path: captions}. Blank
    captions are left out.
  """
  by_path = {path: _stripped(entry(row, path)) for path in paths}
  return dict(captions=next(filter(None, by_path.values()), ()), texts=by_path)


def _stripped(value: Any) -> tuple[str, ...]:
  """The texts in a value that are not blank."""
  if isinstance(value, bytes):
    value = value.decode("utf-8", "replace")
  if isinstance(value, str):
    return (value.strip(),) if value.strip() else ()
  if isinstance(value, np.ndarray):
    value = value.ravel().tolist()
  if isinstance(value, list | tuple):
    return tuple(text for part in value for text in _stripped(part))
  return ()


def label(value: Any, *, column: str, key: str) -> int:
  """Returns the label in a value.

  Args:
    value: an integer, as a number, as text or alone in a sequence; or None.
    column: names the column in the error.
    key: names the sample in the error.

  Returns:
    The integer; -1 for None.

  Raises:
    Rejected: if the value is not an integer.
  """
  if isinstance(value, list | tuple) and len(value) == 1:
    value = value[0]
  if value is None:
    return -1
  try:
    return int(value)
  except (ValueError, TypeError):
    raise Rejected(
      "bad_metadata", f"{key}: the column {column!r} holds {value!r}, not an integer"
    ) from None


def image_column(columns: Iterable[str], wanted: str | None, *, what: str) -> str:
  """Returns the column of the images: `wanted`, or else "image" or the first of jpg, png, ...

  Args:
    columns: of the source.
    wanted: the option image=, or None.
    what: names the source in the error.

  Raises:
    ValueError: if the column does not exist; lists those that do.
  """
  columns = list(columns)
  candidates = ("image", *IMAGES) if wanted is None else (wanted,)
  for name in candidates:
    if name in columns:
      return name
  raise ValueError(
    f"{what}: no image column {' or '.join(map(repr, candidates))}; the columns are:"
    f" {sorted(columns)}. Set config.data.source_options=dict(image=...) to the column that holds"
    " the images (command line tools: --source_options image=...)."
  )


def check_captions(
  columns: Iterable[str], captions: Sequence[str], *, label: str, what: str
) -> None:
  """Checks that a source has one of the caption columns, or the column of the label.

  Args:
    columns: of the source.
    captions: paths, as for `texts`.
    label: the column of the label.
    what: names the source in the error.

  Raises:
    ValueError: if it has neither; lists the columns that it has.
  """
  columns = set(columns)
  # The entries of a nested column are not known here, so the name of the column suffices.
  if (
    captions
    and label not in columns
    and not any(path in columns or path.partition(".")[0] in columns for path in captions)
  ):
    raise ValueError(
      f"{what}: no caption column {list(captions)}; the columns are: "
      f"{sorted(columns)}. Set captions=(...) to one of them."
    )
