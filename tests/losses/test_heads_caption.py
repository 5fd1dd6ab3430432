"""Captions: the loss over the vocabulary, decoders, and captions that a model writes."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from helpers.loss_oracles import both_precisions, cases2, check2, floats, oracles2, run2, unit
from helpers.shipped import load
from helpers.tpu_compiler import compiled_for_tpus

from bigalign import sharding, tree, weights
from bigalign.captions import Captioner, of_config
from bigalign.config import resolve_config
from bigalign.data.fields.regions import BOXES, MASK
from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.losses import first_context, make_loss
from bigalign.losses.heads.base import Read, Writing
from bigalign.losses.heads.caption import inputs, vocabulary
from bigalign.losses.heads.caption_search import search
from bigalign.losses.heads.vocabulary import token_losses
from bigalign.model import make_model
from bigalign.plan import topologies
from bigalign.towers.base import TowerOutput
from bigalign.weights import init, open_clip, table, transfer

# ------------------------------------------------------------------ the loss over the vocabulary


@pytest.mark.parametrize("case", cases2("caption_ce"))
@both_precisions
def test_the_cross_entropy_of_a_vocabulary(case, precision):
  """With every size of a block, as of the tokens in the vectors."""
  params = case["params"]
  for chunk in params["chunks"]:

    def value(inputs, _, chunk=chunk):
      valid = inputs["labels"] != params["pad"]
      losses = token_losses(
        inputs["hidden"],
        inputs["kernel"],
        inputs["labels"],
        label_smoothing=params.get("label_smoothing", 0.0),
        chunk=chunk,
      )
      total = params["weight"] * jnp.where(valid, losses.nll, 0).sum() / valid.sum()
      return total, {"loss": total, "tokens": valid.sum()}

    check2(case, run2(case, precision, value, key=(chunk,)), precision, require=["tokens"])


def _tokens(b=8, length=3, width=4, words=10):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(b, length, width)).astype(np.float32)
  kernel = rng.normal(size=(width, words)).astype(np.float32)
  return hidden, kernel, rng.integers(0, words, (b, length)).astype(np.int32)


slow = pytest.mark.slow


@pytest.mark.parametrize(
  "mesh", [(2, 2, 2), pytest.param((4, 1, 2), marks=slow), pytest.param((1, 8, 1), marks=slow)]
)
def test_the_cross_entropy_is_equal_on_every_mesh(mesh):
  """With words in two parts on the axis "tensor"; compared with plain logits."""
  hidden, kernel, labels = _tokens()
  weights = np.linspace(0, 1, labels.size, dtype=np.float32).reshape(labels.shape)

  def plain(hidden, kernel):
    logs = jax.nn.log_softmax(hidden @ kernel)
    one = jnp.take_along_axis(logs, labels[..., None], -1)[..., 0]
    nll = -0.9 * one - 0.1 * logs.mean(-1)
    return (weights * nll).sum(), (hidden @ kernel).argmax(-1) == labels

  def blocks(hidden, kernel):
    losses = token_losses(hidden, kernel, labels, label_smoothing=0.1, chunk=4)
    return (weights * losses.nll).sum(), losses.correct

  wanted = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, kernel)
  devices = sharding.make_mesh(**dict(zip(sharding.AXES, mesh)))
  with jax.set_mesh(devices):
    rows = jax.device_put(hidden, sharding.batch_sharding(devices))
    found = jax.jit(jax.value_and_grad(blocks, (0, 1), has_aux=True))(rows, kernel)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


def test_the_words_of_a_block_follow_from_the_tokens():
  """No array of the program has as many elements as the logits."""
  b, length, width, words = 64, 16, 8, 40_000
  shapes = (
    jax.ShapeDtypeStruct((b, length, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((width, words), jnp.float32),
    jax.ShapeDtypeStruct((b, length), jnp.int32),
  )

  def value(hidden, kernel, labels):
    return token_losses(hidden, kernel, labels).nll.sum()

  text = jax.jit(jax.grad(value, (0, 1))).lower(*shapes).as_text()
  assert f"{b * length}x16384xf32" in text and f"{b * length}x{words}" not in text


@compiled_for_tpus
def test_a_vocabulary_of_a_quarter_of_a_million_needs_300_mb():
  """128 captions of 64 tokens on a chip, width 768, bfloat16 states: loss and both gradients."""
  grid = sharding.make_mesh(data=1, devices=topologies.devices("v5e:2x2")[:1])
  everywhere = sharding.replicated_sharding(grid)
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    for shape, dtype in [
      ((128, 64, 768), jnp.bfloat16),
      ((768, 256_000), jnp.float32),
      ((128, 64), jnp.int32),
    ]
  ]

  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def value(hidden, kernel, labels):
    return token_losses(hidden, kernel, labels).nll.mean()

  with jax.set_mesh(grid):
    program = topologies.compile_without_cache(jax.jit(value).lower(*shapes))
  memory = program.memory_analysis()
  assert memory.temp_size_in_bytes <= 300e6


# ------------------------------------------------------------------ decoders


@pytest.mark.parametrize("case", cases2("cappa_inputs"))
def test_what_a_decoder_reads(case):
  labels = oracles2().inputs(case)["labels"]
  found = {}
  for name, parallel in dict(autoregressive=False, parallel=True).items():
    rows = np.full(len(labels), parallel)
    params = case["params"]
    read = inputs(jnp.asarray(labels), rows, mask_id=params["mask_id"], start=params["bos"])
    visible = np.asarray(read.visible[0, 0])
    found |= {name: read.ids, "full" if parallel else "causal": visible}
  found["weights"] = labels != 0
  expected = oracles2().expected(case)
  assert found.keys() == expected.keys()
  for name, (wanted, _) in expected.items():
    np.testing.assert_array_equal(found[name], np.broadcast_to(wanted, np.shape(found[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caption", "caption_fused", "coca", "grain"])
def test_layers_of_a_decoder_may_be_one_program(name):
  """Stacked and recomputed, they have the losses and the gradients of separate layers."""
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(0, 20, (3, 6)), jnp.int32)
  batch = dict(text=ids, text_mask=ids > 2, parallel=np.array([True, False, False]))
  corners = np.sort(rng.uniform(size=(3, 2, 2, 2)), axis=2).reshape(3, 2, 4)
  batch |= {BOXES: corners.astype(np.float32), MASK: np.array([[1, 1], [1, 0], [1, 1]])}
  features = dict(
    tokens_img=rng.normal(size=(3, 4, 8)).astype(np.float32),
    tokens_txt=rng.normal(size=(3, 6, 8)).astype(np.float32),
  )
  read = Read(batch, features, None, None, None, dict(vocabulary=20, embed=5, causal=True))
  own, terms = {"grain": (dict(width=8, w_region=0.0), ("l1", "giou", "image"))}.get(
    name, ({}, ("sum",))
  )

  def graded(params, **options):
    """A sum of what the loss is made of, and its gradients."""

    def value(params):
      found = made(**options).apply(tree.unflatten(params), {}, read)
      return sum((found[k].ravel() * (1 + np.arange(found[k].size))).sum() for k in terms)

    return jax.jit(jax.value_and_grad(value))(params)

  def made(**options):
    return make_loss({name: dict(depth=3, heads=2, **own, **options)}).terms[name][1].head

  shapes = tree.flatten(jax.eval_shape(lambda: made().init(jax.random.key(0), read)))
  stacked = {k: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype) for k, x in shapes.items()}
  one, grads = graded(stacked, scan=True, remat="full")
  other, wanted = graded(separate(stacked), scan=False)
  np.testing.assert_allclose(one, other, rtol=1e-5)
  grads = separate(grads)
  assert grads.keys() == wanted.keys() and any("block_2/" in path for path in wanted)
  for path, x in wanted.items():
    np.testing.assert_allclose(grads[path], x, atol=1e-5 * np.abs(x).max() + 1e-6, err_msg=path)


def separate(arrays):
  """{path: array} with a path for each layer of stacked ones."""
  layers = {}
  for path, x in arrays.items():
    each = enumerate(x) if tree.is_stacked(path) else [(0, x)]
    layers |= {tree.layer_path(path, i): one for i, one in each}
  return layers


# ------------------------------------------------------------------ CoCa


def _coca_config(inputs, params):
  """The config of open_clip for the parameters of a case."""
  shapes = {name[3:]: x.shape for name, x in inputs.items() if name.startswith("sd/")}
  vocab, width = shapes["text.token_embedding.weight"]
  image_width = shapes["visual.class_embedding"][0]
  heads, layers = params["heads"], params["layers"]
  vision = dict(
    **dict(layers=layers, width=image_width, head_width=image_width // heads),
    **dict(patch_size=params["patch"], image_size=inputs["image"].shape[-1]),
    **dict(attentional_pool=True, attn_pooler_heads=params["pool_heads"]),
    attn_pooler_queries=shapes["visual.attn_pool.query"][0],
  )
  text = dict(
    **dict(context_length=inputs["text"].shape[1], vocab_size=vocab, width=width),
    **dict(heads=heads, layers=layers, embed_cls=True),
    correct_cls_mask=params["correct_cls_mask"],
  )
  sizes = dict(embed_dim=shapes["visual.proj"][1], vision_cfg=vision, text_cfg=text)
  return sizes | dict(multimodal_cfg=dict(layers=layers, heads=heads))


class CoCa:
  """Our towers and decoder for a config of open_clip's CoCa."""

  def __init__(self, config, shapes, dtype):
    self.layout = open_clip.open_clip(shapes, "", "", **config)
    given = dict(self.layout.model)
    for side in ("image", "text"):
      given[side] = given[side] | dict(dtype=dtype, scan=False)
    self.model = make_model(**given)
    of_decoder = config["multimodal_cfg"]
    term = dict(scan=False, depth=of_decoder["layers"], heads=of_decoder["heads"])
    self.loss = make_loss(dict(clip={}, coca=dict(weight=2.0, **term)))
    self.head = self.loss.terms["coca"][1].head
    self.sizes = dict(vocabulary=given["text"]["vocab_size"], causal=True)

  def features(self, params, pixels, text):
    """What the towers make of normalised pixels [B, H, W, 3] and of ids."""
    variables = {"params": params["model"]}
    call = functools.partial(self.model.apply, variables)
    mask = text != 0
    image = call(pixels, method=lambda m, x: m.image_tower(x))
    out = call(text, mask, method="text_output")
    kernels = (params["model"][f"{side}_projector"]["out"]["kernel"] for side in ("image", "text"))
    raw = [tower.pooled @ kernel for tower, kernel in zip((image, out), kernels)]
    rows = dict(zimg=unit(raw[0]), ztxt=unit(raw[1]), raw_img=raw[0], raw_txt=raw[1])
    return rows | dict(tokens_img=image.tokens, tokens_txt=out.tokens)

  def read(self, feats, text):
    batch = dict(text=text, text_mask=text != 0)
    return Read(batch, feats, None, None, None, self.sizes)

  def logits(self, heads, read):
    """[B, L, V], written token by token, from the states that the text tower has for a text."""
    tokens = read.features["tokens_txt"]
    read = read._replace(text_steps=lambda ids, place, cache=None: (tokens[:, place], {}))
    # One token more, so that the one after the last is predicted too.
    longer = dict(read.batch, text=jnp.zeros((len(tokens), tokens.shape[1] + 1), jnp.int32))
    writing = self.head.write(heads, read._replace(batch=longer))

    def one(cache, position):
      logits, cache = writing.step(longer["text"][:, 0], position, cache)
      return cache, logits

    _, logits = jax.lax.scan(one, writing.cache, jnp.arange(tokens.shape[1] + 1))
    return rearrange(logits[1:], "l b v -> b l v")

  def init(self, pixels, text):
    """{path: shape} of all parameters, those of the model without "model/"."""

    def make():
      own = dict(method=lambda m, x: m.image_projector(m.image_tower(x), False))
      image = self.model.init(jax.random.key(0), pixels, **own)["params"]
      own = dict(method=lambda m, x: m.text_projector(m.text_tower(x, x != 0), False))
      words = self.model.init(jax.random.key(0), text, **own)["params"]
      model = image | words
      feats = self.features({"model": model}, pixels, text)
      return model | {"heads": {"coca": self.head.init(KEY, self.read(feats, text))}}

    return tree.flatten(jax.eval_shape(make))


