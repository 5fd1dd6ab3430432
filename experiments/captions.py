"""Captions, hard negatives and a teacher of texts: python experiments/captions.py OUT

Trains a text tower from scratch beside a frozen MobileNetV2, whose vectors of the photos of COCO
and Flickr8k in BIGALIGN_DATA are stored first, in five ways with equal steps:

  one: a caption is drawn of each image, with `clip`
  several: up to five captions of each image at once, with `clip` and texts="uniform"
  swapped: one caption and a hard negative, the caption with two words swapped, with `negclip`
  against: the same, with `hardneg_own` beside it, as DAC has it
  taught: one caption, with `mobileclip_dr` from stored vectors of a stronger teacher:
    configs/photos_frozen.py, with a pretrained MiniLM as its text tower

Evaluates retrieval on held-out photos, and a test of word order: how often the caption of a
held-out photo of COCO is closer to it than the same caption with two words swapped. Needs MINILM as
configs/photos_frozen.py says; docs/samples.md has the figures.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import arms
import numpy as np

import bigalign
from bigalign.data.sources.base import open_source
from bigalign.data.stores.reader import Store
from bigalign.data.text.negatives import swap
from bigalign.frozen.embed import embed
from bigalign.run.configs import load_config
from bigalign.run.metrics import read_metrics
from bigalign.train import train

SETS = ("coco2k", "flickr8k")
METRICS = {f"{name}, t2i R@5": f"val/{name}/text_to_image_R@5" for name in SETS}
COLUMNS = [*METRICS, "word order"]
SWAPS = 4  # swapped captions of each caption in the test of word order


def base(steps: int, stores: dict[str, pathlib.Path]) -> dict[str, Any]:
  """configs/photos_frozen.py with stored images, and the text tower of configs/photos.py."""
  c: dict[str, Any] = load_config("photos_frozen").to_dict()
  photos: dict[str, Any] = load_config("photos").to_dict()
  c |= dict(total_steps=steps, frozen="image_tower/")
  c["data"]["stores"] = dict(image=str(stores["train"]))
  c["data"]["captions"] = None  # a set has one field of captions, so the teacher has one store
  for part, field in zip(c["data"]["mixture"], ("txt", "json.captions")):
    part["captions"] = (field,)
  c["data"]["tokenizer"] = photos["data"]["tokenizer"]
  c["model"]["text"] = photos["model"]["text"]
  c["model"]["text_projector"] = dict(name="linear")
  c["model"]["embed_dim"] = 256
  for name in SETS:
    c["evals"][name] |= dict(image_store=str(stores[name]))
  return c


def teach(out: pathlib.Path) -> tuple[dict[str, str], float]:
  """Trains the teacher; returns the stores of its vectors, and its logit scale."""
  teacher: dict[str, Any] = load_config("photos_frozen").to_dict()
  towers = embed(teacher, out / "towers")
  teacher["data"]["stores"] = {side: str(folder) for side, folder in towers.items()}
  train(teacher, out / "teacher")
  name = "train/logit_scale"
  scale = [row[name] for row in read_metrics(out / "teacher") if name in row][-1]
  trained = teacher | dict(model=dict(init=str(out / "teacher")))
  stores = embed(trained, out / "stores", projected=True)
  return {side: str(folder) for side, folder in stores.items()}, scale


def ways(config: dict[str, Any], teacher: dict[str, str], scale: float) -> dict[str, Any]:
  """The ways to use captions."""
  one, several, swapped, taught = (copy.deepcopy(config) for _ in range(4))
  several["data"]["texts"] = dict(count=5)
  several["loss"] = dict(clip=dict(weight=1.0, texts="uniform"))
  swapped["data"]["texts"] = dict(count=1, negatives=dict(count=1, rule="swap"))
  swapped["loss"] = dict(negclip=dict(weight=1.0))
  against = copy.deepcopy(swapped)
  against["loss"]["hardneg_own"] = dict(weight=0.3)
  taught["data"]["teachers"] = dict(a=teacher)
  taught["loss"] = dict(mobileclip_dr=dict(weight=1.0, teacher_scales=(scale,)))
  return dict(one=one, taught=taught, swapped=swapped, against=against, several=several)


def stored(out: pathlib.Path) -> dict[str, pathlib.Path]:
  """The vectors of the images: of the photos to train with, and of each set of held-out ones."""
  config: dict[str, Any] = load_config("photos_frozen").to_dict()
  folders = {"train": out / "towers/image"}
  for name in SETS:
    held_out = copy.deepcopy(config)
    del held_out["data"]["mixture"]
    held_out["data"]["source"] = f"$BIGALIGN_DATA/{name}/val/00000.tar"
    folders[name] = embed(held_out, out / f"towers_{name}", sides=("image",))["image"]
  return folders


def word_order(run: pathlib.Path, images: pathlib.Path) -> float:
  """The share of swapped captions of COCO that are further from their photo than the caption."""
  model, store = bigalign.load(run), Store(images)
  source = open_source("$BIGALIGN_DATA/coco2k/val/00000.tar")
  captions = [source[i]["captions"][0] for i in range(len(source))]
  zimg = np.asarray(model.apply(model.params, store.read(np.arange(len(store))))["zimg"])
  true = (zimg * model.embed_texts(captions)).sum(-1)
  rng, right = np.random.default_rng(0), []
  for _ in range(SWAPS):
    swapped = [swap(text, rng) or text for text in captions]
    right.append(true > (zimg * model.embed_texts(swapped)).sum(-1))
  return float(np.mean(right))


def figures(images: pathlib.Path) -> Callable[[pathlib.Path, Any], dict[str, float]]:
  """What `arms.compare` finds of a run; images: the stored photos of the test of word order."""
  return lambda run, state: {
    **arms.last(run, METRICS),
    "word order": word_order(run, images),
  }


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=300)
  teacher, scale = teach(given.out)
  stores = stored(given.out)
  compared = ways(base(given.steps, stores), teacher, scale)
  rows = arms.compare(given.out, compared, given.seeds, figures(stores["coco2k"]))
  arms.show(rows, COLUMNS, given.out)
  arms.draw(rows, COLUMNS, given.out / "captions.png")


if __name__ == "__main__":
  main()
