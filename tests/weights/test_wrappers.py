"""A right checkpoint inside a wrapper is read as without it."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_checkpoints import BERT, CLIP, IDS, PICTURE, bert_keys, clip_keys, folder, save
from helpers.tower_oracles import Side

from bigalign import tree, weights
from bigalign.towers import TOWERS
from bigalign.weights import transfer

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def flat(path, side="image"):
  inputs = (PICTURE,) if side == "image" else (IDS,)
  return Side(weights.describe(path), side, inputs).flat


def same(a, b):
  assert a.keys() == b.keys()
  for key, x in a.items():
    np.testing.assert_array_equal(x, b[key], err_msg=key)


@pytest.mark.parametrize(
  "wrap",
  [
    lambda key: f"module.{key}",
    lambda key: f"_orig_mod.{key}",
    lambda key: f"module._orig_mod.{key}",
    lambda key: key.replace("encoder.layers", "encoder._fsdp_wrapped_module.layers"),
    lambda key: f"model.{key}",
    lambda key: f"module.model.{key}",
    lambda key: f"clip.{key}",
    lambda key: f"model.clip.{key}",
  ],
)
def test_prefixes_of_wrappers(tmp_path, caplog, wrap):
  caplog.set_level(logging.INFO)
  arrays = clip_keys()
  plain = flat(folder(tmp_path / "plain", CLIP, arrays))
  assert not caplog.records
  wrapped = folder(tmp_path / "wrapped", CLIP, {wrap(k): x for k, x in arrays.items()})
  same(flat(wrapped), plain)
  assert "wrapped/model.safetensors: " in caplog.records[0].getMessage()


@pytest.mark.slow
def test_a_tower_with_its_classifier_is_read_without_its_name(tmp_path):
  """Dinov2ForImageClassification names its tower dinov2; the classifier keeps its own name."""
  config = dict(
    model_type="dinov2",
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=16,
    patch_size=4,
  )
  options = {k: v for k, v in config.items() if k != "model_type"}
  layout = weights.LAYOUTS["dinov2"]({}, "", "", **options)
  tower = {k: v for k, v in layout.model["image"].items() if k != "name"}
  module = TOWERS["vit"](**tower, dtype="float32").build()
  params = tree.flatten(module.init(jax.random.key(0), PICTURE)["params"], "image_tower/")
  keys = {k: np.asarray(x, np.float32) for k, x in transfer.write(layout, params)}
  plain = flat(folder(tmp_path / "plain", config, keys))
  classifier = {"classifier.weight": np.ones((3, 24), np.float32)}
  headed = {f"dinov2.{k}": x for k, x in keys.items()} | classifier
  same(flat(folder(tmp_path / "headed", config, headed)), plain)


def test_a_text_tower_inside_sentence_transformers(tmp_path):
  _, keys = bert_keys(BERT)
  plain = flat(folder(tmp_path / "plain", BERT, keys), "text")
  inside = {f"0.auto_model.{k}": x for k, x in keys.items()}
  same(flat(folder(tmp_path / "inside", BERT, inside), "text"), plain)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_in_any_shape(tmp_path, caplog, shape):
  caplog.set_level(logging.INFO)
  arrays = clip_keys() | {"logit_scale": np.full(shape, 3.0, np.float32)}
  path = folder(tmp_path / "clip", CLIP, arrays)
  assert float(weights.describe(path).load({"t": SCALAR})["t"]) == 3
  logged = [x.getMessage() for x in caplog.records if "read as one number" in x.getMessage()]
  assert bool(logged) == (shape != ())
  save(path / "model.safetensors", arrays | {"logit_scale": np.ones(2, np.float32)})
  with pytest.raises(ValueError, match=r"logit_scale .2., the model's: .."):
    weights.describe(path).load({"t": SCALAR})


def test_what_no_prefix_explains_is_still_named(tmp_path):
  arrays = {f"other.{k}": x for k, x in clip_keys().items()}
  with pytest.raises(ValueError, match=r"does not have: other\.[\s\S]*missing keys"):
    flat(folder(tmp_path / "clip", CLIP, arrays))
