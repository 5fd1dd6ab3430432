"""What is to be known of a sample before training: sizes, captions, scripts, why it is bad."""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign.data.image.decode import decode
from bigalign.data.order.order import philox
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Spec, open_spec, texts_of

PIECES = 32  # at least, where a source reads many samples at once
TASK = 64  # samples of a task of a worker, where it reads them one by one
CUT = 1000  # characters of a caption that are looked at

_KINDS = {
  b"\xff\xd8\xff": "jpeg",
  b"\x89PNG": "png",
  b"GIF8": "gif",
  b"RIFF": "webp",
  b"BM": "bmp",
  b"II*\0": "tiff",
  b"MM\0*": "tiff",
}
# The first word of a letter's Unicode name is its script; Japanese is written with three.
_SCRIPTS = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "Han or Kana")


class Fact(NamedTuple):
  """What is kept of a sample."""

  place: int  # in the source
  key: str
  reason: str  # out of rejects.REASONS; "" if it can be used
  detail: str
  kind: str  # of the image, by its content
  width: int  # pixels; 0 if it cannot be decoded
  height: int
  size: int  # bytes of the encoded image
  digest: bytes  # of the image; b"" without one
  lengths: dict[str, tuple[int, ...]]  # {field: characters of each caption}
  caption: str  # the beginning of the first
  scripts: tuple[str, ...]  # one of each caption
  languages: tuple[str, ...]  # what the language field says


class Look(NamedTuple):
  """Samples to look at, for a worker process."""

  spec: Spec
  language: str | None  # the field that holds it, one of the spec's captions
  indices: tuple[int, ...]


def look(task: Look) -> list[Fact]:
  """The facts of some samples."""
  return [_fact(i, task.spec, task.language) for i in task.indices]


def _fact(i: int, spec: Spec, language: str | None) -> Fact:
  try:
    record = open_spec(spec)[i]
  except Rejected as error:
    return Fact(i, f"sample {i}", error.reason, error.detail, "none", 0, 0, 0, b"", {}, "", (), ())
  texts, spoken = captions(record, spec, language)
  every = [text for column in texts.values() for text in column]
  image = record["image"]
  data = image.tobytes() if isinstance(image, np.ndarray) else image
  reason, detail, height, width = "", "", 0, 0
  try:
    height, width, _ = decode(image).shape
    if not every:
      raise Rejected("no_caption")
  except Rejected as error:
    reason, detail = error.reason, error.detail
  return Fact(
    i,
    record["key"],
    reason,
    detail,
    _kind(image),
    width,
    height,
    len(data),
    hashlib.sha256(data).digest()[:8] if data else b"",
    {name: tuple(map(len, column)) for name, column in texts.items()},
    every[0][:CUT] if every else "",
    tuple(map(script, every)),
    spoken,
  )


def captions(
  record: Mapping[str, Any], spec: Spec, language: str | None
) -> tuple[dict[str, Sequence[str]], tuple[str, ...]]:
  """{field: captions} of a record, and what its language field says."""
  texts = dict(texts_of(record, spec))
  return texts, tuple(texts.pop(language, ())) if language else ()


def _kind(image: bytes | np.ndarray) -> str:
  if isinstance(image, np.ndarray):
    return "pixels"
  return next((kind for start, kind in _KINDS.items() if image.startswith(start)), "other")


def script(text: str) -> str:
  """The one that most letters at the beginning of a text are of: "Latin", "Cyrillic", "Arabic"."""
  counts = collections.Counter(map(_script_of, text[:CUT]))
  counts.pop("", None)
  return max(counts, key=lambda name: counts[name]) if counts else "no letters"


@functools.lru_cache(1 << 14)
def _script_of(letter: str) -> str:
  if not letter.isalpha():
    return ""
  first = unicodedata.name(letter, "unnamed").split()[0]
  return _SCRIPTS.get(first, first.capitalize())


def spread(size: int, *, samples: int, block: int) -> list[tuple[int, ...]]:
  """Which samples to look at, in tasks: all, or as many spread evenly, the same ones each time.

  Where a source reads `block` consecutive samples at once, pieces of that length are chosen, but
  no fewer than PIECES.
  """
  if samples >= size:
    length = max(block, TASK)
    return [tuple(range(i, min(i + length, size))) for i in range(0, size, length)]
  length = max(1, min(block, samples // PIECES))
  count = samples // length
  edges = [size * k // count for k in range(count + 1)]
  # Drawn from its stretch, as an even step could meet the same place of every shard.
  starts = [
    first + int(philox(0, k).integers(end - first - length + 1))
    for k, (first, end) in enumerate(itertools.pairwise(edges))
  ]
  indices = [i for start in starts for i in range(start, start + length)]
  each = length if length > 1 else TASK
  return [tuple(indices[i : i + each]) for i in range(0, len(indices), each)]


def quantiles(values: Iterable[float]) -> dict[str, float]:
  """Least, median, most and what lies between; {} of nothing."""
  found = np.sort(np.fromiter(values, np.float64))
  shares = {"least": 0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "most": 1}
  return (
    {
      name: round(float(np.quantile(found, share, method="nearest")), 3)
      for name, share in shares.items()
    }
    if len(found)
    else {}
  )


def repeated(values: Sequence[Any]) -> float:
  """The share of values that stand there a second time or more."""
  return (len(values) - len(set(values))) / len(values) if values else 0.0
