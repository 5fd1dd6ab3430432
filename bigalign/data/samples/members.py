"""Image, captions and label of a sample that consists of the members of a tar.

`members` is {extension: bytes}, such as {"jpg": ..., "txt": ..., "json": ...}.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from bigalign.data.samples.rejects import Rejected

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


def image(members: Mapping[str, bytes]) -> bytes | None:
  """Returns the first member with the extension of an image; None if there is none."""
  for extension in IMAGES:
    if extension in members:
      return members[extension]
  return None


def label(members: Mapping[str, bytes], *, key: str) -> int:
  """Returns the integer in the .cls member; -1 without it.

  Raises:
    Rejected: if .cls holds something else; names `key`.
  """
  if "cls" not in members:
    return -1
  try:
    return int(members["cls"])
  except ValueError:
    raise Rejected("bad_metadata", f"{key}.cls holds {members['cls'][:32]!r}") from None


def read_json(data: bytes, *, key: str) -> dict[str, Any]:
  """Returns the object in a .json member.

  Raises:
    Rejected: if it holds something else; names `key`.
  """
  try:
    value = json.loads(data)
  except ValueError as error:
    raise Rejected("bad_metadata", f"{key}.json: {error}") from None
  if not isinstance(value, dict):
    raise Rejected("bad_metadata", f"{key}.json holds a {type(value).__name__}, expected an object")
  return value


def captions(texts: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
  """Returns dict(captions=...) of the first field that has any; of several fields also `texts`.

  Args:
    texts: {field: captions}, in order of preference.
  """
  first = next(filter(None, texts.values()), ())
  return dict(captions=first, texts=dict(texts)) if len(texts) > 1 else dict(captions=first)


def field_texts(members: Mapping[str, bytes], name: str, *, key: str) -> tuple[str, ...]:
  """Returns the captions of one field, stripped, without blank ones.

  Args:
    members: of the sample.
    name: "txt" for the member .txt; "json.a.b" for the entry b of a in .json, a string or a list.
    key: names the sample in errors.

  Raises:
    Rejected: if .json does not hold an object.
  """
  extension, _, path = name.partition(".")
  value: Any = None
  if extension == "json" and path:
    value = entry(read_json(members["json"], key=key), path) if "json" in members else None
  elif name in members:
    value = _decode_text(members[name], key=f"{key}.{name}")
  if isinstance(value, str):
    text = value.strip()
    return (text,) if text else ()
  texts = value if isinstance(value, list) else []
  return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def entry(row: Any, path: str) -> Any:
  """Returns row["a.b"] if it exists, else row["a"]["b"], for the path "a.b"; None if missing."""
  if isinstance(row, Mapping) and path in row:
    return row[path]
  first, dot, rest = path.partition(".")
  return entry(row[first], rest) if dot and isinstance(row, Mapping) and first in row else None


def _decode_text(data: bytes, *, key: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    logger.warning("%s: invalid UTF-8 (%s); replaced by U+FFFD", key, error.reason)
    return data.decode("utf-8", "replace")
