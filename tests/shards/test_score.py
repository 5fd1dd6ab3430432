"""Scores of the pairs of a source, and the views that are made of them."""

from __future__ import annotations

import io
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import data_options
from helpers.shipped import ROOT, load
from helpers.small_shards import write_tar
from helpers.small_stores import write_store
from PIL import Image

from bigalign import evaluate, sharding, train
from bigalign.data.fields.column_files import ColumnFile, Unfinished
from bigalign.data.sources.base import open_source
from bigalign.data.sources.views import make_view
from bigalign.data.stores.reader import Store
from bigalign.inputs import open_data
from bigalign.run import parsers
from bigalign.shards import score, view

COUNT, SIZE, BATCH = 45, 8, 8
COLOURS = dict(
  red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), white=(255, 255, 255), black=(0, 0, 0)
)


def coloured(name, seed=0):
  """A PNG of noise around a colour."""
  noise = np.random.default_rng(seed).integers(-40, 40, (SIZE, SIZE, 3))
  pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


def shards(path, *, wrong=(), broken=(), silent=(), count=COUNT):
  """Coloured images; the captions of `wrong` ones name another colour."""
  members, names = [], [*COLOURS]
  for i in range(count):
    named = names[(i + 1 + i % 3) % 5] if i in wrong else names[i % 5]
    captions = [] if i in silent else [f"a {named} square", f"all is {named}"][: 1 + i % 2]
    members += [
      (f"{i:04}.png", b"no image" if i in broken else coloured(names[i % 5], i)),
      (f"{i:04}.json", json.dumps(dict(captions=captions, number=i)).encode()),
    ]
  return write_tar(path, members)


DATA = data_options(
  image_size=SIZE, tokenizer=dict(name="byte", length=24), captions=("json.captions",)
)
DRAWS = np.random.default_rng(0)
IMAGE = DRAWS.normal(size=(SIZE * SIZE * 3, 6)).astype(np.float32)
TEXT = DRAWS.normal(size=(259, 6)).astype(np.float32)


def unit(z):
  return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


@jax.jit
def embed_image(params, image):
  return unit((image.reshape(len(image), -1) / np.float32(255) - np.float32(0.5)) @ IMAGE)


@jax.jit
def embed_text(params, ids, mask):
  place = 1 + jnp.arange(ids.shape[1]) / 10
  return unit(jnp.einsum("ble,bl->be", jnp.asarray(TEXT)[ids], mask * place[None]))


def make_run():
  """A model of two matrices."""
  config = types.SimpleNamespace(data=DATA)
  embed = dict(embed_image=embed_image, embed_text=embed_text)
  params = {"loss/clip/t": np.float32(np.log(20.0))}
  return evaluate.Run(
    pathlib.Path("runs/a"), 3, config, {}, sharding.make_mesh(), params, {}, embed
  )


@pytest.fixture
def run():
  return make_run()


def vectors_of(source, known):
  """The embeddings of the images, [N, E], and of the captions of each, [n, E]."""
  views = [DATA.evaluation_view(DATA.decode(source[i]["image"])) for i in known]
  texts = [
    np.asarray(embed_text(None, *DATA.make_tokenizer().encode_batch(source[i]["captions"])))
    for i in known
  ]
  return np.asarray(embed_image(None, np.stack(views)), np.float64), texts


def numbers_of(sims, scale):
  """The scores of a batch from its cosines."""
  own, others = np.diag(sims), np.where(np.eye(len(sims)), -np.inf, sims)
  return dict(
    cosine=own,
    loss=np.log(np.exp(scale * (sims - own[:, None])).sum(1)) / 2
    + np.log(np.exp(scale * (sims - own[None])).sum(0)) / 2,
    margin=own - (others.max(0) + others.max(1)) / 2,
  )


def by_hand(source, what, broken, silent, teacher=None):
  """One batch after the other, the last one from the last BATCH samples.

  teacher: (cosines of all known images and captions, scale).
  """
  known = [i for i in range(COUNT) if i not in (*broken, *silent)]
  zimg, texts = vectors_of(source, known)
  ztxt = np.stack([z.astype(np.float64).mean(0) for z in texts])
  numbers = np.full(COUNT, np.nan)
  for start in [*range(0, COUNT - BATCH, BATCH), COUNT - BATCH]:
    rows = [k for k, i in enumerate(known) if start <= i < start + BATCH]
    found = numbers_of(zimg[rows] @ ztxt[rows].T, 20)
    if teacher:
      cosines, scale = teacher
      other = numbers_of(cosines[np.ix_(rows, rows)], scale)
      found |= dict(teacher_margin=other["margin"], learnability=found["loss"] - other["loss"])
    found = found[what]
    fresh = [k for k in range(len(rows)) if np.isnan(numbers[known[rows[k]]])]
    numbers[[known[rows[k]] for k in fresh]] = found[fresh]
  return numbers


