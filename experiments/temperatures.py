"""Temperatures of samples on a long-tailed set: python experiments/temperatures.py OUT

A long-tailed set of icons: 1,200 of the most frequent of 31 styles, falling exponentially to 12 of
the rarest. The text of an icon is its name and its style, so texts hardly repeat. Linear projectors
on stored vectors, with `clip` (learned and fixed temperature) and `isogclr`
(https://arxiv.org/abs/2305.11965), whose temperatures belong to samples. The fixed temperature and
rho are those that are best on the icons of known concepts with seed 0; those of `unseen` concepts
are scored: text to image R@5 of the styles that are frequent in training, of medium frequency and
rare (a third of the styles each), and the mean of `isogclr`'s temperatures of the images of each.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import arms
import icons
import numpy as np

import bigalign
from bigalign.data.loader.pairs import Pairs
from bigalign.data.samples.ids import sample_id
from bigalign.data.stores.reader import Store

MOST, LEAST = 1_200, 12
FILES = dict(train="train/*.tar", known="val/*.tar", unseen="unseen/*.tar")
THIRDS = ("frequent", "medium", "rare")
TAUS = (0.02, 0.05, 0.1)
RHOS = (0.5, 1.0, 2.0, 4.0, 6.0)


def members(shard: pathlib.Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
  """(key, JPEG, json) of the icons of a shard."""
  with tarfile.open(shard) as tar:
    files: dict[str, bytes] = {}
    for member in tar:
      read = tar.extractfile(member)
      assert read is not None
      files[member.name] = read.read()
  for name in files:
    if name.endswith(".json"):
      yield name[:-5], files[f"{name[:-5]}.jpg"], json.loads(files[name])


def write_shards(out: pathlib.Path) -> dict[str, str]:
  """Writes one shard for each split, in which texts are captions of name and style."""
  folder = pathlib.Path(os.path.expandvars(icons.ICONS))
  out.mkdir(parents=True, exist_ok=True)
  chosen: dict[str, int] = {}
  for split, pattern in FILES.items():
    samples = [one for shard in sorted(folder.glob(pattern)) for one in members(shard)]
    if split == "train":
      styles = [sample["style"] for _, _, sample in samples]
      names = sorted({*styles}, key=styles.count, reverse=True)
      shares = (LEAST / MOST) ** np.linspace(0, 1, len(names))
      chosen = {name: round(MOST * share) for name, share in zip(names, shares)}
    left = dict(chosen) if split == "train" else dict.fromkeys(chosen, len(samples))
    with tarfile.open(out / f"{split}.tar", "w") as tar:
      for i, (_, image, sample) in enumerate(samples):
        if left.get(sample["style"], 0):
          left[sample["style"]] -= 1
          text = dict(style=sample["style"])
          for kind, data in (
            ("jpg", image),
            ("txt", sample["captions"][1].encode()),
            ("json", json.dumps(text).encode()),
          ):
            info = tarfile.TarInfo(f"{i:06d}.{kind}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
  (out / "styles.json").write_text(json.dumps(chosen))
  return {split: str(out / f"{split}.tar") for split in icons.SPLITS}


def thirds(shards: Mapping[str, str], split: str, store: Store) -> np.ndarray:
  """[rows of the store]: 0, 1 or 2, the third to which the style of a sample belongs."""
  path = pathlib.Path(shards[split])
  order = [*json.loads(path.with_name("styles.json").read_text())]
  third = {style: 3 * rank // len(order) for rank, style in enumerate(order)}
  of = {sample_id(f"{path.name}/{key}"): third[x["style"]] for key, _, x in members(path)}
  return np.asarray([of[int(i)] for i, _ in store.samples(np.arange(len(store)))])


def main() -> None:
  """Chooses the constants, then trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=600, batch=256)
  shards = write_shards(given.out / "shards")
  folder = given.out / "stores"
  base = icons.frozen(folder, steps=given.steps, batch=given.batch, splits=shards)
  held_out = {name: base["evals"][name] for name in icons.HELD_OUT}
  base["evals"] = {}

  def found(run: pathlib.Path, state: Any) -> dict[str, float]:
    model = bigalign.load(run)
    figures = {}
    for name, folders in held_out.items():
      hits = icons.hits(model, folders)
      which = thirds(shards, name, Store(folders["image_store"]))
      figures[name] = float(hits.mean())
      figures |= {f"{name}, {x}": float(hits[which == i].mean()) for i, x in enumerate(THIRDS)}
    if "isogclr" in run.name:
      stores = base["data"]["stores"]
      pairs = Pairs(stores["image"], stores["text"])
      rows = pairs.rows(np.arange(len(pairs)))
      which = thirds(shards, "train", Store(stores["image"]))[rows]
      tau = np.asarray(state.loss["isogclr"]["img"]["tau"])[: len(pairs)]
      figures |= {f"tau, {x}": float(tau[which == i].mean()) for i, x in enumerate(THIRDS)}
    return figures

  def arm(name: str, **options: Any) -> dict[str, Any]:
    c = copy.deepcopy(base)
    c["loss"] = {name: dict(weight=1.0, **options)}
    return c

  def chosen(options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The config that is best on known concepts with the first seed."""
    rows = arms.compare(given.out / "chosen", options, given.seeds[:1], found)
    columns = ["known", *(f"known, {x}" for x in THIRDS)]
    if "tau, rare" in rows[0]:
      columns += [f"tau, {x}" for x in THIRDS]
    arms.show(rows, columns, given.out / "chosen")
    return options[max(rows, key=lambda row: row["known"])["arm"]]

  compared = {
    "clip": arm("clip"),
    "clip, fixed": chosen(
      {f"clip {tau}": arm("clip", t_init=1 / tau, t_learned=False, t_max=None) for tau in TAUS}
    ),
    "isogclr": chosen({f"isogclr {rho}": arm("isogclr", rho=rho, tau_init=0.05) for rho in RHOS}),
    "isogclr, rho 6": arm("isogclr", rho=6.0),
  }
  rows = arms.compare(given.out, compared, given.seeds, found)
  columns = [f"unseen, {x}" for x in THIRDS]
  arms.show(rows, ["unseen", *columns], given.out)
  arms.draw(rows, columns, given.out / "temperatures.png")
  of_samples = [row for row in rows if "tau, rare" in row]
  (given.out / "tau").mkdir(exist_ok=True)
  arms.show(of_samples, [f"tau, {x}" for x in THIRDS], given.out / "tau")


if __name__ == "__main__":
  main()
