"""Heads in exported folders, when they are asked for."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import torchvision_beside_cpu_torch
from helpers.small_models import CLIP, CLIP_LOSS, PLAIN, SIGLIP, SIGLIP_LOSS, make_run, pieces_for
from safetensors.numpy import load_file

import bigalign
from bigalign import tree, weights
from bigalign.export import check, main
from bigalign.losses import make_loss
from bigalign.losses.heads.base import Read
from bigalign.program import sizes_of_towers

CAPTION = CLIP_LOSS | dict(caption=dict(depth=1, heads=2))
COCA_LOSS = CLIP_LOSS | dict(coca=dict(depth=2, heads=2))
# open_clip has no option for an unshifted mask, and the decoder is as wide as the embeddings.
COCA = dict(
  image=dict(
    PLAIN["image"],
    **dict(class_token=True, class_position=True, patch_bias=False, pre_norm=True, epsilon=1e-5),
    **dict(pool="queries", queries=4, query_heads=2),
  ),
  text=dict(PLAIN["text"], pool="class", shifted_mask=True),
  embed_dim=16,
  pixels="clip",
)


def _features(run, images, texts):
  """What the towers of a run make of images and token ids."""
  variables = {"params": tree.unflatten(tree.subtree(run.params, "model/"))}
  model = main.trained_model(run).model
  return model.apply(variables, images, texts, texts != 0)


def _with_head(tmp_path, model, loss, name, **more):
  """A run with random parameters of a head, which are not small."""
  run = make_run(tmp_path, model, loss, pieces_for(model, tmp_path), **more)
  head = make_loss(loss).terms[name][1].head
  texts = jnp.ones((1, 8), jnp.int32)
  feats = _features(run, jnp.zeros((1, 16, 16, 3), jnp.uint8), texts)
  read = Read(
    dict(text=texts, text_mask=texts > 0), feats, None, None, None, sizes_of_towers(run.config)
  )
  shapes = jax.eval_shape(lambda key: head.init(key, read), jax.random.key(0))
  rng = np.random.default_rng(1)
  for path, x in tree.flatten(shapes, f"heads/{name}/").items():
    noise = rng.standard_normal(x.shape).astype(np.float32)
    run.params[path] = 0.3 * noise + path.endswith("/scale")
  return run, head, read


@pytest.fixture
def no_torch(monkeypatch):
  monkeypatch.setattr(check, "missing", lambda kind: ["torch"])


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param("torch", marks=pytest.mark.slow),
    pytest.param("hf", marks=pytest.mark.slow),
    "open_clip",
  ],
)
def test_heads_are_beside_the_weights_if_asked(kind, tmp_path, no_torch):
  run, _, _ = _with_head(tmp_path, CLIP, CAPTION, "caption")
  plain, _ = main.export(run, kind, tmp_path / "plain")
  assert not (plain / main.HEADS).exists()
  folder, _ = main.export(run, kind, tmp_path / "heads", heads=True)
  found = load_file(folder / main.HEADS)
  wanted = {k: x for k, x in run.params.items() if k.startswith("heads/caption/")}
  assert found.keys() == wanted.keys()
  for path, x in wanted.items():
    np.testing.assert_array_equal(found[path], x)
  for file in {x.name for x in folder.iterdir()} - {main.HEADS}:
    assert (folder / file).read_bytes() == (plain / file).read_bytes()
  assert bigalign.load(folder).embed_texts(["a cat"], progress=False).shape == (1, 12)


@pytest.mark.parametrize(
  "kind,model,loss,message",
  [
    ("npz", SIGLIP, SIGLIP_LOSS | dict(caption={}), "npz has no place for heads .*hf, open_clip"),
    ("torch", CLIP, CLIP_LOSS, r"config\.loss=\['clip'\] has none with layers"),
  ],
)
def test_heads_that_cannot_be_written(kind, model, loss, message, tmp_path, no_torch):
  tokenizer = dict(name="byte", length=16) if model is SIGLIP else pieces_for(model, tmp_path)
  run = make_run(tmp_path, model, loss, tokenizer)
  if "caption" in loss:
    run.params["heads/caption/logits/kernel"] = np.zeros((2, 2), np.float32)
  with pytest.raises(ValueError, match=message):
    main.export(run, kind, tmp_path / "out", heads=True)


@pytest.mark.slow
def test_the_decoder_of_coca_is_a_part_of_open_clips_model(tmp_path, no_torch):
  """Read back, it has the run's parameters; without --heads the folder holds the towers alone."""
  run, _, _ = _with_head(tmp_path, COCA, COCA_LOSS, "coca")
  folder, _ = main.export(run, "open_clip", tmp_path / "heads", heads=True)
  assert not (folder / main.HEADS).exists()
  about = json.loads((folder / "bigalign.json").read_text())
  assert about["family"] == "open_clip's CoCa"
  shapes = {
    k: jax.ShapeDtypeStruct(x.shape, x.dtype)
    for k, x in run.params.items()
    if k.startswith("heads/coca/")
  }
  found = weights.describe(folder).load(shapes)
  for path, x in shapes.items():
    np.testing.assert_array_equal(found[path], run.params[path], err_msg=path)
    assert found[path].shape == x.shape
  towers, _ = main.export(run, "open_clip", tmp_path / "towers")
  config = json.loads((towers / "open_clip_config.json").read_text())["model_cfg"]
  assert "multimodal_cfg" not in config
  kept = weights.describe(towers).tensors
  assert not [key for key in kept if key.startswith("text_decoder.")]


