"""Runs that begin from pretrained towers: what is loaded, frozen, learned, resumed."""

from __future__ import annotations

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers.shipped import load
from helpers.small_checkpoints import BERT, CLIP, bert_keys, clip_keys, folder
from helpers.small_shards import samples, write_tar
from helpers.small_tokenizers import bert_json
from helpers.tower_oracles import CASES, describe, error, images, stored
from helpers.tower_oracles import ROOT as ORACLES

from bigalign import sharding, tree
from bigalign.config import resolve_and_compare, resolve_config
from bigalign.evaluate import open_run
from bigalign.frozen.embed import embed
from bigalign.model import PIXELS, unit
from bigalign.program import init_on_mesh, layout, make_program
from bigalign.run.metrics import read_metrics
from bigalign.state import State
from bigalign.step import warn_of_bounds
from bigalign.towers.resnet import ResnetOptions
from bigalign.train import train
from bigalign.weights import files, init, slices

TOLERANCE = 2e-5  # relative to the largest output
FLOAT32 = dict(dtype="float32")
IMAGE = dict(name="vit", patch=7, width=16, depth=1, heads=2)
TEXT = dict(name="text", vocab_size=259, length=12, width=16, depth=1, heads=2)


@pytest.fixture
def clip(tmp_path):
  """The folder of a small CLIP of random numbers."""
  return folder(tmp_path / "clip", CLIP, clip_keys())


def config(tmp_path, model, *, image_size=16, length=6, words=8, **changes):
  """Two steps on glyphs; towers of checkpoints have few tokens."""
  (tmp_path / "words.txt").write_text(" ".join(f"word{i}" for i in range(words)))
  c = load("tiny").to_dict() | dict(
    total_steps=2,
    batch_size=16,
    log_every=1,
    checkpoint_every=0,
    evals={},
    ema=0.0,
    writer=dict(tensorboard=False),
    model=model,
    loss=dict(clip=dict(weight=1.0)),
  )
  tokenizer = dict(name="words", vocabulary=str(tmp_path / "words.txt"), length=length)
  c["data"] |= dict(image_size=image_size, tokenizer=tokenizer)
  return c | changes


def sizes(case):
  """What config() needs for the inputs of a checkpoint; IMAGE and TEXT if it has one tower."""
  io, model = stored(case), describe(case).model
  text = model.get("text", TEXT)
  size = io["pixel_values"].shape[-1] if "image" in model else 4 * IMAGE["patch"]
  if "grid" in model.get("image", {}):  # patches instead of images
    size = model["image"]["grid"] * model["image"]["patch"]
  return dict(image_size=size, length=text["length"], words=text["vocab_size"] - 3)


def outputs(run, io, pixels="pixel_values"):
  """(pooled images, unit images, pooled texts, unit texts) of a run for normalised pixels."""
  model = run.config.model.build()
  ids, mask = io["input_ids"].astype(np.int32), io["attention_mask"].astype(bool)

  def apply(model, x, ids, mask):
    image, text = model.image_tower(x), model.text_tower(ids, mask)
    zimg, ztxt = unit(model.image_projector(image)), unit(model.text_projector(text))
    return image.pooled, zimg, text.pooled, ztxt

  # Towers that were sharded for training are used here on one device.
  params = jax.tree.map(np.asarray, run.params)
  variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
  with jax.default_matmul_precision("highest"):
    return jax.jit(lambda v, *a: model.apply(v, *a, method=apply))(
      variables, images(io, pixels), ids, mask
    )


def load_all(given, image_size=16, length=6, loss=None, **changes):
  """(program, {path: loaded array}) of a config.model, on a mesh of eight."""
  values = load("tiny").to_dict() | dict(loss=loss or dict(clip={}), model=given) | changes
  values["data"] |= dict(image_size=image_size, tokenizer=dict(name="byte", length=length))
  program = make_program(resolve_config(values), dataset_size=100)
  shapes, shardings = (
    {**x.trainable, **x.frozen} for x in layout(program, sharding.make_mesh(fsdp=2))
  )
  return program, init.load(values, shapes, shardings)


