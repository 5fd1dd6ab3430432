"""Are microbatches the large batch? python experiments/accumulation.py OUT

Linear projectors on stored vectors of icons with `clip`, equal samples and updates: batches of
1,024 whole; the same in 8 microbatches, whose loss compares all 1,024 pairs; and gradients that are
added up over 8 batches of 128, each of which compares a pair with 127 others. The last is the
mean of `clip` over groups of 128, whose gradient is that of accumulation.
"""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import arms
import icons
import numpy as np

from bigalign import losses
from bigalign.losses.base import Loss
from bigalign.run.metrics import read_metrics

GROUPS = 8


def clip_in_groups(*, groups: int = GROUPS) -> Loss:
  """The mean of `clip` over equal parts of the batch, each of which knows its own pairs alone.

  Args:
    groups: number of parts.
  """
  whole = losses.LOSSES["clip"]()

  def apply(params: Any, state: Any, feats: Any, batch: Any, context: Any) -> Any:
    parts = zip(*(x.reshape(groups, -1, x.shape[1]) for x in (feats["zimg"], feats["ztxt"])))
    each = [
      whole.apply(params, state, dict(zimg=zimg, ztxt=ztxt), {}, context) for zimg, ztxt in parts
    ]
    value = sum(loss for loss, _ in each) / groups
    return value, (state, {"loss": value})

  return whole._replace(apply=apply)


def differs(out: pathlib.Path, seed: int) -> float:
  """The largest relative difference of the training loss, whole and in microbatches."""
  name = "train/loss"
  curves = [
    np.asarray([row[name] for row in read_metrics(out / f"{arm}-{seed}") if name in row])
    for arm in ("whole", "microbatches")
  ]
  return float(np.abs(curves[1] / curves[0] - 1).max())


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", epochs=15)
  losses.TERMS["clip_in_groups"] = clip_in_groups
  steps = given.epochs * icons.TRAINED // 1024
  whole = icons.frozen(given.out.parent / "stores", steps=steps, batch=1024)
  for side in ("image", "text"):
    whole["model"][side]["dtype"] = "float32"
  compared = dict(
    whole=whole,
    microbatches=copy.deepcopy(whole) | dict(microbatches=GROUPS),
    accumulated=copy.deepcopy(whole) | dict(loss=dict(clip_in_groups=dict(weight=1.0))),
  )
  rows = arms.compare(given.out, compared, given.seeds, icons.retrieval)
  arms.show(rows, [*icons.METRICS], given.out)
  arms.draw(rows, ["known, t2i R@5", "unseen, t2i R@5"], given.out / "accumulation.png")
  for seed in given.seeds:
    print(f"seed {seed}: losses in microbatches differ by at most {differs(given.out, seed):.1e}")


if __name__ == "__main__":
  main()
