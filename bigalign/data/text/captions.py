"""Which of a sample's captions a batch gets: by preference or by probability, one or two.

What a config says is a list of columns, each the name of a field or a pair (name, weight). A column
is drawn with a probability proportional to its weight, among those that the sample has; a name
alone has weight 0, and is taken only if no column with a weight is there, the first one first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Columns = tuple[tuple[str, float], ...]
ANY: Columns = (("", 0.0),)  # what the source takes captions from by itself


def columns(given: Sequence[Any] | None, where: str) -> Columns:
  """("txt", ("json.recap", 0.8)) -> (("txt", 0.0), ("json.recap", 0.8)); ANY of None.

  Raises:
    ValueError: for a weight that is none, or a name that stands there twice.
  """
  if given is None:
    return ANY
  if isinstance(given, str):
    raise ValueError(f"{where}={given!r} must be a list of fields: ({given!r},)")
  found: dict[str, float] = {}
  for entry in given:
    name, weight = (entry, 0.0) if isinstance(entry, str) else entry
    if name in found:
      raise ValueError(f"{where} names {name!r} more than once")
    if not 0 <= weight < np.inf:
      raise ValueError(f"{where}: {name!r} has weight {weight}; 0 or more, 0 to fall back on it")
    found[name] = float(weight)
  return tuple(found.items())


def fields(*every: Columns) -> tuple[str, ...]:
  """The names of some columns, each once."""
  return tuple(dict.fromkeys(name for some in every for name, _ in some))


def names(given: Sequence[Any] | None) -> tuple[str, ...] | None:
  """What a source is opened with where a config says `given`, on the way to its captions."""
  return None if given is None else fields(columns(given, "config.data.captions"))


def by_field(record: Mapping[str, Any], first: Columns, second: Columns) -> dict[str, Any]:
  """{field: captions} of a record, as far as `choose` may look at it.

  One caption of each image, from fields by preference, needs no more than a record's `captions`;
  anything else its `texts`, unless there is but one field.

  Raises:
    ValueError: if the source does not tell its fields apart, and must.
  """
  wanted = fields(first, second)
  if len(wanted) == 1 or not (second or any(weight for _, weight in first)):
    return {wanted[0]: record["captions"]}
  if "texts" not in record:
    raise ValueError(
      f"{record['key']}: its source does not tell {list(wanted)} apart, so"
      " config.data.captions can hold names by preference only, without weights, and"
      " config.data.second_captions none"
    )
  return {name: record["texts"][name] for name in wanted}


def lacks(texts: Mapping[str, Sequence[str]], some: Columns) -> bool:
  """Whether no column has a caption."""
  return bool(some) and not any(texts.get(name) for name, _ in some)


def choose(
  texts: Mapping[str, Sequence[str]],
  some: Columns,
  rng: np.random.Generator,
  *,
  but: int | None = None,
) -> int:
  """The place of one caption among all of `texts`, of which some column has one.

  but: a place that is taken only if the chosen column holds nothing else.
  """
  present = [(name, weight) for name, weight in some if texts.get(name)]
  drawn = [column for column in present if column[1] > 0] or present[:1]
  which = 0
  if len(drawn) > 1:
    shares = np.cumsum([weight for _, weight in drawn])
    which = int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
  chosen = drawn[which][0]
  before = sum(len(texts[name]) for name in itertools.takewhile(lambda x: x != chosen, texts))
  places = [before + i for i in range(len(texts[chosen]))]
  if len(places) > 1 and but in places:
    places.remove(but)
  return places[int(rng.integers(len(places)))] if len(places) > 1 else places[0]


def repaired(texts: Sequence[str]) -> np.ndarray:
  """[N] int32, 1 where U+FFFD stands in a text: what sources put in the place of bytes that are no
  UTF-8, if nobody before them did. Such a text is used all the same, and its sample no reject.
  """
  return np.array(["\ufffd" in text for text in texts], np.int32)
