"""Several named sources as one, with weights that may change during a run."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.files import fingerprints
from bigalign.data.sources.base import Concatenation, Source, prefetch, value, where

Weights = Mapping[str, float]


class Mixture(Concatenation):
  """Named sources, and the weights by which they are read.

  The index of a sample is its place in the concatenation of the sources, so indices stay valid if a
  source is added at the end. An epoch of a mixture, as losses and durations count it, has as many
  positions as all sources have samples together.

  Args:
    sources: {name: source}.
    phases: ((start, {name: weight}), ...). The first start is 0; a start is a number of samples, or
      a text such as "2 epochs". A source that a phase does not name is not read in it.
    pure: whether all samples of a batch come from one source; the weights are then shares of the
      batches.

  Raises:
    ValueError: for an unknown name, or a weight that is not above 0.

  Example:
    >>> from bigalign.data.sources.base import open_source
    >>> sources = dict(a=open_source("synthetic:100"), b=open_source("synthetic:50"))
    >>> mixture = Mixture(sources, [(0, dict(a=2.0, b=1.0)), ("2 epochs", dict(b=1.0))])
    >>> len(mixture), mixture[100]["key"]
    (150, 'b/synthetic/0')
  """

  def __init__(
    self,
    sources: Mapping[str, Source],
    phases: Sequence[tuple[int | str, Weights]],
    *,
    pure: bool = False,
  ):
    super().__init__(list(sources.values()))
    self.pure = pure
    self.names = tuple(sources)
    self.phases = tuple(phases)
    for _, weights in self.phases:
      for name, weight in weights.items():
        if name not in sources:
          raise ValueError(f"config.data.schedule: no source {name!r}; known: {self.names}")
        if not 0 < weight < np.inf:
          raise ValueError(
            f"config.data.mixture: {name!r} has weight {weight}; it must be above 0"
            " (leave a source out of a phase in which it is not read)"
          )

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = super().__getitem__(i)
    name = self.names[bisect.bisect_right(self._firsts, i) - 1]
    return {**record, "key": f"{name}/{record['key']}"}

  def key(self, i: int) -> str:
    """Returns the key of sample i, as in its record."""
    return f"{self.names[bisect.bisect_right(self._firsts, i) - 1]}/{super().key(i)}"

  def __repr__(self) -> str:
    parts = (f"{name}={source!r}" for name, source in zip(self.names, self.sources))
    return f"Mixture({tree.shown(parts, sep=', ', width=300)})"


class Prefixed:
  """A source with a text before each caption: a language, or the name of a collection."""

  def __init__(self, source: Source, prefix: str):
    self._source, self._prefix = source, prefix
    self.fingerprint = fingerprints.of_names(source.fingerprint, prefix)
    self.classnames = getattr(source, "classnames", ())
    self.block = getattr(source, "block", 1)

  def __repr__(self) -> str:
    return repr(self._source)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = self._source[i]
    prefixed = dict(record, captions=self._with_prefix(record["captions"]))
    if "texts" in record:
      prefixed["texts"] = {name: self._with_prefix(x) for name, x in record["texts"].items()}
    return prefixed

  def value(self, i: int, path: str) -> Any:
    """Returns one stored value of sample i."""
    return value(self._source, i, path)

  def where(self, i: int) -> tuple[str, int, int]:
    """Returns the file of sample i, its place there, and the samples in that file."""
    return where(self._source, i)

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Lets the source begin to fetch samples."""
    prefetch(self._source, ids, hold=hold)

  def _with_prefix(self, captions: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(self._prefix + caption for caption in captions)


def names(source: Source) -> tuple[str, ...]:
  """Returns the names of the sources of a mixture; of one source, its repr."""
  return source.names if isinstance(source, Mixture) else (repr(source),)