@pytest.mark.slow
def test_tower_oracle_a_run_begins_with_the_embeddings_of_its_checkpoint(tmp_path):
  """A whole CLIP at a learning rate of zero: nothing moves, averages and logit scale included."""
  given = dict(init=str(ORACLES / "hf_clip"), image=FLOAT32, text=FLOAT32)
  c = config(tmp_path, given, **sizes("hf_clip"), ema=0.5)
  c["optimizer"] |= dict(lr=0.0)
  train(c, tmp_path / "run")
  run, io = open_run(tmp_path / "run"), stored("hf_clip")
  for params in (run.params, run.ema):
    _, zimg, _, ztxt = outputs(run._replace(params=params), io)
    assert error(zimg, io["out_image_embeds"]) <= TOLERANCE
    assert error(ztxt, io["out_text_embeds"]) <= TOLERANCE
  logits = np.exp(run.params["loss/clip/t"]) * zimg @ ztxt.T
  assert error(logits, io["out_logits_per_image"]) <= TOLERANCE


@pytest.mark.slow
def test_tower_oracle_two_towers_of_two_checkpoints(tmp_path, caplog):
  """A frozen DINOv2 at another resolution, a sentence encoder that learns, new projectors; then
  the files are gone, and the run goes on to the same bits."""
  for name in ("hf_dinov2", "st_bert_mean"):
    shutil.copytree(ORACLES / name, tmp_path / name)
  given = dict(
    image=dict(init=str(tmp_path / "hf_dinov2"), **FLOAT32),
    text=dict(init=str(tmp_path / "st_bert_mean"), **FLOAT32),
    embed_dim=8,
  )
  io = stored("st_bert_mean") | stored("hf_dinov2")
  size = io["pixel_values_interp"].shape[-1]
  c = config(
    tmp_path,
    given,
    **sizes("st_bert_mean") | dict(image_size=size),
    frozen="image_tower",
    total_steps=3,
    checkpoint_every=1,
    mesh=dict(fsdp=2),
    keep=dict(last=3),
  )
  c["optimizer"] |= dict(lr=1e-5)
  caplog.set_level("INFO", logger="absl")
  whole = train(c, tmp_path / "run")
  patch = describe("hf_dinov2").model["image"]["patch"]
  theirs, ours = ((n // patch) ** 2 for n in (io["pixel_values"].shape[-1], size))
  for line in (
    "config.model.image.init: loaded 42 of 43 tensors from",
    f"resized from {theirs} to {ours} positions (bicubic)",
    "Initialised at random with config.seed: loss/clip, model/image_projector,"
    " model/text_projector",
    "Frozen: 25 of the 25 arrays of model/image_tower",
  ):
    assert line in caplog.text, line
  differs = f"config.data.image_size is {size}, but {tmp_path}/hf_dinov2/"
  assert differs in caplog.text
  for name in ("hf_dinov2", "st_bert_mean"):
    shutil.rmtree(tmp_path / name)

  caplog.clear()
  run = open_run(tmp_path / "run")
  assert differs in caplog.text  # the evaluation has that size too
  image, _, text, _ = outputs(run, io, "pixel_values_interp")
  assert error(image, io["out_pooler_interp"]) <= TOLERANCE
  assert TOLERANCE < error(text, io["out_mean_normalized"]) < 0.05, "it learns, from there"
  bright = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
  mean, std = PIXELS["imagenet"]
  io["normalised"] = ((bright / 255 - mean) / std).transpose(0, 3, 1, 2)
  expected = outputs(run, io, "normalised")[1]
  np.testing.assert_allclose(run.embed["embed_image"](run.params, bright), expected, atol=1e-5)

  for step in ("2", "3"):
    shutil.rmtree(tmp_path / "run/checkpoints" / step)
  caplog.clear()
  again = train(c, tmp_path / "run")
  assert differs in caplog.text
  jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(x) for x in (whole, again)))
  other = dict(given, text=dict(given["text"], init=str(ORACLES / "st_bert_mean")))
  given["image"]["init"] = str(ORACLES / "hf_dinov2")
  with pytest.raises(ValueError, match=r"(?s)config.model/image/init: was .*model/text/init: was"):
    train(c | dict(model=other), tmp_path / "run")