@pytest.mark.parametrize(
  "changes,loss,reason",
  [
    ({"text/shifted_mask": False}, {}, "config.model.text.shifted_mask must be True"),
    ({}, dict(mlp_ratio=2.0), "config.loss.coca.mlp_ratio must be 4.0"),
    ({}, dict(activation="quick_gelu"), "config.loss.coca.activation must be 'gelu'"),
    ({}, dict(epsilon=1e-6), "config.loss.coca.epsilon must be 1e-05"),
  ],
)
def test_what_open_clips_coca_cannot_hold(changes, loss, reason, tmp_path, no_torch):
  model = tree.unflatten(tree.flatten(COCA) | changes)
  terms = CLIP_LOSS | dict(coca=COCA_LOSS["coca"] | loss)
  run = make_run(tmp_path, model, terms, pieces_for(model, tmp_path))
  run.params["heads/coca/logits/kernel"] = np.zeros((2, 2), np.float32)
  with pytest.raises(ValueError) as error:
    main.export(run, "open_clip", tmp_path / "out", heads=True)
  assert reason in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(
  not importlib.util.find_spec("open_clip"), reason="open_clip is not installed: the extra interop"
)
def test_open_clip_computes_the_logits_of_captions(tmp_path):
  """To 2e-5 of the largest, from the same pixels and ids; the export compares the embeddings."""
  torchvision_beside_cpu_torch.enable()
  import open_clip
  import torch

  run, head, read = _with_head(tmp_path, COCA, COCA_LOSS, "coca")
  folder, difference = main.export(run, "open_clip", tmp_path / "heads", heads=True)
  assert difference is not None and difference < check.TOLERANCE
  _, alone = main.export(run, "open_clip", tmp_path / "towers")
  assert alone is not None and alone < check.TOLERANCE
  model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
  texts = open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat", "photo of a dog"])
  images = np.stack(main.sample_images()[:1] * 2)
  pixels = torch.stack([preprocess(main.Image.fromarray(x)) for x in images])
  with torch.inference_mode():
    theirs = model.eval()(pixels, texts)["logits"].numpy()
  views = run.config.data.stacked([run.config.data.evaluation_view(x) for x in images])
  ids = jnp.asarray(texts.numpy(), jnp.int32)
  feats = _features(run, views, ids)
  tokens = feats["tokens_txt"]
  own = tree.unflatten(tree.subtree(run.params, "heads/coca/"))
  read = read._replace(
    batch=dict(text=ids, text_mask=ids != 0),
    features=feats,
    text_steps=lambda ids, place, cache=None: (tokens[:, place], {}),
  )
  writing, cache, ours = head.write(own, read), None, []
  for position in range(ids.shape[1]):
    logits, cache = writing.step(ids[:, 0], jnp.asarray(position), cache or writing.cache)
    ours.append(logits)
  ours = np.stack(ours[1:], 1)
  assert theirs.shape == ours.shape and np.ptp(theirs, -1).min() > 0.1
  np.testing.assert_allclose(theirs, ours, atol=2e-5 * np.abs(ours).max())
