"""Selects samples of a source: bigalign view 'DIR/*.tar' --where 'width >= 200' --out good."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.fields.column_files import ColumnFile
from bigalign.data.sources import keys, views
from bigalign.data.sources.base import open_spec
from bigalign.run import tables
from bigalign.shards import source_flags


def _read_ids(path: str) -> np.ndarray:
  """Positions of samples, from a .npy file of integers or a text file with one per line."""
  if path.endswith(".npy"):
    ids: np.ndarray = np.load(path, allow_pickle=False)
    return ids
  return np.loadtxt(path, np.int64, ndmin=1)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program: prints counts, returns the manifest of the view that it wrote."""
  parser = argparse.ArgumentParser(
    "bigalign view", description=views.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source_flags.add_source_flags(parser)
  parser.add_argument("--out", required=True, help="path: OUT.npy and OUT.json are written")
  parser.add_argument(
    "--where", default="", help="condition on the columns of the stats, such as 'width >= 200'"
  )
  parser.add_argument(
    "--unique",
    default="",
    help="column; keeps one sample for each of its values, and all samples without a value",
  )
  parser.add_argument(
    "--columns",
    nargs="*",
    default=[],
    metavar="NAME=FILE",
    help="columns that score, noise or balance wrote, without .npy, for --where and --draw",
  )
  parser.add_argument(
    "--draw",
    default="",
    metavar="NAME",
    help="one of --columns: keeps each sample with this probability",
  )
  parser.add_argument("--seed", type=int, default=0, help="of --draw (%(default)s)")
  lists = parser.add_mutually_exclusive_group()
  lists.add_argument(
    "--ids", default="", help="file of positions to choose from: .npy, or text with one per line"
  )
  lists.add_argument(
    "--keys", default="", help="text file of sample keys to choose from, one per line; may be .gz"
  )
  parser.add_argument(
    "--workers",
    type=int,
    default=os.cpu_count(),
    help="number of processes that read keys (%(default)s)",
  )
  parser.add_argument("--json", metavar="FILE", help="also write the counts to this file")
  given = parser.parse_args(words)
  spec, counts = source_flags.spec_from_flags(given), {}
  ids = _read_ids(given.ids) if given.ids else None
  if given.keys:
    ids, *numbers = keys.find(spec, given.keys, workers=given.workers)
    counts = dict(zip(("keys_listed", "keys_unknown", "samples_that_share_a_key"), numbers))
  source = open_spec(spec)
  manifest = views.make_view(
    source,
    given.out,
    spec=given.source,
    rule=given.where,
    unique=given.unique,
    ids=ids,
    columns={
      name: ColumnFile(path, source, f"--columns {name}").numbers
      for name, path in source_flags.pairs(given.columns, "--columns").items()
    },
    draw=given.draw,
    seed=given.seed,
  )
  shown = {name: manifest[name] for name in ("samples", "kept", "left_out")} | counts
  rows = tables.pairs()
  for name, value in shown.items():
    text = tables.counts(value) or "none" if isinstance(value, Mapping) else f"{value:,}"
    rows.add_row(name.replace("_", " "), text)
  tables.show(rows)
  print(f"{given.out}.npy")
  if given.json:
    tables.write_json(given.json, shown)
  return manifest | counts


def run() -> None:
  """The program `bigalign view`."""
  main()
