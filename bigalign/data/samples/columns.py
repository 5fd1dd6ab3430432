"""Captions and image column of a sample that is a row of named columns."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigalign import tree
from bigalign.data.samples.members import IMAGES, entry, strings

logger = logging.getLogger(__name__)

IMAGE_ADVICE = (
  " Set config.data.source_options=dict(image=...) to the column that holds the images (command"
  " line tools: --source_options image=...)."
)
CAPTION_ADVICE = (
  " Set captions=(...) to one of them: config.data.captions (command line tools: --captions ...)."
)


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
  by_path = {path: strings(entry(row, path)) for path in paths}
  return dict(captions=next(filter(None, by_path.values()), ()), texts=by_path)


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
    f"{what}: no image column {' or '.join(map(repr, candidates[:7]))}; the columns are:"
    f" {tree.shown(sorted(columns))}.{IMAGE_ADVICE}"
  )


def first_image(columns: Iterable[str]) -> str | None:
  """Returns the column that holds the images by its name, as image_column does; None without."""
  present = {*columns}
  return next((name for name in ("image", *IMAGES) if name in present), None)


def warn_of_differences(columns_of: Mapping[str, set[str]], names: Iterable[str]) -> None:
  """Logs which caption and label columns some files of a source lack and others have.

  Args:
    columns_of: {file: its columns}.
    names: of the columns that are read if they exist.
  """
  for name in names:
    column = name.partition(".")[0]
    lacking = [file for file, have in columns_of.items() if not have & {name, column}]
    if lacking and len(lacking) < len(columns_of):
      logger.warning(
        "%d of %d files have no column %r, which others have; their samples have none: %s",
        *(len(lacking), len(columns_of), name, tree.shown(lacking)),
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
      f"{what}: no caption column {tree.shown(captions)}; the columns are:"
      f" {tree.shown(sorted(columns))}.{CAPTION_ADVICE}"
    )
