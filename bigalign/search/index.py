"""Finds the vectors with the largest products with a query: exactly, or approximately by faiss.

The exact search multiplies all vectors with the query, a tile at a time, so it needs no more memory
than one tile beyond the vectors, which may be mapped from files.
"""

from __future__ import annotations

import collections
import concurrent.futures
import importlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigalign.data.files.storage import atomic_write
from bigalign.data.stores.reader import Store

TILE = 1 << 14  # rows converted to float32 at a time
_SCORES = 1 << 24  # products of a tile that is in memory, at most
_THREADS = 8  # that convert, at most
EXACT_ROWS = 10_000_000  # above, a query takes long and an approximate index is the default
_RERANK = 4  # candidates of the approximate index for each result, ordered by their exact scores
_PER_LIST = 40  # vectors per list that k-means learns from, as faiss recommends (39 to 256)
_PROBES = 32  # lists that a query is compared with


class Hits(NamedTuple):
  """The best rows of each query, best first.

  scores: [Q, k] float32. rows: [Q, k] int64.
  """

  scores: np.ndarray
  rows: np.ndarray


class Index(Protocol):
  """What answers queries."""

  def __len__(self) -> int: ...

  def search(self, queries: np.ndarray, k: int) -> Hits:
    """Finds the k best rows: queries [Q, D] float32."""
    ...


def exact(tiles: Iterable[np.ndarray], queries: np.ndarray, k: int) -> Hits:
  """Returns the k vectors with the largest product with each query; of equal ones the first rows.

  >>> tiles = [np.float32([[1, 0], [0, 1]]), np.float32([[1, 0], [2, 0]])]
  >>> exact(tiles, np.float32([[1, 0]]), 3)
  Hits(scores=array([[2., 1., 1.]], dtype=float32), rows=array([[3, 0, 2]]))

  Args:
    tiles: arrays [n, D] that follow each other, of any floating dtype; computed in float32.
    queries: [Q, D], finite.
    k: results of each query; fewer if there are fewer vectors.

  Raises:
    ValueError: for queries that are not finite or of another width than the vectors, or k < 1.
  """
  queries = _checked(queries, k)
  best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
  first = 0
  for tile in _float32(tiles):
    _check_width(queries, tile.shape[1])
    scores = queries @ tile.T
    best = [_merge(*found, row, first, k) for found, row in zip(best, scores)]
    first += len(tile)
  number = min(k, first)
  shape = (len(queries), number)
  return Hits(*(np.array([x[i] for x in best]).reshape(shape) for i in (0, 1)))


def _checked(queries: np.ndarray, k: int) -> np.ndarray:
  """The queries as float32; ValueError if they are not [Q, D] of finite numbers, or k < 1."""
  if k < 1:
    raise ValueError(f"k={k}: at least 1 result")
  queries = np.ascontiguousarray(queries, np.float32)
  if queries.ndim != 2 or not np.isfinite(queries).all():
    raise ValueError(f"queries of shape {queries.shape}: expected [Q, D] of finite numbers")
  return queries


def _check_width(queries: np.ndarray, width: int) -> None:
  if queries.shape[1] != width:
    raise ValueError(f"queries have {queries.shape[1]} numbers and vectors {width}: another model?")


