"""Which frozen towers agree before anything is trained: bigalign compare --image A B --text C D.

Each of A, B, C, D is an embedding store, of the same samples. For each pair of an image and a text
tower: linear CKA, mutual nearest neighbours, and how well held-out captions find their images by
local CKA, and by maps in closed form (ridge regression, canonical correlations, orthogonal
Procrustes) that were fitted to the other samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from bigalign.data.loader.pairs import Pairs
from bigalign.data.stores.reader import Store
from bigalign.frozen import alignment
from bigalign.report import figures

CHUNK = 8192  # images whose vectors are in memory at a time
MAPS = ("local_cka", "ridge", "cca", "procrustes")
SHOWN = "text_to_image_R@5"


class Held(NamedTuple):
  """Vectors that nothing is fitted to: images [N, D], texts [M, E], and the image of each text."""

  image: np.ndarray
  text: np.ndarray
  owner: np.ndarray


def compare(
  image: str, text: str, *, heldout: float = 0.2, most: int = 2000, least: float = 0.99
) -> dict[str, Any]:
  """The figures of one pair of stores.

  Args:
    image, text: folders of stores.
    heldout: share of the samples that captions are looked up in; a tenth of the others chooses
      penalties.
    most: of these, and of those whose neighbours are compared; N x N cosines are formed.
    least: share of the images that must have captions.

  Raises:
    ValueError: if there are too few samples to hold any out; for stores of tokens.
  """
  pairs = Pairs(image, text, least=least)
  for store in (pairs.image, pairs.text):
    if len(store.shape) > 1:
      raise ValueError(
        f"{store.folder} holds tokens, and pooled vectors are compared; embed without --tokens"
      )
  total: dict[str, alignment.Moments] = {}
  held: list[Held] = []
  for name, some in _chunks(pairs, heldout=heldout):
    if name == "heldout":
      if sum(len(x.image) for x in held) < most:
        held.append(some)
    elif len(some.owner):
      found = alignment.moments([(some.image[some.owner], some.text)])
      total[name] = total[name] + found if name in total else found
  one = _first(held, most)
  if len(total) < 2 or min(total["fit"].n, total["choose"].n, len(one.image)) < 2:
    raise ValueError(f"{pairs!r}: {len(pairs)} samples are too few to hold out {heldout} of them")
  for folder, sums in ((image, total["fit"].xx), (text, total["fit"].yy)):
    if not np.isfinite(sums).all():
      raise ValueError(f"{folder} holds NaN or infinity; find them with `bigalign embed --verify`")
  for folder, spread, mean in zip((image, text), total["fit"].covariances, total["fit"].means):
    if np.trace(spread) <= 1e-9 * (mean @ mean):
      raise ValueError(f"{folder}: all vectors are the same, so there is nothing to compare")
  fit, choose = total["fit"], total["choose"]
  everything = fit + choose
  cov_image, cov_text, _ = everything.covariances
  with_caption, first = np.unique(one.owner, return_index=True)
  maps = dict(
    ridge=alignment.ridge(fit, choose),
    cca=alignment.cca(fit, choose),
    procrustes=alignment.procrustes(everything),
  )
  scores = alignment.local_cka(everything, one.image, one.text)
  return dict(
    image=str(image),
    text=str(text),
    pairs=everything.n,
    heldout=len(one.image),
    linear_cka=alignment.linear_cka(everything),
    mutual_knn=alignment.mutual_knn(
      one.image[with_caption], one.text[first], k=min(10, len(first) - 1)
    ),
    effective_rank_image=alignment.effective_rank(cov_image),
    effective_rank_text=alignment.effective_rank(cov_text),
    uniformity_image=alignment.uniformity(one.image),
    uniformity_text=alignment.uniformity(one.text),
    local_cka=alignment.recalls(scores, one.owner),
    **{
      name: alignment.retrieval(found, one.image, one.text, one.owner)
      for name, found in maps.items()
    },
  )


def _chunks(pairs: Pairs, *, heldout: float) -> Iterator[tuple[str, Held]]:
  """All samples, a chunk at a time, in three parts by their ids: heldout, choose, fit."""
  for start in range(0, len(pairs), CHUNK):
    rows = pairs.rows(np.arange(start, min(start + CHUNK, len(pairs))))
    ids = pairs.image.samples(rows)[:, 0]
    first, count = pairs.text.find(ids)
    draw = (ids >> np.uint64(40)) / 2.0**24  # ids are hashes
    out = draw < heldout
    chooses = ~out & (draw < heldout + (1 - heldout) / 10)
    for name, mine in (("heldout", out), ("choose", chooses), ("fit", ~out & ~chooses)):
      owner = np.repeat(np.arange(mine.sum()), count[mine])
      texts = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(first[mine], count[mine])] or [np.zeros(0, np.int64)]
      )
      yield name, Held(pairs.image.read(rows[mine]), pairs.text.read(texts), owner)


def _first(held: Sequence[Held], most: int) -> Held:
  """The first images of all chunks together."""
  starts = np.cumsum([0, *(len(some.image) for some in held)])
  image = np.concatenate([some.image for some in held])[:most]
  owner = np.concatenate([some.owner + start for some, start in zip(held, starts)])
  text = np.concatenate([some.text for some in held])
  return Held(image, text[owner < most], owner[owner < most])


def tables(rows: Sequence[dict[str, Any]]) -> list[rich.table.Table]:
  """For a person: the pairs, and beside them each tower alone."""
  pairs = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption=f"maps: held-out {SHOWN}")
  towers = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  shown = dict(
    linear_cka="CKA",
    mutual_knn="kNN",
    local_cka="local CKA",
    ridge="ridge",
    cca="CCA",
    procrustes="Procrustes",
  )
  for heading in ("image", "text"):
    pairs.add_column(heading, overflow="fold")
  for heading in shown.values():
    pairs.add_column(heading, justify="right", no_wrap=len(heading) < 9)
  for heading in ("tower", "effective rank", "uniformity"):
    towers.add_column(heading, justify="left" if heading == "tower" else "right")
  alone = {}
  for row in rows:
    found = (row[name][SHOWN] if name in MAPS else row[name] for name in shown)
    pairs.add_row(row["image"], row["text"], *(f"{value:.3f}" for value in found))
    for side in ("image", "text"):
      rank, spread = row[f"effective_rank_{side}"], row[f"uniformity_{side}"]
      alone[row[side]] = (f"{rank:.1f}", f"{spread:.3f}")
  for name, values in alone.items():
    towers.add_row(name, *values)
  return [pairs, towers]


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """The program; the figures of each pair, best ridge regression first."""
  parser = argparse.ArgumentParser(
    "bigalign compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--image", nargs="+", required=True, metavar="STORE")
  parser.add_argument("--text", nargs="+", required=True, metavar="STORE")
  parser.add_argument("--heldout", type=float, default=0.2, help="share of samples (%(default)s)")
  parser.add_argument("--most", type=int, default=2000, help="images held out (%(default)s)")
  parser.add_argument("--json", metavar="FILE", help="write the figures there too")
  parser.add_argument("--heatmap", metavar="FILE.png", help=f"draw ridge's {SHOWN}")
  args = parser.parse_args(words)
  for folder in (*args.image, *args.text):
    Store(folder)  # what is no store is better heard of before anything is computed
  rows = [
    compare(image, text, heldout=args.heldout, most=args.most)
    for image, text in itertools.product(args.image, args.text)
  ]
  if args.heatmap:
    values = np.array([row["ridge"][SHOWN] for row in rows]).reshape(len(args.image), -1)
    rows_and_columns = (
      ["/".join(pathlib.Path(x).parts[-2:]) for x in side] for side in (args.image, args.text)
    )
    names = dict(zip(("rows", "columns"), rows_and_columns))
    pathlib.Path(args.heatmap).write_bytes(figures.grid(values, **names, title=f"ridge, {SHOWN}"))
  rows.sort(key=lambda row: -row["ridge"][SHOWN])
  rich.console.Console().print(*tables(rows))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
  return rows


def run() -> None:
  """The program `bigalign compare`."""
  main()
