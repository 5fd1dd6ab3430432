"""Small images first, then large ones, at equal compute: python experiments/short_long.py OUT

A small model from scratch on icons, patches of 8 pixels: all of training at 64 pixels (64 patches),
or most of it at 32 pixels (16 patches) and the last part at 64, as CLIPA trains
(https://arxiv.org/abs/2305.07017), with more steps such that both process equally many patches; and
the same at 32 pixels alone. Evaluated at the size of the last step.
"""

from __future__ import annotations

import copy

import arms
import icons


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=100, batch=256)
  long = icons.small(steps=given.steps, batch=given.batch)
  long["data"]["image_size"] = 64
  # A step at 32 pixels processes a quarter of the patches: 4 x 4/5 and 1/5 of the compute.
  short, end = given.steps * 16 // 5, given.steps // 5
  both = copy.deepcopy(long) | dict(total_steps=short + end)
  both["stages"] = (dict(until=short, data=dict(image_size=32)),)
  only = copy.deepcopy(long) | dict(total_steps=4 * given.steps)
  only["data"]["image_size"] = 32
  compared = {"64": long, "32, then 64": both, "32": only}
  for c in compared.values():
    c["model"]["image"]["positions"] = "sincos2d"  # of any size
  rows = arms.compare(given.out, compared, given.seeds, icons.retrieval)
  arms.show(rows, [*icons.METRICS], given.out)
  arms.draw(rows, ["known, t2i R@5", "unseen, t2i R@5"], given.out / "short_long.png")


if __name__ == "__main__":
  main()
