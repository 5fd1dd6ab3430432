"""Concept-balanced curation: bigalign curate --classes STORE --captions STORE --out NAME.

The prototype of a class is the mean of the unit embeddings of its images in the first store. Each
caption in the second store is scored by its cosine to each prototype. Each class chooses the
samples that score best, the rarest class first, and no sample is chosen twice
(https://arxiv.org/abs/2409.19425). Both stores hold embeddings of one space: `bigalign embed
--projected`.

NAME.ids.npy holds the ids of the chosen samples, for config.data.stores.keep. NAME.0.places.npy
holds their positions in the embedded source, for `bigalign view SOURCE --ids`; if sources were
appended, NAME.1.places.npy holds those of the next one, and so on. NAME.json holds the number of
samples per class.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.files.storage import atomic_write
from bigalign.data.stores.reader import Store

CHUNK = 1 << 24  # scores in memory at a time


class Best:
  """Collects the best rows of each class; of equal scores, the first row.

  It holds at most a quarter more rows, plus those of the last `add`: 16 bytes each, 80 while they
  are sorted.

  Args:
    classes: C, number of classes.
    keep: rows to keep of each class.
  """

  def __init__(self, classes: int, keep: int) -> None:
    self._classes, self._keep = classes, keep
    self._least = np.full(classes, -np.inf, np.float32)  # a new row must exceed it
    self._parts = [(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    self._held = 0

  def add(self, first: int, scores: np.ndarray) -> None:
    """Adds rows; call it in ascending order of the rows.

    Args:
      first: number of the first row.
      scores: [N, C] float32.
    """
    row, label = np.nonzero(scores > self._least[None])
    self._parts.append((label.astype(np.int32), first + row, scores[row, label]))
    self._held += len(row)
    if self._held > 1.25 * self._classes * self._keep:
      self.table()

  def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (class, row, score), [M] each, class by class with the best rows first."""
    label, row, score = (np.concatenate(x) for x in zip(*self._parts))
    order = np.lexsort((row, -score, label))
    label, row, score = label[order], row[order], score[order]
    starts = np.searchsorted(label, np.arange(self._classes))
    rank = np.arange(len(label)) - starts[label]
    kept = rank < self._keep
    full = rank == self._keep - 1
    self._least[label[full]] = score[full]
    self._parts = [(label[kept], row[kept], score[kept])]
    self._held = int(kept.sum())
    return self._parts[0]


