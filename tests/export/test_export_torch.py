"""Runs trained here, exported, and loaded by transformers and open_clip as their users would."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import test_export_sentence
from helpers import small_models, torchvision_beside_cpu_torch
from helpers.shipped import load
from helpers.small_shards import samples, write_tar
from PIL import Image
from safetensors.numpy import save_file

from bigalign import evaluate, tree
from bigalign.export import check, main
from bigalign.train import train
from bigalign.weights.files import open_tensors

_FOUND = {x: importlib.util.find_spec(x) for x in ("torch", "transformers", "open_clip")}
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(_FOUND.values()),
    reason="torch, transformers or open_clip is not installed: the extra interop",
  ),
]
TOLERANCE = 2e-5  # relative to the largest logit
SIZE = dict(width=32, depth=2, heads=4, mlp_ratio=2.0, scan=True)
TEXTS = ["picture number 3", "A red disc, on the left!", "café", "two words " * 50]


def models(tokenizers):
  """{name: what tiny.py is changed to}."""
  bpe = str(tokenizers / "clip_bpe_simple_vocab_16e6.txt.gz")
  clip = dict(
    small_models.clip(SIZE, vocab_size=49408, length=16, embed_dim=24),
    tokenizer=dict(name="clip", path=bpe, length=16),
    resize="shortest",
    loss=dict(clip=dict(weight=1.0)),
  )
  pieces = str(tokenizers / "maxtext_default_32768.spm.model")
  siglip = dict(
    small_models.siglip(SIZE, vocab_size=32768, length=64),
    tokenizer=dict(name="sentencepiece", path=pieces, length=64, lower=True),
    resize="squash",
    pixels="half",
    loss=dict(siglip=dict(weight=1.0)),
  )
  return dict(clip=clip, siglip=siglip)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """name -> the folder of a run of four steps; trained once."""
  root, made = tmp_path_factory.mktemp("runs"), {}

  def run(name, data_root):
    if name not in made:
      given = models(data_root / "tokenizers")[name]
      c = load("tiny")
      c.total_steps, c.log_every, c.checkpoint_every, c.batch_size = 4, 4, 4, 16
      c.ema = 0.0
      c.optimizer.lr = 0.01
      c.data.source = write_tar(root / f"{name}/train.tar", samples(0, 32))
      c.data.tokenizer, c.data.resize = given.pop("tokenizer"), given.pop("resize")
      c.loss, c.evals, c.writer = given.pop("loss"), {}, dict(tensorboard=False)
      c.model = given
      train(c, root / name / "run")
      made[name] = root / name / "run"
    return made[name]

  return run


@pytest.fixture
def libraries(monkeypatch):
  """One thread, no network, torchvision if only its Python part can be had."""
  import torch

  torchvision_beside_cpu_torch.enable()
  torch.set_num_threads(1)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def plain(data_root, tmp_path):
  """A run of a plain ViT with CLIP's text, by name of its loss; not trained."""
  path = data_root / "tokenizers/clip_bpe_simple_vocab_16e6.txt.gz"
  model = tree.unflatten({**tree.flatten(small_models.PLAIN), "text/vocab_size": 49408})
  return lambda loss: small_models.make_run(
    tmp_path,
    model,
    {loss: dict(weight=1.0)},
    dict(name="clip", path=str(path), length=8),
    resize="shortest",
  )


def ours(run):
  """(pictures, the run's logits of them and TEXTS)."""
  images = main.sample_images()[:3]
  return images, main.logits(main.trained_model(run), images, TEXTS)


def near(found, expected):
  assert found.shape == expected.shape and np.ptp(expected, 1).min() > 1e-3
  assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_transformers_loads_a_run(name, runs, libraries, data_root, tmp_path, capsys):
  """AutoModel with no key too many or too few, AutoProcessor, and the zero-shot pipeline."""
  import torch
  import transformers

  run, out = runs(name, data_root), tmp_path / "hf"
  assert main.main([str(run), "--format=hf", f"--out={out}"]) == 0
  assert main.main(["--check", str(out)]) == 0
  assert "verified. Outputs match the training run" in capsys.readouterr().out
  model, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  processor = transformers.AutoProcessor.from_pretrained(out, backend="pil")
  images, expected = ours(evaluate.open_run(run))
  inputs = processor(
    text=TEXTS,
    images=[Image.fromarray(x) for x in images],
    padding="max_length",
    truncation=True,
    return_tensors="pt",
  )
  with torch.inference_mode():
    near(model(**inputs).logits_per_image.numpy(), expected)

  guess = transformers.pipeline(
    "zero-shot-image-classification", model=str(out), image_processor=processor.image_processor
  )
  found = guess(Image.fromarray(images[0]), candidate_labels=TEXTS[:3], hypothesis_template="{}")
  scores = {x["label"]: x["score"] for x in found}
  logits = expected[0, :3].astype(np.float64)
  scale = 1 / (1 + np.exp(-logits)) if name == "siglip" else np.exp(logits) / np.exp(logits).sum()
  np.testing.assert_allclose([scores[x] for x in TEXTS[:3]], scale, rtol=1e-3)


