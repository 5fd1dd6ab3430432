"""Captions: the loss over the vocabulary, decoders, and captions that a model writes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import both_precisions, cases2, check2, oracles2, run2
from helpers.tpu_compiler import compiled_for_tpus

from bigalign import sharding
from bigalign.losses.heads.caption import inputs
from bigalign.losses.heads.vocabulary import token_losses
from bigalign.plan import topologies

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