@pytest.mark.slow
def test_layers_are_frozen_and_slowed_one_by_one(clip, tmp_path):
  """open_clip's locked image tower with its last groups unlocked; a learning rate per layer."""
  tower = dict(scan=False, **FLOAT32)
  c = config(
    tmp_path,
    dict(init=str(clip), image=tower, text=tower),
    frozen=r"image_tower/(?!encoder/(block_1|ln)/)",
  )
  factors = (0.25, 0.5)
  c["optimizer"] = dict(
    name="adamw",
    lr=1e-2,
    schedule="constant",
    clip_norm=None,
    multipliers=[(f"text_tower/encoder/block_{i}/", x) for i, x in enumerate(factors)],
  )
  first = jax.device_get(load_all(c["model"])[1])
  after = train(c | dict(total_steps=1), tmp_path / "run")
  assert all("block_0" in path or "encoder" not in path for path in after.frozen)
  for path, x in after.frozen.items():
    np.testing.assert_array_equal(x, first[path], err_msg=path)
  # The first step of Adam moves what has a gradient by the learning rate.
  moved = {path: np.abs(x - first[path]).max() for path, x in after.trainable.items()}
  for part in ("image_tower/encoder/block_1/mlp", "image_tower/encoder/ln/", "text_projector"):
    assert all(0.009 < x < 0.011 for path, x in moved.items() if part in path), part
  for i, factor in enumerate(factors):
    slow = moved[f"model/text_tower/encoder/block_{i}/mlp/fc1/kernel"]
    np.testing.assert_allclose(slow, 1e-2 * factor, rtol=0.05)

  c["model"]["image"]["scan"] = True
  with pytest.raises(ValueError, match=r"config.frozen: .*selects some layers of .*scan=False"):
    train(c, tmp_path / "scanned")


@pytest.mark.slow
def test_a_run_begins_with_a_resnet_for_cifar(data_root, tmp_path):
  """A real npz as init of the image tower: frozen parts stay, the others learn from there, and
  batch norm keeps its statistics."""
  file = data_root / "weights/resnet20_cifar10.npz"
  given = dict(image=dict(init=str(file), **FLOAT32), text=TEXT, embed_dim=8)
  c = config(tmp_path, given, image_size=32, frozen=r"image_tower/(stage_[12]|conv1|bn1)")
  state = train(c, tmp_path / "run")
  model = open_run(tmp_path / "run").config.model
  assert isinstance(model.image, ResnetOptions) and model.image.depth == 20
  assert model.pixels == "imagenet"
  arrays = jax.device_get({**state.trainable, **state.frozen})
  with np.load(file) as theirs:
    for stage in (1, 3):
      path = f"model/image_tower/stage_{stage}_block_1"
      for name, leaf in (("mean", "running_mean"), ("var", "running_var")):
        expected = theirs[f"layer{stage}.1.bn2.{leaf}"]
        np.testing.assert_array_equal(arrays[f"{path}/bn2/{name}"], expected)
      kernel = theirs[f"layer{stage}.1.conv2.weight"].transpose(2, 3, 1, 0)
      moved = np.abs(arrays[f"{path}/conv2/kernel"] - kernel).max()
      assert moved == 0 if stage == 1 else 0 < moved < 0.01, (stage, moved)


