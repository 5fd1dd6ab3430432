"""Folders that bigalign exported, loaded again without the library that they are for."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
from helpers import small_models
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store

import bigalign
from bigalign.api import checkpoints, loading
from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.export import check, main, model_card
from bigalign.losses.logit_head import of_losses
from bigalign.suites import main as suites

CLIP = small_models.clip(length=12)  # longer than its tokenizer
SIGLIP = small_models.siglip(mask_padding=True)
SIGLIP_UNMASKED = small_models.siglip()
MPNET = dict(
  image=dict(name="vit", patch=8, positions="sincos2d", **small_models.SIZE),
  text=dict(small_models.MPNET["text"], pool="mean", scan=True),
  text_projector=dict(name="mlp"),
  embed_dim=12,
)
TEXTS = ["a cat", "photo of a dog", "x" * 30]


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Makes a run of random parameters for a model and a loss; nothing is compared by torch."""
  monkeypatch.setattr(check, "possible", lambda kind: False)

  def make(model, loss):
    terms = {loss: {}} if isinstance(loss, str) else loss
    tokenizer = small_models.pieces_for(model, tmp_path)
    if model in (SIGLIP, SIGLIP_UNMASKED):
      tokenizer = dict(name="byte", length=16)
    return small_models.make_run(tmp_path, model, terms, tokenizer, resize="shortest", bias=-3)

  return make


@pytest.fixture
def load_run(monkeypatch):
  """Loads a run of `run`."""

  def make(opened):
    (opened.workdir / "checkpoints").mkdir(exist_ok=True)
    monkeypatch.setattr(loading, "open_run", lambda *_: opened)
    return bigalign.load(opened.workdir)

  return make


@pytest.fixture
def without_samples(monkeypatch):
  """Exports do not compute the logits of the samples, which takes seconds."""
  monkeypatch.setattr(main, "logits", lambda trained, images, texts: np.zeros((4, len(texts))))


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, model, loss",
  [
    ("hf", CLIP, "clip"),
    ("hf", SIGLIP, "siglip"),
    ("open_clip", CLIP, "siglip"),
    ("npz", SIGLIP_UNMASKED, "siglip"),
    ("torch", SIGLIP, "siglip"),
    ("torch", MPNET, "clip"),
    ("hf", CLIP, dict(sogclr=dict(tau=0.05))),
  ],
)
def test_an_exported_folder_is_the_run(kind, model, loss, run, pictures, tmp_path):
  opened = run(model, loss)
  out, _ = main.export(opened, kind, tmp_path / "out")
  loaded = bigalign.load(out)
  images = [np.asarray(x) for x in pictures]
  expected = main.logits(main.trained_model(opened), images, TEXTS)
  assert np.ptp(expected, 0).min() > 1e-2, "inputs are told apart"
  found = loaded.logits(pictures, TEXTS)
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
  probabilities = loaded.classify(pictures, TEXTS)
  rows = probabilities.sum(1)
  if loss == "siglip":
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-expected)), rtol=1e-3)
  else:
    np.testing.assert_allclose(rows, 1, rtol=1e-5)


