"""Statistics of single samples, for inspection: sizes, captions, scripts, why a sample is bad."""

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
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Spec, open_spec, read, texts_of

PIECES = 32  # least number of pieces, for a source that reads many samples at once
TASK = 64  # samples per task of a worker, for a source that reads them one by one
CUT = 1000  # characters of a caption that count

_KINDS = {
  b"\xff\xd8\xff": "jpeg",
  b"\x89PNG": "png",
  b"GIF8": "gif",
  b"RIFF": "webp",
  b"BM": "bmp",
  b"II*\0": "tiff",
  b"MM\0*": "tiff",
}
# The first word of a letter's Unicode name is its script; Japanese uses three scripts.
_SCRIPTS = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "Han or Kana")


class SampleStats(NamedTuple):
  """The statistics of one sample.

  Attributes:
    position: in the source, from 0.
    key: its key in the source.
    reason: why it cannot be used, one of rejects.REASONS; "" if it can.
    detail: details of the reason.
    kind: image format by content, such as "jpeg".
    width: of the image, pixels; 0 if it cannot be decoded.
    height: of the image, pixels.
    size: bytes of the encoded image.
    digest: hash of the image; b"" without one.
    lengths: {field: characters of each caption}.
    caption: beginning of the first caption.
    scripts: the script of each caption.
    languages: content of the language field.
  """

  position: int
  key: str
  reason: str
  detail: str
  kind: str
  width: int
  height: int
  size: int
  digest: bytes
  lengths: dict[str, tuple[int, ...]]
  caption: str
  scripts: tuple[str, ...]
  languages: tuple[str, ...]


class StatsTask(NamedTuple):
  """Samples for a worker process.

  Attributes:
    spec: the source.
    language: the field that holds the language, one of spec.captions, or None.
    indices: positions of the samples.
  """

  spec: Spec
  language: str | None
  indices: tuple[int, ...]


def collect(task: StatsTask) -> list[SampleStats]:
  """Returns the statistics of some samples; runs in worker processes."""
  return [_sample_stats(i, task.spec, task.language) for i in task.indices]


def _sample_stats(i: int, spec: Spec, language: str | None) -> SampleStats:
  try:
    record = read(open_spec(spec), i)
  except Rejected as error:
    return SampleStats(
      i, f"sample {i}", error.reason, error.detail, "none", 0, 0, 0, b"", {}, "", (), ()
    )
  texts, languages = captions(record, spec, language)
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
  return SampleStats(
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
    languages,
  )


def captions(
  record: Mapping[str, Any], spec: Spec, language: str | None
) -> tuple[dict[str, Sequence[str]], tuple[str, ...]]:
  """Returns the captions of a record and the content of its language field.

  Args:
    record: from the source.
    spec: of the source.
    language: the field that holds the language, or None.

  Returns:
    {field: captions}, languages.
  """
  texts = dict(texts_of(record, spec))
  return texts, tuple(texts.pop(language, ())) if language else ()


def _kind(image: bytes | np.ndarray) -> str:
  if isinstance(image, np.ndarray):
    return "pixels"
  return next((kind for start, kind in _KINDS.items() if image.startswith(start)), "other")


def script(text: str) -> str:
  """Returns the script of most letters at the beginning of a text: "Latin", "Cyrillic"."""
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
  """Chooses samples that are evenly spread over a source, the same ones each time.

  Args:
    size: of the source.
    samples: how many to choose; all if the source has no more.
    block: consecutive samples that the source reads at once. Pieces of this length are chosen, but
      at least PIECES of them.

  Returns:
    Positions, ascending, in tasks for workers.
  """
  if samples >= size:
    length = max(block, TASK)
    return [tuple(range(i, min(i + length, size))) for i in range(0, size, length)]
  length = max(1, min(block, samples // PIECES))
  count = samples // length
  edges = [size * k // count for k in range(count + 1)]
  # Drawn at random within its interval: a constant step could hit the same position of every shard.
  starts = [
    first + int(philox(0, k).integers(end - first - length + 1))
    for k, (first, end) in enumerate(itertools.pairwise(edges))
  ]
  indices = [i for start in starts for i in range(start, start + length)]
  each = length if length > 1 else TASK
  return [tuple(indices[i : i + each]) for i in range(0, len(indices), each)]


def quantiles(values: Iterable[float]) -> dict[str, float]:
  """Returns least, most, median and other quantiles of some values; {} if there are none."""
  ordered = np.sort(np.fromiter(values, np.float64))
  shares = {"least": 0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "most": 1}
  return (
    {
      name: round(float(np.quantile(ordered, share, method="nearest")), 3)
      for name, share in shares.items()
    }
    if len(ordered)
    else {}
  )


def repeated(values: Sequence[Any]) -> float:
  """Returns the share of values that repeat an earlier one."""
  return (len(values) - len(set(values))) / len(values) if values else 0.0