@pytest.mark.slow
@pytest.mark.parametrize("small", [0, slices._SMALL])
def test_stacks_are_loaded_where_they_lie(clip, small, monkeypatch):
  """Layer by layer in place, and on the host first: the same arrays as without devices."""
  monkeypatch.setattr(slices, "_SMALL", small)
  given = dict(init=str(clip), image=dict(dtype="bfloat16"))
  program, loaded = load_all(given, frozen="image_tower")
  _, plain = load_all(dict(given, image=dict(scan=False, **FLOAT32)))
  kernel = loaded["model/image_tower/encoder/blocks/attn/query/kernel"]
  assert kernel.dtype == jnp.bfloat16, "frozen: as it is used"
  for i in range(2):
    layer = plain[f"model/image_tower/encoder/block_{i}/attn/query/kernel"]
    np.testing.assert_array_equal(kernel[i], jnp.asarray(layer, jnp.bfloat16))
  kernel = loaded["model/text_tower/encoder/blocks/attn/query/kernel"]
  assert kernel.dtype == jnp.float32
  _, shardings = layout(program, sharding.make_mesh(fsdp=2))
  for path, x in loaded.items():
    assert x.sharding == {**shardings.trainable, **shardings.frozen}[path], path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tower_oracle_every_family_begins_a_run(case, monkeypatch):
  """Whole models and single towers, in place on eight devices, are what is read on the host."""
  monkeypatch.setattr(slices, "_SMALL", 0)
  checkpoint = describe(case)
  both = {"image", "text"} <= checkpoint.model.keys()
  given = {} if both else {"embed_dim": 24}
  for side, tower in (("image", IMAGE), ("text", TEXT)):
    known = checkpoint.model.get(side)
    # Heads, which open_clip does not always save, are said; what there is no tower for is new.
    given[side] = {"heads": known["heads"]} if known else dict(tower)
  side = "image" if "image" in checkpoint.model else "text"
  (given if both else given[side])["init"] = str(checkpoint.path)
  size = sizes(case)
  _, loaded = load_all(given, image_size=size["image_size"], length=size["length"])
  part = "model/" if both else f"model/{side}_tower/"
  shapes = {p: x for p, x in loaded.items() if p.startswith(part)}
  plain = checkpoint.load(tree.subtree(shapes, "model/"))
  assert len(plain) == len(shapes) > 15
  for path, x in shapes.items():
    np.testing.assert_array_equal(x, plain[path.removeprefix("model/")], err_msg=path)


@pytest.mark.slow
def test_what_is_new_is_what_a_run_from_scratch_draws(clip):
  """Only the projectors of two towers; with the same seed they are the same."""
  given = dict(image=dict(init=str(clip)), text=dict(init=str(clip)), embed_dim=4)
  program, loaded = load_all(given)
  assert not any("projector" in path or "loss/" in path for path in loaded)
  _, shardings = layout(program, sharding.make_mesh(fsdp=2))
  kept = {path: np.asarray(x) for path, x in loaded.items()}
  scratch = init_on_mesh(program, shardings)
  made = init_on_mesh(program, shardings, loaded)
  for path, x in made.trainable.items():
    np.testing.assert_array_equal(x, kept.get(path, scratch.trainable[path]), err_msg=path)


def test_the_scale_and_bias_of_the_checkpoint(clip):
  """Go to each loss that learns them, unless the config writes their first value."""
  given = dict(init=str(clip))
  scale = weights_of(clip)["logit_scale"]
  _, loaded = load_all(given, loss=dict(clip={}, siglip={}))
  assert loaded["loss/clip/t"] == loaded["loss/siglip/t"] == scale
  assert "loss/siglip/b" not in loaded, "a CLIP has no bias"
  _, loaded = load_all(given, loss=dict(clip=dict(t_init=10.0)))
  assert "loss/clip/t" not in loaded


