"""Word order by hard negatives: python experiments/word_order.py OUT CAPTIONS --seeds 0,1,2

Tunes a trained pair of towers with captions alone, and with captions whose words are swapped as
hard negatives, as NegCLIP (https://arxiv.org/abs/2210.01936) tunes CLIP. The pair is the teacher of
experiments/captions.py, whose OUT is CAPTIONS here: a frozen MobileNetV2, and MiniLM with a
projector, which are tuned. The test of word order is the one of that script. Writes
OUT/word_order.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import rich.box
import rich.table
from captions import METRICS, SETS, stored, word_order

from bigalign.run import tables
from bigalign.run.configs import load_config
from bigalign.run.metrics import read_metrics
from bigalign.train import train


def tuned(run: pathlib.Path, stores: dict[str, pathlib.Path], steps: int, lr: float) -> Any:
  """The text tower and the projectors of a run, with stored images."""
  c: dict[str, Any] = load_config("photos_frozen").to_dict()
  c |= dict(total_steps=steps, batch_size=64, frozen="image_tower/", model=dict(init=str(run)))
  c["data"]["stores"] = dict(image=str(stores["train"]))
  c["data"]["tokenizer"]["length"] = 24
  c["optimizer"] = dict(name="adamw", lr=lr, schedule="cosine", warmup="10%", weight_decay=0.1)
  for name in SETS:
    c["evals"][name] |= dict(image_store=str(stores[name]))
  return c


def arms(c: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Without and with swapped words, and with `hardneg_own` beside them."""
  swapped = c["data"] | dict(texts=dict(count=1, negatives=dict(count=1, rule="swap")))
  against = dict(negclip=dict(weight=1.0), hardneg_own=dict(weight=0.3))
  return dict(
    clip=c,
    negclip=c | dict(data=swapped, loss=dict(negclip=dict(weight=1.0))),
    against=c | dict(data=swapped, loss=against),
  )


def main() -> None:
  """Tunes all arms with all seeds."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("captions", type=pathlib.Path, nargs="?", help="default: OUT/../captions")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--steps", type=int, default=80)
  parser.add_argument("--lr", type=float, default=1e-4)
  parser.add_argument("--arms", default="clip,negclip,against")
  args = parser.parse_args()
  args.captions = args.captions or args.out.parent / "captions"
  args.out.mkdir(parents=True, exist_ok=True)
  stores = stored(args.captions)
  config = tuned(args.captions / "teacher", stores, args.steps, args.lr)
  before = word_order(args.captions / "teacher", stores["coco2k"])
  print(f"word order before: {before:.3f}")
  results = []
  table = rich.table.Table("arm", "seed", *METRICS, "word order", box=rich.box.SIMPLE_HEAD)
  for seed in map(int, args.seeds.split(",")):
    for arm in args.arms.split(","):
      run = args.out / f"{arm}-{seed}"
      train(arms(config)[arm] | dict(seed=seed), run)
      last = next(row for row in reversed(read_metrics(run)) if METRICS[0] in row)
      found = {name: last[name] for name in METRICS}
      found["word order"] = word_order(run, stores["coco2k"])
      results.append(dict(arm=arm, seed=seed, **found))
      table.add_row(arm, str(seed), *(f"{x:.3f}" for x in found.values()))
      (args.out / "word_order.json").write_text(json.dumps(results, indent=1) + "\n")
  tables.show(table)


if __name__ == "__main__":
  main()
