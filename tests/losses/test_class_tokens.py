"""Several class tokens, each compared with a text of its own (TIPS)."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_models
from helpers.loss_oracles import AT
from helpers.shipped import load
from helpers.small_runs import config
from helpers.small_shards import picture, write_tar
from test_losses_texts import graded, make, random_texts

from bigalign import sharding, tree
from bigalign.config import resolve_config
from bigalign.export import main as exporter
from bigalign.losses import diagnostics, make_loss
from bigalign.model import make_model
from bigalign.plan import loss_costs
from bigalign.program import check_loss, init_params, make_program
from bigalign.run.metrics import read_metrics
from bigalign.towers import TOWERS
from bigalign.train import train

TOWER = dict(patch=8, width=16, depth=2, heads=2, pool="cls", dtype="float32")
IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)), jnp.uint8)


def random_tokens(count=2):
  """Features of images with `count` class tokens and two texts."""
  feats, _ = random_texts(count=2)
  other = random_texts(count=3, seed=1)[0]["ztxts"]
  zimgs = jnp.concatenate([feats["zimg"][:, None], other[:, 1:count]], 1)
  ztxt, second = feats["ztxts"][:, 0], feats["ztxts"][:, 1]
  return {"zimg": feats["zimg"], "zimgs": zimgs, "ztxt": ztxt, "ztxt_second": second}


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_loss_is_the_mean_of_the_losses_of_each_class_token_and_its_texts(name):
  feats = random_tokens()
  value, _, (_, grads) = graded(make(name, dict(texts="per_class_token")), feats, {})
  assert not np.asarray(grads["zimg"]).any()  # it is the first of zimgs
  values = []
  for m, text in enumerate(("ztxt", "ztxt_second")):
    alone = {"zimg": feats["zimgs"][:, m], "ztxt": feats[text]}
    one, _, (_, wanted) = graded(make(name, {}), alone, {})
    values.append(one)
    np.testing.assert_allclose(grads["zimgs"][:, m], wanted["zimg"] / 2, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads[text], wanted["ztxt"] / 2, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(value, sum(values) / 2, rtol=1e-6)
  assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_there_are_as_many_class_tokens_as_texts(name, tokens):
  with pytest.raises(ValueError, match=rf"class_tokens={tokens}; set it to 2"):
    graded(make(name, dict(texts="per_class_token")), random_tokens(tokens), {})


@pytest.mark.slow
def test_diagnoses_and_costs_read_both_class_tokens():
  terms = dict(clip=dict(texts="per_class_token"), feature_distill=dict(w_txt=0.0))
  loss, feats = make_loss(terms), random_tokens()
  feats |= {"raw_img": 2 * feats["zimg"]}
  batch = {"teacher_img": feats["zimg"]}  # of no distance
  params, state = loss.init({})
  found = diagnostics.diagnose(loss, params, state, feats, batch, AT)
  np.testing.assert_allclose(found["gradient_share/clip"], 1, atol=1e-5)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  both, one = (
    loss_costs.measure("clip", "gather", mesh, batch=32, width=16, options=dict(texts=texts))
    for texts in ("per_class_token", "one")
  )
  assert both["flops"] > 1.9 * one["flops"]


@pytest.mark.slow
def test_one_class_token_is_the_tower_without_the_option():
  """The same parameters, and the same output to the bit."""
  one, plain = (TOWERS["vit"](**TOWER, **x).build() for x in (dict(class_tokens=1), {}))
  pixels = IMAGE.astype(jnp.float32)
  params = [jax.jit(tower.init)(jax.random.key(0), pixels) for tower in (one, plain)]
  jax.tree.map(np.testing.assert_array_equal, *params)
  found, wanted = (x.apply(params[0], pixels) for x in (one, plain))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert found.others is None


@pytest.mark.slow
@pytest.mark.parametrize("class_position", [False, True])
def test_each_class_token_has_its_own_embedding(class_position):
  """The model swaps the embeddings if the class tokens are swapped."""
  text = dict(name="text", vocab_size=9, length=4, width=8, depth=1, heads=1, dtype="float32")
  image = dict(TOWER, name="vit", class_tokens=2, registers=3, class_position=class_position)
  model = make_model(image=image, text=text, embed_dim=12)
  ids = jnp.ones((3, 4), jnp.int32)
  params = tree.flatten(model.init(jax.random.key(0), IMAGE, ids)["params"])
  extra = params["image_tower/extra_tokens"]
  assert extra.shape == (1, 5, 16)
  position = "image_tower/class_position"
  if class_position:
    params[position] = jax.random.normal(jax.random.key(1), params[position].shape)
    assert params[position].shape == (1, 2, 16)

  def features(params):
    feats = model.apply({"params": tree.unflatten(params)}, IMAGE, ids)
    return feats["zimg"], feats["zimgs"]

  first, both = features(params)
  np.testing.assert_array_equal(first, both[:, 0])
  np.testing.assert_allclose(np.linalg.norm(both, axis=-1), 1, rtol=1e-6)
  assert np.abs(both[:, 0] - both[:, 1]).max() > 1e-3
  swapped = dict(params, **{"image_tower/extra_tokens": extra[:, np.asarray([1, 0, 2, 3, 4])]})
  if class_position:
    swapped[position] = params[position][:, ::-1]
  np.testing.assert_allclose(features(swapped)[1], both[:, ::-1], atol=1e-5)
  embedded = model.apply({"params": tree.unflatten(params)}, IMAGE, method="embed_image")
  np.testing.assert_array_equal(embedded, first)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(pool="mean", class_tokens=2), "more only with pool='cls', not pool='mean'"),
    (dict(class_tokens=0), "class_tokens=0: at least 1"),
  ],
)
def test_what_class_tokens_need(changes, message):
  with pytest.raises(ValueError, match=message):
    TOWERS["vit"](**{**TOWER, **changes})


def test_a_loss_of_class_tokens_needs_a_tower_that_has_them():
  c = load("tiny")
  c.data.second_captions, c.data.captions = ("json.long",), ("txt",)
  c.loss = dict(clip=dict(texts="per_class_token"))
  c.model.image.pool = "cls"
  with pytest.raises(ValueError, match=r"Set config\.model\.image\.class_tokens=2"):
    check_loss(make_program(resolve_config(c)))
  c.model.image.class_tokens = 2
  check_loss(make_program(resolve_config(c)))
  c.model.image_projector = dict(name="tokens")
  with pytest.raises(ValueError, match="an image projector of one vector, such as 'linear'"):
    make_program(resolve_config(c))


def test_other_formats_refuse_and_the_module_of_pytorch_has_the_first(tmp_path, monkeypatch):
  """Its output is compared with ours where PyTorch is installed."""
  model = tree.unflatten({**tree.flatten(small_models.PLAIN), "image/class_tokens": 2})
  model["image"]["class_position"] = True
  run = small_models.make_run(
    tmp_path, model, small_models.CLIP_LOSS, small_models.word_pieces(tmp_path)
  )
  for kind in ("hf", "open_clip"):
    with pytest.raises(ValueError, match=r"config\.model\.image\.class_tokens"):
      exporter.export(run, kind, tmp_path / kind)
  if importlib.util.find_spec("torch"):
    _, found = exporter.export(run, "torch", tmp_path / "torch")
    assert found is not None and found <= 2e-5


@pytest.mark.slow
def test_a_run_trains_both_class_tokens(tmp_path):
  members = []
  for i in range(24):
    synthetic = json.dumps(dict(synthetic=f"a picture that is number {i}"))
    members += [(f"{i:03d}.jpg", picture(i)), (f"{i:03d}.txt", f"{i}.jpg".encode())]
    members += [(f"{i:03d}.json", synthetic.encode())]
  c = config({}, batch_size=16, total_steps=8, log_every=1)
  with c.unlocked():
    c.data.update(
      source=write_tar(tmp_path / "0.tar", members),
      image_size=16,
      captions=("txt",),
      second_captions=("json.synthetic",),
    )
    c.model.image.update(pool="cls", class_tokens=2)
    c.loss = dict(clip=dict(weight=1.0, texts="per_class_token"))
  begin = init_params(make_program(resolve_config(c)), jax.random.key(c.seed))
  state = train(c, tmp_path / "run")
  rows = read_metrics(tmp_path / "run")
  assert rows[-1]["train/loss"] < rows[0]["train/loss"]
  assert all(rows[-1][f"train/{name}"] > 0 for name in ("first", "second"))
  path = "model/image_tower/extra_tokens"
  moved = np.abs(np.asarray(state.trainable[path]) - np.asarray(begin[path])).max(-1)
  assert (moved > 1e-4).all()