KEY = jax.random.key(0)


def _attention(query, key, value, *, bias=None, mask=None, is_causal=False, implementation=None):
  """jax.nn.dot_product_attention, whose softmax is float32, in the precision of its arguments."""
  logits = jnp.einsum("bnhk,bmhk->bhnm", query, key) / query.shape[-1] ** 0.5
  n, m = logits.shape[2:]
  logits = logits if bias is None else logits + bias
  seen = jnp.ones((1, 1, n, m), bool) if mask is None else mask
  seen = seen & (jnp.tril(jnp.ones((n, m), bool)) | (not is_causal))[None, None]
  weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
  return jnp.einsum("bhnm,bmhk->bnhk", weights, value)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases2("coca"))
@both_precisions
def test_coca_of_open_clip(case, precision, monkeypatch):
  """Embeddings, logits, losses and gradients, which go back through the table of its keys."""
  if precision == "float64":
    monkeypatch.setattr(jax.nn, "dot_product_attention", _attention)
  inputs = floats(oracles2().inputs(case), precision)
  shapes = {name[3:]: x for name, x in inputs.items() if name.startswith("sd/")}
  pixels = rearrange(inputs["image"], "b c h w -> b h w c")
  coca = CoCa(_coca_config(inputs, case["params"]), shapes, precision)
  paths = coca.init(pixels, inputs["text"])
  params = {}
  for row in coca.layout.rows:
    for conversion in table.conversions(row, paths):
      arrays = table.to_ours(conversion, [np.asarray(shapes[key]) for key in conversion.theirs])
      params |= dict(zip(conversion.ours, arrays))
  assert params.keys() == paths.keys()
  assert {k for row in coca.layout.rows for k in table.keys(row)} - {"logit_scale"} == {*shapes}

  def value(params, log_scale):
    ours = tree.unflatten(params)
    heads = ours.pop("heads")["coca"]
    feats = coca.features({"model": ours}, pixels, inputs["text"])
    read = coca.read(feats, inputs["text"])
    rows = {f"coca/{k}": x for k, x in coca.head.apply(heads, {}, read).items()}
    scalars = {"clip": {"t": log_scale}}
    total, (_, metrics) = coca.loss.apply(scalars, {}, feats | rows, read.batch, first_context())
    return total, dict(
      **dict(loss=total, caption=metrics["coca/loss"], contrastive=metrics["clip/loss"]),
      **dict(zimg=feats["zimg"], ztxt=feats["ztxt"], memory=feats["tokens_img"]),
      logits=coca.logits(heads, read),
    )

  log_scale = jnp.asarray(case["scalars"]["log_scale"], precision)
  (_, found), grads = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(params, log_scale)
  theirs = dict(transfer.write(coca.layout, grads[0] | {"t": np.zeros(())}))
  found |= {f"d_sd/{name}": x for name, x in theirs.items()} | {"d_log_scale": grads[1]}
  check2(case, found, precision, require=["logits", "memory", "zimg", "caption"])


