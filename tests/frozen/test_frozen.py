"""Frozen pairs, the whole way: embedded once, trained from stores, evaluated from pixels."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from helpers.shipped import ROOT, load
from helpers.small_checkpoints import CLIP, clip_keys, folder
from helpers.small_shards import samples, write_tar
from helpers.small_stores import write_store

from bigalign import evaluate, train
from bigalign.data.files.storage import locked
from bigalign.data.image.decode import decode
from bigalign.data.loader.options import resolve_data
from bigalign.data.loader.pairs import Pairs, pair_batches
from bigalign.data.samples.ids import sample_id
from bigalign.data.sources.base import open_source
from bigalign.data.stores import writer
from bigalign.data.stores.reader import Store
from bigalign.frozen import compare
from bigalign.frozen import embed as program
from bigalign.frozen.embed import embed, source_fingerprint
from bigalign.frozen.towers import check_stores
from bigalign.inputs import open_data
from bigalign.run.metrics import read_metrics

FLOAT32 = dict(dtype="float32")
COUNT = 70


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with a small CLIP, two shards of samples and a vocabulary; no test changes them."""
  made = tmp_path_factory.mktemp("root")
  folder(made / "clip", CLIP, clip_keys())
  write_tar(made / "0.tar", samples(0, 40))
  write_tar(made / "1.tar", samples(40, COUNT - 40))
  (made / "words.txt").write_text(" ".join(f"word{i}" for i in range(8)))
  return made


def two_towers(root):
  """The config of the small CLIP's towers on the two shards."""
  c = load("tiny").to_dict() | dict(
    total_steps=6,
    batch_size=16,
    log_every=1,
    checkpoint_every=0,
    ema=0.0,
    frozen="_tower/",
    writer=dict(tensorboard=False),
    loss=dict(clip=dict(weight=1.0)),
    evals={},
    model=towers(root / "clip"),
  )
  tokenizer = dict(name="words", vocabulary=str(root / "words.txt"), length=6)
  c["data"] = dict(source=f"{root}/{{0..1}}.tar", image_size=16, tokenizer=tokenizer, workers=0)
  return c


def towers(checkpoint):
  """config.model of the two towers of a checkpoint."""
  tower = dict(init=str(checkpoint), **FLOAT32)
  return dict(image=dict(tower), text=dict(tower), embed_dim=4)


@pytest.fixture
def config(root):
  return two_towers(root)


@pytest.fixture(scope="module")
def embedded(root):
  """What one call of `embed` made of the whole config, as {side: folder}; no test changes it."""
  return embed(two_towers(root), root / "stores", batch_size=8)


@pytest.fixture
def stores(embedded, tmp_path):
  """A copy of it, to change."""
  return {
    side: shutil.copytree(path, tmp_path / "stores" / side) for side, path in embedded.items()
  }


def with_stores(config, folders, **changes):
  data = config["data"] | dict(stores={side: str(path) for side, path in folders.items()})
  return config | dict(data=data | changes)


@pytest.mark.slow
def test_a_run_from_stores_is_the_run_of_the_towers(config, tmp_path):
  """The vectors that projectors get, and what the run is worth from pixels."""
  folders = embed(config, tmp_path / "stores", batch_size=8, dtype="float32")
  image, text = (Store(folders[side]) for side in ("image", "text"))
  assert len(image) == len(text) == COUNT and image.ids == text.ids
  source = config["data"]["source"]
  config["evals"] = dict(val=dict(type="retrieval", source=source, captions=1))
  state = train.train(with_stores(config, folders), tmp_path / "run")
  rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
  assert len(rows) == 6 and rows[-1]["train/loss"] < rows[0]["train/loss"]
  run = evaluate.open_run(tmp_path / "run")
  opened = open_source(source)
  some = [opened[i] for i in (0, 5, 38, 39, 40, 41, 60, 69)]  # one for each device
  stored = image.read(image.find(np.array([sample_id(x["key"]) for x in some], np.uint64))[0])
  reading = run.config.data  # with the resize of the checkpoint; the config sets none
  assert reading.resize == "shortest"
  pixels = np.stack([reading.evaluation_view(decode(x["image"])) for x in some])
  with jax.set_mesh(run.mesh):
    np.testing.assert_allclose(
      run.embed["embed_image"](run.params, stored),
      run.embed["embed_image"](run.params, pixels),
      atol=1e-6,
    )
  assert any(name.startswith("model/image_projector") for name in state.trainable)
  found = evaluate.evaluate(run, config["evals"])
  assert found["val/num_samples"] == COUNT


