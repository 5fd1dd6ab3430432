"""Losses against the oracle cases, numpy, and the mesh."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigalign import losses, sharding
from bigalign.losses.base import At

ROOT = pathlib.Path(
  os.environ.get("BIGALIGN_LOSS_ORACLES")
  or pathlib.Path(__file__).parents[2] / "shared" / "oracles" / "losses"
)
AT = At(jnp.zeros(()), jnp.zeros(2, jnp.uint32), jax.random.key(0))


def _cases(name):
  """The oracle cases of one loss, or one placeholder that skips with the reason."""
  if not (ROOT / "oracles.json").exists():
    assert "BIGALIGN_LOSS_ORACLES" not in os.environ, f"no oracles.json in {ROOT}"
    reason = "BIGALIGN_LOSS_ORACLES is not set: the folder of the loss oracles"
    return [pytest.param(name, None, marks=pytest.mark.skip(reason=reason), id=f"oracle-{name}")]
  cases = list(_oracles().cases(loss=name))
  assert cases, f"{ROOT} holds no case of {name!r}"
  return [pytest.param(name, c, id=f"oracle-{name}-{c['id']}") for c in cases]


@functools.cache
def _oracles():
  spec = importlib.util.spec_from_file_location("loss_oracle_harness", ROOT / "harness.py")
  harness = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(harness)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # the harness leaves its file to the collector
    return harness.Oracles(str(ROOT))


def _run(name, case, dtype):
  """Value and gradients of one case through the registry, in the oracle's names."""
  inputs = {k: jnp.asarray(v) for k, v in _oracles().inputs(case).items()}
  owners = {k: inputs.pop(k) for k in ("img_owner", "txt_owner") if k in inputs}
  batch = {
    ours: jnp.stack([jnp.zeros_like(owners[k]), owners[k]], 1)
    for ours, k in (("image_id", "img_owner"), ("owner_id", "txt_owner")) if k in owners
  }
  inputs = {k: x.astype(dtype) for k, x in inputs.items()}
  scalars = {k: jnp.asarray(v, dtype) for k, v in case["scalars"].items()}
  options = {**case["params"], **({"positives": "ids"} if owners else {})}
  loss = losses.LOSSES[name](**options)

  def value(inputs, scalars):
    z = {k: inputs[k] for k in ("img", "txt")}
    if case["normalize"]:
      z = {k: x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
           for k, x in z.items()}
    params = {"t": scalars["log_scale"]}
    if "bias" in scalars:
      params["b"] = scalars["bias"]
    feats = {"zimg": z["img"], "ztxt": z["txt"]}
    objective, (_, metrics) = loss.apply(params, {}, feats, batch, AT)
    return objective, metrics

  (_, metrics), (dx, ds) = jax.value_and_grad(value, (0, 1), has_aux=True)(inputs, scalars)
  return {"loss": metrics["loss"], **{f"d_{k}": x for k, x in {**dx, **ds}.items()}}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name,case", [*_cases("clip"), *_cases("siglip")])
def test_oracle(name, case, precision):
  """Value and gradients equal the original implementations': 1e-9, and 1e-4 in float32."""
  with jax.enable_x64(precision == "float64"):
    got = _run(name, case, precision)
    needed = ("loss", "d_img", "d_txt", *(f"d_{name}" for name in case["scalars"]))
    _oracles().check(
      case, got, rtol=1e-9 if precision == "float64" else 1e-4, require=needed
    )


def test_batch_over_the_mesh_changes_nothing():
  """Loss and gradients of a batch on 4 x 2 devices equal those on one."""
  z = np.random.default_rng(0).normal(size=(2, 32, 16)).astype(np.float32)
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  mesh = sharding.make_mesh(data=4, fsdp=2)
  for name in losses.LOSSES:
    loss = losses.make_loss({name: dict(weight=2.0)})
    params, state = loss.init({})

    def value(zimg, ztxt, loss=loss, params=params, state=state):
      return loss.apply(params, state, {"zimg": zimg, "ztxt": ztxt}, {}, AT)[0]

    one = jax.jit(jax.value_and_grad(value, (0, 1)))(*z)
    with jax.set_mesh(mesh):
      spread = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in z]
      many = jax.jit(jax.value_and_grad(value, (0, 1)))(*spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, many)


def test_a_sum_of_losses_adds_values_and_keeps_names():
  z = jnp.eye(4)
  both = losses.make_loss(dict(clip=dict(weight=0.5), siglip=dict(weight=2.0)))
  params, state = both.init({})
  objective, (_, metrics) = both.apply(params, state, {"zimg": z, "ztxt": z}, {}, AT)
  expected = 0.5 * metrics["clip/loss"] + 2.0 * metrics["siglip/loss"]
  np.testing.assert_allclose(objective, expected, rtol=1e-6)
  assert {"clip/logit_scale", "siglip/logit_bias", "loss"} <= set(metrics)
  alone = losses.make_loss(dict(clip={}))
  _, (_, metrics) = alone.apply(alone.init({})[0], {}, {"zimg": z, "ztxt": z}, {}, AT)
  assert set(metrics) == {"loss", "contrastive_loss", "logit_scale"}  # open_clip's names


def test_temperature_is_clamped_after_the_update():
  loss = losses.make_loss(dict(clip={}))
  clamped = loss.constrain({"clip": {"t": jnp.asarray(9.0)}})
  np.testing.assert_allclose(jnp.exp(clamped["clip"]["t"]), 100.0, rtol=1e-5)


@pytest.mark.parametrize(
  "terms,error,message",
  [
    (dict(siglipp={}), ValueError, "Did you mean 'siglip'"),
    (dict(clip=dict(label_smoothin=0.1)), TypeError, "Did you mean 'label_smoothing'"),
    (dict(siglip=dict(reduction="sum")), ValueError, "row_sum"),
    ({}, ValueError, "known losses"),
  ],
)
def test_errors_name_what_is_known(terms, error, message):
  with pytest.raises(error, match=message):
    losses.make_loss(terms)


def test_missing_field_is_named():
  loss = losses.make_loss(dict(siglip=dict(positives="ids")))
  with pytest.raises(ValueError, match="image_id"):
    losses.check_needs(loss, {"image", "text"})