def prototypes(store: Store, *, shots: int = 128) -> np.ndarray:
  """Returns the prototype of each label: the mean of its unit embeddings.

  Args:
    store: of labelled images.
    shots: number of images per label, the first ones.

  Returns:
    [C, D] float32, unit norm, for labels 0 … C - 1.

  Raises:
    ValueError: if a label below the largest has no image.
  """
  sums, counts = np.zeros((0, store.width)), np.zeros(0, np.int64)
  for rows in _chunks(store, CHUNK // store.width):
    labels = store.labels(rows)
    grown = max(len(counts), int(labels.max(initial=-1)) + 1) - len(counts)
    sums, counts = np.pad(sums, ((0, grown), (0, 0))), np.pad(counts, (0, grown))
    by_label = np.argsort(labels, kind="stable")
    by_label = by_label[labels[by_label] >= 0]
    mine = labels[by_label]
    rank = np.arange(len(mine)) - np.searchsorted(mine, mine)
    taken = by_label[rank + counts[mine] < shots]
    np.add.at(sums, labels[taken], unit(store.read(rows[taken])))
    counts += np.bincount(mine, minlength=len(counts))
  empty = np.flatnonzero(counts == 0)
  if not len(counts) or len(empty):
    raise ValueError(
      f"{store.folder}: {len(empty)} of {len(counts)} classes have no image:"
      f" {tree.shown(empty.tolist())}"
      if len(counts)
      else f"{store.folder}: none of its {len(store)} images has a label"
    )
  return unit(sums.astype(np.float32))


def choose(
  table: tuple[np.ndarray, np.ndarray, np.ndarray],
  ids: np.ndarray,
  *,
  classes: int,
  per_class: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Lets each class choose its best samples among those that are not chosen yet.

  Classes choose in ascending order of the worst score in their part of the table, so that the
  rarest concept chooses first.

  Args:
    table: from Best.table.
    ids: [M], the sample of each row of the table.
    classes: C, number of classes.
    per_class: most samples per class.

  Returns:
    Chosen rows of the table, ascending, and the number of samples per class [C].
  """
  label, _, score = table
  _, number = np.unique(ids, return_inverse=True)
  free = np.ones(number.max(initial=-1) + 1, bool)
  starts = np.searchsorted(label, np.arange(classes + 1))
  worst = np.array([score[b - 1] if b > a else np.inf for a, b in itertools.pairwise(starts)])
  chosen, counts = [], np.zeros(classes, np.int64)
  for one in np.argsort(worst, kind="stable"):
    rows = np.arange(starts[one], starts[one + 1])
    rows = rows[free[number[rows]]]
    _, first = np.unique(number[rows], return_index=True)  # the best caption of each sample
    mine = rows[np.sort(first)[:per_class]]
    free[number[mine]] = False
    chosen.append(mine)
    counts[one] = len(mine)
  return np.sort(np.concatenate(chosen)), counts


def curate(
  classes: str,
  captions: str,
  out: str,
  *,
  shots: int = 128,
  keep: int = 50_000,
  per_class: int = 2_000,
) -> dict[str, Any]:
  """Chooses samples and writes the lists.

  Args:
    classes: folder of a store of labelled images.
    captions: folder of a store of texts of the same width.
    out: NAME, the start of the paths of the lists.
    shots: images per prototype.
    keep: captions that a class can choose from, the best ones; each takes 100 bytes of memory.
    per_class: most samples per class.

  Returns:
    The content of NAME.json.

  Raises:
    ValueError: for stores of different widths, not projected, or without labels.
  """
  images, texts = Store(classes), Store(captions)
  if images.width != texts.width:
    raise ValueError(
      f"{classes} is {images.width} wide and {captions} {texts.width}: captions and images are"
      " compared in the space of the projectors; embed both with --projected"
    )
  for store in (images, texts):
    if not store.header.get("projected"):
      raise ValueError(
        f"{store.folder} holds embeddings before the projector; images and captions share a"
        " space only after it: embed with --projected"
      )
  centres = prototypes(images, shots=shots)
  best = Best(len(centres), keep)
  for rows in _chunks(texts, CHUNK // len(centres)):
    best.add(int(rows[0]), unit(texts.read(rows)) @ centres.T)
  table = best.table()
  samples = texts.samples(table[1])
  rows_chosen, counts = choose(table, samples[:, 0], classes=len(centres), per_class=per_class)
  manifest = dict(
    classes=images.fingerprint,
    captions=texts.fingerprint,
    shots=shots,
    keep=keep,
    per_class=per_class,
    rows=len(texts),
    chosen=len(rows_chosen),
    chosen_per_class=counts.tolist(),
  )
  write_samples(out, samples[rows_chosen], texts, manifest)
  return manifest


def write_samples(out: str, samples: np.ndarray, store: Store, manifest: dict[str, Any]) -> None:
  """Writes the ids of chosen samples, their positions in each source, and the manifest.

  Args:
    out: NAME, the start of the paths.
    samples: [n, 2] uint64 of Store.samples; a sample may have several rows.
    store: that has them.
    manifest: the content of NAME.json.
  """
  samples = np.unique(samples, axis=0)
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  lists = {f"{out}.ids.npy": samples[:, 0]}
  for i, source in enumerate(store.sources):
    inside = samples[:, 1] - np.uint64(source["place"])  # of an earlier source, this wraps around
    lists[f"{out}.{i}.places.npy"] = np.sort(inside[inside < source["samples"]]).astype(np.int64)
  for path, array in lists.items():
    with atomic_write(path) as file:
      np.save(file, array, allow_pickle=False)
  with atomic_write(f"{out}.json") as file:
    file.write((json.dumps(manifest, indent=1) + "\n").encode())


def _chunks(store: Store, rows: int) -> Iterator[np.ndarray]:
  for start in range(0, len(store), max(rows, 1)):
    yield np.arange(start, min(start + max(rows, 1), len(store)))


def unit(x: np.ndarray) -> np.ndarray:
  """Rows of unit norm, float32."""
  x = x.astype(np.float32)
  rows: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  return rows


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program; returns the content of NAME.json."""
  parser = argparse.ArgumentParser(
    "bigalign curate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--classes", required=True, metavar="STORE", help="store of labelled images")
  parser.add_argument("--captions", required=True, metavar="STORE", help="store of texts")
  parser.add_argument(
    "--out", required=True, metavar="NAME", help="start of the paths to write: NAME.ids.npy …"
  )
  parser.add_argument("--shots", type=int, default=128, help="images per prototype (%(default)s)")
  parser.add_argument(
    "--keep", type=int, default=50_000, help="captions per class to choose from (%(default)s)"
  )
  parser.add_argument(
    "--per_class",
    type=int,
    default=2_000,
    help="most samples per class (%(default)s)",
  )
  given = parser.parse_args(words)
  manifest = curate(**vars(given))
  counts = np.array(manifest["chosen_per_class"])
  print(
    f"Chose {manifest['chosen']:,} samples from {manifest['rows']:,} captions for {len(counts):,}"
    f" classes. Classes with fewer than {given.per_class:,} samples:"
    f" {int((counts < given.per_class).sum()):,}; smallest class: {counts.min():,} samples"
  )
  return manifest


def run() -> None:
  """The program `bigalign curate`."""
  main()
