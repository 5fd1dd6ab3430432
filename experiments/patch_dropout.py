"""Accuracy against speed with fewer patches: python experiments/patch_dropout.py OUT

A small model from scratch on icons of 48 pixels (36 patches), with 0, half and three quarters of
the patches left out in training (https://arxiv.org/abs/2212.00794), for equal samples seen and,
with `tuned`, the last tenth of the samples with all patches, as FLIP tunes.
"""

from __future__ import annotations

import copy
import pathlib
import statistics
from typing import Any

import arms
import icons

from bigalign.run.metrics import read_metrics


def found(run: pathlib.Path, state: Any) -> dict[str, float]:
  """Retrieval, and the samples of the run over the time of its steps."""
  name = "train/samples_per_second"
  speeds = [row[name] for row in read_metrics(run) if name in row]  # of equally many samples
  return icons.retrieval(run, state) | {"images/s": statistics.harmonic_mean(speeds)}


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=200, batch=256)
  base = icons.small(steps=given.steps, batch=given.batch)
  base["data"]["image_size"] = 48
  compared = {}
  for share in (0.0, 0.5, 0.75):
    c = compared[f"{share:.0%}"] = copy.deepcopy(base)
    c["model"]["image"]["patch_dropout"] = share
    if share:
      tuned = compared[f"{share:.0%}, tuned"] = copy.deepcopy(base)
      first = dict(until=given.steps * 9 // 10, model=dict(image=dict(patch_dropout=share)))
      tuned["stages"] = (first,)
  rows = arms.compare(given.out, compared, given.seeds, found)
  columns = ["known, t2i R@5", "unseen, t2i R@5", "images/s"]
  arms.show(rows, columns, given.out)
  arms.draw(rows, columns, given.out / "patch_dropout.png")


if __name__ == "__main__":
  main()
