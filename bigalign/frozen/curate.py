"""Concept-balanced curation: bigalign curate --classes STORE --captions STORE --out NAME.

For each class that images in the first store are labelled with, a prototype: the mean of their unit
vectors. Each caption in the second store is scored by its cosine to each prototype; classes choose
samples by the best of these, the rarest class first, and each sample is chosen once
(https://arxiv.org/abs/2409.19425). Both stores hold vectors of one space: `bigalign embed
--projected`.

NAME.ids.npy holds the ids of the chosen samples, for config.data.stores.keep; NAME.0.places.npy
their places in the source that was embedded, for `bigalign view SOURCE --ids`, and another file
those in each source appended; NAME.json how many samples each class found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigalign.data.files.storage import atomic_write
from bigalign.data.stores.reader import Store

CHUNK = 1 << 24  # scores in memory at a time


class Best:
  """The best `keep` rows of each of C classes, of all that were added; of equal ones the first.

  Holds a quarter more at most, and what the last `add` brought; 16 bytes each, 80 while they are
  sorted.
  """

  def __init__(self, classes: int, keep: int):
    self._classes, self._keep = classes, keep
    self._least = np.full(classes, -np.inf, np.float32)  # what a row must exceed
    self._parts = [(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    self._held = 0

  def add(self, first: int, scores: np.ndarray) -> None:
    """Scores [N, C] float32 of the rows from `first` on, which come in ascending order."""
    row, label = np.nonzero(scores > self._least[None])
    self._parts.append((label.astype(np.int32), first + row, scores[row, label]))
    self._held += len(row)
    if self._held > 1.25 * self._classes * self._keep:
      self.table()

  def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(class, row, score), [M] each: class by class, the best rows first."""
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
  """[C, D] float32, unit: of each label 0 … C - 1 the mean of its first `shots` unit vectors.

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
    np.add.at(sums, labels[taken], _unit(store.read(rows[taken])))
    counts += np.bincount(mine, minlength=len(counts))
  empty = np.flatnonzero(counts == 0)
  if not len(counts) or len(empty):
    raise ValueError(
      f"{store.folder}: no image has the labels {empty[:8].tolist()} of {len(counts)} classes"
      if len(counts)
      else f"{store.folder}: none of its {len(store)} images has a label"
    )
  return _unit(sums.astype(np.float32))


def choose(
  table: tuple[np.ndarray, np.ndarray, np.ndarray],
  ids: np.ndarray,
  *,
  classes: int,
  per_class: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Each class its best samples that none before it has chosen.

  Classes come in the ascending order of the worst score in their part of the table: the rarest
  concept chooses first.

  Args:
    table: as of Best.table.
    ids: [M] the sample of each of its rows.

  Returns:
    Places in the table, ascending, and how many each class has chosen, [C].
  """
  label, _, score = table
  _, number = np.unique(ids, return_inverse=True)
  free = np.ones(number.max(initial=-1) + 1, bool)
  starts = np.searchsorted(label, np.arange(classes + 1))
  worst = np.array([score[b - 1] if b > a else np.inf for a, b in itertools.pairwise(starts)])
  chosen, counts = [], np.zeros(classes, np.int64)
  for one in np.argsort(worst, kind="stable"):
    places = np.arange(starts[one], starts[one + 1])
    places = places[free[number[places]]]
    _, first = np.unique(number[places], return_index=True)  # of several captions the best
    mine = places[np.sort(first)[:per_class]]
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
  """Writes the lists; the manifest, which is NAME.json.

  Args:
    classes: folder of a store of labelled images.
    captions: folder of a store of texts, of the same width.
    out: NAME.
    shots: images that make a prototype.
    keep: the best captions of each class, which are all that it can choose from; 100 bytes of
      memory for each of them.
    per_class: samples that a class chooses at most.

  Raises:
    ValueError: for stores of unlike widths, or without labels.
  """
  images, texts = Store(classes), Store(captions)
  if images.width != texts.width:
    raise ValueError(
      f"{classes} is {images.width} wide and {captions} {texts.width}: captions are"
      " compared with images in the space that both were projected to; embed them"
      " with --projected"
    )
  for store in (images, texts):
    if not store.header.get("projected"):
      raise ValueError(
        f"{store.folder} holds what a tower makes, before its projector; images and"
        " captions share a space after it: embed with --projected"
      )
  middles = prototypes(images, shots=shots)
  best = Best(len(middles), keep)
  for rows in _chunks(texts, CHUNK // len(middles)):
    best.add(int(rows[0]), _unit(texts.read(rows)) @ middles.T)
  table = best.table()
  samples = texts.samples(table[1])
  places, counts = choose(table, samples[:, 0], classes=len(middles), per_class=per_class)
  manifest = dict(
    classes=images.fingerprint,
    captions=texts.fingerprint,
    shots=shots,
    keep=keep,
    per_class=per_class,
    rows=len(texts),
    chosen=len(places),
    chosen_per_class=counts.tolist(),
  )
  _write(out, samples[places], texts, manifest)
  return manifest


def _write(out: str, samples: np.ndarray, store: Store, manifest: dict[str, Any]) -> None:
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  lists = {f"{out}.ids.npy": np.sort(samples[:, 0])}
  for i, source in enumerate(store.sources):
    inside = samples[:, 1] - np.uint64(source["place"])  # of one before, this wraps around
    lists[f"{out}.{i}.places.npy"] = np.sort(inside[inside < source["samples"]]).astype(np.int64)
  for path, array in lists.items():
    with atomic_write(path) as file:
      np.save(file, array, allow_pickle=False)
  with atomic_write(f"{out}.json") as file:
    file.write((json.dumps(manifest, indent=1) + "\n").encode())


def _chunks(store: Store, rows: int) -> Iterator[np.ndarray]:
  for start in range(0, len(store), max(rows, 1)):
    yield np.arange(start, min(start + max(rows, 1), len(store)))


def _unit(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float32)
  unit: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  return unit


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """The program; the manifest of what it wrote."""
  parser = argparse.ArgumentParser(
    "bigalign curate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--classes", required=True, metavar="STORE", help="of labelled images")
  parser.add_argument("--captions", required=True, metavar="STORE", help="of texts")
  parser.add_argument("--out", required=True, metavar="NAME", help="NAME.ids.npy … are written")
  parser.add_argument("--shots", type=int, default=128, help="images of a class (%(default)s)")
  parser.add_argument(
    "--keep", type=int, default=50_000, help="captions that a class chooses from (%(default)s)"
  )
  parser.add_argument(
    "--per_class",
    type=int,
    default=2_000,
    help="samples that a class chooses at most (%(default)s)",
  )
  given = parser.parse_args(words)
  found = curate(**vars(given))
  counts = np.array(found["chosen_per_class"])
  print(
    f"{found['chosen']:,} samples of {found['rows']:,} captions for {len(counts):,} classes;"
    f" {int((counts < given.per_class).sum()):,} classes found fewer than {given.per_class:,},"
    f" the least {counts.min():,}"
  )
  return found


def run() -> None:
  """The program `bigalign curate`."""
  main()
