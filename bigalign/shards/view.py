"""Makes a view of a source: bigalign view 'DIR/*.tar' --where 'width >= 200' --out good."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.data.sources import keys, views
from bigalign.data.sources.base import open_spec
from bigalign.shards import source_flags


def _read_ids(path: str) -> np.ndarray:
  """Places of samples: a .npy of integers, or a text with one a line."""
  if path.endswith(".npy"):
    return np.load(path, allow_pickle=False)
  return np.loadtxt(path, np.int64, ndmin=1)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """The program; the manifest of what it wrote."""
  parser = argparse.ArgumentParser(
    "bigalign view", description=views.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source_flags.add(parser)
  parser.add_argument("--out", required=True, help="OUT.npy and OUT.json are written")
  parser.add_argument("--where", default="", help="rule that the samples fulfil")
  parser.add_argument("--unique", default="", help="column of which each value is kept once")
  lists = parser.add_mutually_exclusive_group()
  lists.add_argument("--ids", default="", help=".npy or text of places to choose from")
  lists.add_argument(
    "--keys", default="", help="text of sample keys to choose from, one a line; may be .gz"
  )
  parser.add_argument(
    "--workers", type=int, default=os.cpu_count(), help="processes that read keys (%(default)s)"
  )
  given = parser.parse_args(words)
  spec, told = source_flags.spec(given), {}
  ids = _read_ids(given.ids) if given.ids else None
  if given.keys:
    ids, *counts = keys.find(spec, given.keys, workers=given.workers)
    told = dict(zip(("keys_listed", "keys_unknown", "samples_that_share_a_key"), counts))
  found = views.make_view(
    open_spec(spec), given.out, spec=given.source, rule=given.where, unique=given.unique, ids=ids
  )
  shown = {name: found[name] for name in ("samples", "kept", "left_out")} | told
  print(json.dumps(shown, indent=1))
  return found | told


def run() -> None:
  """The program `bigalign view`."""
  main()
