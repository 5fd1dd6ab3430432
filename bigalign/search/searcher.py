"""Answers queries: texts, images and rows, with an index and the samples of its rows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigalign.data.files.draws import draw
from bigalign.search.collection import Collection, Item
from bigalign.search.index import Index


class Embeds(Protocol):
  """What embeds queries: the Model of bigalign.load."""

  source: str

  def embed_images(self, images: Any, *, progress: bool = True) -> np.ndarray:
    """[N, E] float32, unit norm."""
    ...

  def embed_texts(self, texts: Any, *, progress: bool = True) -> np.ndarray:
    """[M, E] float32, unit norm."""
    ...


class Result(NamedTuple):
  """One answer; score: the cosine of query and row."""

  rank: int
  score: float
  item: Item

  def as_json(self) -> dict[str, Any]:
    """Returns it as plain values."""
    item = self.item
    return dict(
      rank=self.rank,
      score=round(self.score, 6),
      row=item.row,
      sample=item.place,
      key=item.key,
      captions=list(item.captions),
      **(dict(note=item.note) if item.note else {}),
    )


class Searcher:
  """Answers queries; may be used from several threads.

  Args:
    model: embeds the queries.
    index: of the vectors.
    collection: what its rows stand for.
  """

  def __init__(self, model: Embeds, index: Index, collection: Collection):
    self.model, self.index, self.collection = model, index, collection
    self._lock = threading.Lock()  # one query at a time uses the devices

  def texts(self, queries: Sequence[str], k: int = 10) -> list[list[Result]]:
    """Returns the k best rows of each text, best first."""
    with self._lock:
      vectors = self.model.embed_texts(list(queries), progress=False)
    return self._answer(vectors, k)

  def images(self, images: Sequence[Any], k: int = 10) -> list[list[Result]]:
    """Returns the k best rows of each image (what `embed_images` takes), best first."""
    with self._lock:
      vectors = self.model.embed_images(list(images), progress=False)
    return self._answer(vectors, k)

  def warm_up(self) -> None:
    """Compiles what the first queries would wait for."""
    with contextlib.suppress(ValueError):  # a model may have one tower only
      self.texts(["a"], 1)
    with contextlib.suppress(ValueError):
      self.images([np.zeros((8, 8, 3), np.uint8)], 1)

  def neighbours(self, row: int, k: int = 10) -> list[Result]:
    """Returns the k rows nearest to a row, without itself.

    Raises:
      IndexError: for a row that does not exist.
    """
    vector = self.collection.store.read(np.array([row])).astype(np.float32)
    (found,) = self._answer(vector / np.linalg.norm(vector), k + 1)
    others = [result for result in found if result.item.row != row][:k]
    return [result._replace(rank=rank) for rank, result in enumerate(others, 1)]

  def some(self, k: int) -> list[Result]:
    """Returns k rows, drawn at random and the same ones each time; their score is 0."""
    rows = draw(len(self.collection), k)
    return [Result(i, 0.0, self.collection.item(int(row))) for i, row in enumerate(rows, 1)]

  def _answer(self, vectors: np.ndarray, k: int) -> list[list[Result]]:
    hits = self.index.search(vectors, k)
    return [
      [
        Result(rank, float(score), self.collection.item(int(row)))
        for rank, (score, row) in enumerate(zip(scores, rows), 1)
        if row >= 0
      ]
      for scores, rows in zip(hits.scores, hits.rows)
    ]