def test_transformers_loads_a_plain_vit_beside_clip_text(plain, libraries, tmp_path):
  """VisionTextDualEncoderModel."""
  _, found = main.export(plain("clip"), "hf", tmp_path / "hf")
  assert found is not None and found <= TOLERANCE


@pytest.mark.parametrize("name", ["BERT", "ROBERTA", "MPNET"])
def test_transformers_loads_a_vit_beside_a_text_tower_of_berts_kind(name, libraries, tmp_path):
  """With DINOv2 or ViT; positions, distances, padding and pooling are those of its classes."""
  model = getattr(small_models, name)
  run = small_models.make_run(
    tmp_path, model, small_models.CLIP_LOSS, small_models.pieces_for(model, tmp_path)
  )
  out, found = main.export(run, "hf", tmp_path / "hf")
  assert found is not None and found <= TOLERANCE
  config = json.loads((out / "config.json").read_text())
  assert config["text_config"]["model_type"] == name.lower()


@pytest.mark.skipif(
  not importlib.util.find_spec("sentence_transformers"),
  reason="sentence_transformers is not installed: the extra interop",
)
@pytest.mark.parametrize(
  "name, kind", [("mean", "BERT"), ("cls", "ROBERTA"), ("identity", "MPNET")]
)
def test_sentence_transformers_loads_the_text_side(name, kind, libraries, tmp_path):
  """Its own pooling, dense layers and norms, by the folder's own tokenizer."""
  run = test_export_sentence.sentence_run(name, getattr(small_models, kind), tmp_path)
  out, found = main.export(run, "sentence-transformers", tmp_path / "out")
  assert found is not None and found <= TOLERANCE
  tensors = open_tensors(out / "model.safetensors")
  arrays = {key: np.array(tensors.read(key)) for key in tensors}
  arrays["encoder.layer.1.output.LayerNorm.bias"][0] += 0.1
  save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
  assert main.main(["--check", str(out)]) == 1


# Each option of the towers that the module knows, in one of these.
ODD = {
  "mean": (dict(pool="mean", positions="sincos2d"), dict(pool="mean"), "linear", "mlp"),
  "gated": (
    dict(
      pool="cls",
      class_position=True,
      registers=2,
      gated=True,
      activation="silu",
      layer_scale=0.1,
      biases="qvo",
      mlp_bias=False,
    ),
    dict(pool="map", mask_padding=False, activation="gelu"),
    "mlp",
    "linear",
  ),
  "pooler": (
    dict(pool="pooler", pre_norm=True, patch_bias=False),
    dict(pool="argmax", causal=True),
    "linear",
    "identity",
  ),
  "eos": (
    dict(pool="map", registers=1, scan=False),
    dict(pool="eos", scan=False),
    "identity",
    "linear",
  ),
  "aligned": (dict(pool="cls+mean", registers=1), dict(pool="mean"), "residual", "gated"),
  "largest": (dict(pool="max"), dict(pool="mean"), "linear", "linear"),
}


@pytest.mark.parametrize("name", ODD)
def test_the_torch_module_holds_what_others_cannot(name, libraries, tmp_path):
  image, text, *projectors = ODD[name]
  model = dict(
    image=dict(name="vit", patch=8, **{**small_models.SIZE, **image}),
    text=dict(name="text", vocab_size=259, length=16, **{**small_models.SIZE, **text}),
    embed_dim=16,
    **{f"{side}_projector": dict(name=x) for side, x in zip(("image", "text"), projectors)},
  )
  run = small_models.make_run(
    tmp_path, model, small_models.SIGLIP_LOSS, dict(name="byte", length=16), resize="shortest"
  )
  out, found = main.export(run, "torch", tmp_path / "out")
  assert found is not None and found <= TOLERANCE
  with (out / "model.py").open("a") as file:
    file.write("# changed\n")
  with pytest.raises(
    ValueError, match=r"model\.py: differs from the one that this bigalign writes"
  ):
    check.difference(out)


