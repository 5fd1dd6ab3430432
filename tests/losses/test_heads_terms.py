"""The terms of heads of regions and captions, on given vectors and logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import both_precisions, cases, floats, oracles, unit

from bigalign import sharding
from bigalign.losses.engine import pairwise
from bigalign.losses.heads.base import mean_over_batch
from bigalign.losses.heads.caption import counted
from bigalign.losses.heads.region_phrase import cloc_region


def compare(case, got, precision):
  wanted = [k for k in (*case["expect"], *case["arrays"]) if k != "n_tokens"]
  rtol = 1e-9 if precision == "float64" else 1e-4
  oracles().check(case, got, rtol=rtol, require=wanted)


def inputs_of(case, precision, normed):
  """Inputs and a function that makes those in `normed` unit rows if the case says so."""
  inputs = floats(oracles().inputs(case), precision)
  learned = {k: inputs.pop(k) for k in normed}
  return inputs, learned, unit if case["normalize"] else lambda x: x


@both_precisions
@pytest.mark.parametrize("case", cases("cloc_region"))
def test_cloc_region(case, precision):
  inputs, learned, norm = inputs_of(case, precision, ("regions", "phrases"))
  log_scale = jnp.asarray(case["scalars"]["log_scale"], precision)

  def value(learned, log_scale):
    r2t, t2r = cloc_region(
      norm(learned["regions"]),
      norm(learned["phrases"]),
      inputs["mask"],
      inputs["phrase_id"],
      jnp.exp(log_scale),
    )
    return (r2t + t2r) / 2, dict(r2t=r2t, t2r=t2r)

  (loss, parts), (d_z, d_scale) = jax.value_and_grad(value, (0, 1), has_aux=True)(
    learned, log_scale
  )
  got = {"loss": loss, **parts, **{f"d_{k}": x for k, x in d_z.items()}, "d_log_scale": d_scale}
  compare(case, got, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("coca_caption"))
def test_coca_caption(case, precision):
  inputs, p = floats(oracles().inputs(case), precision), case["params"]
  kernel = jnp.eye(inputs["logits"].shape[-1], dtype=precision)

  def value(logits):
    mask = inputs["labels"] != p["pad_id"]
    return p["weight"] * mean_over_batch(counted(logits, kernel, inputs["labels"], mask))

  loss, grad = jax.value_and_grad(value)(inputs["logits"])
  compare(case, {"loss": loss, "d_logits": grad}, precision)


@pytest.mark.parametrize("text_filter", [None, 0.3])
@pytest.mark.parametrize("way", ["gather", "segment", "ring"])
def test_regions_are_compared_over_the_mesh(way, text_filter):
  rng = np.random.default_rng(0)
  regions, phrases = unit(jnp.asarray(rng.normal(size=(2, 8, 3, 6)), jnp.float32))
  mask = jnp.asarray(rng.random((8, 3)) < 0.7)
  phrase_id = jnp.asarray(rng.integers(0, 12, (8, 3)))

  @functools.partial(jax.jit, static_argnums=2)
  def run(regions, phrases, engine):
    def value(regions, phrases):
      given = regions, phrases, mask, phrase_id, jnp.asarray(20.0)
      return sum(cloc_region(*given, text_filter=text_filter, engine=engine))

    return jax.value_and_grad(value, (0, 1))(regions, phrases)

  expected = jax.tree.map(np.asarray, run(regions, phrases, pairwise.Engine("dense")))
  with jax.set_mesh(sharding.make_mesh(data=4, fsdp=2)):
    found = run(regions, phrases, pairwise.Engine(way, tile_mb=1e-3))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected
  )


def test_nothing_to_learn_from_is_zero():
  z, none = jnp.eye(4)[None], jnp.zeros((1, 4), int)
  assert sum(cloc_region(z, z, none, none, jnp.asarray(10.0))) == 0
