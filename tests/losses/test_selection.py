"""JEST's choice of a sub-batch: the second oracles, and equal choices on every mesh."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import both_precisions, cases2, floats, oracles2, unit

from bigalign import sharding
from bigalign.losses.engine import pairwise
from bigalign.losses.selection import Model, jest, logits, part, rows_of, score


@both_precisions
@pytest.mark.parametrize("case", cases2("jest"))
def test_jest(case, precision):
  inputs, p = floats(oracles2().inputs(case), precision), case["params"]
  learner = Model(inputs["img"], inputs["txt"], p["scale"], p["bias"])
  reference = Model(inputs["ref_img"], inputs["ref_txt"], p["ref_scale"], p["ref_bias"])
  none = jnp.zeros(0, jnp.int32)
  z, r = (x.scale * x.zimg @ x.ztxt.T + x.bias for x in (learner, reference))
  got = {
    "scores": score(z, r, jnp.eye(len(z), dtype=bool), p["kind"]),
    "first_logits": logits(learner, reference, none, kind=p["kind"]),
    "next_logits": logits(learner, reference, inputs["chosen"], kind=p["kind"]),
    "greedy": jest(
      *(learner, reference),
      count=p["chunks"] * p["draws"],
      chunks=p["chunks"],
      kind=p["kind"],
    ),
  }
  rtol = 1e-9 if precision == "float64" else 1e-4
  oracles2().check(case, got, rtol=rtol, require=[*got])


def models(size=64, seed=0):
  rng = np.random.default_rng(seed)
  x = [jnp.asarray(unit(rng.normal(size=(size, 8))), jnp.float32) for _ in range(4)]
  return Model(x[0], x[1], 10.0, -5.0), Model(x[2], x[3], 20.0, -8.0)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_same_pairs_are_chosen_on_every_mesh_and_in_every_way(kind):
  learner, reference = models()
  found = []
  for mesh, way in ((None, "dense"), (sharding.make_mesh(data=4, fsdp=2), "ring")):
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      engine = pairwise.Engine(way, tile_mb=1e-4)

      def choose(learner, reference, engine=engine):
        key = jax.random.key(3)
        return jest(learner, reference, count=16, chunks=4, kind=kind, key=key, engine=engine)

      given = (learner, reference)
      if mesh:
        rows = sharding.batch_sharding(mesh)
        given = [Model(*(jax.device_put(x, rows) for x in m[:2]), *m[2:]) for m in given]
      found.append(jax.jit(choose)(*given).tolist())
  assert found[0] == found[1] and len({*found[0]}) == 16


@pytest.mark.slow
def test_a_learner_that_is_the_reference_chooses_at_random():
  """All logits are equal, so each key draws other pairs."""
  learner, _ = models()
  first = logits(learner, learner, jnp.arange(3))
  np.testing.assert_allclose(first[3:], 0, atol=1e-5)
  draws = [
    {*jest(learner, learner, count=8, chunks=2, key=jax.random.key(k)).tolist()} for k in (0, 1)
  ]
  assert draws[0] != draws[1]


def test_what_only_the_learner_finds_hard_is_chosen_first():
  z = jnp.eye(16)
  learner = Model(z, z.at[5].set(z[6]).at[6].set(z[5]), 10.0, -5.0)
  for kind in ("softmax", "sigmoid"):
    found = jest(learner, Model(z, z, 10.0, -5.0), count=4, chunks=2, kind=kind)
    assert {*found[:2].tolist()} == {5, 6}


def test_rows_of_a_sharded_array_are_exact():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 3)), jnp.float32)
  index = jnp.asarray([23, 0, 7, 7])
  mesh = sharding.make_mesh(data=8)
  with jax.set_mesh(mesh):
    found = jax.jit(rows_of)(jax.device_put(x, sharding.batch_sharding(mesh)), index)
  np.testing.assert_array_equal(found, x[index])


def test_a_part_of_a_batch_is_exact_and_split_over_the_devices():
  rng = np.random.default_rng(0)
  index = jnp.asarray([23, 0, 7, 8, 9, 10, 11, 22])
  batch = dict(
    image=rng.integers(0, 256, (24, 2, 2, 3), np.uint8),
    mask=rng.integers(0, 2, (24, 5)).astype(bool),
    label=rng.integers(-3, 9, 24, np.int32),
    vector=np.asarray(jnp.asarray(rng.normal(size=(24, 3)), jnp.bfloat16)),
  )
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    split = sharding.batch_sharding(mesh)
    found = jax.jit(lambda batch, i: {k: part(x, i) for k, x in batch.items()})(
      {k: jax.device_put(x, split) for k, x in batch.items()}, index
    )
  for name, x in batch.items():
    np.testing.assert_array_equal(found[name], x[index], err_msg=name)
    assert found[name].dtype == x.dtype and found[name].sharding.is_equivalent_to(split, x.ndim)
    np.testing.assert_array_equal(part(jnp.asarray(x), index), x[index])


@pytest.mark.parametrize("count,chunks", [(0, 1), (65, 1), (8, 3)])
def test_numbers_of_pairs_that_do_not_fit_are_named(count, chunks):
  with pytest.raises(ValueError, match=rf"count={count} of 64 pairs in chunks={chunks}"):
    jest(*models(), count=count, chunks=chunks)
