"""Times search in 100,000 vectors, with numpy and faiss: python benchmarks/search.py

Unit vectors of 512 numbers, the 10 nearest of a query. `bigalign search` keeps them as float32, or
reads them from the files of a store as float16; numpy multiplies all and sorts a part; faiss has a
flat index. The ways alternate, one query at a time. Then the approximate index is compared with the
exact search: vectors around 2,000 centres in 48 dimensions with noise, and queries with more noise.
Exits with 1 if the median of the exact search is above LIMIT seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from step import made_by

from bigalign.data.stores import writer
from bigalign.data.stores.reader import Store
from bigalign.run import runtime
from bigalign.search.index import Approximate, Exact, build, recall

LIMIT = 0.050
WIDTH, K = 512, 10
PIECE = 4096


def clustered(count: int, noise: float, rng: np.random.Generator) -> np.ndarray:
  """Returns [count, WIDTH] unit vectors; the centres are those of any generator."""
  fixed = np.random.default_rng(0)
  mixing = fixed.standard_normal((48, WIDTH), np.float32)
  centres = fixed.standard_normal((2000, 48), np.float32)
  places = centres[rng.integers(0, len(centres), count)]
  places = places + 0.6 * rng.standard_normal(places.shape, np.float32)
  z = places @ mixing + noise * rng.standard_normal((count, WIDTH), np.float32)
  return np.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), np.float32)


def write(folder: pathlib.Path, vectors: np.ndarray) -> Store:
  """Returns a store of the vectors in float16."""
  writer.begin(folder, dict(side="image", width=WIDTH, dtype="float16", projected=True))
  writer.claim(folder, "f", len(vectors), "s", batch_size=PIECE, batches=1, write=True)
  for piece, start in enumerate(range(0, len(vectors), PIECE)):
    part = vectors[start : start + PIECE].astype(np.float16)
    places = np.arange(start, start + len(part), dtype=np.uint64)
    writer.write(folder, piece, part, np.stack([places, places], 1))
  writer.finish(folder, captions=False)
  return Store(folder)


def by_numpy(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
  """Returns the rows that the shortest numpy code finds."""
  scores = queries @ vectors.T
  rows = np.argpartition(-scores, k, axis=1)[:, :k]
  order = np.argsort(-np.take_along_axis(scores, rows, 1), axis=1)
  return np.take_along_axis(rows, order, 1)


def flat(vectors: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
  """Returns the search of faiss's flat index."""
  import faiss

  index = faiss.IndexFlatIP(WIDTH)
  index.add(vectors)
  return lambda queries, k: np.asarray(index.search(queries, k)[1])


@contextlib.contextmanager
def realtime(wanted: bool) -> Iterator[None]:
  """A context in which no other program runs on the cores that the threads of this one use."""

  def schedule(policy: int, priority: int) -> None:
    for thread in os.listdir("/proc/self/task"):
      with contextlib.suppress(ProcessLookupError):  # it ended
        os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

  if not wanted:
    yield
    return
  schedule(os.SCHED_FIFO, 1)
  try:
    yield
  finally:
    schedule(os.SCHED_OTHER, 0)


def main() -> int:
  """Prints a table, writes the JSON, and returns 1 if the limit is missed, otherwise 0."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=100_000, help="vectors (%(default)s)")
  parser.add_argument("--rounds", type=int, default=40, help="queries of each way (%(default)s)")
  parser.add_argument(
    "--realtime",
    action="store_true",
    help="measure with real-time priority, if other programs use the machine; needs root on Linux",
  )
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/search.json"))
  args = parser.parse_args()
  versions = runtime.versions()
  vectors = clustered(args.rows, 0.3, np.random.default_rng(1))
  queries = clustered(args.rounds, 1.0, np.random.default_rng(2))
  results: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    store = write(pathlib.Path(folder) / "image", vectors)
    begin = time.perf_counter()
    held = Exact(store)
    open_seconds = time.perf_counter() - begin
    vectors = store.read(np.arange(len(store))).astype(np.float32)  # all search the same numbers
    ways: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
      "bigalign, in memory": lambda q, k: held.search(q, k).rows,
      "bigalign, from files": lambda q, k: Exact(store, memory=0).search(q, k).rows,
      "numpy": functools.partial(by_numpy, vectors),
    }
    if importlib.util.find_spec("faiss"):
      versions["faiss-cpu"] = importlib.metadata.version("faiss-cpu")
      ways["faiss, flat"] = flat(vectors)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for query in [queries[:1], *queries[:, None]]:  # the first is a warm-up
      expected = by_numpy(vectors, query, K)
      for name, way in ways.items():
        with realtime(args.realtime):
          begin = time.perf_counter()
          rows = way(query, K)
          seconds[name].append(time.perf_counter() - begin)
        assert len(np.intersect1d(rows, expected)) >= K - 1, f"{name} finds {rows}, not {expected}"
    for name, (_, *each) in seconds.items():
      results[name] = dict(median=statistics.median(each), fastest=min(each))
      print(f"{name:<22} median {1e3 * results[name]['median']:6.1f} ms", end="")
      print(f", fastest {1e3 * min(each):6.1f} ms")
    if "faiss, flat" in ways:
      results["approximate"] = approximate(store, held, queries, args.realtime)
  result = dict(
    **made_by(versions),
    rows=args.rows,
    width=WIDTH,
    k=K,
    open_seconds=open_seconds,
    seconds=results,
  )
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  median = results["bigalign, in memory"]["median"]
  if median > LIMIT:
    print(f"bigalign, in memory: {1e3 * median:.0f} ms is above {1e3 * LIMIT:.0f} ms")
  return int(median > LIMIT)


def approximate(store: Store, exact: Exact, queries: np.ndarray, alone: bool) -> dict[str, Any]:
  """Returns and prints recall and time of the approximate index for several numbers of lists."""
  begin = time.perf_counter()
  index = build(store)
  built = time.perf_counter() - begin
  print(f"approximate: {index.nlist} lists, built in {built:.0f} s")
  best = exact.search(queries, K)
  rows: dict[str, Any] = dict(build_seconds=built, lists=index.nlist)
  for probes in (8, 32, 128):
    opened = Approximate(store, index, probes=probes)
    with realtime(alone):
      begin = time.perf_counter()
      for query in queries[:, None]:
        opened.search(query, K)
      each = (time.perf_counter() - begin) / len(queries)
    share = recall(opened.search(queries, K), best)
    rows[str(probes)] = dict(recall=share, mean_seconds=each)
    print(f"  {probes:4} lists searched: recall@{K} {share:.3f}, {1e3 * each:.1f} ms per query")
  return rows


if __name__ == "__main__":
  sys.exit(main())
