"""The text side of a run as a sentence-transformers folder, read back without that library."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import BERT, CLIP, CLIP_LOSS, SIGLIP_LOSS, make_run, pieces_for

import bigalign
from bigalign import tree, weights
from bigalign.export import check, main
from bigalign.export.formats import prepare
from bigalign.towers.bert import BertOptions
from bigalign.weights.files import open_tensors

SENTENCES = {
  "mean": (
    dict(pool="mean", unit=True),
    dict(name="linear"),
    ["Transformer", "Pooling", "Normalize", "Dense", "Normalize"],
  ),
  "cls": (
    dict(pool="cls"),
    dict(name="mlp", hidden=5, bias=True, out_bias=False),
    ["Transformer", "Pooling", "Dense", "Dense", "Normalize"],
  ),
  "identity": (
    dict(pool="mean", unit=True),
    dict(name="identity"),
    ["Transformer", "Pooling", "Normalize"],
  ),
}


def sentence_run(name, kind, tmp_path):
  text, projector, _ = SENTENCES[name]
  model = {
    **kind,
    "text": {**kind["text"], **text},
    "text_projector": projector,
    "embed_dim": 16 if name == "identity" else 12,
  }
  return make_run(tmp_path, model, SIGLIP_LOSS, pieces_for(model, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", SENTENCES)
def test_the_text_side_is_a_sentence_transformers_folder(name, tmp_path, monkeypatch):
  """Its modules in their order, applied to what our reader makes of the encoder."""
  monkeypatch.setattr(check, "possible", lambda kind: False)
  run = sentence_run(name, BERT, tmp_path)
  out, _ = main.export(run, "sentence-transformers", tmp_path / "out")
  modules = json.loads((out / "modules.json").read_text())
  assert [x["type"].rsplit(".", 1)[1] for x in modules] == SENTENCES[name][2]
  trained, texts = main.trained_model(run), ["a cat", "photo of a dog", "", "dog " * 30]
  ids, mask = trained.tokenizer.encode_batch(texts)
  x = encoded(out, ids, mask)
  for module in modules[1:]:
    x = _MODULES[module["type"].rsplit(".", 1)[1]](x, mask, out / module["path"])
  expected = main.embeddings(trained, texts)
  loaded = bigalign.load(out)  # pooling, norm, projector and tokenizer, as their library has them
  np.testing.assert_allclose(loaded.embed_texts(texts, progress=False), expected, atol=2e-5)
  assert np.ptp(expected, 0).max() > 1e-1
  np.testing.assert_allclose(x, expected, atol=2e-5)
  with np.load(out / "samples.npz") as stored:
    assert sorted(stored.files) == ["embeddings", "texts"]
  card = (out / "README.md").read_text()
  assert "SentenceTransformer(" in card and "pipeline_tag: sentence-similarity" in card


def encoded(out, ids, mask):
  """[B, L, D]: what the encoder of a folder gives, without its modules."""
  (out / "modules.json").rename(out / "kept.json")
  checkpoint = weights.describe(out)
  (out / "kept.json").rename(out / "modules.json")
  options = {k: v for k, v in checkpoint.model["text"].items() if k != "name"}
  tower = BertOptions(**options, dtype="float32").build()
  made = jax.eval_shape(tower.init, jax.random.key(0), jnp.asarray(ids))["params"]
  arrays = checkpoint.load(tree.flatten(made, "text_tower/"))
  params = tree.unflatten(tree.subtree(arrays, "text_tower/"))
  with jax.default_matmul_precision("highest"):
    return np.asarray(tower.apply({"params": params}, jnp.asarray(ids), mask).tokens)


def pooling(x, mask, folder):
  given = json.loads((folder / "config.json").read_text())
  assert given["word_embedding_dimension"] == x.shape[-1]
  if given["pooling_mode_cls_token"]:
    return x[:, 0]
  return (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def dense(x, mask, folder):
  given = json.loads((folder / "config.json").read_text())
  tensors = open_tensors(folder / "model.safetensors")
  assert ("linear.bias" in tensors) == given["bias"]
  y = x @ tensors.read("linear.weight").T + (tensors.read("linear.bias") if given["bias"] else 0)
  assert y.shape[1:] == (given["out_features"],)
  gelu = given["activation_function"].endswith(".GELU")
  return np.asarray(jax.nn.gelu(y, approximate=False)) if gelu else y


_MODULES = dict(
  Pooling=pooling,
  Dense=dense,
  Normalize=lambda x, mask, folder: x / np.linalg.norm(x, axis=-1, keepdims=True),
)


@pytest.mark.parametrize(
  "model, changes, reason",
  [
    (CLIP, {}, "config.model.text.name must be 'bert' (yours: 'text')"),
    (BERT, {}, "config.model.text.pool must be 'mean' or 'cls' (yours: 'pooler')"),
    (BERT, dict(pool="mean", types=0), "config.model.text.types must be 1 (yours: 0)"),
    (BERT, dict(pool="mean", buckets=32), "pad_token_id: 0; MPNet pads with 1"),
  ],
)
def test_text_sides_that_sentence_transformers_cannot_hold(model, changes, reason, tmp_path):
  model = {**model, "text": {**model["text"], **changes}}
  trained = main.trained_model(make_run(tmp_path, model, CLIP_LOSS, pieces_for(model, tmp_path)))
  with pytest.raises(ValueError, match=re.escape(reason)):
    prepare("sentence-transformers", trained)
