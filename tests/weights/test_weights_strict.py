"""Reading weights: what must agree, what may be left out, other sizes, shards, old names."""

from __future__ import annotations

import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.small_checkpoints import (
  BERT,
  CLIP,
  IDS,
  PICTURE,
  VISION,
  bert_keys,
  clip_keys,
  folder,
  save,
)
from helpers.tower_oracles import Side

from bigalign import sharding, tree, weights
from bigalign.model import make_model

RNG = np.random.default_rng(0)
DENSE = {"fc1": (5, 12), "fc2": (7, 5)}  # [out, in] of two Dense modules


@pytest.fixture
def clip(tmp_path):
  """(folder, tensors)."""
  arrays = clip_keys()
  return folder(tmp_path / "clip", CLIP, arrays), arrays


def image(path, picture=PICTURE, *, tower=None, **options):
  return Side(weights.describe(path), "image", (picture,), tower, **options)


def test_one_tower_of_two_is_read(clip):
  """The text of a CLIP is known, though nothing asks for it; positions of tokens are buffers."""
  path, arrays = clip
  ids = np.arange(6, dtype=np.int64)[None]
  save(path / "model.safetensors", arrays | {"text_model.embeddings.position_ids": ids})
  flat = image(path).flat
  assert all(x.startswith("image_") for x in flat)
  kernel = flat["image_tower/encoder/blocks/attn/query/kernel"][1]
  theirs = arrays["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
  np.testing.assert_array_equal(kernel[:, 2], theirs[8:12].T)  # the third of three heads


@pytest.mark.parametrize(
  "change,message",
  [
    (lambda x: x.pop("vision_model.post_layernorm.bias"), "missing keys.*post_layernorm.bias"),
    (lambda x: x.update(extra=np.zeros(2, np.float32)), "does not have: extra"),
    (lambda x: x.update(logit_scale=np.zeros(2, np.float32)), "logit_scale .2., the model's: .."),
    (lambda x: x.update(logit_scale=np.zeros((), np.int32)), "a type that is.*: logit_scale int32"),
  ],
)
def test_what_does_not_agree_is_named(clip, change, message):
  path, arrays = clip
  change(arrays)
  save(path / "model.safetensors", arrays)
  checkpoint = weights.describe(path)
  with pytest.raises(ValueError, match=f"(?s)clip/model.safetensors: .*{message}"):
    image(path)
    checkpoint.load({"t": jax.ShapeDtypeStruct((), jnp.float32)})


def test_another_geometry_lists_the_differing_tensors(clip):
  path, _ = clip
  checkpoint = weights.describe(path, image=dict(mlp_ratio=2.0, patch=8))
  with pytest.raises(ValueError, match="another shape") as error:
    Side(checkpoint, "image", (PICTURE,))
  for text in (
    "vision_model.encoder.layers.1.mlp.fc1.weight [20, 12], the model's: [24, 12]",
    "vision_model.embeddings.patch_embedding.weight [12, 3, 4, 4], the model's: [12, 3, 8, 8]",
  ):
    assert text in str(error.value)
  assert "self_attn" not in str(error.value)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_another_depth_is_named(clip, scan, depth):
  path, _ = clip
  with pytest.raises(ValueError, match=r"(?s)model\.safetensors: .*(layers|block_2|layers\.0)"):
    image(path, tower=dict(depth=depth, scan=scan))


def test_a_fresh_part_is_asked_for_by_name(clip):
  """Attention pooling on a CLIP: nothing fills it, and the class token's place is kept."""
  path, _ = clip
  tower = dict(pool="map", class_token=True)
  with pytest.raises(ValueError, match=r"nothing fills.*image_tower/map_head/attn/key/bias"):
    image(path, tower=tower)
  flat = image(path, tower=tower, fresh="map_head/").flat
  assert "image_tower/extra_tokens" in flat and not any("map_head" in x for x in flat)
  only = image(path, fresh="positions$").flat  # theirs is one tensor with the class token's
  assert "image_tower/class_position" in only and "image_tower/positions" not in only
  with pytest.raises(ValueError, match=r"fresh: 'maphead/' matches none of"):
    image(path, tower=tower, fresh="maphead/")


def test_a_tensor_without_a_place_is_dropped_by_name(clip):
  path, _ = clip
  tower = dict(pre_norm=False)
  with pytest.raises(ValueError, match=r"no place for.*: vision_model.pre_layrnorm.weight"):
    image(path, tower=tower)
  flat = image(path, tower=tower, drop=r"pre_layrnorm").flat
  assert "image_tower/ln_pre/scale" not in flat


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_it_is(clip, dtype):
  path, arrays = clip
  save(path / "model.safetensors", {k: x.astype(dtype) for k, x in arrays.items()})
  kernel = image(path).flat["image_tower/embedding/kernel"]
  theirs = arrays["vision_model.embeddings.patch_embedding.weight"].astype(dtype)
  assert kernel.dtype == np.float32
  np.testing.assert_array_equal(kernel, theirs.astype(np.float32).transpose(2, 3, 1, 0))


def test_shards_are_one_checkpoint(clip):
  """By their index, found in the folder or named."""
  path, arrays = clip
  whole = image(path).flat
  (path / "model.safetensors").unlink()
  names = {key: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, key in enumerate(arrays)}
  for name in set(names.values()):
    save(path / name, {k: x for k, x in arrays.items() if names[k] == name})
  index = path / "model.safetensors.index.json"
  index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=names)))
  for place in (path, index):
    shards = image(place).flat
    assert all(np.array_equal(x, shards[k]) for k, x in whole.items())
  first = next(iter(names))
  for wrong, message in (
    ({first: "../x.safetensors"}, "is not a file next to the index"),
    ({first: "none"}, "no such file"),
    ({"nothing": names[first]}, "nothing: is missing in"),
  ):
    index.write_text(json.dumps(dict(weight_map=names | wrong)))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      weights.describe(path)
  index.write_text(json.dumps(dict(weight_map={k: v for k, v in names.items() if k != first})))
  with pytest.raises(ValueError, match="is in this file but not in the index"):
    weights.describe(path)