@pytest.mark.slow
def test_embedding_goes_on_and_appends(config, embedded, tmp_path, monkeypatch):
  out = tmp_path / "stores"
  begun = []
  write = writer.write

  def stop_at(folder, piece, *args, **options):
    if piece == 1 and folder.name == "text":
      raise KeyboardInterrupt
    begun.append((folder.name, piece))
    return write(folder, piece, *args, **options)

  monkeypatch.setattr(writer, "write", stop_at)
  with pytest.raises(KeyboardInterrupt):
    embed(config, out, batch_size=8)
  assert begun == [("image", 0), ("text", 0), ("image", 1)]
  with pytest.raises(FileNotFoundError, match="run the same `bigalign embed` again"):
    Store(out / "image")
  monkeypatch.setattr(writer, "write", write)
  folders = embed(config, out, batch_size=8)
  before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
  for side in folders:
    a, b = Store(embedded[side]), Store(folders[side])
    every = np.arange(len(a))
    np.testing.assert_array_equal(a.read(every), b.read(every))
    np.testing.assert_array_equal(a.samples(every), b.samples(every))
  embed(config, out, batch_size=8)
  assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
  write_tar(tmp_path / "2.tar", samples(COUNT, 10))
  config["data"] |= dict(source=f"{tmp_path}/2.tar")
  embed(config, out, batch_size=8)
  assert len(Store(folders["text"])) == COUNT + 10
  assert [x["samples"] for x in json.loads((out / "text/sources.json").read_text())] == [70, 10]


def test_the_program_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
  made = {str(tmp_path / "image"): dict(rows=1200, width=4, left_out={"undecodable": 3})}
  values = dict.fromkeys(("coordinator", "num_processes", "process_id", "verify", "dtype"))
  values |= dict(config=load("tiny"), out=str(tmp_path), towers=["image"], batch_size=8)
  values |= dict(projected=False, tokens=False, json=str(tmp_path / "summary.json"))
  monkeypatch.setattr(
    program, "flags", types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values))
  )
  monkeypatch.setattr(program, "embed", lambda *args, **options: {})
  monkeypatch.setattr(program, "summary", lambda folders: made)
  program.main(["bigalign embed"])
  assert json.loads((tmp_path / "summary.json").read_text()) == made
  row = capsys.readouterr().out.splitlines()[3]
  assert row.split() == [*made, "1,200", "4", "undecodable", "3"]


@pytest.mark.slow
def test_one_side_after_the_other(config, tmp_path):
  out = tmp_path / "stores"
  embed(config, out, sides=["image"], batch_size=8)
  before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
  embed(config, out, batch_size=8)
  assert all(path.stat().st_mtime_ns == when for path, when in before.items())
  assert Store(out / "image").ids == Store(out / "text").ids
  with pytest.raises(ValueError, match=r"--towers: unknown 'img'\. Did you mean 'image'"):
    embed(config, out, sides=["img"])


@pytest.mark.slow
def test_other_captions_are_no_more_of_the_same(config, stores, tmp_path):
  config["data"] |= dict(captions=("txt",))
  with pytest.raises(ValueError, match=r"70 rows have the id of another sample.*delete the folder"):
    embed(config, tmp_path / "stores", batch_size=8)
  config["data"] |= dict(captions=(("txt", 1), ("cls", 2)))
  with pytest.raises(ValueError, match="Embed each field into a store of its own"):
    embed(config, tmp_path / "other", batch_size=8)


