"""SPARC: contrast of words and patches within each pair."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import at, both_precisions, cases, floats, make, oracles

from bigalign import sharding
from bigalign.losses.engine import pairwise

INPUTS = dict(patches="tokens_img", tokens="tokens_txt", img="zimg", txt="ztxt")


def value_and_gradients(loss, feats, params, engine=pairwise.DEFAULT):
  return of_apply(loss.apply, feats, params, at(engine=engine))


@functools.partial(jax.jit, static_argnums=0)
def of_apply(apply, feats, params, context):
  def value(feats, params):
    objective, (_, metrics) = apply(params, {}, {**rest, **feats}, {}, context)
    return objective, metrics

  rest = {"mask_txt": feats["mask_txt"]} if "mask_txt" in feats else {}
  learned = {k: x for k, x in feats.items() if k not in rest}
  (_, metrics), grads = jax.value_and_grad(value, (0, 1), has_aux=True)(learned, params)
  return metrics, {**grads[0], **grads[1]}


@both_precisions
@pytest.mark.parametrize("case", cases("sparc"))
def test_sparc(case, precision):
  inputs = floats(oracles().inputs(case), precision)
  feats = {ours: inputs[k] for k, ours in INPUTS.items()} | {"mask_txt": inputs["mask"]}
  params = {"t": jnp.asarray(case["scalars"]["log_scale"], precision)}
  metrics, grads = value_and_gradients(make("sparc", case["params"]), feats, params)
  parts = dict(
    loss="loss",
    global_="contrastive_loss",
    fine="fine_loss",
    vl="patches_to_token_loss",
    lv="token_to_patches_loss",
  )
  got = {theirs: metrics[ours] for theirs, ours in parts.items()}
  got |= {f"d_{k}": grads[ours] for k, ours in INPUTS.items()} | {"d_log_scale": grads["t"]}
  oracles().check(
    case,
    got,
    rtol=1e-9 if precision == "float64" else 1e-4,
    require=(*case["expect"], *case["arrays"]),
  )


def some(size=16, dtype=jnp.float32, width=12):
  rng = np.random.default_rng(0)
  feats = dict(
    tokens_img=rng.normal(size=(size, 9, width)),
    tokens_txt=rng.normal(size=(size, 6, 12)),
    zimg=rng.normal(size=(size, 8)),
    ztxt=rng.normal(size=(size, 8)),
  )
  for name in ("zimg", "ztxt"):
    feats[name] /= np.linalg.norm(feats[name], axis=1, keepdims=True)
  mask = np.arange(6) < rng.integers(1, 7, (size, 1))
  return {k: jnp.asarray(x, dtype) for k, x in feats.items()} | {"mask_txt": jnp.asarray(mask)}


@pytest.mark.slow
def test_a_mesh_gives_the_same():
  loss, params = make("sparc", {}), {"t": jnp.asarray(2.0)}
  with jax.enable_x64(True):
    expected = value_and_gradients(
      loss, some(dtype="float64"), {"t": jnp.asarray(2.0, "float64")}, pairwise.Engine("dense")
    )
  mesh = sharding.make_mesh(data=4, fsdp=2)
  feats = jax.device_put(some(), sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    found = value_and_gradients(loss, feats, params, pairwise.Engine("ring"))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3)),
    found,
    expected,
  )


def test_padding_and_equal_patches_do_no_harm():
  """Padding tokens have no effect; equal patches give finite numbers."""
  loss, params, feats = make("sparc", {}), {"t": jnp.asarray(2.0)}, some()
  metrics, grads = value_and_gradients(loss, feats, params)
  mask = feats["mask_txt"][:, :, None]
  assert not np.where(mask, 0, grads["tokens_txt"]).any()
  junk = dict(feats, tokens_txt=jnp.where(mask, feats["tokens_txt"], 1e3))
  np.testing.assert_array_equal(value_and_gradients(loss, junk, params)[0]["loss"], metrics["loss"])
  equal = dict(feats, tokens_img=jnp.broadcast_to(feats["tokens_img"][:, :1], (16, 9, 12)))
  metrics, grads = value_and_gradients(loss, equal, params)
  assert np.isfinite(metrics["loss"]) and all(np.isfinite(x).all() for x in grads.values())


def test_texts_without_padding_need_no_mask():
  loss, params, feats = make("sparc", {}), {"t": jnp.asarray(2.0)}, some()
  full = dict(feats, mask_txt=jnp.ones((16, 6), bool))
  without = {k: x for k, x in feats.items() if k != "mask_txt"}
  a, b = (value_and_gradients(loss, x, params)[0]["loss"] for x in (full, without))
  assert a == b


def test_errors_name_what_to_change():
  with pytest.raises(ValueError, match=r"tokens_img are 10 wide.*tokens_txt 12.*same width"):
    value_and_gradients(make("sparc", {}), some(width=10), {"t": jnp.asarray(2.0)})
  with pytest.raises(ValueError, match=r"config\.loss\.sparc\.threshold=3"):
    make("sparc", dict(threshold=3.0))
