"""Near-duplicates of an embedding store: bigalign dedup stores/images --out unique.

SemDeDup (https://arxiv.org/abs/2303.09540): spherical k-means splits the store into clusters. In
each cluster a row is removed if its cosine with an earlier one is above 1 - eps. Rows that are far
from the centre of the cluster come first. Removed rows remove others too, so of a chain of
near-duplicates one row is left. Rows of different clusters are not compared.

NAME.ids.npy holds the ids of the samples that are kept, for config.data.stores.keep.
NAME.0.places.npy holds their positions in the embedded source, for `bigalign view SOURCE --ids`; if
sources were appended, NAME.1.places.npy holds those of the next one, and so on. NAME.json holds the
counts, and what share other values of eps would remove.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from bigalign.data.stores.reader import CHUNK, Store
from bigalign.frozen.curate import unit, write_samples
from bigalign.run import progress

ROWS = 8192  # of a cluster on average
SAMPLE = 256  # rows per cluster that k-means learns from
MOST = 100_000  # rows that are compared with each other; larger clusters are cut
TILE = 4096  # rows of a product
COSINES = 1 << 26  # of rows and centres at a time
SHOWN = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)  # values of eps in NAME.json


def largest_earlier(vectors: np.ndarray) -> np.ndarray:
  """The largest cosine of each row with an earlier one: [N, D], unit norm -> [N], at least 0.

  >>> largest_earlier(np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])).tolist()
  [0.0, 0.0, 0.8]
  """
  largest = np.zeros(len(vectors), vectors.dtype)
  for start in range(0, len(vectors), TILE):
    own = vectors[start : start + TILE]
    best = np.zeros(len(own), vectors.dtype)
    for before in range(0, start + 1, TILE):
      cosines = own @ vectors[before : before + TILE].T
      best = np.maximum(best, (np.tril(cosines, -1) if before == start else cosines).max(1))
    largest[start : start + TILE] = best
  return largest


def learn_centres(
  rows: np.ndarray, clusters: int, *, iterations: int, rng: np.random.Generator
) -> np.ndarray:
  """The centres of spherical k-means, [K, D] float32, unit norm.

  A cluster that loses all its rows keeps its centre.

  Args:
    rows: [n, D] of any floating dtype and norm.
    clusters: K.
    iterations: of Lloyd's algorithm.
    rng: draws the rows that are the first centres.
  """
  centres = unit(rows[np.sort(rng.choice(len(rows), clusters, replace=False))])
  for _ in range(iterations):
    sums = np.zeros_like(centres)
    assign = _nearest(centres)
    for tile in _tiles(len(rows), clusters):
      own = unit(rows[tile])
      cluster, _ = assign(own)
      order = np.argsort(cluster, kind="stable")
      numbers, first = np.unique(cluster[order], return_index=True)
      sums[numbers] += np.add.reduceat(own[order], first)
    filled = np.linalg.norm(sums, axis=1) > 0
    moved = np.where(filled[:, None], unit(sums), centres)
    if np.array_equal(moved, centres):
      break
    centres = moved
  return centres


def _tiles(count: int, clusters: int) -> Iterator[slice]:
  size = max(256, COSINES // clusters)
  return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _nearest(centres: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """Returns assign([n, D], unit norm) -> the nearest centre of each row [n], and their cosine [n].

  All devices of this machine share the rows.
  """
  import jax  # takes seconds, which --help does not need

  find, spread, everywhere = _compiled()
  on_devices = jax.device_put(centres, everywhere)

  def assign(own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    padded = np.pad(own, ((0, -len(own) % spread.mesh.size), (0, 0)))
    found = find(jax.device_put(padded, spread), on_devices)
    cluster, cosine = (np.asarray(x)[: len(own)] for x in found)
    return cluster, cosine

  return assign


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Any, Any]:
  """The jitted function of _nearest, and the shardings of rows and centres."""
  import jax
  import jax.numpy as jnp

  mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("rows",))
  spread, everywhere = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("rows",), ())
  )

  @jax.jit
  def find(own: jax.Array, centres: jax.Array) -> tuple[jax.Array, jax.Array]:
    cosines = jnp.matmul(own, centres.T, precision=jax.lax.Precision.HIGHEST)
    return cosines.argmax(1), cosines.max(1)

  return find, spread, everywhere


def dedup(
  folder: str,
  out: str,
  *,
  eps: float = 0.05,
  clusters: int = 0,
  iterations: int = 20,
  keep: str = "hard",
  seed: int = 0,
) -> dict[str, Any]:
  """Chooses the rows to keep and writes the lists.

  Holds in memory: the rows that k-means learns from, one cluster, and 24 bytes for each sample that
  is kept; the rest is in a scratch file of 13 bytes a row beside `out`.

  Args:
    folder: of a store of pooled vectors.
    out: NAME, the start of the paths of the lists.
    eps: 1 - eps is the cosine from which on two rows are near-duplicates.
    clusters: K; 0: one for every 8,192 rows.
    iterations: of k-means.
    keep: of near-duplicates, the one far from the centre ("hard") or near it ("easy").
    seed: of the rows that k-means learns from.

  Returns:
    The content of NAME.json.

  Raises:
    ValueError: for a store of tokens, an eps outside [0, 1], or more clusters than rows.
  """
  store = Store(folder)
  clusters = clusters or -(-len(store) // ROWS)
  if len(store.shape) > 1:
    raise ValueError(f"{folder} holds tokens, but pooled vectors are compared; embed without them")
  if not 0 <= eps <= 1 or not 1 <= clusters <= len(store):
    raise ValueError(
      f"eps={eps}, clusters={clusters}: eps is from 0 to 1, and clusters from 1 to {len(store)},"
      " the number of rows"
    )
  rng = np.random.default_rng(seed)
  number = min(len(store), SAMPLE * clusters)
  drawn = np.sort(rng.choice(len(store), number, replace=False))
  centres = learn_centres(store.read(drawn), clusters, iterations=iterations, rng=rng)
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=pathlib.Path(out).parent))

    def array(name: str, dtype: Any) -> np.ndarray:
      return np.memmap(pathlib.Path(scratch) / name, dtype, "w+", shape=(len(store),))

    cosine, kept = array("cosine", np.float32), array("kept", np.bool_)
    rows, ends = _by_cluster(store, centres, cosine, array("rows", np.int64), array("c", np.int32))
    cut, removed = 0, np.zeros(len(SHOWN), np.int64)
    shown = stack.enter_context(progress.Progress("dedup", len(store), unit="rows"))
    for begin, end in zip([0, *ends], ends):
      # The stable sort leaves rows of equal cosines in the order of the store.
      mine = np.sort(rows[begin:end])
      order = np.argsort(cosine[mine] if keep == "hard" else -cosine[mine], kind="stable")
      cut += len(mine) > MOST
      for start in range(0, len(mine), MOST):
        some = mine[order[start : start + MOST]]
        largest = largest_earlier(unit(store.read(some)))
        kept[some] = largest <= 1 - eps
        removed += [int((largest > 1 - x).sum()) for x in SHOWN]
      shown.reach(int(end))
    if cut:
      logging.warning(
        "%d clusters have more than %d rows and were cut; near-duplicates may remain. Use more than"
        " %d clusters",
        *(cut, MOST, clusters),
      )
    samples = store.samples(np.flatnonzero(kept))
  manifest = dict(
    store=store.fingerprint,
    eps=eps,
    clusters=clusters,
    iterations=iterations,
    keep=keep,
    seed=seed,
    rows=len(store),
    rows_kept=len(samples),
    samples_kept=len(np.unique(samples[:, 0])),
    removed_by_eps={str(x): int(n) for x, n in zip(SHOWN, removed)},
  )
  write_samples(out, samples, store, manifest)
  return manifest


def _by_cluster(
  store: Store, centres: np.ndarray, cosine: np.ndarray, rows: np.ndarray, cluster: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Fills `cosine` of each row with its centre, and `rows`, cluster by cluster, [N] each.

  Returns:
    rows, and the end of each cluster in it, [K].
  """
  assign, counts = _nearest(centres), np.zeros(len(centres), np.int64)
  with progress.Progress("clusters", len(store), unit="rows") as shown:
    for tile in _tiles(len(store), len(centres)):
      own = unit(store.read(np.arange(tile.start, tile.stop)))
      cluster[tile], cosine[tile] = assign(own)
      counts += np.bincount(cluster[tile], minlength=len(counts))
      shown.reach(tile.stop)
  ends = np.cumsum(counts)
  free = ends - counts  # where the next row of each cluster goes
  for start in range(0, len(store), CHUNK):
    some = cluster[start : start + CHUNK]
    order = np.argsort(some, kind="stable")
    numbers, first, size = np.unique(some[order], return_index=True, return_counts=True)
    places = np.repeat(free[numbers] - first, size) + np.arange(len(some))
    rows[places] = start + order
    free[numbers] += size
  return rows, ends


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program; returns the content of NAME.json."""
  parser = argparse.ArgumentParser(
    "bigalign dedup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", metavar="STORE", help="store of the samples")
  parser.add_argument(
    "--out", required=True, metavar="NAME", help="start of the paths to write: NAME.ids.npy …"
  )
  parser.add_argument(
    "--eps", type=float, default=0.05, help="near-duplicates: cosine above 1 - eps (%(default)s)"
  )
  parser.add_argument(
    "--clusters", type=int, default=0, help="number of clusters; 0: one per 8,192 rows"
  )
  parser.add_argument(
    "--iterations", type=int, default=20, help="of k-means, at most (%(default)s)"
  )
  parser.add_argument(
    "--keep",
    choices=("hard", "easy"),
    default="hard",
    help="which of near-duplicates: far from the centre, or near it (%(default)s)",
  )
  parser.add_argument("--seed", type=int, default=0, help="of k-means (%(default)s)")
  given = parser.parse_args(words)
  manifest = dedup(**vars(given))
  print(
    f"Keeps {manifest['rows_kept']:,} of {manifest['rows']:,} rows,"
    f" {manifest['samples_kept']:,} samples: {given.out}.ids.npy"
  )
  return manifest


def run() -> None:
  """The program `bigalign dedup`."""
  main()
