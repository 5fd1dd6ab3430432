"""Concept-balanced samples against random ones: python experiments/curation.py OUT

A quarter of the icons, drawn at random or with MetaCLIP's probabilities
(https://arxiv.org/abs/2309.16671), whose concepts are here the words of the icons' names: a word
that t names have or fewer is kept with each of them. t is such that a quarter is kept. In a second
arm only words that 20 names have are concepts, as MetaCLIP's are frequent ones, and names without a
concept are left out. Linear projectors on stored vectors with `clip`, equal steps. Retrieval of all
held-out icons, and of those with a word that less than 20 names of the training icons have.
"""

from __future__ import annotations

import collections
import copy
import pathlib
from typing import Any

import arms
import icons
import numpy as np

import bigalign
from bigalign.data.samples.ids import sample_id
from bigalign.data.sources.base import open_source
from bigalign.data.stores.reader import Store
from bigalign.shards import balance

SHARE, RARE = 0.25, 20


def named(split: str) -> tuple[np.ndarray, list[set[str]]]:
  """The ids of the icons of a split, and the words of their names."""
  source = open_source(icons.SPLITS[split], captions=("txt",))
  samples = [source[i] for i in range(len(source))]
  ids = np.asarray([sample_id(x["key"]) for x in samples], np.uint64)
  return ids, [{*x["captions"][0].lower().split()} for x in samples]


def probabilities(names: list[set[str]], share: float, least: int = 1) -> np.ndarray:
  """[N]: MetaCLIP's probabilities of keeping a name, with t such that a share of all is kept.

  Concepts are the words that `least` names have.
  """
  every = collections.Counter(word for name in names for word in name)
  count = {word: number for word, number in every.items() if number >= least}
  number = {word: i for i, word in enumerate(count)}
  counts = np.asarray([*count.values()])
  matches = [np.asarray([number[word] for word in name & number.keys()]) for name in names]
  low, high = 0.0, float(counts.max())
  for _ in range(20):
    middle = (low + high) / 2
    kept = balance.keep_probability(balance.entry_probability(counts, middle), matches)
    low, high = (middle, high) if kept.mean() < share else (low, middle)
  return kept


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=400, batch=512)
  base = icons.frozen(given.out.parent / "stores", steps=given.steps, batch=given.batch)
  held_out = {name: base["evals"][name] for name in icons.HELD_OUT}
  base["evals"] = {}
  ids, names = named("train")
  counts = collections.Counter(word for name in names for word in name)
  rare = {}
  for name in icons.HELD_OUT:
    of = dict(zip(*named(name)))
    stored = Store(held_out[name]["image_store"])
    samples = stored.samples(np.arange(len(stored)))[:, 0]
    rare[name] = np.asarray([min(counts[word] for word in of[i]) < RARE for i in samples])
  balanced = {
    "balanced": probabilities(names, SHARE),
    "balanced, frequent concepts": probabilities(names, SHARE, least=RARE),
  }

  def found(run: pathlib.Path, state: Any) -> dict[str, float]:
    model = bigalign.load(run)
    figures = {}
    for name, folders in held_out.items():
      hits = icons.hits(model, folders)
      figures |= {name: float(hits.mean()), f"{name}, rare words": float(hits[rare[name]].mean())}
    return figures

  rows = []
  for seed in given.seeds:
    rng = np.random.default_rng(seed)
    drawn = rng.random(len(ids))
    chosen = {name: np.flatnonzero(drawn < kept) for name, kept in balanced.items()}
    chosen |= {
      "all": np.arange(len(ids)),
      "random": rng.permutation(len(ids))[: len(chosen["balanced"])],
    }
    compared = {}
    for name, places in chosen.items():
      file = given.out / f"{name}-{seed}.npy"
      file.parent.mkdir(parents=True, exist_ok=True)
      np.save(file, np.sort(ids[places]))
      compared[name] = copy.deepcopy(base)
      compared[name]["data"]["stores"]["keep"] = str(file)
    rows += arms.compare(given.out, compared, [seed], found)
  columns = [f"{name}{kind}" for name in icons.HELD_OUT for kind in ("", ", rare words")]
  arms.show(rows, columns, given.out)
  arms.draw(rows, columns, given.out / "curation.png")


if __name__ == "__main__":
  main()
