"""Retrieval by the number of pairs, frozen towers and from scratch:
python experiments/scaling.py OUT

The first 1,000 to 26,659 icons: linear projectors on stored vectors of MobileNetV2 and MiniLM
(`frozen`), and a small model from scratch (`scratch`), with equal samples seen for each number. A
line is fitted to the logit of R@5 by log2 of the pairs.
"""

from __future__ import annotations

import copy

import arms
import icons
import numpy as np

from bigalign.data.sources.base import open_source
from bigalign.data.sources.views import make_view

PAIRS = (1_000, 2_500, 5_000, 10_000, 26_659)


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", seen=128_000)
  compared, places = {}, {}
  source = open_source(icons.SPLITS["train"], captions=())
  bases = dict(
    frozen=icons.frozen(given.out.parent / "stores", steps=given.seen // 256, batch=256),
    scratch=icons.small(steps=given.seen // 256, batch=256),
  )
  for line, base in bases.items():
    for pairs in PAIRS:
      c = copy.deepcopy(base)
      if line == "scratch":
        view = c["data"]["view"] = str(given.out / f"first_{pairs}.view")
        make_view(source, view, spec=icons.SPLITS["train"], ids=np.arange(pairs))
      else:
        image = c["data"]["stores"]["image"]
        keep = icons.first_samples(image, pairs, given.out / f"first_{pairs}.npy")
        c["data"]["stores"]["keep"] = keep
      compared[f"{line} {pairs}"], places[f"{line} {pairs}"] = c, float(pairs)
  rows = arms.compare(given.out, compared, given.seeds, icons.retrieval)
  columns = [*icons.METRICS]
  arms.show(rows, columns, given.out)
  arms.draw(rows, ["known, t2i R@5", "unseen, t2i R@5"], given.out / "scaling.png", places, "pairs")
  for line in bases:
    for column in ("known, t2i R@5", "unseen, t2i R@5"):
      x = np.log2([places[row["arm"]] for row in rows if row["arm"].startswith(line)])
      y = np.asarray([row[column] for row in rows if row["arm"].startswith(line)])
      slope, start = np.polyfit(x, np.log(y / (1 - y)), 1)
      at = 1 / (1 + np.exp(-(start + slope * (x.max() + 1))))
      print(f"{line}, {column}: logit {slope:+.2f} for each doubling; {at:.3f} predicted at twice")


if __name__ == "__main__":
  main()
