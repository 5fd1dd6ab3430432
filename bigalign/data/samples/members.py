"""What the members of a sample say: image, captions, label."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from bigalign.data.samples.rejects import Rejected

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


def image(fields: Mapping[str, bytes]) -> bytes | None:
  """The first member with the extension of an image; None if there is none."""
  for kind in IMAGES:
    if kind in fields:
      return fields[kind]
  return None


def label(fields: Mapping[str, bytes], *, key: str) -> int:
  """The number in .cls, -1 without it; Rejected if it holds something else."""
  if "cls" not in fields:
    return -1
  try:
    return int(fields["cls"])
  except ValueError:
    raise Rejected("bad_metadata", f"{key}.cls holds {fields['cls'][:32]!r}") from None


def read_json(data: bytes, *, key: str) -> dict[str, Any]:
  """The object in a .json member; Rejected if it holds something else."""
  try:
    value = json.loads(data)
  except ValueError as error:
    raise Rejected("bad_metadata", f"{key}.json: {error}") from None
  if not isinstance(value, dict):
    raise Rejected("bad_metadata", f"{key}.json holds a {type(value).__name__}, expected an object")
  return value


def captions(texts: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
  """`captions`, those of the first field that is not blank; of several fields `texts` too."""
  found = next(filter(None, texts.values()), ())
  return dict(captions=found, texts=dict(texts)) if len(texts) > 1 else dict(captions=found)


def field_texts(fields: Mapping[str, bytes], name: str, *, key: str) -> tuple[str, ...]:
  """The texts of one caption field that are not blank, stripped."""
  field, _, path = name.partition(".")
  value: Any = None
  if field == "json" and path:
    value = entry(read_json(fields["json"], key=key), path) if "json" in fields else None
  elif name in fields:
    value = _decode_text(fields[name], key=f"{key}.{name}")
  if isinstance(value, str):
    text = value.strip()
    return (text,) if text else ()
  texts = value if isinstance(value, list) else []
  return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def entry(row: Any, path: str) -> Any:
  """What a mapping has under a name, or the mapping under its a has, for "a.b"; None if nothing."""
  if isinstance(row, Mapping) and path in row:
    return row[path]
  first, dot, rest = path.partition(".")
  return entry(row[first], rest) if dot and isinstance(row, Mapping) and first in row else None


def _decode_text(data: bytes, *, key: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    logger.warning("%s: not UTF-8 (%s); the bytes in question are replaced", key, error.reason)
    return data.decode("utf-8", "replace")
