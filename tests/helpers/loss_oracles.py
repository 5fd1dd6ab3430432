"""Reads the expected values of the losses and runs their cases through the registry."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigalign import losses
from bigalign.losses.base import Context
from bigalign.losses.engine import pairwise

# Made by tests/expected/make_losses.py.
SMALL = pathlib.Path(__file__).parents[1] / "expected/losses"
ROOT = pathlib.Path(os.environ.get("BIGALIGN_LOSS_ORACLES") or SMALL)
# The second set, of objectives and mechanisms, and the losses of it that are not built yet.
ROOT2 = os.environ.get("BIGALIGN_LOSS_ORACLES2")
WHY2 = "BIGALIGN_LOSS_ORACLES2 is not set: the second set of expected values of the losses"
NOT_BUILT = (
  *("expert_router",),
  *("longclip", "lora", "matformer", "moe"),
  *("spacetime", "valor_group"),
)
# Inputs of a case with steps whose first axis is the step.
PER_STEP = ("traj/", "albef/t_")
# A gradient below this share of the largest gradient of its case is compared with that share.
SMALL_GRADIENT = 1e-6


def at(step=0, epochs=0.0, engine=pairwise.DEFAULT):
  """The context of a step."""
  return Context(
    jnp.asarray(step),
    jnp.zeros(()),
    jnp.zeros(()),
    jnp.asarray(epochs, jnp.float32),
    jax.random.key(0),
    engine,
  )


AT = at()

# Input of a case -> our feature (differentiated) or field of the batch.
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
  """The cases of one loss, as parameters of a test; of cases of several sizes, one is fast."""
  cases = list(oracles().cases(loss=name, contains=contains))
  assert cases, f"{ROOT} holds no case of {name!r}"
  params, kinds = [], set()
  for case in cases:
    kind = re.sub(r"\bN\d+(x\d+)?", "N", case["id"])
    marks = [pytest.mark.slow] if kind in kinds else []
    params.append(pytest.param(case, id=f"oracle-{name}-{case['id']}", marks=marks))
    kinds.add(kind)
  return params


def cases2(*names):
  """The cases of these losses in the second set, as parameters of a test."""
  if not ROOT2:
    return [pytest.param(None, id="oracle-losses2", marks=pytest.mark.skip(reason=WHY2))]
  cases = [case for name in names for case in oracles2().cases(loss=name)]
  assert {case["loss"] for case in cases} == {*names}, f"{ROOT2} lacks cases of {names}"
  return [pytest.param(case, id=f"oracle-losses2-{case['id']}") for case in cases]


class Oracles:
  """Cases of oracles.json with their arrays from oracles.npz; make_losses.py has the format."""

  def __init__(self, root: pathlib.Path, name: str = "oracles"):
    self._cases = json.loads((root / f"{name}.json").read_text())["cases"]
    with np.load(root / f"{name}.npz") as arrays:
      self._arrays = dict(arrays)

  def cases(self, loss=None, contains=""):
    """The cases of one loss, or all, whose id contains a text."""
    for case in self._cases:
      if loss in (None, case["loss"]) and contains in case["id"]:
        yield case

  def inputs(self, case, step=None):
    """{name: array}, of one step if the case has steps."""
    inputs = {}
    for name, key in case["inputs"].items():
      x = self._arrays[key]
      inputs[name] = x[step] if step is not None and key.startswith(PER_STEP) else x
    return inputs

  def expected(self, case, step=None):
    """{name: (value, kind)}; kind is "scalar", "full", or "probe": a projection of the array."""
    of = case if step is None else case["steps"][step]
    scalars = {name: (np.asarray(x), "scalar") for name, x in of["expect"].items()}
    arrays = of.get("arrays", {}).items()
    return scalars | {name: (self._arrays[x["key"]], x["kind"]) for name, x in arrays}

  def errors(self, case, got, step=None):
    """{name: error} of the values in both: the largest difference over the largest value."""
    expected = self.expected(case, step)
    largest = max(
      (np.abs(x).max() for name, (x, kind) in expected.items() if _is_gradient(name, kind)),
      default=0.0,
    )
    errors = {}
    for name in expected.keys() & got.keys():
      theirs, kind = expected[name]
      ours = np.asarray(got[name], np.float64)
      if kind == "probe":
        ours = ours @ self._arrays[f"probe/{ours.shape[-1]}"]
      assert ours.shape == theirs.shape, (case["id"], name, ours.shape, theirs.shape)
      finite = np.isfinite(theirs)
      if not np.array_equal(np.isfinite(ours), finite):
        errors[name] = np.inf
        continue
      difference = np.abs(ours[finite] - theirs[finite]).max(initial=0)
      top = np.abs(theirs[finite]).max(initial=0)
      if top < 1e-10:  # zero but for rounding
        errors[name] = float(difference)
      else:
        floor = SMALL_GRADIENT * max(largest, 1e-8) if name.startswith("d_") else 1e-8
        errors[name] = float(difference / max(top, floor))
    return errors

  def check(self, case, got, step=None, rtol=1e-5, require=()):
    """Fails on an error above rtol, and on a required value that is not among both."""
    errors = self.errors(case, got, step)
    assert errors, f"{case['id']}: nothing to compare with {sorted(got)}"
    missing = set(require) - errors.keys()
    assert not missing, f"{case['id']}: {sorted(missing)} missing"
    wrong = {name: x for name, x in errors.items() if not x <= rtol}
    assert not wrong, f"{case['id']} step={step}: {wrong}"


def _is_gradient(name, kind):
  return name.startswith("d_") and kind != "scalar"


@functools.cache
def oracles():
  return Oracles(ROOT)


@functools.cache
def oracles2():
  return Oracles(pathlib.Path(ROOT2), "oracles2")


def unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def ids(x):
  """Integers as ids of a batch: two words each, [n, 2] uint32."""
  x = np.asarray(x, np.int64)
  return jnp.asarray(np.stack([x >> 32, x & 0xFFFFFFFF], -1).astype(np.uint32))


def floats(inputs, dtype):
  """The inputs as jax arrays, floating ones in `dtype`."""
  return {
    k: jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)
    for k, x in inputs.items()
  }


def run(loss, case, dtype, fields=None, where=AT):
  """Metrics and gradients of a case without state; gradients by the case's names.

  Args:
    fields: More fields of the batch, by our names.
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
  """Compares the value and every gradient, to 1e-9 in float64 and to 1e-4 in float32."""
  inputs = [k for k in FEATURES if k in case["inputs"]]
  oracles().check(
    case,
    got,
    rtol=1e-9 if precision == "float64" else 1e-4,
    require=("loss", *(f"d_{k}" for k in (*inputs, *case["scalars"]))),
  )


