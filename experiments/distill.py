"""Dataset reinforcement on icons: python experiments/distill.py OUT --seeds 0,1,2

Trains a teacher with `clip` on the icons in BIGALIGN_DATA, stores its vectors of augmented views
and of names (`bigalign reinforce`), and trains a smaller student with `clip` and with
`mobileclip_dr`, the same otherwise, for each seed. Writes OUT/distill.json and prints a table of
retrieval on held-out icons; docs/samples.md has the figures. Exits with 1 unless the student of the
teacher is better for every seed.
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

from bigalign.frozen.reinforce import reinforce
from bigalign.run import tables
from bigalign.run.configs import load_config
from bigalign.run.metrics import read_metrics
from bigalign.train import train

SETS = dict(seen="val", unseen="unseen")  # concepts of the training icons, and others
METRICS = tuple(f"val/{name}/text_to_image_R@5" for name in SETS)


def base() -> dict[str, Any]:
  """What teacher and students share: configs/photos.py on icons of 32 pixels, with `clip`."""
  c: dict[str, Any] = load_config("photos").to_dict()
  c |= dict(log_every=50, checkpoint_every=0, eval_every=0, batch_size=256)
  c["data"] |= dict(
    source="$BIGALIGN_DATA/icons/train/{00000..00010}.tar",
    captions=("txt",),
    image_size=32,
    resize="squash",
    augment=dict(crop="random_resized", scale=(0.6, 1.0)),
  )
  c["data"]["tokenizer"]["length"] = c["model"]["text"]["length"] = 12
  c["loss"] = dict(clip=dict(weight=1.0))
  c["optimizer"] = dict(name="adamw", lr=1e-3, warmup="5%", weight_decay=0.1)
  c["evals"] = {
    name: dict(
      type="retrieval", source=f"$BIGALIGN_DATA/icons/{part}/00000.tar", fields=("txt",), captions=1
    )
    for name, part in SETS.items()
  }
  return c


def configs(steps: int, teacher_steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """The configs of the teacher and of a student without one."""
  teacher = base() | dict(total_steps=teacher_steps, seed=0)
  teacher["model"]["image"] |= dict(patch=8, depth=4, stem="patch")
  student = base() | dict(total_steps=steps)
  student["model"]["image"] |= dict(patch=8, depth=2, width=64, stem="patch", dropout=0.0)
  student["model"]["text"] |= dict(width=64, dropout=0.0)
  return teacher, student


def scores(run: pathlib.Path) -> dict[str, float]:
  """The last evaluation of a run."""
  last: dict[str, float] = {}
  for row in read_metrics(run):
    last |= {name: row[name] for name in METRICS if name in row}
  return last


def main() -> None:
  """The program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--teacher_steps", type=int, default=900)
  parser.add_argument("--views", type=int, default=4)
  args = parser.parse_args()
  teacher, student = configs(args.steps, args.teacher_steps)
  train(teacher, args.out / "teacher")
  name = "train/logit_scale"
  scale = [row[name] for row in read_metrics(args.out / "teacher") if name in row][-1]
  frozen = teacher | dict(model=dict(init=str(args.out / "teacher")))
  stores = reinforce(frozen, args.out / "stores", views=args.views, batch_size=256)
  table = rich.table.Table("run", "seed", *METRICS, box=rich.box.SIMPLE_HEAD)
  found: dict[str, Any] = {"teacher": scores(args.out / "teacher"), "scale": scale}
  table.add_row("teacher", "0", *(f"{found['teacher'][name]:.3f}" for name in METRICS))
  wins = []
  for seed in map(int, args.seeds.split(",")):
    plain, taught = (copy.deepcopy(student) | dict(seed=seed) for _ in range(2))
    taught["data"]["teachers"] = dict(a=dict(image=str(stores["image"]), text=str(stores["text"])))
    taught["loss"] = dict(mobileclip_dr=dict(weight=1.0, teacher_scales=(scale,)))
    for name, config in (("clip", plain), ("mobileclip_dr", taught)):
      train(config, args.out / f"{name}-{seed}")
      found[f"{name}-{seed}"] = of = scores(args.out / f"{name}-{seed}")
      table.add_row(name, str(seed), *(f"{of[metric]:.3f}" for metric in METRICS))
    pair = [found[f"{name}-{seed}"] for name in ("clip", "mobileclip_dr")]
    wins.append(all(pair[1][metric] > pair[0][metric] for metric in METRICS))
    (args.out / "distill.json").write_text(json.dumps(found, indent=1))
  tables.show(table)
  sys.exit(0 if all(wins) else 1)


if __name__ == "__main__":
  main()