@pytest.mark.slow
def test_what_cannot_be_used_is_left_out_and_counted(config, tmp_path):
  bad = {"000003.jpg": b"<html>", "000007.txt": b""}
  write_tar(tmp_path / "bad.tar", [(name, bad.get(name, x)) for name, x in samples(0, 20)])
  config["data"] |= dict(source=f"{tmp_path}/bad.tar")
  folders = embed(config, tmp_path / "stores", batch_size=8)
  image, text = (Store(folders[side]) for side in ("image", "text"))
  assert (len(image), len(text)) == (19, 18)
  assert sum(image.left_out.values()) == 1 and image.left_out.keys() == text.left_out.keys()
  alone = Store(embed(config, tmp_path / "texts", sides=["text"], batch_size=8)["text"])
  assert len(alone) == 19 and not alone.left_out, "no picture is decoded for it"
  ids = text.samples(np.arange(18))[:, 0]
  np.testing.assert_array_equal(alone.read(alone.find(ids)[0]), text.read(np.arange(18)))
  config["batch_size"] = 8
  with pytest.raises(ValueError, match=r"18 of the 19 images .* have captions"):
    train.train(with_stores(config, folders), tmp_path / "run")


@pytest.mark.slow
def test_vectors_beyond_the_dtype_are_left_out(config, tmp_path):
  arrays = clip_keys()
  arrays["text_model.final_layer_norm.bias"] += 1e5
  config["model"] = towers(folder(tmp_path / "clip", CLIP, arrays))
  with pytest.raises(ValueError, match=r"no sample has a vector; left out: .*'not_finite': 70"):
    embed(config, tmp_path / "half", sides=["text"], batch_size=8)
  found = embed(config, tmp_path / "whole", sides=["text"], batch_size=8, dtype="bfloat16")
  assert len(Store(found["text"])) == COUNT


@pytest.mark.slow
@pytest.mark.parametrize(
  "change, message",
  [
    (dict(data=dict(image_size=32)), r"image_size: 16 there, 32 here"),
    (dict(data=dict(resize="squash")), r"resize: 'shortest' there, 'squash' here"),
    (dict(tokenizer=dict(length=5)), r"tokenizer: '\w+' there, '\w+' here"),
    (dict(weights=True), r"weights: '\w+' there, '\w+' here"),
    (dict(frozen="text_tower"), r"arrays of towers would learn nothing .*config\.frozen='_tower/'"),
    (dict(loss=dict(sparc={}), text=dict(name="features", width=12)), "config.loss reads tokens"),
  ],
)
def test_stores_of_other_towers_are_refused(config, stores, tmp_path, change, message):
  change = dict(change)
  config["data"] |= change.pop("data", {})
  config["data"]["tokenizer"] |= change.pop("tokenizer", {})
  config["model"] |= {k: change.pop(k) for k in ["text"] if k in change}
  if change.pop("weights", False):
    config["model"] = towers(folder(tmp_path / "clip", CLIP, clip_keys(seed=1)))
  with pytest.raises(ValueError, match=message):
    train.train(with_stores(config | change, stores), tmp_path / "run")
  if "there" in message:
    with pytest.raises(ValueError, match=message):
      embed(config, tmp_path / "stores", batch_size=8)


@pytest.mark.slow
def test_two_programs_do_not_embed_into_one_folder(config, stores, tmp_path):
  with locked(stores["text"], "x"), pytest.raises(BlockingIOError, match="another bigalign embed"):
    embed(config, tmp_path / "stores", batch_size=8)
  embed(config, tmp_path / "stores", batch_size=8)


@pytest.mark.slow
def test_towers_that_nobody_trained_are_not_embedded(config, tmp_path):
  config["model"]["image"] = dict(name="vit", patch=8, width=8, depth=1, heads=2, **FLOAT32)
  with pytest.raises(ValueError, match=r"config\.model\.image: \d+ of its \d+ arrays come from no"):
    embed(config, tmp_path / "stores")
  assert set(embed(config, tmp_path / "stores", sides=["text"])) == {"text"}


