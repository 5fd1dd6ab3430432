"""Global contrast at a small batch: python experiments/global_contrast.py OUT

Linear projectors on stored vectors of icons at a batch of 32: `clip`, `sogclr`
(https://arxiv.org/abs/2202.12387) and `fastclip_v3` (https://arxiv.org/abs/2407.01445), which keep
a moving average of each sample's denominator, and `clip` at a batch of 512 with equal samples seen.
`sogclr` has a fixed temperature, as has a second `clip`: that of a grid which is best on known
concepts with seed 0. rho of `fastclip_v3` is chosen likewise.
"""

from __future__ import annotations

import copy
from typing import Any

import arms
import icons

COLUMNS = [*icons.METRICS]
TAUS = (0.01, 0.03, 0.07)
RHOS = (2.0, 4.0, 6.5, 8.5)


def main() -> None:
  """Chooses the constants, then trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", epochs=6)
  small, large = (
    icons.frozen(
      given.out.parent / "stores", steps=given.epochs * icons.TRAINED // batch, batch=batch
    )
    for batch in (32, 512)
  )
  large["optimizer"]["lr"] *= 2
  small["optimizer"]["lr"] /= 2

  def arm(name: str, base: dict[str, Any] = small, **options: Any) -> dict[str, Any]:
    c = copy.deepcopy(base)
    c["loss"] = {name: dict(weight=1.0, **options)}
    return c

  def chosen(options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The config that is best on known concepts with the first seed."""
    tried = given.out / "chosen"
    rows = arms.compare(tried, options, given.seeds[:1], icons.retrieval)
    arms.show(rows, COLUMNS, tried)
    return options[max(rows, key=lambda row: row["known, t2i R@5"])["arm"]]

  compared = {
    "clip, 512": arm("clip", large),
    "clip": arm("clip"),
    "clip, fixed": chosen(
      {f"clip {t}": arm("clip", t_init=1 / t, t_learned=False, t_max=None) for t in TAUS}
    ),
    "sogclr": chosen({f"sogclr {t}": arm("sogclr", tau=t) for t in TAUS}),
    "fastclip_v3": chosen({f"fastclip_v3 {x}": arm("fastclip_v3", rho=x) for x in RHOS}),
  }
  rows = arms.compare(given.out, compared, given.seeds, icons.retrieval)
  arms.show(rows, COLUMNS, given.out)
  arms.draw(rows, ["known, t2i R@5", "unseen, t2i R@5"], given.out / "global_contrast.png")


if __name__ == "__main__":
  main()
