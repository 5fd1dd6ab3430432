"""Losses against the oracle cases, and their registry."""

from __future__ import annotations

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
  names = {case["loss"] for case in oracles().cases()}
  assert [name for name in sorted(names) if f'"{name}"' not in tests] == []
