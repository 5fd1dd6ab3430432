"""Exact search is a sort of all products, in tiles of any size; the approximate one is measured."""

from __future__ import annotations

import doctest
import pathlib

import ml_dtypes
import numpy as np
import pytest
from search.conftest import write_store

from bigalign.data.files.checksums import Damaged
from bigalign.search import index
from bigalign.search.index import Exact, Hits, exact, open_approximate, recall, tiles_of

RNG = np.random.default_rng(0)
# Small integers: their products are exact in any order, and many are equal.
VECTORS = RNG.integers(-2, 3, (157, 8)).astype(np.float32)
QUERIES = RNG.integers(-2, 3, (5, 8)).astype(np.float32)


def sorted_all(vectors, queries, k):
  """The definition, in numpy."""
  scores = queries @ vectors.T
  rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(scores, rows, 1), rows


def test_examples():
  assert doctest.testmod(index).failed == 0


@pytest.mark.parametrize("k", [1, 4, 156, 157, 200])
@pytest.mark.parametrize("tile", [1, 3, 50, 156, 157, 1000])
def test_exact_search_is_a_stable_sort_in_tiles_of_any_size(tile, k):
  scores, rows = sorted_all(VECTORS, QUERIES, k)
  assert len(np.unique(scores[0])) < len(scores[0]) or k == 1, "ties are among the results"
  found = exact(tiles_of(VECTORS, tile), QUERIES, k)
  np.testing.assert_array_equal(found.rows, rows)
  np.testing.assert_array_equal(found.scores, scores)
  assert found.scores.dtype == np.float32 and found.rows.dtype == np.int64


def test_equal_vectors_come_in_the_order_of_their_rows():
  found = exact(tiles_of(np.ones((100, 4), np.float32), 7), np.ones((1, 4)), 20)
  assert found.rows.tolist() == [list(range(20))]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_vectors_of_other_dtypes_are_multiplied_in_float32(dtype):
  vectors = RNG.standard_normal((90, 16)).astype(dtype)
  queries = RNG.standard_normal((2, 16)).astype(np.float32)
  expected, rows = sorted_all(vectors.astype(np.float32), queries, 9)
  found = exact(tiles_of(vectors, 32), queries, 9)
  np.testing.assert_array_equal(found.rows, rows)
  np.testing.assert_allclose(found.scores, expected, atol=1e-6)


def test_nothing_to_find_and_nothing_to_ask():
  assert exact([], QUERIES, 3).rows.shape == (5, 0)
  assert exact(tiles_of(VECTORS[:0]), QUERIES, 3).rows.shape == (5, 0)
  assert exact(tiles_of(VECTORS), QUERIES[:0], 3).rows.shape == (0, 3)


@pytest.mark.parametrize(
  "queries, k, message",
  [
    (QUERIES, 0, "k=0: at least 1"),
    (QUERIES[:, :7], 3, "queries have 7 numbers and vectors 8"),
    (QUERIES[0], 3, r"shape \(8,\)"),
    (QUERIES * np.nan, 3, "finite"),
  ],
)
def test_wrong_queries_are_refused(queries, k, message):
  with pytest.raises(ValueError, match=message):
    exact(tiles_of(VECTORS), queries, k)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_store_in_memory_and_one_read_from_its_files_give_the_same(tmp_path, dtype):
  store = write_store(tmp_path, VECTORS, dtype=dtype)
  scores, rows = sorted_all(VECTORS, QUERIES, 9)
  for memory in (1 << 20, 0):
    found = Exact(store, memory=memory)
    assert len(found) == 157 and isinstance(found._vectors, np.ndarray) == bool(memory)
    answer = found.search(QUERIES, 9)
    np.testing.assert_array_equal(answer.rows, rows)
    np.testing.assert_array_equal(answer.scores, scores)