@pytest.mark.parametrize(
  "scale,t_max,said",
  [
    (117.33, 100.0, "117.33, .* sets it to 100"),
    (0.5, 100.0, "0.5, .* sets it to 1"),
    (100.001, 100.0, ""),
    (117.33, None, ""),
    (117.33, 120.0, ""),
  ],
)
def test_a_scale_outside_of_the_bounds_of_the_loss_is_named(scale, t_max, said, caplog):
  values = load("tiny").to_dict() | dict(loss=dict(clip=dict(t_max=t_max), siglip={}))
  loss = make_program(resolve_config(values), dataset_size=100).loss
  t, b = jnp.float32(np.log(scale)), jnp.float32(-10.0)
  trainable = {"loss/clip/t": t, "loss/siglip/t": t, "loss/siglip/b": b, "model/x": b}
  warn_of_bounds(loss, State(0, trainable, {}, {}, (), ()), [*trainable])
  texts = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
  assert len(texts) == bool(said)
  if said:
    assert re.match(rf"config\.loss\.clip: the checkpoint has a logit scale of {said}", texts[0])
  caplog.clear()
  warn_of_bounds(loss, State(0, trainable, {}, {}, (), ()), [])  # the config gives the first value
  frozen = {path: trainable.pop(path) for path in ("loss/clip/t",)}  # no update moves it
  warn_of_bounds(loss, State(0, trainable, frozen, {}, (), ()), [*frozen])
  assert not [x for x in caplog.records if x.levelname == "WARNING"]


def weights_of(path):
  """{key: tensor} of a folder."""
  tensors = files.open_tensors(path)
  return {key: np.array(tensors.read(key)) for key in tensors}


@pytest.mark.parametrize(
  "given,message",
  [
    (dict(init="{clip}", image=dict(depth=1)), r"(?s)another shape.*q_proj.weight has 2 layers"),
    (dict(init="{clip}", image=dict(variant="S")), r"patch_embedding.weight .*: \[384, 3, 4, 4\]"),
    (dict(init="{clip}", embed_dim=5), r"visual_projection.weight .*the model's: \[5, 12\]"),
    (
      dict(image=dict(init="{clip}", pool="map", class_token=True), text="{text}", embed_dim=4),
      "nothing fills.*image_tower/map_head",
    ),
    (dict(init="{cut}"), "missing keys.*vision_model.post_layernorm.bias"),
    (dict(init="{clip}", fresh="no_such"), "config.model.fresh: 'no_such' matches no path"),
  ],
)
def test_what_does_not_fit_is_never_drawn_at_random(clip, tmp_path, given, message):
  cut = weights_of(clip)
  cut.pop("vision_model.post_layernorm.bias")
  folder(tmp_path / "cut", CLIP, cut)
  given = json.loads(
    json.dumps(given)
    .replace("{clip}", str(clip))
    .replace('"{text}"', json.dumps(TEXT))
    .replace("{cut}", str(tmp_path / "cut"))
  )
  with pytest.raises(ValueError, match=message):
    load_all(given)


def test_what_is_asked_for_by_name_is_new(clip, tmp_path):
  """A head that the checkpoint lacks, a tensor that is lost, one that is not wanted."""
  head = dict(init=str(clip), pool="map", class_token=True, fresh="map_head/")
  _, loaded = load_all(dict(image=head, text=TEXT, embed_dim=4))
  assert "model/image_tower/extra_tokens" in loaded
  assert not any("map_head" in path or "text" in path for path in loaded)
  tensors = weights_of(clip)
  tensors.pop("vision_model.post_layernorm.bias")
  cut = folder(tmp_path / "cut", CLIP, tensors)
  _, loaded = load_all(dict(init=str(cut), fresh="^model/image_tower/encoder/ln/bias$"))
  assert "model/image_tower/encoder/ln/scale" in loaded
  assert "model/image_tower/encoder/ln/bias" not in loaded
  _, loaded = load_all(dict(init=str(clip), image=dict(pre_norm=False), drop="pre_layrnorm"))
  assert not any("ln_pre" in path for path in loaded)


