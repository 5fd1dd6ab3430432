"""Prefixes of one embedding against embeddings of their width: python experiments/prefixes.py OUT

Linear projectors on stored vectors of icons: `matryoshka` (https://arxiv.org/abs/2205.13147) with
prefixes of 16 to 256 numbers, `clip` with an embedding of each width, and prefixes of the widest.
"""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import arms
import icons

import bigalign

WIDTHS = (16, 32, 64, 128, 256)
WIDEST = f"clip, {WIDTHS[-1]}"


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=1000, batch=512)
  base = icons.frozen(given.out.parent / "stores", steps=given.steps, batch=given.batch)
  stores = {name: base["evals"][name] for name in icons.HELD_OUT}
  base["evals"] = {}

  def found(run: pathlib.Path, state: Any) -> dict[str, float]:
    model = bigalign.load(run)
    figures = {}
    for name, folders in stores.items():
      for width in WIDTHS:
        if width <= model.embed_dim:
          figures[f"{name}, {width}"] = float(icons.hits(model, folders, width).mean())
    return figures

  compared = {"matryoshka": copy.deepcopy(base)}
  compared["matryoshka"]["loss"] = dict(matryoshka=dict(base="clip", dims=WIDTHS, reduction="mean"))
  for width in WIDTHS:
    compared[f"clip, {width}"] = copy.deepcopy(base)
    compared[f"clip, {width}"]["model"]["embed_dim"] = width
  rows = arms.compare(given.out, compared, given.seeds, found)
  lines = [
    _at(row, line, width)
    for line, arm in (("matryoshka", "matryoshka"), ("own", "clip, {}"), ("prefix", WIDEST))
    for width in WIDTHS
    for row in rows
    if row["arm"] == arm.format(width)
  ]
  columns = [f"{name}, t2i R@5" for name in icons.HELD_OUT]
  arms.show(lines, columns, given.out)
  places = {row["arm"]: float(row["arm"].split()[1]) for row in lines}
  arms.draw(lines, columns, given.out / "prefixes.png", places, "width")


def _at(row: arms.Row, line: str, width: int) -> arms.Row:
  """The figures of a run at a width, as a row of its own."""
  figures = {f"{name}, t2i R@5": row[f"{name}, {width}"] for name in icons.HELD_OUT}
  return dict(arm=f"{line} {width}", seed=row["seed"], **figures)


if __name__ == "__main__":
  main()