@pytest.mark.parametrize("what", ["cosine", "loss", "margin"])
def test_scores_are_those_of_numpy_and_go_on_after_a_kill(run, tmp_path, what, monkeypatch):
  broken, silent = (3, 20), (5,)
  source = open_source(
    shards(tmp_path / "0.tar", broken=broken, silent=silent), captions=("json.captions",)
  )
  out = str(tmp_path / "made/score")
  monkeypatch.setattr(score, "BATCHES", 2)
  put, pieces = Unfinished.put, []

  def killed_at(self, first, numbers):
    pieces.append(first)
    if len(pieces) == 2:
      raise KeyboardInterrupt
    put(self, first, numbers)

  monkeypatch.setattr(Unfinished, "put", killed_at)
  with pytest.raises(KeyboardInterrupt):
    score.score(run, source, out, what=what, batch_size=BATCH)
  about = score.score(run, source, out, what=what, batch_size=BATCH)
  assert pieces == [0, 16, 16, 32, 40]
  assert about["scored"] == COUNT - 3 and about["scale"] == pytest.approx(20)
  assert not [*tmp_path.glob("made/*.part*")]
  found = ColumnFile(out, source, "here").numbers
  np.testing.assert_allclose(found, by_hand(source, what, broken, silent), atol=1e-5)


@pytest.mark.parametrize("kind", ["stores", "run"])
def test_scores_against_a_teacher_are_those_of_numpy(run, tmp_path, kind):
  """The teacher lacks an image, and one of two captions."""
  source = open_source(
    shards(tmp_path / "0.tar", broken=(3,), silent=(5,)), captions=("json.captions",)
  )
  known = [i for i in range(COUNT) if i not in (3, 5)]
  keys = [source[i]["key"] for i in known]
  zimg, texts = vectors_of(source, known)
  turn = np.random.default_rng(1).normal(size=(6, 4))  # another model, from these vectors
  zimg, texts = zimg @ turn, [z @ turn for z in texts]
  missing = ()
  if kind == "stores":
    rows = dict(zip(keys, texts)) | {source[5]["key"]: np.ones((1, 4))}
    rows[source[9]["key"]] = rows[source[9]["key"]][:1]
    image = {k: z for k, z in zip(keys, zimg) if k != source[7]["key"]}
    image, text = (write_store(tmp_path / k, x) for k, x in (("i", image), ("t", rows)))
    teacher, scale, missing = score.Stored(Store(image), Store(text)), 50.0, (7, 9)
  else:

    def turned(embed):
      return jax.jit(lambda *given: unit(embed(*given) @ turn.astype(np.float32)))

    embed = dict(embed_image=turned(embed_image), embed_text=turned(embed_text))
    teacher, scale = make_run()._replace(embed=embed, params={}), score.SCALE
  zimg = zimg / np.linalg.norm(zimg, axis=1, keepdims=True)
  ztxt = [(z / np.linalg.norm(z, axis=1, keepdims=True)).mean(0) for z in texts]
  kept = [k for k, i in enumerate(known) if i not in missing]
  cosines = (zimg @ np.stack(ztxt).T)[np.ix_(kept, kept)]
  for what in ("teacher_margin", "learnability"):
    given = dict(what=what, batch_size=BATCH, teacher=teacher, teacher_scale=50.0)
    about = score.score(run, source, f"{tmp_path}/{what}", **given)
    assert about["teacher_scale"] == pytest.approx(scale)
    assert about["scored"] == COUNT - 2 - len(missing)
    expected = by_hand(source, what, (3,), (5, *missing), teacher=(cosines, scale))
    np.testing.assert_allclose(np.load(f"{tmp_path}/{what}.npy"), expected, atol=2e-5)


def test_the_program_knows_the_scores():
  words = ["run", "shards", "--out", "x", "--teacher", "a", "b", "--what"]
  for what in score.SCORES:
    assert parsers.score().parse_args([*words, what]).teacher == ["a", "b"]


def test_a_teacher_that_does_not_fit_is_an_error(run, tmp_path):
  source = open_source(shards(tmp_path / "0.tar"), captions=("json.captions",))
  with pytest.raises(ValueError, match=r"--what=learnability compares .* set --teacher=RUN"):
    score.score(run, source, f"{tmp_path}/x", what="learnability", batch_size=BATCH)
  with pytest.raises(ValueError, match=r"--what=cosine reads no teacher; .* teacher_margin or lea"):
    score.score(run, source, f"{tmp_path}/x", batch_size=BATCH, teacher=run)
  key = source[0]["key"]
  one, two = (
    Store(write_store(tmp_path / name, {key: np.ones(shape)}))
    for name, shape in (("i", (3,)), ("t", (1, 4)))
  )
  with pytest.raises(ValueError, match=r"i has width 3, .*t has width 4; .*--projected"):
    given = dict(what="learnability", teacher=score.Stored(one, two))
    score.score(run, source, f"{tmp_path}/x", batch_size=BATCH, **given)