ORACLES = os.environ.get("BIGALIGN_TOWER_ORACLES2")
WHY = "BIGALIGN_TOWER_ORACLES2 is not set: the second set of expected outputs of towers"


@pytest.mark.slow
@pytest.mark.skipif(not ORACLES, reason=WHY)
def test_a_checkpoint_of_coca():
  """Its embeddings, logits and losses to 2e-5, with the parameters that a run would load."""
  folder = pathlib.Path(ORACLES) / "oc_coca_like"
  checkpoint = weights.describe(folder)
  config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
  io = dict(np.load(folder / "io.npz"))
  pixels, text = rearrange(io["pixel_values"], "b c h w -> b h w c"), io["input_ids"]
  coca = CoCa(config, checkpoint.tensors, "float32")
  shapes = coca.init(pixels, jnp.asarray(text))
  as_in_run = {k if k.startswith("heads/") else f"model/{k}": x for k, x in shapes.items()}
  everywhere = sharding.replicated_sharding(sharding.make_mesh(data=1, devices=jax.devices()[:1]))
  loss = dict(clip={}, coca={})
  model = dict(init=str(folder), image=dict(scan=False), text=dict(scan=False))
  as_in_run["loss/clip/t"] = jax.ShapeDtypeStruct((), jnp.float32)
  loaded = init.load(dict(model=model, loss=loss), as_in_run, dict.fromkeys(as_in_run, everywhere))
  assert loaded.keys() == as_in_run.keys()
  feats = coca.features({"model": tree.unflatten(tree.subtree(loaded, "model/"))}, pixels, text)
  heads = tree.unflatten(tree.subtree(loaded, "heads/coca/"))
  read = coca.read(feats, jnp.asarray(text, jnp.int32))
  rows = {f"coca/{k}": x for k, x in coca.head.apply(heads, {}, read).items()}
  scalars = {"clip": {"t": loaded["loss/clip/t"]}}
  total, (_, metrics) = coca.loss.apply(scalars, {}, feats | rows, read.batch, first_context())
  found = dict(
    **dict(
      image_latent=feats["zimg"], text_latent=feats["ztxt"], logits=coca.logits(heads, read)[:, :-1]
    ),
    **dict(image_tokens=feats["tokens_img"], text_tokens=feats["tokens_txt"]),
    **dict(contrastive_loss=metrics["clip/loss"], caption_loss=2 * metrics["coca/loss"]),
    total_loss=total,
  )
  for name, x in found.items():
    wanted = io[f"out_{name}"]
    np.testing.assert_allclose(np.reshape(x, wanted.shape), wanted, atol=2e-5, err_msg=name)


