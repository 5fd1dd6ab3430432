"""Reads the loss oracles and puts their cases through the registry, in the oracles' names."""

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

from bigalign import losses
from bigalign.losses.base import At

ROOT = pathlib.Path(
  os.environ.get("BIGALIGN_LOSS_ORACLES")
  or pathlib.Path(__file__).parents[3] / "shared" / "oracles" / "losses"
)


def at(step=0, epochs=0.0):
  """A place in training."""
  return At(
    jnp.asarray(step),
    jnp.zeros(()),
    jnp.zeros(()),
    jnp.asarray(epochs, jnp.float32),
    jax.random.key(0),
  )


AT = at()

# Oracle input -> our feature (differentiated) or field of the batch.
FEATURES = dict(img="zimg", txt="ztxt", txt_long="ztxt_second", txt_syn="ztxt_second")
FIELDS = dict(
  t_img="teacher_img",
  t_txt="teacher_txt",
  t_txt_syn="teacher_txt_second",
  sem="teacher_txt",
  labels="label",
)
SCALARS = dict(log_scale="t", bias="b")


def cases(name, contains=""):
  """The oracle cases of one loss, or one placeholder that skips with the reason."""
  if not (ROOT / "oracles.json").exists():
    assert "BIGALIGN_LOSS_ORACLES" not in os.environ, f"no oracles.json in {ROOT}"
    reason = "BIGALIGN_LOSS_ORACLES is not set: the folder of the loss oracles"
    return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=f"oracle-{name}")]
  found = list(oracles().cases(loss=name, contains=contains))
  assert found, f"{ROOT} holds no case of {name!r}"
  return [pytest.param(c, id=f"oracle-{name}-{c['id']}") for c in found]


@functools.cache
def oracles():
  spec = importlib.util.spec_from_file_location("loss_oracle_harness", ROOT / "harness.py")
  harness = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(harness)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # the harness leaves its file to the collector
    return harness.Oracles(str(ROOT))


def unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def ids(x):
  """Small integers as the two words in which ids travel, [n, 2] uint32."""
  x = np.asarray(x, np.int64)
  return jnp.asarray(np.stack([x >> 32, x & 0xFFFFFFFF], -1).astype(np.uint32))


def floats(inputs, dtype):
  """The floating inputs in the dtype under test, the others as they are."""
  return {
    k: jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)
    for k, x in inputs.items()
  }


def run(loss, case, dtype, fields=None, where=AT):
  """Value and gradients of a case without state, for the oracle's names of inputs and scalars.

  fields: more fields of the batch, by our names.
  """
  inputs = floats(oracles().inputs(case), dtype)
  features = {k: inputs[k] for k in FEATURES if k in inputs}
  scalars = {k: jnp.asarray(v, dtype) for k, v in case["scalars"].items()}
  batch = {ours: inputs[k] for k, ours in FIELDS.items() if k in inputs} | dict(fields or {})

  def value(features, scalars):
    feats = {FEATURES[k]: unit(x) if case["normalize"] else x for k, x in features.items()}
    feats |= {f"raw_{k}": x for k, x in features.items()}
    params = {SCALARS[k]: x for k, x in scalars.items()}
    objective, (_, metrics) = loss.apply(params, {}, feats, batch, where)
    return objective, metrics

  (_, metrics), (dx, ds) = jax.value_and_grad(value, (0, 1), has_aux=True)(features, scalars)
  return {**metrics, **{f"d_{k}": x for k, x in {**dx, **ds}.items()}}


def check(case, got, precision):
  """1e-9 in float64, 1e-4 in float32; value and every gradient compared."""
  inputs = [k for k in FEATURES if k in case["inputs"]]
  oracles().check(
    case,
    got,
    rtol=1e-9 if precision == "float64" else 1e-4,
    require=("loss", *(f"d_{k}" for k in (*inputs, *case["scalars"]))),
  )


def both_precisions(function):
  """Runs a test in float64 and, among the slow ones, in float32."""

  @pytest.mark.parametrize(
    "precision", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
  )
  @functools.wraps(function)
  def test(precision, **kwargs):
    with jax.enable_x64(precision == "float64"):
      function(precision=precision, **kwargs)

  return test


def make(name, options):
  return losses.LOSSES[name](**options)
