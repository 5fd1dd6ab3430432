"""Sigmoid or softmax, by batch size: python experiments/batches.py OUT

Linear projectors on stored vectors of icons, with `siglip` and `clip` at batches of 16 to 1,024 and
equal samples seen (https://arxiv.org/abs/2303.15343 finds the sigmoid ahead at small batches), and
`siglip_even`, whose bias starts at -log(batch - 1), where positives and negatives weigh the same.
The icons of known concepts choose the best evaluation of a run, where `unseen` ones are scored.
Rates grow with the square root of the batch.
"""

from __future__ import annotations

import copy
import math
import pathlib
from typing import Any

import arms
import icons

from bigalign.run.metrics import read_metrics

BATCHES = (16, 64, 256, 1024)
CHOSEN_BY, SCORED = "val/known/text_to_image_R@5", "val/unseen/text_to_image_R@5"


def best(run: pathlib.Path, state: Any) -> dict[str, Any]:
  """The evaluation of a run whose retrieval of known concepts is highest."""
  rows = [row for row in read_metrics(run) if CHOSEN_BY in row]
  row = max(rows, key=lambda row: row[CHOSEN_BY])
  return {
    "known, t2i R@5": row[CHOSEN_BY],
    "unseen, t2i R@5": row[SCORED],
    "share of the steps": row["step"] / rows[-1]["step"],
  }


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", epochs=6)
  base = icons.frozen(given.out.parent / "stores", steps=1, batch=16)
  compared, places = {}, {}
  for batch in BATCHES:
    for loss in ("siglip", "siglip_even", "clip"):
      c = copy.deepcopy(base)
      steps = given.epochs * icons.TRAINED // batch
      c |= dict(batch_size=batch, total_steps=steps, eval_every=max(steps // 10, 1))
      c["loss"] = {loss.removesuffix("_even"): dict(weight=1.0)}
      if loss == "siglip_even":
        c["loss"]["siglip"]["b_init"] = -math.log(batch - 1)
      c["optimizer"]["lr"] = 1e-3 * (batch / 256) ** 0.5
      compared[f"{loss} {batch}"], places[f"{loss} {batch}"] = c, float(batch)
  rows = arms.compare(given.out, compared, given.seeds, best)
  columns = ["known, t2i R@5", "unseen, t2i R@5", "share of the steps"]
  arms.show(rows, columns, given.out)
  arms.draw(rows, columns[:2], given.out / "batches.png", places, "batch")


if __name__ == "__main__":
  main()
