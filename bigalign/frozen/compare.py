"""Compares frozen towers before training: bigalign compare --image A B --text C D.

A, B, C and D are embedding stores of the same samples. For each pair of an image and a text tower,
or without --text for each pair of image towers, it prints linear CKA, mutual nearest neighbours,
and the recall of held-out captions and images by local CKA and by maps in closed form (ridge
regression, canonical correlations, orthogonal Procrustes) that are fitted to the other samples.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rich.box
import rich.table

from bigalign.data.stores.reader import Store
from bigalign.frozen import alignment
from bigalign.run import progress
from bigalign.run.configs import load_config
from bigalign.run.tables import show, write_json

if TYPE_CHECKING:
  from bigalign.data.loader.pairs import Pairs

BASE = 320  # pairs that are known when others are matched
STARTS = 30  # of the matching
CHUNK = 8192  # images whose embeddings are in memory at a time
MAPS = ("local_cka", "ridge", "cca", "procrustes")
SHOWN = "text_to_image_R@5"
# What `compare` does, in order.
STAGES = ("read", "spectra", "neighbours", "ridge", "cca", "procrustes", "local_cka", "recall")


class Embeddings(NamedTuple):
  """Embeddings of some samples.

  Attributes:
    image: [N, D].
    text: [M, E].
    owner: [M], the row of `image` that each text belongs to.
  """

  image: np.ndarray
  text: np.ndarray
  owner: np.ndarray


def compare(
  image: str,
  text: str,
  *,
  heldout: float = 0.2,
  most: int = 2000,
  least: float = 0.99,
  queries: int = 0,
  stage: Callable[[str], None] = lambda name: None,
  fitted: dict[str, tuple[alignment.Map, alignment.Map]] | None = None,
) -> dict[str, Any]:
  """Returns the measures of one pair of stores.

  Args:
    image: folder of a store of images.
    text: folder of a store of texts.
    heldout: share of the samples for retrieval; a tenth of the others chooses penalties.
    most: largest number of images for retrieval and nearest neighbours, which form N x N cosines.
    least: share of the images that must have captions.
    queries: held-out images to match with their captions by their similarities to each other and to
      BASE known pairs, see alignment.match; 0: none. It takes seconds to minutes.
    stage: called with each of STAGES when it begins.
    fitted: gets {name: maps of both sides} of the maps in closed form.

  Raises:
    ValueError: if there are too few samples to hold any out; for stores of tokens.
  """
  from bigalign.data.loader.pairs import Pairs  # imports JAX, which --help does not need

  pairs = Pairs(image, text, least=least)
  for store in (pairs.image, pairs.text):
    if len(store.shape) > 1:
      raise ValueError(
        f"{store.folder} holds tokens, but pooled embeddings are compared; embed without --tokens"
      )
  stage("read")
  total: dict[str, alignment.Moments] = {}
  chunks: list[Embeddings] = []
  for name, some in _chunks(pairs, heldout=heldout):
    if name == "heldout":
      if sum(len(x.image) for x in chunks) < most:
        chunks.append(some)
    elif len(some.owner):
      part = alignment.moments([(some.image[some.owner], some.text)])
      total[name] = total[name] + part if name in total else part
  heldout_samples = _first(chunks, most)
  if len(total) < 2 or min(total["fit"].n, total["choose"].n, len(heldout_samples.image)) < 2:
    raise ValueError(f"{pairs!r}: {len(pairs)} samples are too few to hold out {heldout} of them")
  for folder, sums in ((image, total["fit"].xx), (text, total["fit"].yy)):
    if not np.isfinite(sums).all():
      raise ValueError(f"{folder} holds NaN or infinity; find them with `bigalign embed --verify`")
  for folder, spread, mean in zip((image, text), total["fit"].covariances, total["fit"].means):
    if np.trace(spread) <= 1e-9 * (mean @ mean):
      raise ValueError(f"{folder}: all embeddings are equal, so there is nothing to compare")
  fit, choose = total["fit"], total["choose"]
  everything = fit + choose
  cov_image, cov_text, _ = everything.covariances
  with_caption, first = np.unique(heldout_samples.owner, return_index=True)
  stage("spectra")
  measures: dict[str, Any] = dict(
    image=str(image),
    text=str(text),
    pairs=everything.n,
    heldout=len(heldout_samples.image),
    linear_cka=alignment.linear_cka(everything),
    effective_rank_image=alignment.effective_rank(cov_image),
    effective_rank_text=alignment.effective_rank(cov_text),
    uniformity_image=alignment.uniformity(heldout_samples.image),
    uniformity_text=alignment.uniformity(heldout_samples.text),
  )
  stage("neighbours")
  measures["mutual_knn"] = alignment.mutual_knn(
    heldout_samples.image[with_caption], heldout_samples.text[first], k=min(10, len(first) - 1)
  )
  if queries:
    size = min(BASE + queries, len(first))
    known = size * BASE // (BASE + queries)
    kernels = (
      alignment.kernel(x[:size])
      for x in (heldout_samples.image[with_caption], heldout_samples.text[first])
    )
    matched, _ = alignment.match(*kernels, known=known, starts=STARTS)
    measures["matched"] = float((matched[known:] == np.arange(known, size)).mean())
    measures["queries"] = size - known
  maps = {}
  stage("ridge")
  maps["ridge"] = alignment.ridge(fit, choose)
  stage("cca")
  maps["cca"] = alignment.cca(fit, choose)
  stage("procrustes")
  maps["procrustes"] = alignment.procrustes(everything)
  if fitted is not None:
    fitted |= maps
  stage("local_cka")
  scores = alignment.local_cka(everything, heldout_samples.image, heldout_samples.text)
  stage("recall")
  return dict(
    **measures,
    local_cka=alignment.recalls(scores, heldout_samples.owner),
    **{
      name: alignment.retrieval(
        both, heldout_samples.image, heldout_samples.text, heldout_samples.owner
      )
      for name, both in maps.items()
    },
  )


def _chunks(pairs: Pairs, *, heldout: float) -> Iterator[tuple[str, Embeddings]]:
  """All samples, a chunk at a time, in three parts by their ids: "heldout", "choose", "fit"."""
  for start in range(0, len(pairs), CHUNK):
    rows = pairs.rows(np.arange(start, min(start + CHUNK, len(pairs))))
    ids = pairs.image.samples(rows)[:, 0]
    first, count = pairs.text.find(ids)
    draw = (ids >> np.uint64(40)) / 2.0**24  # uniform in [0, 1), since ids are hashes
    held_out = draw < heldout
    choose = ~held_out & (draw < heldout + (1 - heldout) / 10)
    for name, mine in (
      ("heldout", held_out),
      ("choose", choose),
      ("fit", ~held_out & ~choose),
    ):
      owner = np.repeat(np.arange(mine.sum()), count[mine])
      texts = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(first[mine], count[mine])] or [np.zeros(0, np.int64)]
      )
      yield name, Embeddings(pairs.image.read(rows[mine]), pairs.text.read(texts), owner)


def _first(chunks: Sequence[Embeddings], most: int) -> Embeddings:
  """The first `most` images of some chunks, with their texts."""
  starts = np.cumsum([0, *(len(some.image) for some in chunks)])
  image = np.concatenate([some.image for some in chunks])[:most]
  owner = np.concatenate([some.owner + start for some, start in zip(chunks, starts)])
  text = np.concatenate([some.text for some in chunks])
  return Embeddings(image, text[owner < most], owner[owner < most])


def tables(rows: Sequence[dict[str, Any]]) -> list[rich.table.Table]:
  """Returns a table of the pairs and a table of the single towers."""
  pairs = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption=f"maps: held-out {SHOWN}")
  towers = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  shown = dict(
    linear_cka="CKA",
    mutual_knn="kNN",
    local_cka="local CKA",
    ridge="ridge",
    cca="CCA",
    procrustes="Procrustes",
    **(dict(matched="matched") if "matched" in rows[0] else {}),
  )
  for heading in ("image", "text"):
    pairs.add_column(heading, overflow="fold")
  for heading in shown.values():
    pairs.add_column(heading, justify="right", no_wrap=True)
  for heading in ("tower", "effective rank", "uniformity"):
    towers.add_column(heading, justify="left" if heading == "tower" else "right")
  alone = {}
  for row in rows:
    values = (row[name][SHOWN] if name in MAPS else row[name] for name in shown)
    pairs.add_row(row["image"], row["text"], *(f"{value:.3f}" for value in values))
    for side in ("image", "text"):
      rank, spread = row[f"effective_rank_{side}"], row[f"uniformity_{side}"]
      alone[row[side]] = (f"{rank:.1f}", f"{spread:.3f}")
  for name, cells in alone.items():
    towers.add_row(name, *cells)
  return [pairs, towers]


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Runs the program; returns the measures of each pair, best ridge regression first."""
  parser = argparse.ArgumentParser(
    "bigalign compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--image", nargs="+", required=True, metavar="STORE", help="of images")
  parser.add_argument(
    "--text",
    nargs="+",
    default=[],
    metavar="STORE",
    help="of texts; without it, all pairs of --image are compared",
  )
  parser.add_argument(
    "--heldout",
    type=float,
    default=0.2,
    help="share of the samples held out for retrieval (%(default)s)",
  )
  parser.add_argument(
    "--most", type=int, default=2000, help="largest number of images for retrieval (%(default)s)"
  )
  parser.add_argument(
    "--match",
    type=int,
    default=0,
    metavar="N",
    help=f"also match N held-out images with texts, given {BASE} known pairs, without a map",
  )
  parser.add_argument("--json", metavar="FILE", help="also write the measures to this file")
  parser.add_argument("--heatmap", metavar="FILE.png", help=f"draw {SHOWN} by ridge regression")
  parser.add_argument(
    "--save",
    choices=MAPS[1:],
    help="write this map as the linear projectors of a run: --config names the towers of the two"
    " stores, --workdir the folder of the run",
  )
  parser.add_argument("--config", metavar="NAME|FILE", help="of --save")
  parser.add_argument("--workdir", metavar="DIR", help="of --save; new or empty")
  args = parser.parse_args(words)
  if args.save and (len(args.image), len(args.text)) != (1, 1):
    parser.error("--save writes the map of one pair: give one --image and one --text")
  if args.save and not (args.config and args.workdir):
    parser.error("--save needs --config and --workdir")
  config = load_config(args.config) if args.save else None
  workdir = pathlib.Path(args.workdir or ".").expanduser().absolute()
  if args.save and workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise FileExistsError(f"--workdir={args.workdir} exists and is not an empty folder")
  for folder in (*args.image, *args.text):
    Store(folder)  # reports a folder that is not a store before anything is computed
  if not args.text and len(args.image) < 2:
    parser.error("give --text STORE, or several stores of images to compare with each other")
  pairs = [
    *(
      itertools.product(args.image, args.text)
      if args.text
      else itertools.combinations(args.image, 2)
    )
  ]
  rows: list[dict[str, Any]] = []
  fitted: dict[str, tuple[alignment.Map, alignment.Map]] = {}
  with progress.Progress("compare", len(pairs) * len(STAGES), unit="stages") as shown:
    for image, text in pairs:

      def stage(name: str) -> None:
        shown.note = f"pair {len(rows) + 1} of {len(pairs)}, {name}"
        shown.reach(len(rows) * len(STAGES) + STAGES.index(name))

      rows.append(
        compare(
          image,
          text,
          heldout=args.heldout,
          most=args.most,
          queries=args.match,
          stage=stage,
          fitted=fitted,
        )
      )
      shown.reach(len(rows) * len(STAGES))
  if args.save:
    from bigalign.frozen.closed_form import write_run  # imports JAX, which --help does not need

    (row,), sides = rows, dict(image=args.image[0], text=args.text[0])
    about = dict(map=args.save, heldout=row[args.save], stores=sides)
    write_run(config, sides, fitted[args.save], workdir, about)
    print(f"{args.workdir}: the folder of a run with the map {args.save}")
  if args.heatmap:
    from bigalign.report import figures

    columns = args.text or args.image
    values = np.ones((len(args.image), len(columns)))  # a store with itself
    for row in rows:
      i, j = args.image.index(row["image"]), columns.index(row["text"])
      values[i, j] = row["ridge"][SHOWN]
      if not args.text:
        values[j, i] = values[i, j]
    rows_and_columns = (
      ["/".join(pathlib.Path(x).parts[-2:]) for x in side] for side in (args.image, columns)
    )
    names = dict(zip(("rows", "columns"), rows_and_columns))
    pathlib.Path(args.heatmap).write_bytes(figures.grid(values, **names, title=f"ridge, {SHOWN}"))
  rows.sort(key=lambda row: -row["ridge"][SHOWN])
  show(*tables(rows))
  if args.json:
    write_json(args.json, rows)
  return rows


def run() -> None:
  """The program `bigalign compare`."""
  main()
