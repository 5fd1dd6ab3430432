"""The icons in BIGALIGN_DATA: stores of frozen towers, and configs that train on them."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Mapping
from typing import Any

import arms
import numpy as np

from bigalign.data.stores.reader import Store
from bigalign.frozen.embed import embed
from bigalign.run.configs import load_config

ICONS = "$BIGALIGN_DATA/icons"
# `train` and `known` hold the same concepts in other drawings; no concept of `unseen` is in them.
SPLITS = dict(
  train=f"{ICONS}/train/{{00000..00010}}.tar",
  known=f"{ICONS}/val/00000.tar",
  unseen=f"{ICONS}/unseen/00000.tar",
)
TRAINED = 26_659  # pairs of `train`
HELD_OUT = ("known", "unseen")
# {column: metric} of the evaluators that `frozen` and `small` name.
METRICS = {
  f"{name}, {way} R@5": f"val/{name}/{metric}_R@5"
  for name in HELD_OUT
  for way, metric in (("t2i", "text_to_image"), ("i2t", "image_to_text"))
}
# The same of the evaluator "geometry", see geometry_of.
GEOMETRY = {
  "gap": "val/geometry/centroid_distance",
  "uniformity": "val/geometry/uniformity",
  "alignment": "val/geometry/alignment",
}


def frozen(
  stores: pathlib.Path, *, steps: int, batch: int, splits: Mapping[str, str] = SPLITS
) -> dict[str, Any]:
  """configs/photos_frozen.py on icons: linear projectors after MobileNetV2 and MiniLM, with `clip`.

  Embeds all splits first, unless `stores` has them. Needs MINILM, as that config says.

  Args:
    stores: the folder of the stores, OUT/../stores, which the scripts share.
    steps: of training.
    batch: pairs of a step.
    splits: {name: shards}; "train" is trained on, the others are evaluated.
  """
  c: dict[str, Any] = load_config("photos_frozen").to_dict()
  c |= dict(total_steps=steps, batch_size=batch, log_every=20, writer=dict(tensorboard=False))
  del c["data"]["mixture"]
  c["data"] |= dict(captions=("txt",), image_size=96)
  c["data"]["tokenizer"]["length"] = 16
  c["model"] |= dict(embed_dim=256)
  for side in ("image", "text"):
    c["model"][f"{side}_projector"] = dict(name="linear")
  c["evals"] = {}
  folders = {}
  for name, source in splits.items():
    own = copy.deepcopy(c)
    own["data"]["source"] = source
    folders[name] = {side: str(x) for side, x in embed(own, stores / name).items()}
  c["data"] |= dict(source=splits["train"], stores=folders["train"])
  for name in splits.keys() - {"train"}:
    both = {f"{side}_store": folder for side, folder in folders[name].items()}
    c["evals"][name] = dict(type="retrieval", captions=1, **both)
  return c


def retrieval(run: pathlib.Path, state: Any) -> dict[str, float]:
  """What a run found with the evaluators of `frozen` and `small`."""
  return arms.last(run, METRICS)


def first(zimg: np.ndarray, ztxt: np.ndarray, k: int = 5) -> np.ndarray:
  """[N] bool: which texts find their icon among the first k; a tie counts for the icon.

  Args:
    zimg: [N, E], unit norm.
    ztxt: [N, E], of the same samples.
    k: icons that are found.
  """
  scores = ztxt @ zimg.T
  found: np.ndarray = (scores > np.diag(scores)[:, None]).sum(1) < k
  return found


def hits(model: Any, stores: Mapping[str, Any], width: int | None = None, k: int = 5) -> np.ndarray:
  """`first` of the stored vectors of an evaluator.

  Args:
    model: of bigalign.load.
    stores: an evaluator of `frozen`.
    width: numbers of the embeddings that are compared, the first ones; None: all.
    k: icons that are found.
  """
  image, text = (Store(stores[f"{side}_store"]) for side in ("image", "text"))
  given = dict(images=image.read(np.arange(len(image))), ids=text.read(np.arange(len(text))))
  outputs = model.apply(model.params, **given)
  z = [np.asarray(outputs[key])[:, :width] for key in ("zimg", "ztxt")]
  zimg, ztxt = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in z)
  return first(zimg, ztxt, k)


def geometry_of(retrieval: dict[str, Any]) -> dict[str, Any]:
  """The geometry of the pairs of an evaluator of `frozen`."""
  stores = {name: x for name, x in retrieval.items() if name.endswith("_store")}
  return dict(type="geometry", **stores)


def first_samples(store: str, count: int, path: pathlib.Path) -> str:
  """Writes the ids of the first samples of a store's source, for config.data.stores.keep."""
  path.parent.mkdir(parents=True, exist_ok=True)
  opened = Store(store)
  ids, places = opened.samples(np.arange(len(opened))).T
  np.save(path, np.sort(ids[places < count]))
  return str(path)


def small(*, steps: int, batch: int) -> dict[str, Any]:
  """configs/photos.py from scratch on icons of 32 pixels, with `clip` and AdamW."""
  c: dict[str, Any] = load_config("photos").to_dict()
  c |= dict(total_steps=steps, batch_size=batch, log_every=20, checkpoint_every=0, eval_every=0)
  c |= dict(writer=dict(tensorboard=False))
  c["data"] |= dict(source=SPLITS["train"], captions=("txt",), image_size=32, workers=0)
  c["data"] |= dict(resize="squash", augment=dict(crop="random_resized", scale=(0.6, 1.0)))
  c["data"]["tokenizer"]["length"] = 10
  c["model"]["image"] |= dict(patch=8, stem="patch", dropout=0.0)
  c["model"]["text"] |= dict(length=10, dropout=0.0)
  c["loss"] = dict(clip=dict(weight=1.0))
  c["optimizer"] = dict(name="adamw", lr=1e-3, warmup="5%", weight_decay=0.1)
  c["evals"] = {
    name: dict(type="retrieval", source=SPLITS[name], fields=("txt",), captions=1)
    for name in HELD_OUT
  }
  return c