@pytest.mark.slow
def test_vectors_that_nobody_here_can_make(config, embedded, tmp_path):
  """The text side is a store alone: its tower is a place to put vectors."""
  config["model"]["text"] = dict(name="features", width=8)
  train.train(with_stores(config, embedded), tmp_path / "run")
  assert len(read_metrics(tmp_path / "run")) == 6
  config["model"]["text"]["width"] = 9
  with pytest.raises(ValueError, match="width: 8 there, 9 here"):
    train.train(with_stores(config, embedded), tmp_path / "other")


@pytest.mark.slow
def test_stages_of_a_run_from_stores_have_batches_of_their_own(config, embedded, tmp_path):
  """And several texts of each image."""
  c = with_stores(config, embedded, texts=dict(count=2)) | dict(total_steps=4)
  c["loss"] = dict(clip=dict(weight=1.0, texts="uniform"))
  train.train(c | dict(stages=[dict(until=2, batch_size=32)]), tmp_path / "run")
  rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
  assert [row["train/samples_seen"] for row in rows] == [32, 64, 80, 96]
  with pytest.raises(ValueError, match=r"stages\[0\].data.image_size has no effect, because"):
    train.train(c | dict(stages=[dict(until=2, data=dict(image_size=8))]), tmp_path / "other")


@pytest.mark.slow
def test_sail_from_two_stores_of_texts(config, tmp_path):
  """As configs/sail_*.py say, but for the towers' sizes, the batch and the number of steps."""
  shipped, towers = load("sail_dinov2l_nv2").to_dict(), config["model"]
  config |= {k: shipped[k] for k in ("loss", "optimizer", "logits", "frozen")}
  towers["image"]["pool"] = "cls+mean"
  folders = embed(config, tmp_path / "stores", batch_size=8)
  assert Store(folders["image"]).width == 2 * 12
  config["model"] = shipped["model"] | dict(
    image=towers["image"], text=dict(name="features", width=8), embed_dim=4
  )
  train.train(with_stores(config, folders | dict(second=folders["text"])), tmp_path / "run")
  assert len(read_metrics(tmp_path / "run")) == 6
  for change, message in (
    (dict(view="some"), r"config\.data\.view has no effect"),
    (dict(augment=dict(flip=0.5)), r"config\.data\.augment has no effect"),
  ):
    with pytest.raises(ValueError, match=message):
      train.train(with_stores(config, folders, **change), tmp_path / "other")


@pytest.mark.slow
def test_two_processes_embed_what_one_embeds(config, embedded, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "config.py").write_text(
    "import json, pathlib\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
    "  here = pathlib.Path(__file__).with_name('config.json')\n"
    "  return ConfigDict(json.loads(here.read_text()), convert_dict=True)\n"
  )
  program = [sys.executable, "-m", "bigalign", "embed"]
  subprocess.run(
    [
      ROOT / "launch/local.sh",
      "-n",
      "2",
      "-d",
      "4",
      "--",
      *program,
      "--batch_size=8",
      f"--config={tmp_path}/config.py",
      f"--out={tmp_path}/stores",
    ],
    check=True,
    timeout=300,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
  )
  for side, path in embedded.items():
    one, two = Store(path), Store(tmp_path / "stores" / side)
    assert one.ids == two.ids and not list(two.verify())
    ids = one.samples(np.arange(len(one)))[:, 0]
    np.testing.assert_allclose(
      one.read(one.find(ids)[0]).astype(float), two.read(two.find(ids)[0]).astype(float), rtol=2e-3
    )