# ------------------------------------------------------------------ captions that a model writes

WORDS, LENGTH = 5, 4
_TABLE = np.random.default_rng(0).normal(size=(2, LENGTH, WORDS, WORDS))


def _writing(beams):
  """Logits that depend on the image, the position and the token before."""

  def step(before, position, cache):
    return jnp.asarray(_TABLE)[cache["image"], position, before], cache

  return Writing(step, {"image": jnp.repeat(jnp.arange(2), beams)})


def _probability(image, text, end):
  """(log probability, tokens) of a text; what follows the end does not count."""
  total, before = 0.0, 0
  for position, word in enumerate(text):
    logits = _TABLE[image, position, before]
    total += logits[word] - np.log(np.exp(logits).sum())
    before = word
    if word == end:
      return total, position + 1
  return total, len(text)


@pytest.mark.parametrize("end,penalty", [(None, 0.0), (2, 0.0), (2, 1.0)])
def test_enough_beams_find_the_most_probable_text(end, penalty):
  beams = WORDS**LENGTH
  options = dict(batch=2, length=LENGTH, beams=beams, end=end, length_penalty=penalty)
  found = search(_writing(beams), **options)
  for image, ids in enumerate(np.asarray(found.ids)):
    texts = {}
    for text in itertools.product(range(WORDS), repeat=LENGTH):
      text = text[: text.index(end) + 1] if end in text else text
      score, tokens = _probability(image, text, end)
      texts[text] = score / tokens**penalty
    best = max(texts, key=texts.get)
    assert tuple(ids[: len(best)]) == best and not ids[len(best) :].any()
    np.testing.assert_allclose(found.scores[image], _probability(image, best, end)[0], rtol=1e-5)


