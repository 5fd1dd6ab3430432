"""Pairs of texts of another source beside the samples of a run: config.data.text_pairs.

  data.text_pairs = dict(source="qa/{00000..00099}.jsonl", query="question", document="answer")

Row r of a batch holds an image and its text, and a query and its document, which have nothing to do
with each other: `query`, `query_mask`, `document`, `document_mask`, [B, L] each. The pairs of texts
are read in an order of their own, one for each position of the run, so a batch has one shape, is
equal on any number of hosts, and a run resumes where it was. jina-clip trains on both kinds of
pairs in each step: https://arxiv.org/abs/2405.20204.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.fields.base import Draws, Sample, Spec
from bigalign.data.order.order import Order
from bigalign.data.order.permutation import TEXT_PAIRS, hash_words
from bigalign.data.samples.rejects import Rejected, rejection
from bigalign.data.sources.base import Source, open_source, read, where
from bigalign.data.text.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

NAMES = ("query", "query_mask", "document", "document_mask")
_ATTEMPTS = 64  # pairs that are tried at a position
_LANE_ROWS = 1024  # of Order: of any batch size, so that the order does not depend on it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPairsOptions:
  """A source of pairs of texts.

  Args:
    source: as config.data.source; it needs no images.
    query: the field of the query, named as a field of captions; of several texts one is drawn.
    document: the field of the document, likewise.
    source_options: as config.data.source_options.
  """

  source: str
  query: str
  document: str
  source_options: Mapping[str, Any] | None = None

  def open(self) -> Source:
    """The source.

    Raises:
      ValueError: if it has no samples, or both texts would come from one field.
    """
    if self.query == self.document:
      raise ValueError(
        f"config.data.text_pairs: query and document are both {self.query!r}; name two fields"
      )
    captions = (self.query, self.document)
    source = open_source(self.source, captions=captions, images=False, **self.source_options or {})
    if not len(source):
      raise ValueError(f"config.data.text_pairs.source={self.source!r} has no samples")
    return source


def spec(options: TextPairsOptions | None, length: int) -> Spec:
  """The arrays of the pairs; length: L."""
  if options is None:
    return {}
  kinds = (np.dtype(np.int32), np.dtype(bool)) * 2
  return {name: ((length,), dtype) for name, dtype in zip(NAMES, kinds)}


class TextPairs:
  """The pairs of texts, as a field.

  Args:
    options: config.data.text_pairs.
    tokenizer: of both texts.
    shuffle: config.data.shuffle.
    order: config.data.order.

  Attributes:
    fingerprint: of the source.
  """

  def __init__(self, options: TextPairsOptions, tokenizer: Tokenizer, *, shuffle: bool, order: str):
    self._options, self._tokenizer = options, tokenizer
    self._source = options.open()
    self._shuffle, self._kind = shuffle, order
    self._order: Order | None = None
    self._logged: set[int] = set()
    self.fingerprint = self._source.fingerprint
    self.spec = spec(options, tokenizer.length)

  def read(self, sample: Sample, draws: Draws) -> tuple[np.ndarray, ...]:
    """Ids and masks of the pair at a position, whatever the sample is.

    A pair that cannot be used is replaced, and counted in the row of the sample.

    Raises:
      ValueError: if most pairs cannot be used.
    """
    order = self._order = self._order or Order(
      self._source,
      seed=int(hash_words(TEXT_PAIRS, draws.seed)[0]),
      lane_rows=_LANE_ROWS,
      shuffle=self._shuffle,
      kind=self._kind,
    )
    index = int(order(np.array([draws.position]))[0])
    for attempt in range(_ATTEMPTS):
      if attempt:
        index = order.substitute(draws.position, attempt, index)
      try:
        return self._pair(index, draws)
      except Exception as error:
        last = rejection(error)
        self._log(index, last)
        sample.count(last)
    raise ValueError(
      f"config.data.text_pairs.source={self._options.source!r}: {_ATTEMPTS} pairs in a row cannot"
      f" be used; the last: {last}. Does each sample have {self._options.query!r} and"
      f" {self._options.document!r}?"
    )

  def stack(self, values: Sequence[tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    """{name: [b, L]}."""
    return {name: np.stack(column) for name, column in zip(NAMES, zip(*values))}

  def _pair(self, index: int, draws: Draws) -> tuple[np.ndarray, ...]:
    record, rng = read(self._source, index), draws.of("text_pairs")
    every: list[str] = []
    for field in (self._options.query, self._options.document):
      texts = record.get("texts", {}).get(field)
      if not texts:
        raise Rejected("no_caption", f"{record['key']} has no {field!r}")
      every.append(texts[int(rng.integers(len(texts)))])
    ids, mask = self._tokenizer.encode_batch(every)
    return ids[0], mask[0], ids[1], mask[1]

  def _log(self, index: int, rejected: Rejected) -> None:
    if index not in self._logged:
      self._logged.add(index)
      file, ordinal, _ = where(self._source, index)
      logger.warning("Rejected pair %d of %s: %s", ordinal, file, rejected)