@pytest.mark.parametrize(
  "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)]
)
def test_embed_survives_kills(config, embedded, tmp_path, monkeypatch, kills):
  """The program itself, killed once a piece more is there, or at any moment; then whole."""
  (tmp_path / "config.json").write_text(json.dumps(config))
  script = (
    "import json, sys, time; from bigalign.frozen import embed;"
    " embed.BATCHES = 1; piece = embed._piece;"
    " embed._piece = lambda *x: (time.sleep(0.1), piece(*x))[1];"  # so that a kill costs one or two
    " embed.embed(json.load(open(sys.argv[1])), sys.argv[2], batch_size=2)"
  )
  out = tmp_path / "stores"
  command = [sys.executable, "-c", script, str(tmp_path / "config.json"), str(out)]
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")  # 35 pieces of two samples
  draws, unfinished, start = random.Random(1), 0, 120.0
  for kill in range(kills):
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
      pieces = len(writer.pieces(out / "image")) if out.exists() else 0
      begin = time.monotonic()
      end = begin + (120 if kill % 2 == 0 else draws.uniform(0, start))
      while time.monotonic() < end and process.poll() is None:
        if kill % 2 == 0 and out.exists() and len(writer.pieces(out / "image")) > pieces:
          start = min(start, time.monotonic() - begin)
          break
        time.sleep(0.01)
      time.sleep(draws.uniform(0, 0.05))
      unfinished += process.poll() is None
      process.send_signal(signal.SIGKILL)
  assert unfinished > kills / 2
  subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
  assert len(Store(out / "image")) == len(Store(out / "text")) == COUNT
  assert not list(Store(out / "image").verify()) and not list(Store(out / "text").verify())
  rows = np.arange(COUNT)
  for side, path in embedded.items():
    one, two = Store(path), Store(out / side)
    np.testing.assert_array_equal(one.samples(rows), two.samples(rows))
    np.testing.assert_allclose(
      one.read(rows).astype(float), two.read(rows).astype(float), rtol=2e-3, atol=1e-4
    )


def losses(workdir):
  return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["image", "text"])
def test_one_side_may_be_stored_while_the_other_is_read(config, tmp_path, side):
  """The run is that of a frozen tower in the loop."""
  config["frozen"] = f"{side}_tower/"
  folders = embed(config, tmp_path / "stores", sides=[side], batch_size=8, dtype="float32")
  whole = config["data"] | (dict(augment=dict(crop="evaluation")) if side == "image" else {})
  train.train(config | dict(data=whole), tmp_path / "loop")
  state = train.train(with_stores(config, folders), tmp_path / "stored")
  np.testing.assert_allclose(losses(tmp_path / "loop"), losses(tmp_path / "stored"), rtol=1e-5)
  other = {"image": "text", "text": "image"}[side]
  assert any(path.startswith(f"model/{other}_tower/") for path in state.trainable)
  digests = {
    open_data(resolve_data(c["data"])).fingerprint for c in (config, with_stores(config, folders))
  }
  assert len(digests) == 2  # a run does not go on without the store


def facets(config, folder, count):
  """A store of `count` vectors of each sample: its number, that of the vector, zeros."""
  opened = open_source(config["data"]["source"])
  ids = np.array([sample_id(opened[i]["key"]) for i in range(COUNT)], np.uint64)
  writer.begin(folder, dict(side="text", dtype="float32", width=5))
  writer.claim(folder, folder.name, COUNT, folder.name, batch_size=COUNT, batches=1, write=True)
  rows = np.repeat(np.stack([ids, np.arange(COUNT, dtype=np.uint64)], 1), count, 0)
  vectors = np.zeros((COUNT * count, 5), np.float32)
  vectors[:, 0], vectors[:, 1] = rows[:, 1], np.tile(np.arange(count), COUNT)
  writer.write(folder, 0, vectors, rows)
  writer.finish(folder, captions=True)
  return str(folder)


def test_facets_of_a_caption_are_drawn_from_their_stores(config, tmp_path):
  """Several stored vectors of each image, and a second one of another kind."""
  first, other = (facets(config, tmp_path / name, n) for name, n in (("first", 3), ("other", 1)))
  for second in (other, first):
    data = config["data"] | dict(stores=dict(text=first, second=second))
    inputs = open_data(resolve_data(data))
    with contextlib.closing(
      inputs.batches(
        rejected_log="", batch_size=COUNT, rows=range(COUNT), seed=0, start=0, stop=COUNT
      )
    ) as batches:
      (batch,) = batches
    assert batch["image"].shape == (COUNT, 16, 16, 3) and batch["text_mask"].shape == (COUNT, 1)
    for name in ("text", "text_second"):
      np.testing.assert_array_equal(batch[name][:, 0], batch["image_id"][:, 1])
    drawn, again = (batch[name][:, 1] for name in ("text", "text_second"))
    assert set(drawn) == {0, 1, 2} and set(again) == ({0} if second == other else {0, 1, 2})
    np.testing.assert_array_equal(batch["text_id"][:, 1] % 8, drawn)
    assert second == other or (drawn != again).all()