_VIT, _MOBILE = (
  dict(name="vit", patch=8, pool="cls", **small_models.SIZE),
  dict(name="mobilenet_v2"),
)
PAIRS = {
  "patches": (_VIT, small_models.BERT["text"], "patches_and_class", "tokens"),
  "photos": (_MOBILE, small_models.MPNET["text"] | dict(pool="mean"), "residual", "residual"),
  "roberta": (_MOBILE, small_models.ROBERTA["text"] | dict(unit=True), "gated", "tokens"),
  "vectors": (_VIT, dict(name="features", width=12), "linear", "gated"),
  "token_vectors": (_VIT, dict(name="features", width=12, tokens=5), "linear", "tokens"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_torch_module_holds_frozen_pairs(name, libraries, tmp_path):
  image, text, *projectors = PAIRS[name]
  model = dict(
    image=image,
    text=dict(text),
    embed_dim=16,
    **{f"{side}_projector": dict(name=x) for side, x in zip(("image", "text"), projectors)},
  )
  run = small_models.make_run(
    tmp_path,
    model,
    small_models.SIGLIP_LOSS,
    small_models.pieces_for(model, tmp_path),
    scale=0.3 if image is _VIT else 0.1,  # 52 layers of larger ones only magnify rounding
  )
  out, found = main.export(run, "torch", tmp_path / "out")
  assert found is not None and found <= TOLERANCE
  assert (out / "tokenizer.json").exists() == ("vectors" not in name)


@pytest.mark.parametrize("name", ["clip", "plain"])
def test_open_clip_loads_a_run(name, runs, plain, libraries, data_root, tmp_path):
  """With the bias of a sigmoid loss, without the norm before the blocks, by its own tokenizer."""
  import open_clip
  import torch

  run = plain("siglip") if name == "plain" else evaluate.open_run(runs(name, data_root))
  out, _ = main.export(run, "open_clip", tmp_path / "open_clip")
  model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
  tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
  images, expected = ours(run)
  pixels = torch.stack([preprocess(Image.fromarray(x)) for x in images])
  with torch.inference_mode():
    near(model.eval().get_logits(pixels, tokenizer(TEXTS))[0].numpy(), expected)


CODE = {
  "hf": (small_models.CLIP, small_models.CLIP_LOSS),
  "open_clip": (small_models.PLAIN, small_models.SIGLIP_LOSS),
  "torch": (small_models.PLAIN, small_models.CLIP_LOSS),
  "sentence-transformers": (None, None),
}


@pytest.mark.parametrize("kind", CODE)
def test_the_code_of_the_model_card_runs(kind, libraries, tmp_path, monkeypatch):
  """As it is printed, on one image; it gives the run's logits or embeddings."""
  import torch

  model, loss = CODE[kind]
  if model is None:
    run = test_export_sentence.sentence_run("mean", small_models.BERT, tmp_path)
  else:
    run = small_models.make_run(
      tmp_path, model, loss, small_models.word_pieces(tmp_path), resize="shortest"
    )
  out, _ = main.export(run, kind, tmp_path / "out")
  image = main.sample_images()[1]
  Image.fromarray(image).save(tmp_path / "x.png")
  code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
  code = code.replace("DIR", str(out)).replace("x.jpg", str(tmp_path / "x.png"))
  monkeypatch.setattr(sys, "path", [*sys.path])
  names: dict = {}
  with torch.inference_mode():
    exec(code, names)
  sys.modules.pop("model", None)
  trained = main.trained_model(run)
  if model is None:
    np.testing.assert_allclose(
      names["embeddings"], main.embeddings(trained, ["a cat", "a dog"]), atol=TOLERANCE
    )
    return
  texts = ["a cat"] if kind == "open_clip" else ["a cat", "a dog"]
  expected = main.logits(trained, [image], texts)
  found = np.asarray(names["logits"])
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


def test_the_check_sees_what_was_changed(runs, libraries, data_root, tmp_path):
  """A weight; the mask that tokenizers make by default, under which SigLIP differs."""
  out = tmp_path / "hf"
  assert main.main([str(runs("siglip", data_root)), "--format=hf", f"--out={out}"]) == 0
  kept = tmp_path / "kept"
  shutil.copytree(out, kept)
  about = json.loads((out / "tokenizer_config.json").read_text())
  about["model_input_names"] = ["input_ids", "attention_mask"]
  (out / "tokenizer_config.json").write_text(json.dumps(about))
  assert main.main(["--check", str(out)]) == 1
  tensors = open_tensors(kept)
  arrays = {key: np.array(tensors.read(key)) for key in tensors}
  arrays["text_model.head.bias"][0] += 0.01
  save_file(arrays, kept / "model.safetensors", metadata={"format": "pt"})
  assert main.main(["--check", str(kept)]) == 1
