"""Do uniformity and alignment close the modality gap? python experiments/gap.py OUT

Linear projectors on stored vectors of icons, at a fixed temperature of 0.01, as the paper tunes
CLIP (https://arxiv.org/abs/2405.18570), and at a learned one: `clip_gap` with the weights of
uniformity, alignment and cross-modal uniformity at 0 (which is `clip`) and at 1.
"""

from __future__ import annotations

import copy

import arms
import icons

METRICS = icons.METRICS | icons.GEOMETRY


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=1000, batch=512)
  base = icons.frozen(given.out.parent / "stores", steps=given.steps, batch=given.batch)
  base["evals"]["geometry"] = icons.geometry_of(base["evals"]["known"])
  compared = {}
  for temperature, learned in (("fixed", False), ("learned", True)):
    scale = (
      dict(t_init=100.0, t_learned=False) if not learned else dict(t_init=14.3, t_learned=True)
    )
    for name, weight in (("clip", 0.0), ("with all terms", 1.0)):
      c = copy.deepcopy(base)
      terms = dict.fromkeys(("w_uniform", "w_align", "w_xuniform"), weight)
      c["loss"] = dict(clip_gap=dict(weight=1.0, **terms, **scale))
      compared[f"{temperature}, {name}"] = c
  rows = arms.compare(given.out, compared, given.seeds, lambda run, state: arms.last(run, METRICS))
  columns = ["gap", "uniformity", "alignment", *icons.METRICS]
  arms.show(rows, columns, given.out)
  arms.draw(rows, ["gap", "known, t2i R@5", "unseen, t2i R@5"], given.out / "gap.png")


if __name__ == "__main__":
  main()