def test_one_beam_takes_the_most_probable_token_at_each_place():
  found = search(_writing(1), batch=2, length=LENGTH, prompt=[3])
  for image, row in enumerate(np.asarray(found.ids)):
    assert row[0] == 3
    for position in range(1, LENGTH):
      assert row[position] == _TABLE[image, position, row[position - 1]].argmax()


class Towers:
  """Stands for a dual encoder: 3 tokens of an image, and 6 of a text."""

  def apply(self, variables, x, mask=None, *, method):
    if method == "image_output":
      tokens = jnp.sin(jnp.arange(24.0).reshape(1, 3, 8) + x.mean((1, 2, 3))[:, None, None])
      return TowerOutput(tokens[:, 0], tokens)
    tokens = jnp.zeros((*x.shape, 8))
    return TowerOutput(tokens[:, 0], tokens, mask)


@pytest.mark.slow
def test_the_decoder_predicts_each_token_of_its_own_caption():
  """What the head writes is what its training path finds most probable, token by token."""
  tokenizer = make_tokenizer("byte", length=6)
  loss = make_loss(dict(caption=dict(depth=1, heads=2)))
  head, sizes = loss.terms["caption"][1].head, dict(vocabulary=tokenizer.vocab_size)
  images = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
  images[1] += 2
  image = Towers().apply({}, images, method="image_output").tokens
  ids = jnp.zeros((2, 6), jnp.int32)
  batch = dict(text=ids, text_mask=ids == 0, parallel=np.zeros(2, bool))
  read = Read(batch, dict(tokens_img=image, tokens_txt=image), None, None, None, sizes)
  params = jax.jit(lambda key: head.init(key, read))(jax.random.key(0))
  kernel = params["logits"]["kernel"]
  assert not kernel.any(), "as in CapPa: each token has the same probability at first"
  params["logits"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
  captioner = Captioner("caption", head, Towers(), sizes, tokenizer)
  own = tree.flatten(params, "heads/caption/")
  ids = np.asarray(jax.jit(captioner.ids)(own, images))
  assert len({tuple(row) for row in ids.tolist()}) == 2, "captions depend on the images"
  mask = np.cumsum(np.cumsum(ids == tokenizer.eos, 1), 1) <= 1  # the end counts
  read = read._replace(batch=batch | dict(text=ids, text_mask=mask))
  rows = jax.jit(lambda params: head.apply(params, {}, read))(params)
  assert rows["correct"] == mask.sum() == rows["count"].sum() < ids.size
  assert captioner.texts(ids) == [tokenizer.decode(row[seen]) for row, seen in zip(ids, mask)]


@pytest.mark.slow
def test_texts_with_boxes_are_predicted_token_by_token_after_their_beginning():
  """A caption among them may be predicted in parallel; what is not counted has no effect."""
  rng = np.random.default_rng(0)
  image = rng.normal(size=(3, 3, 8)).astype(np.float32)
  ids = jnp.asarray(rng.integers(0, 20, (3, 6)), jnp.int32)
  counted = np.arange(6)[None].repeat(3, 0) >= np.array([[1], [2], [3]])
  batch = dict(text=ids, text_mask=ids == ids, parallel=np.ones(3, bool))
  batch |= dict(task=np.arange(3), task_text=ids[:, ::-1], task_counted=counted)
  features = dict(tokens_img=image, tokens_txt=jnp.zeros((3, 6, 8)))
  read = Read(batch, features, None, None, None, dict(vocabulary=20))

  def head(**options):
    return make_loss(dict(caption=dict(depth=1, heads=2, **options))).terms["caption"][1].head

  own = head(tasks=True).init(jax.random.key(0), read)
  own["logits"]["kernel"] = jax.random.normal(jax.random.key(1), own["logits"]["kernel"].shape)
  found = head(tasks=True).apply(own, {}, read)
  assert found["count"].tolist() == [5, 4, 3]
  plain = dict(text=ids[:, ::-1], text_mask=counted, parallel=np.arange(3) == 0)
  wanted = head().apply(own, {}, read._replace(batch=plain))
  np.testing.assert_array_equal(found["sum"], wanted["sum"])


@pytest.mark.slow
def test_a_caption_is_what_follows_the_name_of_its_task():
  tokenizer = make_tokenizer("byte", length=12)
  loss = make_loss(dict(caption=dict(depth=1, heads=2, tasks=True)))
  head, sizes = loss.terms["caption"][1].head, dict(vocabulary=tokenizer.vocab_size)
  image = Towers().apply({}, jnp.zeros((2, 4, 4, 3)), method="image_output").tokens
  ids = jnp.zeros((2, 12), jnp.int32)
  batch, features = dict(text=ids, task_text=ids), dict(tokens_img=image, tokens_txt=image)
  read = Read(batch, features, None, None, None, sizes)
  params = head.init(jax.random.key(0), read)
  kernel = params["logits"]["kernel"]
  params["logits"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
  captioner = Captioner("caption", head, Towers(), sizes, tokenizer)
  own = tree.flatten(params, "heads/caption/")
  for beams in (1, 3):
    call = functools.partial(captioner.ids, beams=beams)
    ids = np.asarray(jax.jit(call)(own, np.zeros((2, 4, 4, 3), np.float32)))
    assert [tokenizer.decode(row[:4].tolist()) for row in ids] == ["Cap:"] * 2
    texts = captioner.texts(ids)
    ends = [(*np.flatnonzero(row == tokenizer.eos), 12)[0] for row in ids]
    rest = [tokenizer.decode(row[4:end].tolist()) for row, end in zip(ids, ends)]
    assert texts == [text.lstrip() for text in rest] and any(texts)


def test_a_run_without_a_decoder_says_what_is_missing():
  config = resolve_config(load("tiny"))
  with pytest.raises(ValueError, match="no term that writes captions"):
    of_config(config, config.model.build(), config.data.make_tokenizer())


def test_a_head_of_captions_needs_token_ids():
  read = types.SimpleNamespace(sizes=dict(vocabulary=0), batch=dict(text=np.zeros((1, 2), int)))
  with pytest.raises(ValueError, match=r"config.loss.caption predicts the tokens"):
    vocabulary(read, "config.loss.caption")


# ------------------------------------------------------------------ against the whole text

_SHORT = dict(vocab_size=12, length=6)
_TRANSFORMER = dict(width=16, depth=2, heads=2, dtype="float32")
_HEADS = dict(
  caption=dict(caption=dict(depth=2, heads=2, parallel=0.0)),
  caption_unrolled=dict(caption=dict(depth=2, heads=2, parallel=0.0, scan=False)),
  queries=dict(caption_fused=dict(depth=2, heads=2)),
  tokens=dict(caption_fused=dict(depth=2, heads=2, inputs="tokens")),
  coca=dict(coca=dict(depth=2, heads=2)),
)


class Vocabulary(NamedTuple):
  """Stands for a tokenizer."""

  length: int = _SHORT["length"]
  adds_start: bool = False
  adds_end: bool = True
  first_id: int = 1
  last_id: int = 2


class Whole:
  """The log probability of texts as training computes it, which reads each text as a whole."""

  def __init__(self, name, coca):
    term = _HEADS[name]
    ((self.name, _),) = term.items()
    image = dict(name="vit", patch=4, positions="learned", scan=False, **_TRANSFORMER)
    text = dict(name="text", causal=True, **_SHORT, **_TRANSFORMER)
    if coca:
      image |= dict(pool="queries", queries=4, query_heads=2, query_width=16, class_token=True)
      text |= dict(pool="class")
    self.model = make_model(image=image, text=text, embed_dim=16)
    self.head = make_loss(term).terms[self.name][1].head
    self.sizes = dict(vocabulary=_SHORT["vocab_size"], causal=True)
    self.images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    ids = jnp.zeros((2, _SHORT["length"]), jnp.int32)
    self.variables = self.model.init(jax.random.key(0), self.images, ids, ids == 0)
    own = self.head.init(jax.random.key(1), self.read(self.images, ids, ids == 0))
    keys = iter(jax.random.split(jax.random.key(2), 200))
    # Larger than at the start of a run, so that texts differ in their probability.
    self.own = jax.tree.map(lambda x: x + 0.4 * jax.random.normal(next(keys), x.shape), own)

  def read(self, images, ids, mask):
    feats = self.model.apply(self.variables, images, ids, mask)
    batch = dict(text=ids, text_mask=mask, parallel=np.zeros(len(ids), bool))
    return Read(batch, feats, None, None, None, self.sizes)

  @functools.cached_property
  def _sums(self):
    """(image, ids [n, L], counted [n, L]) -> [n]."""

    def sums(image, ids, counted):
      images = jnp.broadcast_to(image, (len(ids), *image.shape))
      read = self.read(images, ids, jnp.ones(ids.shape, bool))
      read = read._replace(batch=read.batch | dict(text_mask=counted))
      return -self.head.apply(self.own, {}, read)["sum"]

    return jax.jit(sums)

  def next_logs(self, image, before):
    """[V]: the log probability of each token after some."""
    words = _SHORT["vocab_size"]
    ids = np.zeros((words, _SHORT["length"]), np.int32)
    ids[:, : len(before)] = before
    ids[:, len(before)] = np.arange(words)
    counted = np.zeros(ids.shape, bool)
    counted[:, len(before)] = True
    return np.asarray(self._sums(self.images[image], ids, counted))

  def search(self, image, beams, tokenizer):
    """(ids, log probability) of the best text that the beams find; the mean of tokens decides."""
    kept = [((tokenizer.first_id,), 0.0)] if tokenizer.adds_start else [((), 0.0)]
    end = tokenizer.last_id
    while any(len(ids) < tokenizer.length and end not in ids for ids, _ in kept):
      longer = []
      for ids, score in kept:
        if end in ids or len(ids) == tokenizer.length:
          longer.append((ids, score))
        else:
          logs = self.next_logs(image, ids)
          longer += [((*ids, word), score + logs[word]) for word in range(len(logs))]
      kept = sorted(longer, key=lambda x: -x[1])[:beams]
    return max(kept, key=lambda x: x[1] / len(x[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", _HEADS)
def test_kept_keys_and_values_write_the_same_captions(name):
  """Greedy and with beams; the reference reads each beginning of a text as a whole."""
  coca = name == "coca"
  whole = Whole(name, coca)
  tokenizer = Vocabulary(adds_start=coca)
  captioner = Captioner(whole.name, whole.head, whole.model, whole.sizes, tokenizer)
  params = tree.flatten(whole.variables["params"], "model/")
  params |= tree.flatten(whole.own, f"heads/{whole.name}/")
  different = set()
  for beams in (1, 3):
    found = jax.jit(functools.partial(captioner.found, beams=beams))(params, whole.images)
    for image in range(2):
      ids, score = whole.search(image, beams, tokenizer)
      written = tuple(np.asarray(found.ids[image]).tolist())
      assert written == (*ids, *(0,) * (tokenizer.length - len(ids))), (beams, image)
      np.testing.assert_allclose(found.scores[image], score, rtol=1e-5)
      different.add(written)
  assert len(different) > 1
