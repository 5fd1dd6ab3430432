"""Squares against patches in their own aspect, at equal tokens: python experiments/naflex.py OUT

Trains one small NaFlex tower on the photos of COCO and Flickr8k in BIGALIGN_DATA three times: on
squares of 16 patches, on at most 16 patches in the aspect of each photo, and on lengths drawn from
(9, 16, 25), whose batches have as many tokens. All arms train on as many samples and are evaluated
by retrieval on held-out photos.
"""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import arms

from bigalign.run.configs import load_config

SETS = ("coco2k", "flickr8k")
METRICS = {f"{name}, t2i R@10": f"val/{name}/text_to_image_R@10" for name in SETS}
PATCH, TOKENS = 16, 16


def configs(samples: int) -> dict[str, dict[str, Any]]:
  """The config of each arm: configs/photos.py without emoji."""
  squares: dict[str, Any] = load_config("photos").to_dict()
  squares |= dict(total_steps=f"{samples} samples", log_every=20)
  squares |= dict(checkpoint_every=0, eval_every=0)
  source = "$BIGALIGN_DATA/coco2k/train/{00000..00005}.tar"
  squares["data"] |= dict(source=f"{source}::$BIGALIGN_DATA/flickr8k/train/{{00000..00002}}.tar")
  squares["data"] |= dict(resize="squash", augment=dict(crop="squash", flip=0.5))
  tower = dict(name="naflex", patch=PATCH, grid=4, width=128, depth=4, heads=4, mlp_ratio=2.0)
  squares["model"]["image"] = dict(tower, scan=False, dtype="float32", dropout=0.1)
  squares["optimizer"] = dict(name="adamw", lr=1e-3, warmup="5%", weight_decay=0.1)
  squares["evals"] = {name: squares["evals"][name] for name in SETS}
  natural, drawn = copy.deepcopy(squares), copy.deepcopy(squares)
  natural["data"]["naflex"] = dict(lengths=(TOKENS,), patch=PATCH)
  size, text = squares["batch_size"], squares["data"]["tokenizer"]["length"]
  drawn["data"]["naflex"] = dict(
    lengths=(9, 16, 25),
    eval_length=TOKENS,
    patch=PATCH,
    tokens_per_batch=size * (TOKENS + text),
  )
  drawn["batch_size"] = 2 * size  # at most
  return dict(squares=squares, natural=natural, drawn=drawn)


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", samples=40_000)

  def found(run: pathlib.Path, state: Any) -> dict[str, float]:
    return arms.last(run, METRICS)

  rows = arms.compare(given.out, configs(given.samples), given.seeds, found)
  arms.show(rows, [*METRICS], given.out)
  arms.draw(rows, [*METRICS], given.out / "naflex.png")


if __name__ == "__main__":
  main()
