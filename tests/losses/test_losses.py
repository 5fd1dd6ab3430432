"""Losses against the oracle cases, and their registry."""

from __future__ import annotations

import inspect
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import AT, both_precisions, cases, check, ids, make, oracles, run

from bigalign import losses


@both_precisions
@pytest.mark.parametrize("case", cases("clip"))
def test_clip(case, precision):
  check(case, run(make("clip", case["params"]), case, precision), precision)


@both_precisions
@pytest.mark.parametrize("case", cases("siglip"))
def test_siglip(case, precision):
  owners = {k: oracles().inputs(case)[k] for k in ("img_owner", "txt_owner") if k in case["inputs"]}
  loss = make("siglip", {**case["params"], **({"positives": "ids"} if owners else {})})
  fields = {
    ours: ids(owners[k])
    for ours, k in (("image_id", "img_owner"), ("owner_id", "txt_owner"))
    if owners
  }
  check(case, run(loss, case, precision, fields), precision)


@pytest.mark.parametrize("name", ["clip_gap", "sogclr", "sogclr_unimodal", "fastclip_v1"])
def test_a_batch_of_one_sample_has_no_negatives(name):
  z, one = jnp.ones((1, 4)) / 2, ids(np.arange(1))
  batch, sizes = {"image_id": one, "text_id": one}, {"image": 4, "text": 4}
  with pytest.raises(ValueError, match=r"config\.batch_size=1: .* at least 2"):
    losses.apply_once(losses.LOSSES[name](), {"zimg": z, "ztxt": z}, batch, sizes)


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
  params = {"clip": {"t": jnp.asarray(9.0)}}
  clamped = loss.constrain(params, params)
  np.testing.assert_allclose(jnp.exp(clamped["clip"]["t"]), 100.0, rtol=1e-5)


SCALED = [name for name, f in losses.LOSSES.items() if "t_max" in inspect.signature(f).parameters]


@pytest.mark.parametrize("name", SCALED)
def test_a_logit_scale_starts_within_its_bounds(name):
  """Otherwise the first update moves it there."""
  learned = {"t_learned": True} if name in ("clip_gap", "m2mix", "m3mix") else {}
  where = rf"config\.loss\.{name}\."
  for t_init in (200, 0.5):
    with pytest.raises(ValueError, match=where + rf"t_init={t_init} .* 1 and t_max=100"):
      losses.LOSSES[name](t_init=t_init, t_max=100, **learned)
    losses.LOSSES[name](t_init=t_init, t_max=None, **learned)
  with pytest.raises(ValueError, match=where + "t_init=0 must be above 0"):
    losses.LOSSES[name](t_init=0)
  with pytest.raises(ValueError, match=where + "t_max=0.5 must be at least 1"):
    losses.LOSSES[name](t_init=1.0, t_max=0.5)
  if learned:  # a constant scale has no bounds
    losses.LOSSES[name](t_init=200.0, t_max=100.0)


@pytest.mark.parametrize(
  "name,options,message",
  [
    ("clip", dict(label_smoothing=1.5), "label_smoothing=1.5 must be between 0 and 1"),
    ("clip_gap", dict(t=0), "t=0 must be above 0"),
    ("albef_itc", dict(alpha=-0.1), "alpha=-0.1 must be between 0 and 1"),
    ("clip_distill", dict(teacher_scales=(0,)), r"teacher_scales\[0\]=0 must be above 0"),
    (
      "mobileclip_dr",
      dict(teacher_dims=(4, 4), teacher_scales=(70.0, -60.0)),
      r"teacher_scales\[1\]=-60.0 must be above 0",
    ),
    ("m3co", dict(tau=0), "tau=0 must be above 0"),
    ("m3co", dict(probability=50), "probability=50 must be between 0 and 1"),
    ("m3co", dict(soft_after=33), "soft_after=33 must be between 0 and 1"),
    ("softclip_m3co", dict(tau=-1.0), "tau=-1.0 must be above 0"),
    ("m2mix", dict(tau2=0), "tau2=0 must be above 0"),
    ("m2mix", dict(alpha_m=0), "alpha_m=0 is a parameter of a Beta distribution"),
    ("matryoshka", dict(base="albef_itc"), "base='albef_itc'"),
    ("matryoshka", dict(dims=(2, 4), weights=(0, 0)), r"weights=\(0, 0\) .*not all 0"),
  ],
)
def test_numbers_outside_their_bounds_are_refused(name, options, message):
  with pytest.raises(ValueError, match=rf"config\.loss\.{name}\." + message):
    losses.make_loss({name: options})


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


def test_no_loss_of_the_oracles_is_left_out():
  every = pathlib.Path(__file__).parents[1].rglob("test_*.py")
  tests = "".join(path.read_text() for path in every)
  # The ratio of distances of M3L was a formula from memory that nothing called.
  names = {case["loss"] for case in oracles().cases()} - {"m3l_ratio"}
  assert [name for name in sorted(names) if f'"{name}"' not in tests] == []
