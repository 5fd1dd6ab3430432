"""DRRho: the second oracles and its limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import at, both_precisions, cases2, check2, ids, make, run2, unit

from bigalign import losses


def options_of(case):
  p = case["params"]
  return dict(
    tau_learned=True,
    rho=p["rho"],
    gamma=p["gamma"],
    gamma_over=f"{p['gamma_decay_epochs']} epochs",
    eps=p["eps"],
    w_distill=p.get("distill_weight", 0.0),
    teacher_scales=(p.get("teacher_scale", 100.0),),
  )


@both_precisions
@pytest.mark.parametrize("case", cases2("drrho"))
def test_drrho(case, precision):
  """Step k is epoch k. With gamma 1 there is no table to compare."""
  loss, n = make("drrho", options_of(case)), case["data_size"]
  state = loss.init({"image": n, "text": n})[1]

  def value(inputs, scalars):
    step, state = inputs["more"]
    batch = {"teacher_img": inputs["ref_img"], "teacher_txt": inputs["ref_txt"]}
    for ours, name in (("image_id", "img_ids"), ("text_id", "txt_ids")):
      low = inputs[name].astype(jnp.uint32)
      batch[ours] = jnp.stack([jnp.zeros_like(low), low], -1)
    feats = {"zimg": inputs["img"], "ztxt": inputs["txt"]}
    params, where = {"t": scalars["log_scale"]}, at(step, epochs=step)
    objective, (after, logs) = loss.apply(params, state, feats, batch, where)
    return objective, {**logs, "state": after}

  scalars = {"log_scale": case["params"]["log_scale"]}
  for step in range(len(case["steps"])):
    more = (jnp.asarray(step), state)
    got = run2(case, precision, value, scalars=scalars, step=step, more=more)
    state = got.pop("state")
    got["contrastive"] = got.pop("contrastive_loss")
    got |= {"distill": got["distill_loss"]} if "distill_loss" in got else {}
    needed = ["contrastive", "gamma"]
    if state:
      tables = {f"state_log_u_{side}": state[side]["log_u"][:n] for side in ("img", "txt")}
      got, needed = got | tables, [*needed, *tables]
    check2(case, got, precision, step=step, require=needed)


def example(size=16, width=8, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  x = [rng.normal(size=(size, width)) for _ in range(4)]
  feats = {"zimg": unit(x[0]), "ztxt": unit(x[0] + x[1])}
  batch = {"teacher_img": unit(x[2]), "teacher_txt": unit(x[2] + x[3])}
  return tuple({k: jnp.asarray(v, dtype) for k, v in d.items()} for d in (feats, batch))


def gradients(name, options, feats, batch, sizes=None):
  loss = make(name, options)
  params, state = loss.init(sizes or {})
  return jax.grad(lambda x: loss.apply(params, state, x, batch, at())[0])(feats)


@pytest.mark.slow
def test_of_a_reference_without_differences_the_gradient_is_that_of_sogclr():
  """R constant: tau (mean log u) of both sides, with the divisor B where sogclr has B - 1."""
  with jax.enable_x64(True):
    feats, batch = example(dtype=jnp.float64)
    batch = {k: jnp.ones_like(x) / np.sqrt(8) for k, x in batch.items()}
    found = gradients("drrho", dict(tau=0.1, eps=1e-300), feats, batch)
    ids_ = {"image_id": ids(np.arange(16)), "text_id": ids(np.arange(16))}
    known = gradients("sogclr", dict(tau=0.1, gamma=1.0), feats, ids_, {"image": 16, "text": 16})
    for k in feats:
      np.testing.assert_allclose(found[k], known[k] * 16 / 15, rtol=1e-10)


@pytest.mark.slow
def test_a_model_that_is_its_reference_has_equal_weights():
  """All exponents are 0, so u is (B - 1) / B + eps."""
  feats, _ = example()
  batch = {"teacher_img": feats["zimg"], "teacher_txt": feats["ztxt"]}
  options = dict(tau=0.1, rho=0.0, eps=0.5)
  logs = losses.apply_once(make("drrho", options), feats, batch)
  np.testing.assert_allclose(logs["loss"], 0.1 * np.log(15 / 16 + 0.5), rtol=1e-5)


@pytest.mark.slow
def test_what_the_reference_finds_hard_counts_less():
  """The weight of a negative falls as its reference cosine rises."""
  feats, batch = example()
  hard = dict(batch, teacher_txt=batch["teacher_txt"].at[3].set(batch["teacher_img"][0]))
  before, after = (gradients("drrho", dict(tau=0.1), feats, x)["ztxt"] for x in (batch, hard))
  push = [float(jnp.vdot(g[3], feats["zimg"][0])) for g in (before, after)]
  assert push[0] > 5 * push[1] > 0


def test_each_teacher_of_the_distillation_has_its_own_scale():
  """The term is that of clip_distill with the same teachers, times tau and its weight."""
  feats, batch = example()
  own = dict(teacher_dims=(3, 5), teacher_scales=(20.0, 80.0))
  found = losses.apply_once(make("drrho", dict(tau=0.1, w_distill=0.5, **own)), feats, batch)
  known = losses.apply_once(make("clip_distill", dict(t_init=10.0, **own)), feats, batch)
  np.testing.assert_allclose(found["distill_loss"], 0.05 * known["distill_loss"], rtol=1e-6)
  for scales in ((20.0, 20.0), (80.0, 20.0)):
    other = make("drrho", dict(tau=0.1, w_distill=0.5, **{**own, "teacher_scales": scales}))
    other = losses.apply_once(other, feats, batch)
    assert abs(other["distill_loss"] - found["distill_loss"]) > 1e-3


def test_without_an_average_there_is_no_state_and_no_id_is_needed():
  assert make("drrho", {}).needs == {"teacher"}
  assert make("drrho", {}).init({}) == ({}, {})
  averaged = make("drrho", dict(gamma=0.5))
  assert averaged.needs == {"teacher", "ids"} and averaged.per_sample_state