def test_vectors_that_changed_on_disk_are_refused(tmp_path):
  store = write_store(tmp_path, VECTORS)
  path = next(tmp_path.glob("*.vectors.npy"))
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  with pytest.raises(Damaged, match="row 63 changed"):
    Exact(store)


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
  """A store of 4,000 unit vectors around 40 centres, and queries near them."""
  pytest.importorskip("faiss", reason="faiss or starlette is not installed: the extra search")
  centres = RNG.standard_normal((40, 16))

  def near(count):
    z = centres[RNG.integers(0, 40, count)] + 0.9 * RNG.standard_normal((count, 16))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

  return write_store(tmp_path_factory.mktemp("clusters"), near(4000)), near(50)


def test_the_approximate_index_states_its_recall(clusters):
  store, queries = clusters
  found, facts = open_approximate(store, probes=1, queries=lambda: queries)
  best = Exact(store).search(queries, 10)
  answer = found.search(queries, 10)
  assert facts["recall"] == recall(answer, best) and 0.3 < facts["recall"] < 1
  assert facts["lists"] == 100 and facts["queries"] == 50
  same = answer.rows == best.rows
  np.testing.assert_allclose(answer.scores[same], best.scores[same], atol=1e-6)
  assert (np.diff(answer.scores) <= 0).all()


def test_all_lists_find_all_but_what_8_bits_lose(clusters):
  store, queries = clusters
  _, facts = open_approximate(store, probes=100, queries=lambda: queries)
  assert facts["recall"] > 0.99


def test_an_approximate_index_is_built_once(clusters, monkeypatch):
  store, queries = clusters
  open_approximate(store, probes=1, queries=lambda: queries)
  monkeypatch.setattr(index, "build", None)
  monkeypatch.setattr(index, "recall", None)
  found, facts = open_approximate(store, probes=1)
  assert facts["queries"] == 50
  answer = found.search(queries, 5000)  # more than there are, and than the lists hold
  assert answer.rows.shape == (50, 4000)
  missing = answer.rows < 0
  assert missing.any() and np.isneginf(answer.scores[missing]).all()


def test_results_that_lists_lack_are_not_counted_as_found():
  rows = np.array([[3, -1, -1, -1]])
  best = np.array([[3, 4, 5, 6]])
  assert recall(Hits(rows, rows), Hits(best, best)) == 0.25


def test_recall_is_measured_again_for_other_queries(clusters):
  store, queries = clusters

  def facts(origin, count):
    asked = queries[:count]
    return open_approximate(store, probes=2, queries=lambda: asked, origin=origin)[1]

  assert facts("one text tower", 7)["queries"] == 7
  assert facts("another", 8)["queries"] == 8
  again = facts("another", 9)
  assert again["queries"] == 8 and again["origin"] == "another"


def test_wrong_queries_of_an_approximate_index_are_refused(clusters):
  store, queries = clusters
  found, _ = open_approximate(store, probes=1, queries=lambda: queries)
  nothing = found.search(queries[:0], 3)
  assert nothing.rows.shape == nothing.scores.shape == (0, 3) and nothing.rows.dtype == np.int64
  for wrong, k, message in (
    (queries, 0, "k=0: at least 1"),
    (queries[:, :7], 3, "queries have 7 numbers and vectors 16"),
    (queries[0], 3, r"shape \(16,\)"),
    (queries * np.nan, 3, "finite"),
  ):
    with pytest.raises(ValueError, match=message):
      found.search(wrong, k)


def test_an_index_that_was_not_written_to_its_end_is_removed(tmp_path, monkeypatch):
  library = pytest.importorskip(
    "faiss", reason="faiss or starlette is not installed: the extra search"
  )

  def killed(index, path):
    pathlib.Path(path).write_bytes(b"half")
    raise KeyboardInterrupt

  monkeypatch.setattr(library, "write_index", killed)
  store = write_store(tmp_path, VECTORS)
  with pytest.raises(KeyboardInterrupt):
    open_approximate(store)
  assert not [*tmp_path.glob("faiss-*")]