TWO = """
import sys
sys.path.insert(0, sys.argv[1])
from bigalign.run import runtime
runtime.connect()
import test_score as t
source = t.open_source(sys.argv[2], captions=("json.captions",))
t.score.score(t.make_run(), source, sys.argv[3], what="margin", batch_size=t.BATCH)
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run, tmp_path):
  shard = shards(tmp_path / "0.tar", broken=(3,), silent=(5,))
  source = open_source(shard, captions=("json.captions",))
  score.score(run, source, f"{tmp_path}/one", what="margin", batch_size=BATCH)
  (tmp_path / "two.py").write_text(TWO)
  words = ["bash", f"{ROOT}/launch/local.sh", "-n", "2", "-d", "4", "-o", str(tmp_path), "--"]
  words += [sys.executable, f"{tmp_path}/two.py", str(pathlib.Path(__file__).parent)]
  subprocess.run(
    [*words, shard, f"{tmp_path}/two"],
    check=True,
    timeout=300,
    env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
  )
  one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
  np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_view_and_a_run_read_a_column(run, tmp_path):
  """Of a view, a column of the whole source gives the numbers of its samples."""
  shard = shards(tmp_path / "0.tar", silent=(5,))
  source = open_source(shard, captions=("json.captions",))
  score.score(run, source, f"{tmp_path}/score", batch_size=BATCH)
  numbers = np.load(tmp_path / "score.npy")
  words = [shard, "--captions", "json.captions", "--columns", f"score={tmp_path}/score"]
  made = view.main([*words, "--where", "score > 0.1", "--out", f"{tmp_path}/good"])
  assert made["kept"] == (numbers > 0.1).sum() > 5
  inputs = open_data(
    data_options(
      source=shard,
      captions=("json.captions",),
      view=f"{tmp_path}/good",
      image_size=SIZE,
      tokenizer=dict(name="byte", length=4),
      columns=dict(score=dict(file=f"{tmp_path}/score"), number="json.number"),
    )
  )
  with pytest.raises(FileNotFoundError, match=r"--columns score='x': no x\.json; `bigalign score`"):
    view.main([*words[:3], "--columns", "score=x", "--out", "y"])
  (columns,) = inputs.fields
  for i in range(len(inputs.source)):
    read = columns._read("score", columns._columns["score"], i, "")["score"]
    assert read == numbers[int(inputs.source[i]["key"][-4:])]


def test_each_sample_of_a_view_is_drawn_with_its_probability(tmp_path):
  source = open_source(shards(tmp_path / "0.tar"), captions=("json.captions",))
  keep = np.where(np.arange(COUNT) % 3, 0.5, np.nan)
  made, chosen = {}, []
  for seed in range(60):
    make_view(source, f"{tmp_path}/v", columns=dict(p=keep), draw="p", seed=seed)
    made[seed] = np.load(tmp_path / "v.npy")
    chosen.append(np.isin(np.arange(COUNT), made[seed]))
  share = np.mean(chosen, 0)
  assert not share[::3].any()  # without a probability
  drawn = share[np.arange(COUNT) % 3 > 0]
  assert abs(drawn.mean() - 0.5) < 3 * 0.5 / np.sqrt(60 * len(drawn))
  assert (abs(drawn - 0.5) < 5 * 0.5 / np.sqrt(60)).all()
  rule = dict(columns=dict(p=keep), rule="p > 0.1", draw="p", seed=7)
  assert make_view(source, f"{tmp_path}/v", **rule)["left_out"].keys() == {
    "not p > 0.1",
    "not drawn with the probability p",
  }
  np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), made[7])
  with pytest.raises(ValueError, match=r"draw='q' is not one of the given columns \['p'\]"):
    make_view(source, f"{tmp_path}/v", columns=dict(p=keep), draw="q")


def auc(scores, positive):
  """The share of (positive, negative) pairs in the right order."""
  ranks = np.argsort(np.argsort(scores))
  first, others = positive.sum(), (~positive).sum()
  return (ranks[positive].sum() - first * (first - 1) / 2) / (first * others)


@pytest.mark.slow
def test_scores_of_a_trained_run_find_mismatched_captions(tmp_path):
  """Ten per cent of the captions name another colour than their image has."""
  wrong = set(range(0, 240, 10))
  shard = shards(tmp_path / "0.tar", wrong=wrong, count=240)
  c = load("tiny").to_dict() | dict(
    total_steps=40, batch_size=40, checkpoint_every=0, ema=0.0, evals={}, mesh=dict(data=-1)
  )
  c["data"] = dict(
    source=shard,
    captions=("json.captions",),
    image_size=SIZE,
    tokenizer=dict(name="byte", length=24),
    workers=0,
  )
  c["model"]["image"] |= dict(width=32, depth=1, patch=4)
  c["model"]["text"] |= dict(width=32, depth=1)
  c["writer"] = dict(tensorboard=False)
  c["optimizer"] = dict(name="adamw", lr=3e-3, schedule="cosine", warmup=5)
  train.train(c, tmp_path / "run")
  is_wrong = np.isin(np.arange(240), [*wrong])
  for what in ("cosine", "loss", "margin"):
    words = [str(tmp_path / "run"), shard, f"--what={what}", "--batch_size=80"]
    score.main([*words, "--out", str(tmp_path / what)])
    numbers = np.load(tmp_path / f"{what}.npy")
    assert auc(numbers if what == "loss" else -numbers, is_wrong) > 0.9, what
