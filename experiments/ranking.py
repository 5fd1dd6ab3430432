"""Tests whether `bigalign compare` ranks towers as training does: python experiments/ranking.py OUT

Uses four image towers and two text towers on the data of configs/photos_frozen.py (needs
BIGALIGN_DATA and MINILM). Embeds the data once with each tower, compares each pair of towers
without training, then trains projectors for each pair and retrieves held-out photos by their
captions: the mean over the seeds, which are of the first projectors and of the order of the data.
Writes OUT/ranking.json and OUT/ranking.png, and prints the rows, and the rank correlation of each
measure with training, for each seed and for their mean. Exits with 1 if ridge regression, by which
`compare` sorts, does not rank the best pair first, or if its rank correlation is below LEAST.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import arms
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from bigalign.frozen.compare import MAPS, SHOWN, compare
from bigalign.frozen.embed import embed
from bigalign.run.configs import load_config
from bigalign.train import train

LEAST = 0.8
WEIGHTS = "$BIGALIGN_DATA/weights"
# {name: (options of the tower, pixels per side)}
IMAGE = dict(
  mobilenet_288=(dict(init=f"{WEIGHTS}/mobilenetv2_1.0_224_imagenet.npz"), 288),
  mobilenet_96=(dict(init=f"{WEIGHTS}/mobilenetv2_1.0_224_imagenet.npz"), 96),
  resnet56_cifar=(dict(init=f"{WEIGHTS}/resnet56_cifar10.npz"), 32),
  resnet20_cifar=(dict(init=f"{WEIGHTS}/resnet20_cifar10.npz"), 32),
)
TEXT = dict(minilm=dict(init="$MINILM"), minilm_first_token=dict(init="$MINILM", pool="cls"))
MEASURES = ("linear_cka", "mutual_knn", "local_cka", "ridge", "cca", "procrustes")


def config(image: str, text: str) -> dict[str, Any]:
  """Returns configs/photos_frozen.py with two other towers."""
  c: dict[str, Any] = load_config("photos_frozen").to_dict()
  tower, size = IMAGE[image]
  c["model"] |= dict(image=dict(tower, dtype="float32"), text=dict(TEXT[text], dtype="float32"))
  c["data"]["image_size"] = size
  return c | dict(writer=dict(tensorboard=False))


def measures(comparison: dict[str, Any]) -> dict[str, float]:
  """Returns one number for each measure."""
  return {name: comparison[name][SHOWN] if name in MAPS else comparison[name] for name in MEASURES}


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Plots one point for each pair: the ridge regression score against the trained score."""
  figure = Figure(figsize=(5.5, 3.8), layout="constrained", dpi=120)
  axes = figure.add_subplot()
  for (image, colour), (text, marker) in itertools.product(
    zip(IMAGE, ("C0", "C1", "C2", "C3")), zip(TEXT, "os")
  ):
    (row,) = (row for row in rows if (row["image"], row["text"]) == (image, text))
    label = f"{image}, {text}"
    axes.scatter(row["ridge"], row["trained"], marker=marker, color=colour, label=label)
    seeds = row["seeds"]
    axes.plot([row["ridge"]] * len(seeds), seeds, "_", color=colour, ms=4)
  axes.set_xlabel("ridge regression, held-out training photos, R@5")
  axes.set_ylabel("trained projectors, text to image R@5")
  axes.legend(fontsize=7, frameon=False, loc="upper left")
  figure.savefig(path)


def main() -> int:
  """Runs the experiment and returns the exit status."""
  given = arms.arguments(__doc__ or "", steps=200)
  out, first = given.out, next(iter(IMAGE))
  images = {
    name: embed(config(name, "minilm"), out / name, sides=["image"])["image"] for name in IMAGE
  }
  texts = {name: embed(config(first, name), out / name, sides=["text"])["text"] for name in TEXT}
  rows = []
  for image, text in itertools.product(IMAGE, TEXT):
    stores = dict(image=str(images[image]), text=str(texts[text]))
    before = measures(compare(**stores))
    seeds = []
    for seed in given.seeds:
      c = config(image, text) | dict(total_steps=given.steps, seed=seed)
      c["data"]["stores"] = stores
      workdir = out / f"{image}-{text}-{seed}"
      train(c, workdir)
      found = arms.last(workdir, {name: f"val/{name}/text_to_image_R@5" for name in c["evals"]})
      seeds.append(float(np.mean([*found.values()])))
    trained = float(np.mean(seeds))
    rows.append(dict(image=image, text=text, **before, trained=trained, seeds=seeds))
    print(json.dumps(rows[-1]), flush=True)

  def correlations(trained: Sequence[float]) -> dict[str, float]:
    return {
      name: float(scipy.stats.spearmanr([row[name] for row in rows], trained).statistic)
      for name in MEASURES
    }

  ranks = correlations([row["trained"] for row in rows])
  of_seeds = [correlations([row["seeds"][i] for row in rows]) for i in range(len(given.seeds))]
  print(json.dumps(dict(mean=ranks, seeds=of_seeds)))
  written = dict(rows=rows, spearman=ranks, spearman_of_seeds=of_seeds)
  (out / "ranking.json").write_text(json.dumps(written, indent=1) + "\n")
  draw(rows, out / "ranking.png")
  best = max(rows, key=lambda row: row["trained"])
  return int(ranks["ridge"] < LEAST or best["ridge"] < max(row["ridge"] for row in rows))


if __name__ == "__main__":
  sys.exit(main())
