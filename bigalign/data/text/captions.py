"""Chooses one or two of a sample's captions, by preference or by probability.

A config has a list of columns; each is the name of a field, or a pair (name, weight). Of the
columns that a sample has, one is drawn with a probability proportional to its weight. A name alone
has weight 0: the first such column is used if the sample has no column with a weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Columns = tuple[tuple[str, float], ...]
ANY: Columns = (("", 0.0),)  # the fields that the source takes captions from by default


def columns(given: Sequence[Any] | None, where: str) -> Columns:
  """Returns the columns of a config with their weights.

  Args:
    given: names and pairs, such as ("txt", ("json.recap", 0.8)), or None.
    where: names the option in errors.

  Returns:
    Pairs, such as (("txt", 0.0), ("json.recap", 0.8)); ANY for None.

  Raises:
    ValueError: for a wrong weight, or a name that is given twice.
  """
  if given is None:
    return ANY
  if isinstance(given, str):
    raise ValueError(f"{where}={given!r} must be a list of fields: ({given!r},)")
  weights: dict[str, float] = {}
  for entry in given:
    name, weight = (entry, 0.0) if isinstance(entry, str) else entry
    if name in weights:
      raise ValueError(f"{where} names {name!r} more than once")
    if not 0 <= weight < np.inf:
      raise ValueError(
        f"{where}: {name!r} has weight {weight}; it must be 0 or more (0: only as fallback)"
      )
    weights[name] = float(weight)
  return tuple(weights.items())


def fields(*every: Columns) -> tuple[str, ...]:
  """Returns the names of columns, each once."""
  return tuple(dict.fromkeys(name for some in every for name, _ in some))


def by_field(record: Mapping[str, Any], first: Columns, second: Columns) -> dict[str, Any]:
  """Returns {field: captions} of a record, for `choose`.

  One caption per image from fields by preference needs only the `captions` of a record. Weights and
  second captions need its `texts`, unless there is only one field.

  Args:
    record: of a source.
    first: columns of the first caption.
    second: columns of the second caption; () for none.

  Raises:
    ValueError: if the source does not separate the captions of its fields, but must.
  """
  wanted = fields(first, second)
  if len(wanted) == 1 or not (second or any(weight for _, weight in first)):
    return {wanted[0]: record["captions"]}
  if "texts" not in record:
    raise ValueError(
      f"{record['key']}: its source does not separate the captions of {list(wanted)}, so"
      " config.data.captions must be names without weights, and config.data.second_captions must"
      " be empty"
    )
  return {name: record["texts"][name] for name in wanted}


def lacks(texts: Mapping[str, Sequence[str]], some: Columns) -> bool:
  """Returns whether no column of `some` has a caption; False if there are no columns."""
  return bool(some) and not any(texts.get(name) for name, _ in some)


def choose(
  texts: Mapping[str, Sequence[str]],
  some: Columns,
  rng: np.random.Generator,
  *,
  but: int | None = None,
) -> int:
  """Draws one caption.

  Args:
    texts: {field: captions}; at least one column of `some` has a caption.
    some: the columns to choose from.
    rng: draws the column and the caption.
    but: the place of a caption that is chosen only if the column has no other one.

  Returns:
    The place of the caption among all captions of `texts`.
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
  """Returns [N] int32, 1 for a text that contains U+FFFD.

  Sources replace invalid UTF-8 by U+FFFD. Such a text is still used, and its sample not rejected.
  """
  return np.array(["\ufffd" in text for text in texts], np.int32)


def choose_others(
  texts: Mapping[str, Sequence[str]],
  some: Columns,
  rng: np.random.Generator,
  *,
  first: int,
  count: int,
) -> list[int]:
  """Draws further captions without replacement, each as `choose` draws the first one.

  Columns without a weight follow in their order once the columns with a weight have none left.

  Args:
    texts: {field: captions}.
    some: the columns to choose from.
    rng: draws the columns and the captions.
    first: the place of the caption that was drawn before.
    count: of captions; fewer are returned if there are no more.

  Returns:
    Their places among all captions of `texts`.
  """
  left: dict[str, list[int]] = {}
  place = 0
  for name, captions in texts.items():
    left[name] = [i for i in range(place, place + len(captions)) if i != first]
    place += len(captions)
  chosen: list[int] = []
  while len(chosen) < count:
    present = [(name, weight) for name, weight in some if left.get(name)]
    if not present:
      break
    drawn = [column for column in present if column[1] > 0] or present[:1]
    shares = np.cumsum([weight or 1.0 for _, weight in drawn])
    which = int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
    places = left[drawn[which][0]]
    chosen.append(places.pop(int(rng.integers(len(places)))))
  return chosen
