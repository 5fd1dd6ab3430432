"""Near-duplicates: what numpy finds with all pairs, and copies of images that are injected."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from helpers.loss_oracles import cases2, oracles2
from helpers.shipped import load
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store
from PIL import Image

from bigalign.data.image.decode import decode
from bigalign.data.loader.options import resolve_data
from bigalign.data.samples.ids import sample_id
from bigalign.data.sources.base import open_source
from bigalign.data.stores.reader import Store
from bigalign.frozen import dedup
from bigalign.frozen.curate import unit
from bigalign.frozen.embed import embed


@pytest.mark.parametrize("case", cases2("semdedup"))
def test_what_is_removed_from_a_cluster(case):
  inputs = oracles2().inputs(case)
  largest = dedup.largest_earlier(inputs["emb"])
  got = dict(max_earlier=largest, remove=largest > 1 - case["params"]["eps"])
  oracles2().check(case, got, rtol=1e-9, require=("max_earlier", "remove"))


def test_tiles_and_clusters_compare_as_all_pairs_do(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  middles = rng.normal(size=(6, 5))
  vectors = middles[rng.integers(0, 6, 300)] + 0.2 * rng.normal(size=(300, 5))
  rows = {f"{i}": x for i, x in enumerate(vectors)}
  folder = write_store(tmp_path / "store", rows)
  monkeypatch.setattr(dedup, "TILE", 16)
  for clusters, keep in ((1, "hard"), (5, "easy")):
    made = dedup.dedup(folder, f"{tmp_path}/made/out", clusters=clusters, eps=0.01, keep=keep)
    z = unit(Store(folder).read(np.arange(300)))
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.choice(300, min(300, dedup.SAMPLE * clusters), replace=False))
    centres = dedup.learn_centres(z[drawn], clusters, iterations=20, rng=rng)
    cosines = z @ centres.T
    label = cosines.argmax(1)
    kept = []
    for k in range(clusters):
      mine = np.flatnonzero(label == k)
      order = mine[np.argsort(cosines[mine, k] * (1 if keep == "hard" else -1), kind="stable")]
      pairs = np.tril(z[order] @ z[order].T, -1)
      kept += order[(pairs <= 1 - 0.01).all(1)].tolist()
    ids = np.load(tmp_path / "made/out.ids.npy")
    assert sorted(ids.tolist()) == sorted(sample_id(str(i)) for i in kept)
    assert np.load(tmp_path / "made/out.0.places.npy").tolist() == sorted(kept)
    assert made["rows_kept"] == made["samples_kept"] == len(kept) < 290
    assert made["removed_by_eps"]["0.01"] == 300 - len(kept)
    assert json.loads((tmp_path / "made/out.json").read_text()) == made
  assert len([*(tmp_path / "made").iterdir()]) == 3  # no scratch file is left


def test_captions_and_exact_copies(tmp_path):
  """A sample stays as long as one of its captions does."""
  x = np.eye(4)
  rows = {"a": x[:2], "b": x[1:3], "c": x[[0, 1]] * 3}
  made = dedup.dedup(write_store(tmp_path / "store", rows), f"{tmp_path}/out", eps=1e-6)
  assert made["rows_kept"] == 3 and made["samples_kept"] == 2
  ids = {sample_id(key) for key in "ab"}
  assert {*np.load(tmp_path / "out.ids.npy").tolist()} == ids
  for options in (dict(eps=2.0), dict(clusters=9)):
    with pytest.raises(ValueError, match="eps is from 0 to 1, and clusters from 1 to 6"):
      dedup.dedup(str(tmp_path / "store"), f"{tmp_path}/out", **options)


def again(image: bytes, quality: int, scale: float) -> bytes:
  """An image, resized and encoded again."""
  opened = Image.open(io.BytesIO(image)).convert("RGB")
  file = io.BytesIO()
  opened.resize([max(round(side * scale), 8) for side in opened.size]).save(
    file, "jpeg", quality=quality
  )
  return file.getvalue()


def injected(images):
  """{key: image} with copies of a third of the images, under keys that end with "copy"."""
  rng = np.random.default_rng(0)
  copies = {
    f"{key}copy": again(images[key], int(rng.integers(50, 95)), rng.uniform(0.5, 1.2))
    for key in [*images][::3]
  }
  return {**images, **copies}


def check_found(images, folder, out):
  """Precision and recall of the pairs of an image and its copy, of which one is removed."""
  kept = {*np.load(f"{out}.ids.npy").tolist()}
  removed = {key for key in images if sample_id(folder + key) not in kept}
  copied = {key.removesuffix("copy") for key in images if key.endswith("copy")}
  found = {key.removesuffix("copy") for key in removed}
  assert len(found & copied) > 0.95 * max(len(copied), len(removed)), (len(removed), len(copied))


def test_injected_copies_are_found(tmp_path):
  """With the pixels of small views as vectors."""
  data = resolve_data(dict(image_size=8, resize="squash", tokenizer=dict(name="byte", length=2)))
  images = injected({f"{i:03}": picture(i, size=(48, 64)) for i in range(150)})
  views = {key: data.evaluation_view(decode(x)).astype(np.float64) for key, x in images.items()}
  vectors = {key: view.ravel() - view.mean() for key, view in views.items()}
  out = f"{tmp_path}/out"
  dedup.dedup(write_store(tmp_path / "store", vectors), out, clusters=2)
  check_found(images, "", out)


@pytest.mark.long
def test_injected_copies_of_photos_are_found(data_root, tmp_path):
  source = open_source(f"{data_root}/flickr8k/val/00000.tar", captions=())
  images = injected({f"{i:03}": source[i]["image"] for i in range(len(source))})
  shard = write_tar(tmp_path / "photos.tar", [(f"{key}.jpg", x) for key, x in images.items()])
  c = load("photos_frozen").to_dict()
  c["model"]["text"] = dict(name="features", width=4)
  c["data"] = dict(
    source=shard,
    captions=(),
    image_size=96,
    resize="squash",
    tokenizer=dict(name="byte", length=2),
    workers=0,
  )
  folders = embed(c, tmp_path / "stores", sides=["image"], batch_size=32)
  out = f"{tmp_path}/out"
  dedup.dedup(str(folders["image"]), out, eps=0.1)
  check_found(images, "photos.tar/", out)