@pytest.mark.slow
def test_flame_learns_images_from_stored_facets(config, tmp_path):
  """configs/flame_b16.py, but for the sizes, the source and the number of steps."""
  shipped = load("flame_b16").to_dict()
  shipped["data"] |= dict(
    source=config["data"]["source"],
    image_size=16,
    workers=0,
    stores=dict(text=facets(config, tmp_path / "facets", 3)),
  )
  shipped["model"] |= dict(
    image=shipped["model"]["image"] | dict(patch=8, width=16, depth=1, heads=2),
    text=dict(name="features", width=5),
    embed_dim=5,
  )
  shipped["optimizer"]["warmup"] = 0
  shipped |= {k: config[k] for k in ("total_steps", "batch_size", "log_every", "writer")}
  val = dict(type="retrieval", source=config["data"]["source"], text_store=str(tmp_path / "facets"))
  state = train.train(shipped | dict(evals=dict(val=val)), tmp_path / "run")
  assert len(losses(tmp_path / "run")) == 6 and not state.frozen
  measured = read_metrics(tmp_path / "run")[-1]
  assert measured["val/num_captions"] == 3 * COUNT
  assert evaluate.evaluate(evaluate.open_run(tmp_path / "run")) == {
    name: x for name, x in measured.items() if name.startswith("val/")
  }


def test_labels_of_stored_images_reach_the_losses_that_read_them(tmp_path):
  images = {f"{i}": np.full(3, float(i)) for i in range(8)}
  texts = {key: x[None] for key, x in images.items()}
  kinds = {key: int(key) % 3 - 1 for key in images}
  image = write_store(tmp_path / "image", images, labels=kinds)
  bare = write_store(tmp_path / "bare", images)
  text = write_store(tmp_path / "text", texts)
  tower = types.SimpleNamespace(options=types.SimpleNamespace(token_width=3))
  program = types.SimpleNamespace(
    loss=types.SimpleNamespace(needs={"labels"}),
    model=types.SimpleNamespace(image_tower=tower, text_tower=tower),
  )
  state = types.SimpleNamespace(trainable={}, frozen={})
  for store in (image, bare):
    source = Pairs(store, text)
    data = resolve_data(dict(image_size=1, tokenizer=dict(name="byte", length=2)))
    with contextlib.closing(
      pair_batches(source, data, batch_size=8, rows=range(8), seed=0, stop=8)
    ) as batches:
      (batch,) = batches
    expected = batch["image"][:, 0] % 3 - 1 if store == image else np.full(8, -1)
    np.testing.assert_array_equal(batch["label"], expected)
    refused = contextlib.nullcontext() if store == image else pytest.raises(ValueError)
    with refused as found:
      check_stores(source.sides, None, program, state)
  assert str(found.value) == "config.loss reads labels, which config.data.stores does not hold"


@pytest.mark.slow
def test_samples_that_a_store_lacks_are_rejected(config, root, tmp_path):
  half = config["data"] | dict(source=str(root / "0.tar"))
  folders = embed(config | dict(data=half), tmp_path / "stores", sides=["text"], batch_size=8)
  config["frozen"] = "text_tower/"
  with pytest.raises(ValueError, match=r"1\.tar: sample .* cannot be used \({'no_vector': 29}\)"):
    train.train(with_stores(config, folders), tmp_path / "run")
  changes = dict(stop_at_bad_shard=False, rejects=dict(stop=1.0))
  train.train(with_stores(config, folders, **changes), tmp_path / "all")
  assert read_metrics(tmp_path / "all")[-1]["train/rejected_no_vector"] > 6
  line = json.loads((tmp_path / "all" / "rejected-00000.jsonl").read_text().splitlines()[0])
  assert line["reason"] == "no_vector" and str(folders["text"]) in line["detail"]