@pytest.mark.parametrize(
  "given,kind,message",
  [
    (dict(init="$NO_SUCH/clip"), KeyError, "config.model.init.*NO_SUCH is not set; export NO_SUCH"),
    (dict(init="{clip}/x"), FileNotFoundError, "config.model.init='.*/x': no such file or folder"),
    (dict(init=3), TypeError, "config.model.init=3 is of type int"),
    (dict(init="{bert}"), ValueError, "holds no image tower; set it as init of the tower it holds"),
    (
      dict(image=dict(init="{bert}")),
      ValueError,
      "config.model.image.init: .*holds no image tower",
    ),
    (
      dict(init="{clip}", image=dict(init="{clip}"), text=dict(init="{bert}")),
      ValueError,
      "config.model.init gives nothing, since both towers",
    ),
    (dict(init="{clip}", pixels="half"), ValueError, "pixels='half': .*was trained with 'clip'"),
    (dict(init="{clip}", open_clip="ViT-B-16"), ValueError, "both give the sizes"),
    (dict(image=dict(init="{dino}")), ValueError, "preprocessor_config.json: image_mean.*known"),
  ],
)
def test_mistakes_in_where_a_run_starts_are_named(clip, tmp_path, given, kind, message):
  folder(tmp_path / "bert", BERT, bert_keys(BERT)[1])
  shutil.copytree(clip, tmp_path / "dino")
  statistics = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5])
  (tmp_path / "dino/preprocessor_config.json").write_text(json.dumps(statistics))
  text = json.dumps(given)
  for name in ("clip", "bert", "dino"):
    text = text.replace(f"{{{name}}}", str(tmp_path / name))
  with pytest.raises(kind, match=message):
    init.options(json.loads(text))


def test_pixels_are_those_of_the_folder(clip):
  """A family's statistics are not those of each of its models."""
  assert init.options(dict(init=str(clip)))["pixels"] == "clip"
  mean, std = PIXELS["imagenet"]
  (clip / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=mean, image_std=std)))
  assert init.options(dict(init=str(clip)))["pixels"] == "imagenet"
  both = dict(image=dict(init=str(clip)), text=dict(init=str(clip)), embed_dim=4)
  assert init.options(both)["pixels"] == "imagenet"


