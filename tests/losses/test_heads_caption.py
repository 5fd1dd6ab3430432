"""Captions: the loss over the vocabulary, decoders, and captions that a model writes."""

from __future__ import annotations

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import both_precisions, cases2, check2, oracles2, run2
from helpers.shipped import load
from helpers.tpu_compiler import compiled_for_tpus

from bigalign import sharding, tree
from bigalign.captions import Captioner, of_config
from bigalign.config import resolve_config
from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.losses import make_loss
from bigalign.losses.heads.base import Read
from bigalign.losses.heads.caption import inputs, vocabulary
from bigalign.losses.heads.caption_search import search
from bigalign.losses.heads.vocabulary import token_losses
from bigalign.plan import topologies
from bigalign.towers.base import TowerOutput

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


# ------------------------------------------------------------------ captions that a model writes

WORDS, LENGTH = 5, 4
_TABLE = np.random.default_rng(0).normal(size=(2, LENGTH, WORDS, WORDS))


def _next(ids, position, beams):
  """Logits that depend on the image, the position and the token before."""
  image = jnp.repeat(jnp.arange(2), beams)
  before = jnp.where(position == 0, 0, ids[:, jnp.maximum(position - 1, 0)])
  return jnp.asarray(_TABLE)[image, position, before]


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
  call = functools.partial(_next, beams=beams)
  found = search(call, batch=2, length=LENGTH, beams=beams, end=end, length_penalty=penalty)
  for image, ids in enumerate(np.asarray(found)):
    texts = {}
    for text in itertools.product(range(WORDS), repeat=LENGTH):
      text = text[: text.index(end) + 1] if end in text else text
      score, tokens = _probability(image, text, end)
      texts[text] = score / tokens**penalty
    best = max(texts, key=texts.get)
    assert tuple(ids[: len(best)]) == best and not ids[len(best) :].any()


def test_one_beam_takes_the_most_probable_token_at_each_place():
  ids = search(functools.partial(_next, beams=1), batch=2, length=LENGTH, start=3)
  for image, row in enumerate(np.asarray(ids)):
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


def test_a_run_without_a_decoder_says_what_is_missing():
  config = resolve_config(load("tiny"))
  with pytest.raises(ValueError, match="no term that writes captions"):
    of_config(config, config.model.build(), config.data.make_tokenizer())


def test_a_head_of_captions_needs_token_ids():
  read = types.SimpleNamespace(sizes=dict(vocabulary=0), batch=dict(text=np.zeros((1, 2), int)))
  with pytest.raises(ValueError, match=r"config.loss.caption predicts the tokens"):
    vocabulary(read, "config.loss.caption")