def test_each_device_is_given_its_part(clip):
  """Straight into sharded arrays, stacked layers and fused matrices included."""
  path, _ = clip
  checkpoint = weights.describe(path)
  side = Side(checkpoint, "image", (PICTURE,))
  mesh = sharding.make_mesh(fsdp=2, tensor=1)
  for axis in (0, 1):
    places = {
      name: jax.NamedSharding(mesh, jax.P(*[None] * axis, "fsdp"))
      if x.ndim > axis and x.shape[axis] % 2 == 0
      else jax.NamedSharding(mesh, jax.P())
      for name, x in side.flat.items()
    }
    arrays = checkpoint.load(side.flat, shardings=places)
    for name, x in arrays.items():
      assert x.sharding == places[name]
      np.testing.assert_array_equal(x, side.flat[name], err_msg=name)
    assert any(x.sharding.shard_shape(x.shape) != x.shape for x in arrays.values())


@pytest.mark.slow
def test_a_checkpoint_is_a_config_and_its_arrays(clip):
  """What it says of itself makes the model, whose own paths are those that are read."""
  path, arrays = clip
  checkpoint = weights.describe(path, image=dict(dtype="float32"), text=dict(scan=False))
  model = make_model(**checkpoint.model)
  made = jax.eval_shape(model.init, jax.random.key(0), PICTURE.astype(jnp.uint8), IDS)
  params = weights.load(path, tree.flatten(made["params"]))
  kernel = params["text_projector/out/kernel"]
  np.testing.assert_array_equal(kernel, arrays["text_projection.weight"].T)
  variables = {"params": tree.unflatten(params)}
  out = model.apply(variables, PICTURE.astype(jnp.uint8), IDS)
  assert out["zimg"].shape == out["ztxt"].shape == (1, 4)


