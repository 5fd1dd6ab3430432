"""Captions of icons: python experiments/icon_captions.py OUT

Trains a small model on the icons in BIGALIGN_DATA with `clip` alone, and with `clip` and `caption`,
the same otherwise, for each seed. It writes captions of held-out icons with the decoder and counts
how many are the name of the icon, or share a word with it, against the same captions of other icons
(chance). The table has retrieval too. Exits with 1 unless captions share a word with the name of
their icon five times as often as by chance, for every seed.
"""

from __future__ import annotations

import copy
import pathlib
import sys
from typing import Any

import arms
import numpy as np

import bigalign
from bigalign.data.sources.base import open_source
from bigalign.run.configs import load_config

ICONS = "$BIGALIGN_DATA/icons"
SETS = dict(seen="val", unseen="unseen")  # concepts of the training icons, and others
METRICS = {f"{name}, t2i R@5": f"val/{name}/text_to_image_R@5" for name in SETS}
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


def named(run: pathlib.Path, part: str, beams: int) -> dict[str, float]:
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
  print(*(f"{b} -> {a}" for a, b in zip(written[:200:20], known[:200:20])), sep="\n")
  return dict(zip(COUNTS, map(float, counts)))


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=1_000, beams=4)
  vocabulary = given.out / "words.txt"
  write_vocabulary(vocabulary)
  plain = config(vocabulary, given.steps)
  captioned = copy.deepcopy(plain)
  captioned["loss"]["caption"] = dict(weight=2.0, depth=2, heads=4)

  def found(run: pathlib.Path, state: Any) -> dict[str, float]:
    figures = arms.last(run, METRICS)
    if run.name.startswith("caption"):
      for split, part in SETS.items():
        counts = named(run, part, given.beams)
        figures |= {f"{split}, {name}": x for name, x in counts.items()}
    return figures

  rows = arms.compare(given.out, dict(caption=captioned, clip=plain), given.seeds, found)
  arms.show(rows, [*METRICS, *(f"seen, {name}" for name in COUNTS)], given.out)
  arms.draw(rows, [*METRICS], given.out / "icon_captions.png")
  counted = [row for row in rows if row["arm"] == "caption"]
  sys.exit(0 if all(row["seen, word"] > 5 * row["seen, word_chance"] for row in counted) else 1)


if __name__ == "__main__":
  main()
