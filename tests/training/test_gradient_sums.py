"""Microbatches: copies of the model exchange one gradient a step, the one of the whole batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.one_step import update
from helpers.shipped import load

from bigalign import gradcache, sharding
from bigalign.plan import hlo_collectives
from bigalign.towers import linear

ROWS, WIDTH = 32, 64


def embed(params, batch, key, *, dropout=0.0):
  """A token table, looked up as the towers do, and a kernel."""
  x = linear.lookup(params["table"], batch["ids"], jnp.float32).mean(1)
  if dropout:
    x = x * jax.random.bernoulli(key, 1 - dropout, x.shape)
  return {"z": sharding.constrain_batch(jnp.sin(x @ params["kernel"]))}


@functools.cache
def step(microbatches, *, dropout=0.0, wire=jnp.float32, **sizes):
  """(gradients, collectives) of a loss of the whole batch; without sizes on one device."""
  rng = np.random.default_rng(0)
  params = {
    "table": jnp.asarray(rng.normal(size=(96, WIDTH)), jnp.float32),
    "kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32),
  }
  batch = {"ids": jnp.asarray(rng.integers(0, 96, (ROWS, 4)), jnp.int32)}

  def gradients(params, batch):
    return gradcache.value_and_grad(
      functools.partial(embed, dropout=dropout),
      lambda params, features: ((features["z"].mean(0) ** 2).sum(), ()),
      params,
      batch,
      jax.random.key(0),
      microbatches=microbatches,
      communicated=functools.partial(jax.tree.map, lambda x: x.astype(wire)),
    )[1]

  if not sizes:
    return jax.jit(gradients)(params, batch), {}
  mesh = sharding.make_mesh(**sizes)
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    params = jax.device_put(params, sharding.replicated_sharding(mesh))
    compiled = jax.jit(gradients).lower(params, batch).compile()
    return compiled(params, batch), hlo_collectives.collectives(compiled.as_text())


GRADIENT = (96 + WIDTH) * WIDTH * 4  # bytes


def close(found, expected):
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-6 * np.abs(x).max())


def test_the_gradient_of_all_microbatches_is_summed_over_devices_once():
  """An all-reduce counts as twice its operand."""
  found, moved = step(4, data=8)
  close(found, step(1)[0])
  assert GRADIENT <= moved["all-reduce"].bytes / 2 <= 1.1 * GRADIENT


def test_each_copy_is_distributed_over_its_devices():
  close(step(4, data=2, fsdp=2, tensor=2)[0], step(1)[0])


def test_a_gradient_is_rounded_once_to_the_dtype_in_which_it_is_communicated():
  rounded = step(4, data=8, wire=jnp.bfloat16)[0]
  for name, x in step(4, data=8)[0].items():
    assert 0 < np.abs(np.asarray(rounded[name] - x)).max() < 2**-7 * np.abs(x).max()


def test_random_numbers_are_drawn_for_the_whole_microbatch():
  """So each microbatch communicates; test_dropout_is_drawn_again_in_the_second_pass compares."""
  assert step(4, data=8, dropout=0.5)[1]["all-reduce"].bytes / 2 >= 4 * GRADIENT


def trained(microbatches, **sizes):
  """{path: gradient} of two towers with a teacher and a frozen table; the step's collectives."""
  c = load("tiny").to_dict() | dict(
    batch_size=64,
    microbatches=microbatches,
    frozen="text_tower/embedding",
    ema=0.5,
    optimizer=dict(name="sgd", lr=1.0, momentum=0.0, clip_norm=None),
    loss=dict(siglip={}, albef_itc=dict(queue_size=128)),
    mesh=dict(data=1, fsdp=1, tensor=1) | sizes,
  )
  for side in ("image", "text"):
    c["model"][side] |= dict(depth=2, width=64, heads=4, scan=True, dtype="float32", remat="full")

  def field(rng, name, shape, dtype):
    return np.asarray(
      rng.integers(0, 99, shape) if name in ("image", "text") else np.ones(shape), dtype
    )

  found = update(c, field)
  return found.trainable, hlo_collectives.collectives(found.compiled.as_text())


@pytest.mark.slow
def test_a_step_of_two_towers_in_microbatches_on_two_meshes():
  """Frozen parameters, averages, FSDP and tensor parallelism, and the bytes of data parallelism."""
  expected, _ = trained(1)
  scale = max(np.abs(x).max() for x in expected.values())
  for sizes in (dict(data=8), dict(data=2, fsdp=2, tensor=2)):
    found, moved = trained(4, **sizes)
    for path, x in expected.items():
      # The gradient of a key's bias is zero; what is left of it is rounding of the largest.
      atol = max(1e-5 * np.abs(x).max(), 1e-7 * scale)
      np.testing.assert_allclose(found[path], x, rtol=0, atol=atol, err_msg=f"{sizes} {path}")
    if sizes == dict(data=8):
      size = sum(x.nbytes for x in expected.values())
      assert moved["all-reduce"].bytes / 2 <= 1.1 * size