@pytest.mark.slow
def test_shards_are_read_with_little_more_than_their_arrays(tmp_path):
  """1.3 times the largest shard at most, though layers of all shards make one array."""
  names = {}
  keys = bert_keys(dict(BERT, hidden_size=64, intermediate_size=1024, num_hidden_layers=8))[1]
  path = folder(
    tmp_path / "big", dict(BERT, hidden_size=64, intermediate_size=1024, num_hidden_layers=8), {}
  )
  (path / "model.safetensors").unlink()
  for key in keys:
    layer = re.search(r"layer\.(\d)", key)
    names[key] = f"model-{layer[1] if layer else 8}.safetensors"
  for name in set(names.values()):
    save(path / name, {k: x for k, x in keys.items() if names[k] == name})
  largest = max(file.stat().st_size for file in path.glob("*.safetensors"))
  (path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=names)))
  checkpoint = weights.describe(path)
  shapes = Side(checkpoint, "text", (IDS,)).flat
  shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in shapes.items()}
  mesh = sharding.make_mesh(fsdp=8, data=1)
  places = {
    name: jax.NamedSharding(mesh, jax.P(*["fsdp" if n % 8 == 0 else None for n in x.shape[:1]]))
    for name, x in shapes.items()
  }
  for options in ({}, {"shardings": places}):
    tracemalloc.start()
    arrays = checkpoint.load(shapes, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(x.nbytes for x in arrays.values()) + 1.3 * largest


def test_positions_follow_the_pictures_size(clip):
  """A wider grid; a grid that is no square must be named; the class token's is untouched."""
  path, arrays = clip
  theirs = arrays["vision_model.embeddings.position_embedding.weight"]
  larger = image(path, jnp.zeros((1, 24, 24, 3))).flat
  assert larger["image_tower/positions"].shape == (1, 36, 12)
  np.testing.assert_array_equal(larger["image_tower/class_position"][0], theirs[:1])
  wide = jnp.zeros((1, 8, 24, 3))
  assert image(path, wide, grid=(2, 6)).flat["image_tower/positions"].shape == (1, 12, 12)
  with pytest.raises(ValueError, match="has 12 positions; give grid="):
    image(path, wide)


@pytest.mark.parametrize(
  "prefix,norm",
  [
    ("", ("weight", "bias")),
    ("bert.", ("gamma", "beta")),
  ],
)
def test_names_of_old_and_of_headed_models(tmp_path, prefix, norm):
  """bert-base-uncased is a BertForPreTraining with gamma and beta: its head is left out."""
  ours, keys = bert_keys(BERT, prefix, norm)
  head = {"cls.predictions.bias": np.zeros(11, np.float32)} if prefix else {}
  ids = {f"{prefix}embeddings.position_ids": np.arange(6)[None]}
  path = folder(tmp_path / "bert", BERT, keys | head | ids)
  flat = Side(weights.describe(path), "text", (IDS,)).flat
  assert flat.keys() == ours.keys()
  for name, x in flat.items():
    np.testing.assert_array_equal(x, ours[name])


@pytest.mark.parametrize(
  "config,files,message",
  [
    (dict(CLIP, model_type="clop"), {}, "config.json: model_type: unknown 'clop'; known"),
    (dict(CLIP, vision_config=dict(VISION, hidden_act="relu9")), {}, "vision_config: hidden_act"),
    (dict(BERT, position_embedding_type="relative_key"), {}, "position_embedding_type"),
    (
      BERT,
      {"modules.json": [dict(type="x.Transformer", path=""), dict(type="x.LSTM", path="2")]},
      "modules.json: module 1 is 'LSTM'",
    ),
    (
      BERT,
      {
        "modules.json": [dict(type="x.Dense", path="1"), dict(type="x.Pooling", path="2")],
        "1/config.json": dict(out_features=3, activation_function="torch.nn.Identity"),
      },
      "modules.json: module 1 is 'Pooling'; known: .* in this order",
    ),
    (
      BERT,
      {
        "modules.json": [dict(type="x.Dense", path="1")],
        "1/config.json": dict(out_features=3),
      },
      "1/config.json: activation_function: Tanh; known: Identity of one Dense",
    ),
    (
      BERT,
      {"modules.json": [dict(type="x.Dense", path="1")], "1/config.json": dict(out_features=0)},
      "1/config.json: .*out_features must be a number",
    ),
    (
      BERT,
      {
        "modules.json": [dict(type="x.Dense", path="1")],
        "1/config.json": dict(out_features=3, module_input_name="token_embeddings"),
      },
      "1/config.json: module_input_name: 'token_embeddings'; known: 'sentence_embedding'",
    ),
    (
      BERT,
      {"modules.json": [dict(type="x.Pooling", path="../..")]},
      "is not a folder next to the file",
    ),
    (
      BERT,
      {
        "modules.json": [dict(type="x.Pooling", path="1")],
        "1/config.json": dict(pooling_mode_max_tokens=True),
      },
      "pooling_mode: .'max_tokens'",
    ),
    (
      BERT,
      {
        "modules.json": [dict(type="x.Pooling", path="1")],
        "1/config.json": dict(pooling_mode_mean_tokens=True, skip=1),
      },
      "1/config.json: .'skip'.: unknown keys",
    ),
    (
      BERT,
      {
        "modules.json": [dict(type="x.Transformer", path=""), dict(type="x.Pooling", path="1")],
        "1/config.json": dict(pooling_mode_mean_tokens=True, include_prompt=False),
        "config_sentence_transformers.json": dict(prompts=dict(q="q:"), default_prompt_name="q"),
      },
      "include_prompt: false",
    ),
    (
      BERT,
      {"modules.json": [], "sentence_bert_config.json": dict(max_seq_length=7)},
      "max_seq_length: 7, but the table has 6",
    ),
  ],
)
def test_configs_that_cannot_be_read_are_named(tmp_path, config, files, message):
  path = folder(tmp_path / "some", config, {x: np.zeros(1, np.float32) for x in "xyz"})
  for name, content in files.items():
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    weights.describe(path)


def test_two_libraries_in_one_folder(clip):
  """The weights that are read choose the config."""
  path, arrays = clip
  (path / "open_clip_config.json").write_text("{}")
  assert weights.describe(path).kind == "clip"
  save(path / "open_clip_model.safetensors", arrays)
  (path / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"open_clip_config\.json: model_cfg: must be an object"):
    weights.describe(path)


def test_dense_modules_of_sentence_transformers_are_a_projector(tmp_path):
  """Their tensors are in files of their own."""
  top = folder(tmp_path / "dense", BERT, bert_keys(BERT)[1])
  kernels = {name: RNG.standard_normal(x).astype(np.float32) for name, x in DENSE.items()}
  files = {
    "modules.json": [
      dict(type=f"a.{kind}", path=path)
      for kind, path in zip(("Transformer", "Pooling", "Dense", "Dense", "Normalize"), " 1234")
    ],
    "1/config.json": dict(pooling_mode_mean_tokens=True),
    "2/config.json": dict(out_features=5, bias=True, activation_function="torch.nn.GELU"),
    "3/config.json": dict(out_features=7, bias=False, activation_function="torch.nn.Identity"),
  }
  for name, content in files.items():
    (top / name).parent.mkdir(exist_ok=True)
    (top / name).write_text(json.dumps(content).replace('" "', '""'))
  bias = np.arange(5, dtype=np.float32)
  save(top / "2/model.safetensors", {"linear.weight": kernels["fc1"], "linear.bias": bias})
  save(top / "3/model.safetensors", {"linear.weight": kernels["fc2"]})
  checkpoint = weights.describe(top)
  projector = dict(name="mlp", hidden=5, bias=True, out_bias=False)
  assert checkpoint.model["text_projector"] == projector and checkpoint.model["embed_dim"] == 7
  assert checkpoint.model["text"]["pool"] == "mean" and "unit" not in checkpoint.model["text"]
  shapes = {f"text_projector/{x}/kernel": x_shape[::-1] for x, x_shape in DENSE.items()}
  shapes["text_projector/fc1/bias"] = (5,)
  found = checkpoint.load({k: jax.ShapeDtypeStruct(x, np.float32) for k, x in shapes.items()})
  for name, kernel in kernels.items():
    np.testing.assert_array_equal(found[f"text_projector/{name}/kernel"], kernel.T)
  np.testing.assert_array_equal(found["text_projector/fc1/bias"], bias)


def test_an_old_sentence_transformers_folder(tmp_path):
  """With the encoder in a folder of its own."""
  ours, keys = bert_keys(BERT)
  top = tmp_path / "old"
  top.mkdir()
  folder(top / "0_Transformer", BERT, keys)
  modules = [dict(type="a.Transformer", path="0_Transformer"), dict(type="a.Pooling", path="1")]
  (top / "modules.json").write_text(json.dumps(modules))
  (top / "1").mkdir()
  (top / "1/config.json").write_text(json.dumps(dict(pooling_mode_cls_token=True)))
  (top / "0_Transformer/sentence_bert_config.json").write_text('{"max_seq_length": 4}')
  checkpoint = weights.describe(top)
  assert checkpoint.model["text"]["pool"] == "cls" and checkpoint.layout.data == {"length": 4}
  flat = Side(checkpoint, "text", (IDS,)).flat
  np.testing.assert_array_equal(flat["text_tower/embedding"], ours["text_tower/embedding"])


def test_no_config_and_no_weights_are_named(tmp_path):
  save(tmp_path / "a.safetensors", {})
  with pytest.raises(
    FileNotFoundError, match=r"needs a config\.json or open_clip_config.json next to it"
  ):
    weights.describe(tmp_path / "a.safetensors")
  (tmp_path / "a.safetensors").rename(tmp_path / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match=r"It holds: .'pytorch_model.bin'"):
    weights.describe(tmp_path)
  with pytest.raises(ValueError, match="holds a pickle, which can run code"):
    weights.describe(tmp_path / "pytorch_model.bin")
