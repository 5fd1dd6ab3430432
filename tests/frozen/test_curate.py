"""Concept-balanced curation: the choice of each class, from stores larger than memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.shipped import load
from helpers.small_checkpoints import CLIP, clip_keys, folder
from helpers.small_shards import samples, write_tar

from bigalign import train
from bigalign.data.loader.options import resolve_data
from bigalign.data.loader.pairs import Pairs
from bigalign.data.samples.ids import sample_id
from bigalign.data.sources.base import open_source
from bigalign.data.stores import writer
from bigalign.data.stores.reader import Store
from bigalign.frozen import curate
from bigalign.frozen.embed import embed
from bigalign.inputs import open_data
from bigalign.run.metrics import read_metrics
from bigalign.shards import view

WIDTH, PIECE = 6, 40
HEADER = dict(projected=True, width=WIDTH, dtype="float32", weights="w")


def write(path, vectors, samples, *, labels=None, sources=1, **header):
  """A store of these rows, appended from several sources."""
  writer.begin(path, HEADER | header)
  of = samples[:, 1] * sources // (samples[:, 1].max() + 1)
  for number in range(sources):
    rows = np.flatnonzero(of == number)
    count = len(np.unique(samples[rows, 1]))
    held = writer.claim(
      path, str(number), count, f"source {number}", batch_size=count, batches=1, write=True
    )
    writer.write(
      path,
      held.first,
      vectors[rows],
      samples[rows],
      labels=None if labels is None else labels[rows],
    )
  writer.finish(path, captions=labels is None)
  return str(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """Images of five classes, of which one is rare among the captions; one to three captions each."""
  root, rng = tmp_path_factory.mktemp("curated"), np.random.default_rng(0)
  middles = rng.normal(size=(5, WIDTH))
  labels = np.append(rng.integers(0, 5, 300), [-1, -1]).astype(np.int32)
  images = (middles[labels] + 0.3 * rng.normal(size=(302, WIDTH))).astype(np.float32)
  ids = rng.integers(0, 2**63, 302 + 900).astype(np.uint64)
  places = np.arange(302, dtype=np.uint64)
  write(root / "classes", images, np.stack([ids[:302], places], 1), labels=labels, side="image")
  owner = np.repeat(np.arange(900), rng.integers(1, 4, 900))
  about = rng.choice(5, 900, p=[0.4, 0.3, 0.2, 0.09, 0.01])[owner]
  texts = (middles[about] + rng.normal(size=(len(owner), WIDTH))).astype(np.float32)
  write(
    root / "captions",
    texts,
    np.stack([ids[302:][owner], owner.astype(np.uint64)], 1),
    sources=2,
    side="text",
  )
  return dict(classes=str(root / "classes"), captions=str(root / "captions"))


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_hand(classes, captions, *, shots, keep, per_class):
  """{class: positions of its samples in the source}, one caption and one class after the other."""
  classes, captions = Store(classes), Store(captions)
  x, labels = classes.read(np.arange(302)), classes.labels(np.arange(302))
  middles = unit(np.stack([unit(x[labels == k][:shots]).mean(0) for k in range(5)]))
  rows = np.arange(len(captions))
  scores = unit(captions.read(rows)) @ middles.T
  places = captions.samples(rows)[:, 1]
  best = {k: sorted(rows, key=lambda i: (-scores[i, k], i))[:keep] for k in range(5)}
  taken, chosen = set(), {}
  for k in sorted(best, key=lambda k: scores[best[k][-1], k]):
    chosen[k] = []
    for i in best[k]:
      if places[i] not in taken and len(chosen[k]) < per_class:
        taken.add(places[i])
        chosen[k].append(places[i])
  return chosen


@pytest.mark.parametrize(
  "options",
  [
    dict(shots=128, keep=400, per_class=60),
    dict(shots=3, keep=50, per_class=60),
    dict(shots=20, keep=5000, per_class=500),
  ],
)
def test_each_class_chooses_what_it_would_by_hand(stores, options, tmp_path, monkeypatch):
  """In chunks that end anywhere; classes choose more than there is for them, or less."""
  monkeypatch.setattr(curate, "CHUNK", 5 * 37)
  expected = by_hand(**stores, **options)
  manifest = curate.curate(**stores, out=str(tmp_path / "a/list"), **options)
  assert manifest["chosen_per_class"] == [len(expected[k]) for k in range(5)]
  every = np.sort(np.concatenate([x for x in expected.values()])).astype(np.int64)
  first, second = (np.load(tmp_path / f"a/list.{i}.places.npy") for i in (0, 1))
  offset = Store(stores["captions"]).sources[1]["place"]
  np.testing.assert_array_equal(np.concatenate([first, second + offset]), every)
  ids = np.load(tmp_path / "a/list.ids.npy")
  assert len(ids) == len(every) == manifest["chosen"]
  assert json.loads((tmp_path / "a/list.json").read_text()) == manifest
  again = curate.curate(**stores, out=str(tmp_path / "b"), **options)
  monkeypatch.setattr(curate, "CHUNK", 1 << 24)
  assert again == curate.curate(**stores, out=str(tmp_path / "b"), **options) == manifest


def test_only_the_best_are_held():
  """Of 40,000 scores no more than 1.25 x 2 x 50 between two chunks."""
  rng, best = np.random.default_rng(0), curate.Best(2, 50)
  scores = rng.permutation(40_000).astype(np.float32).reshape(-1, 2)
  for start in range(0, len(scores), 100):
    best.add(start, scores[start : start + 100])
    assert best._held <= 1.25 * 2 * 50
  label, row, score = best.table()
  for k in range(2):
    expected = np.argsort(-scores[:, k])[:50]
    np.testing.assert_array_equal(row[label == k], expected)
    np.testing.assert_array_equal(score[label == k], scores[expected, k])


def test_mistakes_are_named(stores, tmp_path):
  with pytest.raises(ValueError, match=r"none of its .* images has a label"):
    ids = np.stack([np.arange(4), np.arange(4)], 1).astype(np.uint64)
    bare = write(
      tmp_path / "bare", np.ones((4, WIDTH), np.float32), ids, side="image", labels=np.full(4, -1)
    )
    curate.curate(bare, stores["captions"], str(tmp_path / "x"))
  with pytest.raises(ValueError, match=r"2 of 3 classes have no image: \[0, 1\]"):
    some = write(
      tmp_path / "some", np.ones((4, WIDTH), np.float32), ids, side="image", labels=np.full(4, 2)
    )
    curate.curate(some, stores["captions"], str(tmp_path / "x"))
  with pytest.raises(ValueError, match=r"before the projector.*--projected"):
    raw = write(
      tmp_path / "raw",
      np.ones((4, WIDTH), np.float32),
      ids,
      side="image",
      labels=np.zeros(4),
      projected=False,
    )
    curate.curate(raw, stores["captions"], str(tmp_path / "x"))
  with pytest.raises(ValueError, match=r"is 3 wide and .* 6"):
    thin = write(
      tmp_path / "thin", np.ones((4, 3), np.float32), ids, side="image", width=3, labels=np.zeros(4)
    )
    curate.curate(thin, stores["captions"], str(tmp_path / "x"))
  with pytest.raises(ValueError, match="captions holds no labels"):
    curate.curate(stores["captions"], stores["captions"], str(tmp_path / "x"))
  np.save(tmp_path / "wrong.npy", np.array([3, 1], np.uint64))
  with pytest.raises(ValueError, match="ascending, without repetition"):
    Pairs(stores["classes"], stores["captions"], least=0.0, keep=str(tmp_path / "wrong.npy"))


@pytest.mark.slow
def test_from_pictures_to_a_run_on_what_was_chosen(tmp_path):
  """A CLIP model embeds labelled images, and captions; the choice is a view, and a list of ids."""
  clip = str(folder(tmp_path / "clip", CLIP, clip_keys()))
  (tmp_path / "words.txt").write_text(" ".join(f"word{i}" for i in range(8)))
  labelled = [(f"{key}.cls", str(int(key[:6]) % 3).encode()) for key, _ in samples(0, 40)[::2]]
  write_tar(tmp_path / "labelled.tar", sorted(samples(0, 40) + labelled))
  write_tar(tmp_path / "captioned.tar", samples(40, 60))
  c = load("tiny").to_dict() | dict(
    total_steps=4,
    batch_size=8,
    log_every=1,
    checkpoint_every=0,
    ema=0.0,
    frozen="_tower/",
    writer=dict(tensorboard=False),
    loss=dict(clip={}),
    evals={},
    model=dict(init=clip, image=dict(dtype="float32"), text=dict(dtype="float32")),
  )
  tokenizer = dict(name="words", vocabulary=str(tmp_path / "words.txt"), length=6)
  data = dict(image_size=16, tokenizer=tokenizer, workers=0)
  for name in ("labelled", "captioned"):
    config = c | dict(data=dict(source=str(tmp_path / f"{name}.tar"), **data))
    embed(config, tmp_path / name, projected=True, batch_size=8)
  image = Store(tmp_path / "labelled/image")
  np.testing.assert_allclose(np.linalg.norm(image.read(np.arange(40)), axis=1), 1, atol=1e-3)
  np.testing.assert_array_equal(image.labels(np.arange(40)), np.arange(40) % 3)
  manifest = curate.main(
    [
      "--classes",
      str(tmp_path / "labelled/image"),
      "--captions",
      str(tmp_path / "captioned/text"),
      "--out",
      str(tmp_path / "list"),
      "--per_class",
      "7",
    ]
  )
  assert manifest["chosen_per_class"] == [7, 7, 7]
  view.main(
    [
      str(tmp_path / "captioned.tar"),
      "--ids",
      str(tmp_path / "list.0.places.npy"),
      "--out",
      str(tmp_path / "view"),
    ]
  )
  source = open_data(
    resolve_data(dict(source=str(tmp_path / "captioned.tar"), view=str(tmp_path / "view"), **data))
  ).source
  ids = np.load(tmp_path / "list.ids.npy")
  every = open_source(str(tmp_path / "captioned.tar"))
  assert {sample_id(source[i]["key"]) for i in range(len(source))} == {*ids.tolist()}
  assert len(source) == 21 < len(every)
  # Towers alone, and the same list of ids.
  embed(config, tmp_path / "towers", batch_size=8)
  stores = dict(
    image=str(tmp_path / "towers/image"),
    text=str(tmp_path / "towers/text"),
    keep=str(tmp_path / "list.ids.npy"),
  )
  pairs = Pairs(**stores)
  assert len(pairs) == 21
  np.testing.assert_array_equal(np.sort(pairs.image.samples(pairs.rows(np.arange(21)))[:, 0]), ids)
  config["data"]["stores"] = stores
  train.train(config, tmp_path / "run")
  losses = [row["train/loss"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
  assert len(losses) == 4 and np.isfinite(losses).all()