def differentiated(case, step=None):
  """The names of a case's inputs and scalars that have a gradient."""
  of = case if step is None else case["steps"][step]
  return {k[2:] for k in (*of["expect"], *of.get("arrays", {})) if k.startswith("d_")}


_compiled: dict = {}


def run2(case, dtype, function, *, scalars=None, step=None, key=(), more=None):
  """The values of a case of the second set, and its gradients as "d_..."; compiled once per shapes.

  Args:
    case: of `cases2`.
    dtype: of the floating arrays.
    function: (inputs, scalars) -> (objective, {name: value}). Rows of inputs that the case
      normalises are unit rows.
    scalars: {name: number}; None: those of the case.
    step: of a case with steps.
    key: what else the function depends on, beside the shapes of its inputs.
    more: a tree of arrays that the function gets as inputs["more"], such as the state.
  """
  inputs = floats(oracles2().inputs(case, step), dtype)
  scalars = case.get("scalars", {}) if scalars is None else scalars
  scalars = {k: jnp.asarray(v, dtype) for k, v in scalars.items()}
  learned = {k: x for k, x in inputs.items() if k in differentiated(case, step)}
  fixed = {k: x for k, x in inputs.items() if k not in learned}
  shapes = tuple((k, x.shape) for k, x in sorted(inputs.items()))
  options = json.dumps(case["params"], sort_keys=True)
  found = (case["loss"], case["normalize"], options, shapes, tuple(sorted(learned)), dtype, key)
  if found not in _compiled:

    def value(learned, scalars, fixed, more):
      rows = {k: unit(x) if case["normalize"] else x for k, x in learned.items()}
      return function({**fixed, **rows, "more": more}, scalars)

    _compiled[found] = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
  (_, values), grads = _compiled[found](learned, scalars, fixed, more)
  return {**values, **{f"d_{k}": x for d in grads for k, x in d.items()}}


def check2(case, got, precision, step=None, require=()):
  """Compares every value that both have, and every gradient of the case, see `check`."""
  expected = oracles2().expected(case, step)
  needed = {k for k in expected if k.startswith("d_") or k == "loss"} | {*require}
  rtol = 1e-9 if precision == "float64" else 1e-4
  oracles2().check(case, got, step=step, rtol=rtol, require=needed)


def both_precisions(function):
  """Runs a test in float64 and, as a slow test, in float32."""

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