def _merge(
  scores: np.ndarray, rows: np.ndarray, new: np.ndarray, first: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """The k best of those found and of the new scores, which belong to rows from `first` on."""
  if len(scores) == k:
    # A later row of equal score comes after those found, so it must be larger to be among the best.
    near = np.flatnonzero(new > scores[-1])
    if len(near) > k:
      near = near[new[near] >= _largest(new[near], k)]
  else:
    near = np.flatnonzero(new >= _largest(new, k)) if len(new) > k else np.arange(len(new))
  scores, rows = np.append(scores, new[near]), np.append(rows, near + first)
  order = np.argsort(-scores, kind="stable")[:k]
  return scores[order], rows[order]


def _largest(x: np.ndarray, k: int) -> np.floating[Any]:
  """The k-th largest number."""
  kth: np.floating[Any] = np.partition(x, len(x) - k)[len(x) - k]
  return kth


def _float32(tiles: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Tiles as float32; several threads convert those that are not, some tiles ahead."""
  ahead: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
  workers = min(_THREADS, os.cpu_count() or 1)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for tile in tiles:
      if tile.dtype == np.float32:
        yield tile
        continue
      ahead.append(pool.submit(tile.astype, np.float32))
      if len(ahead) > workers:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()


def tiles_of(vectors: np.ndarray | Store, rows: int = TILE) -> Iterator[np.ndarray]:
  """Yields the vectors of an array or a store in order, [n, D] with n <= rows, without copies."""
  if isinstance(vectors, Store):
    yield from vectors.tiles(rows)
  else:
    yield from (vectors[start : start + rows] for start in range(0, len(vectors), rows))


class Exact:
  """Exact search in a store.

  Vectors that fit into `memory` are read once and kept as float32, checked against the checksums of
  their rows. Larger stores are read from their files at each query, in tiles.

  Args:
    store: of vectors [N, D].
    memory: bytes for the vectors as float32.
  """

  def __init__(self, store: Store, *, memory: int = 8 << 30):
    self._size = len(store)
    self._vectors: np.ndarray | Store = store
    if 4 * len(store) * store.width <= memory:
      self._vectors = np.empty((len(store), store.width), np.float32)
      for start in range(0, len(store), TILE):
        rows = np.arange(start, min(start + TILE, len(store)))
        self._vectors[rows[0] : rows[-1] + 1] = store.read(rows)

  def __len__(self) -> int:
    return self._size

  def search(self, queries: np.ndarray, k: int) -> Hits:
    """Returns the k best rows of each query, [Q, D] float32."""
    if isinstance(self._vectors, Store):
      return exact(tiles_of(self._vectors), queries, k)
    # Large tiles: each product makes the threads of BLAS wait for each other.
    return exact(tiles_of(self._vectors, max(TILE, _SCORES // max(1, len(queries)))), queries, k)


class Approximate:
  """Approximate search by faiss: vectors of 8 bits per number, in lists around k-means centres.

  A query is compared with the vectors of the nearest lists. The best candidates are ordered by
  their exact scores, computed from the store.

  Args:
    store: of vectors [N, D].
    index: the faiss index of its rows.
    probes: lists that a query is compared with; more are slower and miss less.
  """

  def __init__(self, store: Store, index: Any, *, probes: int = _PROBES):
    self._store, self._index = store, index
    index.nprobe = probes

  def __len__(self) -> int:
    return len(self._store)

  def search(self, queries: np.ndarray, k: int) -> Hits:
    """Returns about the k best rows of each query, [Q, D] float32, with their exact scores.

    Lists with too few vectors give fewer results; their scores are then -inf and their rows -1.

    Raises:
      ValueError: as `exact`.
    """
    queries = _checked(queries, k)
    _check_width(queries, self._store.width)
    number = min(k, len(self))
    if not len(queries):
      return Hits(np.empty((0, number), np.float32), np.empty((0, number), np.int64))
    wanted = min(_RERANK * number, len(self))
    _, candidates = self._index.search(queries, wanted)
    answers = [self._ordered(q, rows[rows >= 0], number) for q, rows in zip(queries, candidates)]
    return Hits(*(np.stack(x) for x in zip(*answers)))

  def _ordered(self, query: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.sort(rows)
    scores = self._store.read(rows).astype(np.float32) @ query
    order = np.argsort(-scores, kind="stable")[:k]
    missing = (0, k - len(order))
    return (
      np.pad(scores[order], missing, constant_values=-np.inf),
      np.pad(rows[order], missing, constant_values=-1),
    )


def faiss() -> Any:
  """Returns the module faiss.

  Raises:
    ImportError: if it is not installed.
  """
  try:
    return importlib.import_module("faiss")
  except ImportError as error:
    raise ImportError(
      "an approximate index needs faiss: pip install 'bigalign[search]', or search exactly with"
      " --index exact"
    ) from error


def build(store: Store, *, lists: int | None = None, seed: int = 0) -> Any:
  """Returns a faiss index of the rows of a store.

  Args:
    store: of vectors [N, D].
    lists: k-means centres; None: a power of two near 4 √N.
    seed: of k-means and of the vectors that it learns from.
  """
  library = faiss()
  count = lists or 1 << max(0, round(np.log2(4 * len(store) ** 0.5)))
  count = max(1, min(count, len(store) // _PER_LIST))
  rng = np.random.default_rng(seed)
  number = min(len(store), _PER_LIST * count)
  sample = np.sort(rng.choice(len(store), number, replace=False, shuffle=False))
  quantizer = library.IndexFlatIP(store.width)
  index = library.IndexIVFScalarQuantizer(
    quantizer,
    store.width,
    count,
    library.ScalarQuantizer.QT_8bit,
    library.METRIC_INNER_PRODUCT,
  )
  index.cp.seed = seed + 1
  index.train(store.read(sample).astype(np.float32))
  for tile in tiles_of(store):
    index.add(np.ascontiguousarray(tile, np.float32))
  return index


def open_approximate(
  store: Store,
  *,
  probes: int = _PROBES,
  queries: Callable[[], np.ndarray] | None = None,
  origin: str = "",
  k: int = 10,
) -> tuple[Approximate, dict[str, Any]]:
  """Opens the approximate index next to the vectors of a store; builds it if there is none.

  Args:
    store: of vectors [N, D].
    probes: lists that a query is compared with.
    queries: makes [Q, D] float32 to measure the recall with; None: rows of the store.
    origin: of the queries, such as the model that makes them. The recall is kept next to the index
      and measured again for another origin, probes or k.
    k: results per query for the recall.

  Returns:
    The index, and its facts: "lists", "probes", "recall" against the exact search, "k", "queries",
    "origin".
  """
  library = faiss()
  path = store.folder / f"faiss-{store.fingerprint[:12]}.index"
  facts_path = path.with_suffix(".json")
  if not path.exists():
    part = pathlib.Path(f"{path}.part-{os.getpid()}")
    try:
      library.write_index(build(store), os.fspath(part))
      part.replace(path)
    except BaseException:
      part.unlink(missing_ok=True)  # the disk may be full
      raise
  index = library.read_index(os.fspath(path), library.IO_FLAG_MMAP)
  opened = Approximate(store, index, probes=probes)
  facts = json.loads(facts_path.read_text()) if facts_path.exists() else {}
  if tuple(map(facts.get, ("probes", "k", "origin"))) != (probes, k, origin):
    asked = queries() if queries else _some_rows(store)
    facts = dict(
      lists=index.nlist,
      probes=probes,
      k=k,
      queries=len(asked),
      origin=origin,
      recall=recall(opened.search(asked, k), exact(tiles_of(store), asked, k)),
    )
    with atomic_write(facts_path) as file:
      file.write((json.dumps(facts, indent=1) + "\n").encode())
  return opened, facts


def _some_rows(store: Store, number: int = 100) -> np.ndarray:
  """Rows spread evenly over a store, [n, D] float32."""
  rows = np.linspace(0, len(store) - 1, min(number, len(store))).astype(np.int64)
  return store.read(rows).astype(np.float32)


def recall(found: Hits, best: Hits) -> float:
  """Returns the share of the best rows that were found, over all queries.

  >>> rows = np.array([[1, 2], [3, 4]])
  >>> recall(Hits(rows, rows), Hits(rows, np.array([[2, 1], [3, 9]])))
  0.75
  """
  pairs = zip(found.rows, best.rows)  # missing results are -1, several times
  shared = (np.intersect1d(rows[rows >= 0], wanted, assume_unique=True) for rows, wanted in pairs)
  return sum(map(len, shared)) / max(best.rows.size, 1)
