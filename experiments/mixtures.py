"""Do mixed pairs help as negatives? python experiments/mixtures.py OUT

Linear projectors on stored vectors of icons, with `clip` and with `m2mix`
(https://arxiv.org/abs/2203.03897), whose geodesic mixtures of an image and its text are further
negatives, at the release's fixed temperature of 0.01 and at a learned one, for two weights.
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
  scales = dict(
    fixed=dict(t_init=100.0, t_learned=False), learned=dict(t_init=14.3, t_learned=True)
  )
  compared = {}
  for name, scale in scales.items():
    for weight in (0.0, 0.01, 0.3):
      c = copy.deepcopy(base)
      c["loss"] = dict(m2mix=dict(weight=1.0, w_m=weight, **scale))
      compared[f"{name}, {f'm2mix {weight}' if weight else 'clip'}"] = c
  rows = arms.compare(given.out, compared, given.seeds, lambda run, state: arms.last(run, METRICS))
  arms.show(rows, [*METRICS], given.out)
  arms.draw(rows, ["gap", "known, t2i R@5", "unseen, t2i R@5"], given.out / "mixtures.png")


if __name__ == "__main__":
  main()
