"""Masked prediction against none, and `blocks` against `linear`: python experiments/masked.py OUT

Trains a small model on the icons in BIGALIGN_DATA for each seed, with `siglip` alone and with
`ibot` beside it. Patches are then compared by a linear probe: ridge regression from single tokens
(and from their mean) to the icon's style, one of 31, fitted on 3,000 training icons and scored on
the held-out icons. Then the image tower of `siglip` alone is frozen, and a new text tower is
trained with the projectors `linear` and `blocks`. The table has retrieval on held-out icons too.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import arms
import jax
import numpy as np

import bigalign
from bigalign import tree
from bigalign.run.configs import load_config

RETRIEVAL = "val/icons/text_to_image_R@5"
ICONS = pathlib.Path(os.environ["BIGALIGN_DATA"]) / "icons"
TRAIN, VAL = "train/{00000..00009}.tar", "val/00000.tar"


def config(steps: int) -> dict[str, Any]:
  """The model without masked prediction."""
  c: dict[str, Any] = load_config("photos").to_dict()
  c |= dict(total_steps=steps, log_every=50, checkpoint_every=0, eval_every=0)
  c["data"] |= dict(source=f"$BIGALIGN_DATA/icons/{TRAIN}", captions=("txt",), image_size=40)
  c["data"] |= dict(
    workers=0, resize="squash", augment=dict(crop="random_resized", scale=(0.6, 1.0))
  )
  c["data"]["tokenizer"]["length"] = 12
  c["model"]["image"] |= dict(width=96, depth=3, heads=4, patch=8, stem="patch", dropout=0.0)
  c["model"]["text"] |= dict(width=96, heads=4, length=12, dropout=0.0)
  c["model"] |= dict(embed_dim=96)
  c["loss"] = dict(siglip=dict(weight=1.0))
  c["optimizer"] = dict(name="adamw", lr=1e-3, warmup="10%", weight_decay=0.1)
  icons = dict(type="retrieval", source=f"$BIGALIGN_DATA/icons/{VAL}")
  c["evals"] = dict(icons=icons)
  return c


def with_ibot(c: dict[str, Any]) -> dict[str, Any]:
  """The same model with half of the patches of each image hidden in a second pass."""
  c = copy.deepcopy(c)
  c["loss"]["ibot"] = dict(
    weight=0.25,
    view="",
    prototypes=512,
    hidden=256,
    bottleneck=64,
    teacher_temp_updates=0,
  )
  c["twin"] = dict(paths=r"^model/image_tower|^heads/", decay=0.98)
  return c


def frozen(c: dict[str, Any], out: pathlib.Path, projector: str, seed: int) -> dict[str, Any]:
  """A new text tower and projectors on the image tower of the run of `none`."""
  c = copy.deepcopy(c)
  c["frozen"] = "^model/image_tower/"
  c["model"]["image"] = dict(init=str(out / f"none-{seed}"), pool="mean", dtype="float32")
  c["model"] |= dict(embed_dim=192, image_projector=dict(name=projector))
  return c


def icons(shards: list[pathlib.Path], most: int) -> Iterator[tuple[bytes, str]]:
  """(JPEG, style) of the first icons of some shards."""
  left = most
  for shard in shards:
    with tarfile.open(shard) as file:
      for member in file:
        if member.name.endswith(".json") and left:
          read = file.extractfile(member.name)
          image = file.extractfile(member.name.replace(".json", ".jpg"))
          assert read and image
          left -= 1
          yield image.read(), json.loads(read.read())["style"]


def probe(run: pathlib.Path, most: int) -> dict[str, float]:
  """Accuracies of the style of held-out icons from one patch, and from the mean of the patches."""
  model = bigalign.load(run)
  variables = {"params": tree.unflatten({k: x for k, x in model.params.items() if "/" in k})}

  @jax.jit
  def tokens(pixels: Any) -> Any:
    rows: Any = model.encoder.apply(variables, pixels, method="with_tokens_image")
    return rows[:, 1:]

  sets = {}
  for name, pattern in (("train", sorted(ICONS.glob("train/*.tar"))), ("val", [ICONS / VAL])):
    images, styles = zip(*icons(pattern, most))
    pixels = model.preprocess(images)
    x = [np.asarray(tokens(pixels[i : i + 256]), np.float64) for i in range(0, len(pixels), 256)]
    sets[name] = np.concatenate(x), np.asarray(styles)
  known = sorted({*sets["train"][1]})
  found = {}
  for kind in ("patch", "mean"):
    x, y = {}, {}
    for name, (features, styles) in sets.items():
      of = features if kind == "patch" else features.mean(1, keepdims=True)
      x[name] = of.reshape(-1, of.shape[-1])
      y[name] = np.repeat([known.index(s) if s in known else -1 for s in styles], of.shape[1])
    middle, scale = x["train"].mean(0), x["train"].std(0) + 1e-6
    a, b = ((x[name] - middle) / scale for name in ("train", "val"))
    target = np.eye(len(known))[y["train"]]
    share = target.mean(0)
    gram = a.T @ a / len(a) + 1e-3 * np.eye(a.shape[1])
    weights = np.linalg.solve(gram, a.T @ (target - share) / len(a))
    found[f"style_from_{kind}"] = float(((b @ weights + share).argmax(1) == y["val"]).mean())
  most_common = np.bincount(y["train"]).argmax()
  return found | {"chance": float((y["val"] == most_common).mean())}


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=300, probed=3_000)
  plain = config(given.steps)
  compared = {"none": plain, "ibot": with_ibot(plain)} | {
    f"frozen, {name}": functools.partial(frozen, plain, given.out, name)
    for name in ("linear", "blocks")
  }

  def found(run: pathlib.Path, state: Any) -> dict[str, float]:
    figures = arms.last(run, dict(retrieval=RETRIEVAL))
    return figures if run.name.startswith("frozen") else figures | probe(run, given.probed)

  rows = arms.compare(given.out, compared, given.seeds, found)
  columns = ["retrieval", "style_from_patch", "style_from_mean", "chance"]
  arms.show(rows, columns, given.out)
  arms.draw(rows, columns[:-1], given.out / "masked.png")


if __name__ == "__main__":
  main()
