"""Captions of icons: python experiments/icon_captions.py OUT --seeds 0,1,2

Trains a small model on the icons in BIGALIGN_DATA with `clip` alone, and with `clip` and `caption`,
the same otherwise, for each seed. It writes captions of held-out icons with the decoder and counts
how many are the name of the icon, or share a word with it, against the same captions of other icons
(chance). Writes OUT/captions.json and prints a table with retrieval.
Exits with 1 unless captions share a word with the name of their icon five times as often as by
chance, for every seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import rich.box
import rich.table

import bigalign
from bigalign.data.sources.base import open_source
from bigalign.run import tables
from bigalign.run.configs import load_config
from bigalign.run.metrics import read_metrics
from bigalign.train import train

ICONS = "$BIGALIGN_DATA/icons"
SETS = dict(seen="val", unseen="unseen")  # concepts of the training icons, and others
METRICS = tuple(f"val/{name}/text_to_image_R@5" for name in SETS)
COUNTS = ("exact", "exact_chance", "word", "word_chance")


def config(vocabulary: pathlib.Path, steps: int) -> dict[str, Any]:
  """configs/photos.py on icons of 32 pixels, with `clip` and a tokenizer of whole words."""
  c: dict[str, Any] = load_config("photos").to_dict()
  c |= dict(log_every=50, checkpoint_every=0, eval_every=0, batch_size=128, total_steps=steps)
  c["data"] |= dict(
    source=f"{ICONS}/train/{{00000..00010}}.tar",
    captions=("txt",),
    image_size=32,
    resize="squash",
    augment=dict(crop="random_resized", scale=(0.6, 1.0)),
    tokenizer=dict(name="words", vocabulary=str(vocabulary), length=10),
  )
  c["model"]["image"] |= dict(patch=8, depth=4, stem="patch")
  c["model"]["text"] |= dict(length=10, vocab_size=len(vocabulary.read_text().split()) + 3)
  c["loss"] = dict(clip=dict(weight=1.0))
  c["optimizer"] = dict(name="adamw", lr=2e-3, warmup="5%", weight_decay=0.1)
  c["evals"] = {
    name: dict(type="retrieval", source=f"{ICONS}/{part}/00000.tar", fields=("txt",), captions=1)
    for name, part in SETS.items()
  }
  return c


def write_vocabulary(path: pathlib.Path) -> None:
  """All words of the names of the training icons: no caption to learn has an unknown word."""
  words: set[str] = set()
  source = open_source(f"{ICONS}/train/{{00000..00010}}.tar", captions=("txt",))
  for i in range(len(source)):
    words |= {*source[i]["captions"][0].lower().split()}
  path.write_text("\n".join(sorted(words)))


def named(run: pathlib.Path, part: str, beams: int) -> dict[str, Any]:
  """How many icons of a split their captions name, beside the same captions of all other icons."""
  model = bigalign.load(run)
  source = open_source(f"{ICONS}/{part}/00000.tar", captions=("txt",))
  records = [source[i] for i in range(len(source))]
  written = model.caption([x["image"] for x in records], beams=beams, batch_size=128)
  # Both as words of the vocabulary.
  ids, _ = model.tokenize([x["captions"][0] for x in records])
  known = [model.tokenizer.decode(row) for row in ids.tolist()]
  same = np.asarray([[a == b and "?" not in b for b in known] for a in written], float)
  words = [[{*text.split()} - {"?"} for text in texts] for texts in (written, known)]
  shared = np.asarray([[bool(a & b) for b in words[1]] for a in words[0]], float)
  counts = [x for table in (same, shared) for x in (np.diag(table).mean(), table.mean())]
  examples = [f"{b} -> {a}" for a, b in zip(written[:200:20], known[:200:20])]
  return dict(zip(COUNTS, map(float, counts)), examples=examples)


def main() -> None:
  """The program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--beams", type=int, default=4)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  vocabulary = args.out / "words.txt"
  write_vocabulary(vocabulary)
  plain = config(vocabulary, args.steps)
  captioned = copy.deepcopy(plain)
  captioned["loss"]["caption"] = dict(weight=2.0, depth=2, heads=4)
  table = rich.table.Table("run", "seed", "minutes", *METRICS, *COUNTS, box=rich.box.SIMPLE_HEAD)
  found: dict[str, Any] = {}
  ratios = []
  for seed in map(int, args.seeds.split(",")):
    for name, own in (("caption", captioned), ("clip", plain)):
      workdir, begin = args.out / f"{name}-{seed}", time.perf_counter()
      train(own | dict(seed=seed), workdir)
      row: dict[str, Any] = dict(minutes=(time.perf_counter() - begin) / 60)
      for values in read_metrics(workdir):
        row |= {metric: values[metric] for metric in METRICS if metric in values}
      if name == "caption":
        row |= {split: named(workdir, part, args.beams) for split, part in SETS.items()}
        ratios.append(row["seen"]["word"] / row["seen"]["word_chance"])
      shown = [row.get("seen", {}).get(column) for column in COUNTS]
      cells = [row["minutes"], *(row[metric] for metric in METRICS), *shown]
      table.add_row(name, str(seed), *("" if x is None else f"{x:.3f}" for x in cells))
      found[workdir.name] = row
      (args.out / "captions.json").write_text(json.dumps(found, indent=1))
      print(json.dumps({workdir.name: row}), flush=True)
  tables.show(table)
  sys.exit(0 if all(ratio > 5 for ratio in ratios) else 1)


if __name__ == "__main__":
  main()