def test_two_towers_bring_their_own_inputs_and_are_described_once(clip, tmp_path, monkeypatch):
  """Images as the image tower's checkpoint states them, texts as the text tower's does."""
  size = dict(shortest_edge=20), dict(height=16, width=16)
  preprocessor = dict(size=size[0], crop_size=size[1], do_center_crop=True, resample=2)
  (clip / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  bert_json(clip)
  other = folder(tmp_path / "other", CLIP, clip_keys())
  (other / "preprocessor_config.json").write_text(json.dumps(dict(size=dict(height=8, width=8))))
  bert_json(other, lower=False)
  (clip / "added_tokens.json").write_text(json.dumps({"<new>": 40}))
  described = []
  real = init.describe
  monkeypatch.setattr(init, "describe", lambda path, **x: described.append(path) or real(path, **x))
  values = load("tiny").to_dict() | dict(loss=dict(clip={}))
  values["data"] = dict(source="glyphs")
  values["model"] = dict(image=dict(init=str(clip)), text=dict(init=str(other)), embed_dim=4)
  data = resolve_config(values).data
  assert described == [clip, other]
  assert (data.image_size, data.resize, data.resize_edge) == (16, "shortest", 20)
  assert data.interpolation == "bilinear"
  assert data.tokenizer.option("path") == str(other / "tokenizer.json")
  assert data.text_length == 6
  values["model"] = dict(init=str(clip))
  data = resolve_config(values).data
  values["data"] |= dict(resize="longest", tokenizer=dict(length=4))
  config, differences = resolve_and_compare(values)
  assert config.data.resize == "longest" and config.data.text_length == 4
  assert [x.split(",")[0] for x in differences] == [
    "config.data.resize is 'longest'",
    "config.data.tokenizer: a text ends with the id 3",
    "config.data.tokenizer: the token '<new>' has the id None",
  ]
  assert described[2:] == [clip, clip] and data.tokenizer.option("path") == str(
    clip / "tokenizer.json"
  )


def test_a_tower_of_another_checkpoint_stands_beside_the_rest_of_a_model(clip, tmp_path):
  """As AltCLIP's: the image side of CLIP, and another text tower, whose projector is new."""
  bert_json(clip)
  other = folder(tmp_path / "bert", BERT, bert_keys(BERT)[1])
  bert_json(other, lower=False)
  given = dict(init=str(clip), text=dict(init=str(other)))
  program, loaded = load_all(given)
  _, whole = load_all(dict(init=str(clip)))
  _, alone = load_all(dict(image=dict(init=str(clip)), text=dict(init=str(other)), embed_dim=4))
  assert type(program.model.text_tower).__name__ == "Bert"
  sides = {path: x for path, x in whole.items() if path.startswith("model/image_")}
  texts = {path: x for path, x in alone.items() if path.startswith("model/text_")}
  assert sides.keys() | texts.keys() | {"loss/clip/t"} == loaded.keys()
  assert "model/image_projector/out/kernel" in sides and texts
  for path, x in {**sides, **texts}.items():
    np.testing.assert_array_equal(np.asarray(loaded[path]), np.asarray(x), err_msg=path)
  values = load("tiny").to_dict() | dict(loss=dict(clip={}), model=given)
  values["data"] = dict(source="glyphs")
  tokenizer = resolve_config(values).data.tokenizer
  assert tokenizer.option("path") == str(other / "tokenizer.json")


def test_names_of_open_clip_are_sizes(tmp_path):
  """Read from a JSON file as from an installed open_clip; what is written stands in its place."""
  file = tmp_path / "ViT-S-4.json"
  vision = dict(layers=2, width=128, patch_size=4, image_size=16)
  text = dict(width=64, heads=2, layers=1, vocab_size=300, context_length=8)
  file.write_text(json.dumps(dict(embed_dim=32, vision_cfg=vision, text_cfg=text)))
  model = init.options(dict(open_clip=str(file), image=dict(dropout=0.1, depth=3), embed_dim=16))
  assert (model["image"]["width"], model["image"]["depth"], model["embed_dim"]) == (128, 3, 16)
  assert model["pixels"] == "clip" and model["image"]["dropout"] == 0.1
  program, loaded = load_all(dict(open_clip=str(file)))
  assert not loaded and program.model.image_tower.options.sizes.width == 128


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,text_depth",
  [
    ("lit", 6),
    ("lit_b16", 1),
    ("lit_unlocked_b16", 1),
    ("freeze_align_dinov2l_arl", 6),
    ("dinotxt_l16", 1),
  ],
)
def test_the_shipped_configs(clip, tmp_path, monkeypatch, name, text_depth):
  """With small towers and data; and what they say where they have none."""
  c = load(name).to_dict()
  for size in ("name", "variant", "patch"):  # for `bigalign plan`; the checkpoint has its own
    c["model"]["image"].pop(size, None)
  with pytest.raises(KeyError, match=r"config.model.image.init.*export IMAGE_TOWER="):
    init.options(c["model"])
  six = dict(BERT, num_hidden_layers=6)
  text = folder(tmp_path / "bert", six, bert_keys(six)[1])
  pieces = {piece: i for i, piece in enumerate(("[PAD]", "[UNK]", "picture", "number"))}
  tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]")).save(
    str(text / "tokenizer.json")
  )
  monkeypatch.setenv("IMAGE_TOWER", str(clip))
  monkeypatch.setenv("TEXT_TOWER", str(text))
  shards = write_tar(tmp_path / "data/00000.tar", samples(0, 12))
  c["data"] |= dict(source=shards, image_size=24, workers=0)
  c["data"]["tokenizer"]["length"] = 6
  c["optimizer"]["warmup"] = 0
  if "init" not in c["model"]["text"]:
    (tmp_path / "words.txt").write_text("\n".join([*pieces, "[CLS]", "[SEP]", "[MASK]"]) + "\n")
    c["data"]["tokenizer"] |= dict(name="wordpiece", path=str(tmp_path / "words.txt"))
    c["model"]["text"] |= dict(width=24, depth=1, heads=12, length=6)
    c["model"]["embed_dim"] = 12
  steps = 1
  for number, stage in enumerate(c.get("stages", ()), 1):
    stage |= dict(until=number)
    stage["optimizer"]["warmup"] = 0
    steps = number + 1
  c |= dict(total_steps=steps, batch_size=8, writer=dict(tensorboard=False))
  state = train(c, tmp_path / "run")
  assert all(c["frozen"] in path for path in state.frozen)
  arrays = state.frozen if c["frozen"] else state.trainable
  assert arrays["model/image_tower/positions"].shape == (1, 36, 12)
  assert open_run(tmp_path / "run").config.model.text.depth == text_depth