@pytest.mark.parametrize(
  "change, message",
  [
    (
      dict(captions=("txt",)),
      r"config\.data\.captions has no effect, because .* read from config\.data\.stores",
    ),
    (dict(stores=dict(text="", second="x")), "take image or text, or text and second"),
    (dict(stores=dict(keep="x")), r"config\.data\.stores.*keep"),
    (dict(source=""), "needs either source or mixture"),
  ],
)
def test_what_stores_of_one_side_cannot_do(config, tmp_path, change, message):
  folders = embed(config, tmp_path / "stores", sides=["text"], batch_size=8)
  stores = dict(text=str(folders["text"])) | change.pop("stores", {})
  with pytest.raises((ValueError, TypeError), match=message):
    open_data(resolve_data(config["data"] | dict(stores=stores) | change))


@pytest.mark.slow
def test_tokens_are_stored_for_projectors_that_read_them(config, tmp_path):
  config["model"] |= dict(
    image_projector=dict(name="patches_and_class", dropout=0.0),
    text_projector=dict(name="tokens", dropout=0.0),
  )
  folders = embed(config, tmp_path / "stores", batch_size=8, dtype="float32", tokens=True)
  image, text = (Store(folders[side]) for side in ("image", "text"))
  assert image.shape == (1 + 16, 12) and text.shape == (1 + 6, 8)
  assert not list(image.verify()) and not list(text.verify())
  whole = config["data"] | dict(augment=dict(crop="evaluation"))
  train.train(config | dict(data=whole), tmp_path / "loop")
  train.train(with_stores(config, folders), tmp_path / "stored")
  np.testing.assert_allclose(losses(tmp_path / "loop"), losses(tmp_path / "stored"), rtol=1e-5)
  with pytest.raises(ValueError, match="image holds tokens, but pooled embeddings are compared"):
    compare.compare(**folders)
  pooled = embed(config, tmp_path / "pooled", batch_size=8)
  with pytest.raises(ValueError, match=r"this projector reads tokens.* embed with --tokens"):
    train.train(with_stores(config, pooled), tmp_path / "none")
  config["model"]["text"] = dict(name="features", width=8, tokens=6)
  train.train(with_stores(config, folders), tmp_path / "place")
  assert len(losses(tmp_path / "place")) == 6
  with pytest.raises(ValueError, match="one vector of all tokens"):
    embed(config, tmp_path / "none", projected=True, tokens=True)


def test_a_moved_dataset_is_the_same_for_a_store(tmp_path):
  """data_dir, root and the path of a view say where files are, and not what they hold."""

  class Source:
    fingerprint = "0"

  def fingerprint(data, **older):
    data = resolve_data(dict(data, image_size=8, tokenizer=dict(name="byte", length=4)))
    return source_fingerprint(Source(), data, **older)

  def part(source, **more):
    return dict(mixture=(dict(name="a", source=source, **more),))

  def table(root, **more):
    return dict(source="0.csv", source_options=dict(root=root, **more))

  for one, moved in (
    (dict(source="tfds:x", source_options=dict(data_dir="/a")), dict(source="tfds:x")),
    (table("/a", label="y"), table("/b", label="y")),
    (part("/a/0.tar", view="/a/v"), part("/b/0.tar", view="/b/v")),
    (part("0.csv", source_options=dict(root="/a")), part("0.csv", source_options=dict(root="/b"))),
  ):
    assert fingerprint(one) == fingerprint(moved)
    assert fingerprint(one, places=True) != fingerprint(moved, places=True)
  assert fingerprint(table("/a", label="x")) != fingerprint(table("/a", label="y"))
  unmoved = part("0.tar", prefix="de: ", source_options=dict(image="png"))
  assert fingerprint(unmoved) == fingerprint(unmoved, places=True)  # stores of older versions
  header = dict(side="image", width=3, dtype="float16")
  writer.begin(tmp_path, header)
  assert writer.fingerprints(tmp_path) == []
  writer.claim(tmp_path, "old", 8, "a", batch_size=8, batches=1, write=True)
  assert writer.fingerprints(tmp_path) == ["old"]
