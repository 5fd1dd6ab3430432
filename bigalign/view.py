"""Makes a view of a source: bigalign view 'DIR/*.tar' --where 'width >= 200' --out good."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.data import views
from bigalign.data.sources import open_source


def _read_ids(path: str) -> np.ndarray:
  """Places of samples: a .npy of integers, or a text with one a line."""
  if path.endswith(".npy"):
    return np.load(path, allow_pickle=False)
  return np.array(pathlib.Path(path).read_text().split(), np.int64)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """The program; the manifest of what it wrote."""
  parser = argparse.ArgumentParser("bigalign view", description=views.__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", help="what config.data.source would say")
  parser.add_argument("--out", required=True, help="OUT.npy and OUT.json are written")
  parser.add_argument("--where", default="", help="rule that the samples fulfil")
  parser.add_argument("--unique", default="", help="column of which each value is kept once")
  parser.add_argument("--ids", default="", help=".npy or text of places to choose from")
  given = parser.parse_args(words)
  ids = _read_ids(given.ids) if given.ids else None
  found = views.make_view(
      open_source(given.source), given.out, spec=given.source, rule=given.where,
      unique=given.unique, ids=ids)
  print(json.dumps({name: found[name] for name in ("samples", "kept", "left_out")}, indent=1))
  return found


def run() -> None:
  """The program `bigalign view`."""
  main()