@pytest.mark.slow
def test_the_shipped_config_of_texts_alone(clip, tmp_path, monkeypatch):
  """AltCLIP's first stage, with small towers, from a store made as its docstring says."""
  bert_json(clip)
  known = dict(BERT, max_position_embeddings=8, type_vocab_size=1)
  about = dict(known, model_type="xlm-roberta", pad_token_id=1)
  xlm_r = folder(tmp_path / "xlm_r", about, bert_keys(known)[1])
  bert_json(xlm_r, lower=False)
  rows = [dict(en="a dog" if i % 2 else "dog", other="A Dog" if i % 2 else "Dog") for i in range(8)]
  (tmp_path / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for name, path in (("CLIP_L14", clip), ("XLM_R", xlm_r), ("STORES", tmp_path)):
    monkeypatch.setenv(name, str(path))

  c = load("altclip_1").to_dict()
  c["data"] |= dict(source=f"{tmp_path}/0.jsonl", image_size=16, workers=0)
  english = {k: x for k, x in c["data"].items() if k != "teachers"} | dict(captions=("en",))
  english["tokenizer"] = dict(name="hf", path=str(clip / "tokenizer.json"), length=6)
  teacher = c | dict(data=english, model=dict(init=str(clip)), loss=dict(clip={}))
  made = embed(teacher, tmp_path / "clip_l14", sides=("text",), projected=True, batch_size=8)
  assert made["text"] == tmp_path / "clip_l14/text"

  for side in ("image", "text"):  # for `bigalign plan`; the checkpoints have their own
    c["model"][side] = {k: x for k, x in c["model"][side].items() if k in ("init", "remat")}
  c["model"] = {k: x for k, x in c["model"].items() if k in ("init", "image", "text")}
  c["data"]["teachers"]["clip"]["width"] = 4
  c["data"]["tokenizer"]["length"] = 6
  c["optimizer"]["warmup"] = 0
  c |= dict(total_steps=2, batch_size=8, log_every=1, mesh={}, writer=dict(tensorboard=False))
  state = train(c, tmp_path / "run")
  assert {path.split("/")[1] for path in state.frozen} == {"image_tower", "image_projector"}
  assert {path.split("/")[1] for path in state.trainable} == {"text_tower", "text_projector"}
  first, second = (row["train/loss"] for row in read_metrics(tmp_path / "run"))
  assert 0 < second < first
  _, whole = load_all(dict(init=str(clip)))
  for path, x in state.frozen.items():  # in the dtype of the tower
    wanted = np.asarray(whole[path]).astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(x), wanted, err_msg=path)
  assert type(open_run(tmp_path / "run").config.model.text).__name__ == "BertOptions"
