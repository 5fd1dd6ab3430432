"""Small datasets in the folders of CLIP_benchmark: parts of real ones, or synthetic pictures."""

from __future__ import annotations

import io
import json
import os
import pathlib
import tarfile

import numpy as np
from helpers.small_shards import picture, write_tar

CLASSES = 10
TEMPLATES = ("a photo of a {c}.", "a small picture of the {c}.")


def _members(tar):
  """{key: {extension: bytes}} of a shard."""
  samples = {}
  with tarfile.open(tar) as opened:
    for member in opened:
      key, _, kind = member.name.partition(".")
      samples.setdefault(key, {})[kind] = opened.extractfile(member).read()
  return samples


def labelled(first, count):
  """`count` images with classes: [(bytes, class)]. CIFAR-10, or coloured pictures."""
  if root := os.environ.get("BIGALIGN_DATA"):
    samples = [*_members(f"{root}/cifar10/test/0.tar").values()]
    # Its classes lie one after the other.
    chosen = [samples[i * 100 % 1000 + i // 10] for i in range(first, first + count)]
    return [(x["jpg"], int(x["cls"])) for x in chosen]
  return [(picture(i), i % CLASSES) for i in range(first, first + count)]


def captioned(count):
  """`count` images with five captions each: [(bytes, captions)]. Flickr8k, or pictures."""
  if root := os.environ.get("BIGALIGN_DATA"):
    samples = [*_members(f"{root}/flickr8k/val/00000.tar").values()][:count]
    return [(x["jpg"], json.loads(x["json"])["captions"]) for x in samples]
  words = ("red", "green", "blue", "round", "flat", "wide", "bright")
  return [
    (picture(i), [f"{words[i % 7]} {words[k]} picture {i}" for k in range(5)]) for i in range(count)
  ]


def names():
  """The names of the classes of `labelled`."""
  if root := os.environ.get("BIGALIGN_DATA"):
    return pathlib.Path(f"{root}/cifar10/classnames.txt").read_text().split()
  return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def _npy(values):
  file = io.BytesIO()
  np.save(file, values)
  return file.getvalue()


def write(root, count):
  """Writes cifar10, flickr8k and several, of images with several classes; returns the folders."""
  images = labelled(0, count)
  sets = np.random.default_rng(0).random((count, CLASSES)) < 0.3
  kinds = {
    "cifar10": ("", [("cls", str(k).encode()) for _, k in images]),
    "flickr8k": ("retrieval", [("txt", "\n".join(x).encode()) for _, x in captioned(count)]),
    "several": ("multilabel", [("npy", _npy(x.astype(np.int64))) for x in sets]),
  }
  for name, (kind, fields) in kinds.items():
    folder = root / name
    pictures = captioned(count) if name == "flickr8k" else images
    members = []
    for i, ((image, _), (field, value)) in enumerate(zip(pictures, fields, strict=True)):
      members += [(f"s{i:04}.jpg", image), (f"s{i:04}.{field}", value)]
    write_tar(folder / "test/0.tar", members)
    (folder / "test/nshards.txt").write_text("1")
    if kind:
      (folder / "dataset_type.txt").write_text(kind)
    if kind != "retrieval":
      (folder / "classnames.txt").write_text("\n".join(names()))
      (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
  return [root / name for name in kinds]
