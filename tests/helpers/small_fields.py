"""A small dataset with fields that a batch can have: texts, teachers, columns, views, regions."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store

SAMPLES = 24
OPTIONS = dict(image_size=16, tokenizer=dict(name="byte", length=24), augment=dict(flip=0.5))


def captions_of(i: int) -> list[str]:
  """One to four captions of sample i."""
  return [f"picture {i} seen {k} times" for k in range(1 + i % 4)]


def key_of(i: int) -> str:
  """The key of sample i."""
  return f"0.tar/{i:03d}"


def noise_of(i: int) -> float:
  """A number of sample i, exact in float32."""
  return i / 64


def boxes_of(i: int) -> np.ndarray:
  """[i % 3, 4]"""
  return np.arange(4 * (i % 3), dtype=np.float32).reshape(-1, 4) / 16


def regions_of(i: int) -> list[dict]:
  """Up to three regions of sample i."""
  return [
    dict(box=[k / 8, 0.25, 0.5 + k / 8, 1.0], phrase=f"part {k} of {i}") for k in range(i % 4)
  ]


def vectors_of(i: int, *, width: int, scale: float) -> np.ndarray:
  """Of a teacher for each caption of sample i."""
  rows = np.arange(len(captions_of(i)), dtype=np.float32)
  return scale * (i + rows[:, None] / 8 + np.arange(width) / 64)


def write_dataset(root: pathlib.Path) -> pathlib.Path:
  """A shard with captions and numbers, and the stores of two teachers, a and b."""
  members = []
  for i in range(SAMPLES):
    stored = dict(noise=noise_of(i), captions=captions_of(i), boxes=boxes_of(i).tolist())
    stored |= dict(regions=regions_of(i))
    members += [(f"{i:03d}.jpg", picture(i)), (f"{i:03d}.json", json.dumps(stored).encode())]
  write_tar(root / "0.tar", members)
  for name, width, scale in (("a", 3, 1.0), ("b", 5, -2.0)):
    every = {key_of(i): vectors_of(i, width=width, scale=scale) for i in range(SAMPLES)}
    write_store(root / name / "text", every)
    write_store(root / name / "image", {key: x[0] + 0.5 for key, x in every.items()})
  return root


def every_field(folder) -> dict:
  """config.data of the dataset with all fields at once."""
  return dict(
    **OPTIONS,
    source=f"{folder}/0.tar",
    captions=("json.captions",),
    texts=dict(count=3, negatives=dict(count=2, rule="swap")),
    teachers={
      name: dict(image=f"{folder}/{name}/image", text=f"{folder}/{name}/text") for name in "ab"
    },
    columns=dict(
      noise_prob="json.noise", boxes=dict(field="json.boxes", shape=(4, 4), ragged=True)
    ),
    views=dict(wide=dict(scale=(0.4, 1.0)), local=dict(count=3, size=8, scale=(0.05, 0.4))),
    regions=dict(field="json.regions", count=2),
  )
