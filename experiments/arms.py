"""Compares configs over seeds: what the experiments in this folder share."""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.table
from matplotlib.figure import Figure

from bigalign.run import tables
from bigalign.run.metrics import read_metrics
from bigalign.state import State
from bigalign.train import train

Row = dict[str, Any]  # arm, seed, minutes, and the figures of a run
RESULTS = "results.json"
OPTIONS = "options.json"


def arguments(doc: str, **options: Any) -> argparse.Namespace:
  """OUT and --seeds of a script; `options` adds {flag: default}.

  OUT/options.json keeps the options, because OUT may hold figures that are not made again.

  Raises:
    SystemExit: if OUT was made with other options.
  """
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  for name, default in options.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
  given = parser.parse_args()
  own, file = {name: getattr(given, name) for name in options}, given.out / OPTIONS
  made_with = json.loads(file.read_text()) if file.exists() else own
  if made_with != own:
    parser.error(f"{given.out} was made with {made_with}, not {own}; choose another OUT")
  given.out.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(own) + "\n")
  return given


def last(run: pathlib.Path, metrics: Mapping[str, str]) -> dict[str, float]:
  """{column: the last value of its metric} of a run."""
  rows = read_metrics(run)
  return {
    column: float(next(row[name] for row in reversed(rows) if name in row))
    for column, name in metrics.items()
  }


def compare(
  out: pathlib.Path,
  arms: Mapping[str, dict[str, Any] | Callable[[int], dict[str, Any]]],
  seeds: Iterable[int],
  found: Callable[[pathlib.Path, State], Mapping[str, Any]],
) -> list[Row]:
  """Trains each arm with each seed; rows that OUT/results.json has are not made again.

  Args:
    out: the folder of the runs, OUT/<arm>-<seed>.
    arms: {name: config, or a function of the seed that makes it}.
    seeds: of the initial parameters and the order of the data.
    found: (folder of a run, its last state) -> its figures.
  """
  out.mkdir(parents=True, exist_ok=True)
  file = out / RESULTS
  rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
  seeds = [*seeds]
  for seed in seeds:
    for arm, made in arms.items():
      if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
        continue
      config = made(seed) if callable(made) else made
      run, begin = out / f"{arm}-{seed}", time.perf_counter()
      state = train(config | dict(seed=seed), run)
      minutes = round((time.perf_counter() - begin) / 60, 2)
      rows.append(dict(arm=arm, seed=seed, minutes=minutes, **found(run, state)))
      file.write_text(json.dumps(rows, indent=1) + "\n")
  return [row for row in rows if row["arm"] in arms and row["seed"] in seeds]


def of(rows: Sequence[Row], arm: str, column: str) -> list[float]:
  """The values of a column, one for each seed; none if the arm has no such column."""
  return [row[column] for row in rows if row["arm"] == arm and column in row]


def show(rows: Sequence[Row], columns: Sequence[str], out: pathlib.Path) -> None:
  """Prints the mean and the values of all seeds; writes them to OUT/table.md too."""
  arms = [*dict.fromkeys(row["arm"] for row in rows)]
  table = rich.table.Table("arm", *columns, box=rich.box.SIMPLE_HEAD)
  lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
  for arm in arms:
    cells = []
    for column in columns:
      values = of(rows, arm, column)
      each = ", ".join(f"{x:.3f}" for x in values)
      cells.append(f"{np.mean(values):.3f} ({each})" if values else "")
    table.add_row(arm, *cells)
    lines.append(f"| {arm} | " + " | ".join(cells) + " |")
  tables.show(table)
  (out / "table.md").write_text("\n".join(lines) + "\n")


def draw(
  rows: Sequence[Row],
  columns: Sequence[str],
  path: pathlib.Path,
  places: Mapping[str, float] | None = None,
  x_name: str = "",
) -> None:
  """A panel for each column: a point for each run, a line over the means.

  Args:
    rows: of `compare`.
    columns: one for each panel.
    path: of the picture.
    places: {arm: x}, for arms that differ in a number, such as the batch; arms of one name before
      the first space are then one line. None: arms side by side.
    x_name: of that number.
  """
  figure = Figure(figsize=(3.6 * len(columns), 3.4), layout="constrained", dpi=120)
  arms = [*dict.fromkeys(row["arm"] for row in rows)]
  for i, column in enumerate(columns):
    axes = figure.add_subplot(1, len(columns), i + 1)
    axes.set_title(column, fontsize=9)
    axes.grid(axis="y", lw=0.4)
    if places is None:
      for x, arm in enumerate(arms):
        if values := of(rows, arm, column):
          axes.plot([x] * len(values), values, "o", color="C0", ms=4, alpha=0.6)
          axes.plot(x, np.mean(values), "_", color="C0", ms=22)
      axes.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=8)
      axes.set_xlim(-0.5, len(arms) - 0.5)
      continue
    for colour, line in enumerate(dict.fromkeys(arm.split()[0] for arm in arms)):
      own = sorted((arm for arm in arms if arm.split()[0] == line), key=lambda arm: places[arm])
      means = [np.mean(of(rows, arm, column)) for arm in own]
      axes.plot([places[arm] for arm in own], means, "-", color=f"C{colour}", label=line)
      for arm in own:
        values = of(rows, arm, column)
        axes.plot([places[arm]] * len(values), values, "o", color=f"C{colour}", ms=3, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x_name, fontsize=8)
    axes.legend(fontsize=8, frameon=False)
  figure.savefig(path)
