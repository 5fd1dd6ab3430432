"""The curve of WiSE-FT on a real fine-tuning: python experiments/alphas.py OUT

Trains a small model on the icons in BIGALIGN_DATA, tunes it on the emoji from `init=` of that run,
and evaluates (1 - alpha) * base + alpha * tuned on held-out icons and emoji. Writes OUT/alphas.json
and prints a table; docs/merge.md has the figures of a shorter run. Exits with 1 unless some alpha
between 0 and 1 is better than both ends in the mean of both sets.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import sys
from typing import Any

import rich.box
import rich.table

from bigalign.merge.main import parse_alphas, sweep
from bigalign.run import tables
from bigalign.run.configs import load_config
from bigalign.train import train

METRICS = ("val/icons/text_to_image_R@5", "val/emoji/text_to_image_R@5")
SETS = ("icons", "emoji")


def configs(out: pathlib.Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """The configs of the base and of the tuning: configs/photos.py on drawings of 32 pixels."""
  base: dict[str, Any] = load_config("photos").to_dict()
  base |= dict(seed=seed, total_steps=800, log_every=50, checkpoint_every=0, eval_every=0)
  base["data"] |= dict(
    source="$BIGALIGN_DATA/icons/train/{00000..00010}.tar",
    captions=("txt",),
    image_size=32,
    resize="squash",
    augment=dict(crop="random_resized", scale=(0.8, 1.0)),
  )
  base["data"]["tokenizer"]["length"] = base["model"]["text"]["length"] = 12
  base["model"]["image"] |= dict(patch=8, depth=3, stem="patch")
  base["optimizer"] = dict(name="adamw", lr=1e-3, warmup="5%", weight_decay=0.1)
  base["evals"] = {
    name: dict(
      type="retrieval", source=f"$BIGALIGN_DATA/{name}/val/00000.tar", fields=("txt",), captions=1
    )
    for name in SETS
  }
  tuned = copy.deepcopy(base)
  tuned |= dict(total_steps=200, model=dict(init=str(out / "base")))
  tuned["data"]["source"] = "$BIGALIGN_DATA/emoji/train/{00000..00002}.tar"
  return base, tuned


def main() -> None:
  """The program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  for name, config in zip(("base", "tuned"), configs(args.out, args.seed)):
    train(config, args.out / name)
  runs = str(args.out / "base"), str(args.out / "tuned")
  scores = sweep(*runs, parse_alphas("0,0.1,...,1"))
  (args.out / "alphas.json").write_text(
    json.dumps({str(a): x for a, x in scores.items()}, indent=1)
  )
  shown = rich.table.Table("alpha", *METRICS, "mean", box=rich.box.SIMPLE_HEAD)
  means = {}
  for alpha, metrics in scores.items():
    values = [metrics[name] for name in METRICS]
    means[alpha] = sum(values) / len(values)
    shown.add_row(f"{alpha:g}", *(f"{x:.3f}" for x in (*values, means[alpha])))
  tables.show(shown)
  inner = max(x for alpha, x in means.items() if 0 < alpha < 1)
  sys.exit(0 if inner > max(means[0.0], means[1.0]) else 1)


if __name__ == "__main__":
  main()