@pytest.mark.slow
def test_a_folder_with_a_text_tower_is_evaluated(run, tmp_path):
  """By texts alone, and with stored vectors of images; with a suite and without one."""
  out, _ = main.export(run(MPNET, "clip"), "sentence-transformers", tmp_path / "out")
  texts = [
    f"{a} {b}" for a in ("a cat", "photo of a dog", "a") for b in ("dog", "x", "cat a", "of")
  ]
  members = []
  for i in range(6):
    pair = json.dumps(dict(texts=texts[2 * i : 2 * i + 2])).encode()
    members += [(f"{i}.jpg", picture(i)), (f"{i}.json", pair), (f"{i}.cls", b"0")]
  source = write_tar(tmp_path / "val.tar", members)
  zimg = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
  store = write_store(tmp_path / "image", {f"val.tar/{i}": x for i, x in enumerate(zimg)})
  ztxt = bigalign.load(out).embed_texts(texts)
  alike = ztxt @ ztxt.T - 9 * np.eye(12)
  expected = dict(
    texts=np.mean(alike.argmax(1) // 2 == np.arange(12) // 2),
    pairs=np.mean((ztxt @ zimg.T / np.linalg.norm(zimg, axis=1)).argmax(1) == np.arange(12) // 2),
  )
  assert 0 < expected["texts"] < 1 and 0 < expected["pairs"] < 1
  read = dict(source=source, fields=["json.texts"])
  evals = dict(
    texts=dict(type="text_retrieval", **read),
    pairs=dict(type="retrieval", image_store=store, **read),
  )
  found = bigalign.evaluate(out, evals=evals)
  assert found["val/texts/text_to_text_R@1"] == pytest.approx(expected["texts"])
  assert found["val/pairs/text_to_image_R@1"] == pytest.approx(expected["pairs"])
  words = [str(out), f"--retrieval={source}", "--fields=json.texts", f"--image_store={store}"]
  assert suites.main(words)["val/text_to_image_R@1"] == found["val/pairs/text_to_image_R@1"]
  (tmp_path / "classnames.txt").write_text("cat")
  with pytest.raises(ValueError, match=r"'features' takes stored vectors, .*12.*image_store"):
    bigalign.evaluate(out, zeroshot=tmp_path)
  tasks = "".join(
    f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in options.items())
    for name, options in dict(evals, pixels=dict(type="zeroshot", dataset=str(tmp_path))).items()
  )
  (tmp_path / "s.toml").write_text(tasks)
  of_suite = suites.main([str(out), f"--suite={tmp_path}/s.toml", f"--cache={tmp_path}/cache"])
  for result in of_suite[:2]:
    assert {f"val/{result.task}/{k}": x for k, x in result.metrics.items()}.items() <= found.items()
    assert len(result.metrics) > 3
  assert "it cannot embed anything new" in of_suite[2].missing
  with pytest.raises(ValueError, match="has no image tower; a model with two towers is needed"):
    loading.as_run(bigalign.load(out), str(out))


@pytest.mark.slow
def test_a_folder_is_saved_in_another_format(run, pictures, tmp_path):
  out, _ = main.export(run(CLIP, "clip"), "hf", tmp_path / "hf")
  first = bigalign.load(out)
  saved = first.save(tmp_path / "second", "open_clip", license="mit", name="small")
  again = bigalign.load(saved)
  np.testing.assert_allclose(
    again.logits(pictures, TEXTS), first.logits(pictures, TEXTS), rtol=1e-4, atol=1e-4
  )
  card = (saved / "README.md").read_text()
  assert "license: mit" in card and "# small" in card and "from hf" in card
  with pytest.raises(ValueError, match="Formats that can: hf, open_clip, torch"):
    first.save(tmp_path / "third", "npz")
  with pytest.raises(ValueError, match="unknown 'onnx'"):
    first.save(tmp_path / "third", "onnx")


def test_what_is_not_there_or_not_a_run(tmp_path):
  with pytest.raises(FileNotFoundError, match="nope: no such file or folder"):
    bigalign.load(tmp_path / "nope")
  for options in (dict(step=3), dict(ema=True)):
    with pytest.raises(ValueError, match="is not a run"):
      bigalign.load(tmp_path, **options)


def test_the_scale_is_one_in_a_run_and_its_export(
  run, load_run, without_samples, tmp_path, monkeypatch
):
  """Also where no loss learns it; "~" is the home folder."""
  monkeypatch.setenv("HOME", str(tmp_path))
  opened = run(CLIP, dict(sogclr=dict(tau=0.05)))
  model = load_run(opened)
  assert model.head == (20, 0, False)
  z = np.eye(3, 12, dtype=np.float32)
  monkeypatch.setattr(model, "_encode", lambda method, params, x, mask=None: x)
  np.testing.assert_allclose(model.apply(model.params, z, z)["logits"], model.logits(z, z), 1e-6)
  out, _ = main.export(opened, "torch", "~/exported/clip")
  assert out == tmp_path / "exported/clip"
  loaded = bigalign.load("~/exported/clip")
  np.testing.assert_allclose(loaded.head, model.head, rtol=1e-6)
  np.testing.assert_array_equal(loaded.params["t"], model.params["t"])


def test_an_export_says_what_follows_the_cosines(run):
  """A module of PyTorch always has a bias, which says nothing about the loss."""
  opened = run(CLIP, dict(sogclr=dict(tau=0.05), clip={}))
  arrays = {**main.trained_model(opened).arrays, "b": np.float32(0)}
  about = json.loads(json.dumps(model_card.facts(opened, "torch", "", False)))
  expected = of_losses(opened.params, opened.config.loss)
  assert checkpoints._head(arrays, about, "torch") == expected, "of the loss that learns a scale"
  assert checkpoints._head({}, about, "bert") == expected, "a text side holds no scale"
  assert checkpoints._head(arrays, {}, "open_clip").sigmoid, "of another library"


@pytest.mark.parametrize("kind, file", [("npz", "model.npz"), ("torch", "model.safetensors")])
def test_a_file_of_a_folder_stands_for_it(kind, file, tmp_path, monkeypatch):
  (tmp_path / "bigalign.json").write_text(json.dumps({"format": kind}))
  (tmp_path / file).touch()
  read = []

  def stop(path, *_):
    read.append(path)
    raise InterruptedError

  monkeypatch.setattr(checkpoints.weights, "describe", stop)
  monkeypatch.setattr(checkpoints, "_torch_module", stop)
  for path in (tmp_path, tmp_path / file):
    with pytest.raises(InterruptedError):
      bigalign.load(path)
  assert read == [tmp_path / file if kind == "npz" else tmp_path] * 2


def test_a_loaded_run_keeps_its_parameters_once(run, load_run, monkeypatch, tmp_path):
  opened = run(CLIP, "clip")
  again = opened._replace(params={})
  parameter = weakref.ref(next(iter(opened.params.values())))
  model = load_run(opened)
  del opened
  asked, exported = [], []
  monkeypatch.undo()
  gc.collect()
  assert parameter() is None, "the model has its own copy"

  def export(*args, **options):
    exported.append((*args, options))
    return args[2], None

  monkeypatch.setattr(loading, "open_run", lambda folder, step: asked.append(step) or again)
  monkeypatch.setattr(main, "export", export)
  out = tmp_path / "out"
  assert model.save(out, license="mit") == out and asked == [3]
  assert exported == [(again, "hf", out, dict(ema=False, license="mit"))]


def test_a_tokenizer_that_would_not_be_used(tmp_path):
  (tmp_path / "run/checkpoints").mkdir(parents=True)
  (tmp_path / "torch").mkdir()
  (tmp_path / "torch/bigalign.json").write_text('{"format": "torch"}')
  for folder in ("run", "torch"):
    with pytest.raises(ValueError, match=f"tokenizer: .*{folder} .*for files without one"):
      bigalign.load(tmp_path / folder, tokenizer=dict(name="byte", length=8))


def test_underscores_are_those_of_the_tokenizer_that_is_given(run, without_samples, tmp_path):
  """The tokenizer of a released SigLIP drops them; another one is used as it is."""
  out, _ = main.export(run(SIGLIP, "siglip"), "hf", tmp_path / "out")
  (out / "bigalign.json").unlink()
  file = out / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "SiglipTokenizer"}))
  options = dict(name="byte", length=16)
  ids, _ = bigalign.load(out, tokenizer=options).tokenize(["two_dogs"])
  np.testing.assert_array_equal(ids, make_tokenizer(**options).encode_batch(["two_dogs"])[0])
