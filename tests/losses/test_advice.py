"""What the log says about defaults for large data, and about temperatures at a bound."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from bigalign import reading
from bigalign.losses import LOSSES, advice, apply_once, clip, logit_head, make_loss
from bigalign.options import Component, definition, resolve


def terms(**options):
  return {
    name: resolve(LOSSES[name], given, f"config.loss.{name}") for name, given in options.items()
  }


@pytest.mark.parametrize("name", advice.OF_LARGE_DATA)
def test_defaults_for_millions_of_pairs_are_named_on_small_data(name):
  (text,) = advice.defaults_of_large_data(terms(**{name: {}}), 3_400)
  assert text.startswith(f"config.loss.{name}: ") and "this data has 3,400" in text
  assert not advice.defaults_of_large_data(terms(**{name: {}}), 10**7)
  assert not advice.defaults_of_large_data(terms(**{name: {}}), 0)


def test_an_option_that_was_chosen_is_not_named():
  (text,) = advice.defaults_of_large_data(terms(isogclr=dict(tau_init=0.1), clip={}), 100)
  assert "rho=6," in text and "tau_init" not in text


@pytest.mark.parametrize("name", ["siglip", "siglip_distill", "sail"])
def test_the_bias_of_large_batches_is_named_at_a_small_batch(name):
  (text,) = advice.bias_of_large_batches(terms(**{name: {}}), 129)
  assert text.startswith(f"config.loss.{name}: b_init=-10") and "b_init=-4.9" in text
  assert not advice.bias_of_large_batches(terms(**{name: {}}), 32_768)
  assert not advice.bias_of_large_batches(terms(**{name: dict(b_init=-5.0)}), 128)
  assert not advice.bias_of_large_batches(terms(clip={}), 128)


def test_averages_that_no_loss_reads_are_named():
  averages = {"a": np.zeros((3, 4)), "b": np.zeros(5)}
  plain, reads = (
    reading.heads(make_loss(terms)).values()
    for terms in (dict(clip={}, caption={}), dict(clip={}, silc={}))
  )
  (text,) = advice.unread_averages(plain, averages)
  assert text.startswith("config.twin averages 17 parameters that no loss reads")
  assert not advice.unread_averages([*plain, *reads], averages)
  assert not advice.unread_averages(plain, {})


def test_all_losses_that_begin_with_this_bias_are_known():
  """Another loss with a default of -10 must be in docs/losses.md too."""
  known = {name: definition(loss) for name, loss in LOSSES.items()}
  biased = {name for name, options in known.items() if "b_init" in options} - {"clip"}
  assert biased == {"siglip", "siglip_distill", "sail"}
  assert all(known[name]["b_init"].default == -10 for name in biased)


def at(watch, loss, step, t, **metrics):
  return watch.see(step, loss, {"loss/clip/t": np.float32(math.log(t))}, metrics)


def test_a_scale_that_stays_at_its_bound_is_named_once():
  """Not while it only passes by, and not one without bounds."""
  loss, chosen = make_loss(dict(clip={})), terms(clip={})
  watch = advice.BoundWatch(chosen, 1000)
  said = [at(watch, loss, step, t) for step, t in ((0, 14), (20, 100), (40, 90), (60, 100))]
  said += [at(watch, loss, step, 100) for step in (80, 109)]
  assert said == [[]] * 6
  (text,) = at(watch, loss, 110, 100)
  assert (
    text == "config.loss.clip: the logit scale has been at its upper bound of 100 since step 60"
  )
  assert at(watch, loss, 500, 100) == []
  free = make_loss(dict(clip=dict(t_max=None)))
  watch = advice.BoundWatch(chosen, 10)
  assert at(watch, free, 1, 100) == at(watch, free, 10, 100) == []


def test_temperatures_of_samples_at_a_bound_are_named():
  chosen = terms(isogclr={})
  watch, loss = advice.BoundWatch(chosen, 100), make_loss(dict(isogclr={}))
  assert watch.see(1, loss, {}, {"tau_img": 0.005, "tau_txt": 0.2}) == []
  (text,) = watch.see(6, loss, {}, {"tau_img": 0.005, "tau_txt": 0.2})
  assert "config.loss.isogclr" in text and "at tau_min=0.005 since step 1" in text


def test_a_constant_temperature_is_no_parameter():
  loss = clip(t_init=20.0, t_learned=False, t_max=10.0)
  assert loss.init({}) == ({}, {})
  z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
  z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
  feats = {"zimg": z[0], "ztxt": z[1]}
  learned, constant = apply_once(clip(t_init=20.0), feats), apply_once(loss, feats)
  np.testing.assert_allclose(constant["loss"], learned["loss"], rtol=1e-6)
  options = {"clip": Component("clip", LOSSES["clip"], dict(t_init=20.0), "config.loss.clip")}
  assert logit_head.of_losses({}, options).scale == 20


@pytest.mark.parametrize(
  "name, scalar, value, text",
  [
    ("albef_itc", "temperature", 0.5, "the temperature has been at its upper bound of 0.5"),
    ("fastclip_v3", "t", 0.0, "the logit scale has been at its lower bound of 1"),
  ],
)
def test_bounds_of_other_losses(name, scalar, value, text):
  loss, watch = make_loss({name: {}}), advice.BoundWatch({}, 10)
  scalars = {f"loss/{name}/{scalar}": np.float32(value)}
  assert watch.see(1, loss, scalars, {}) == []
  assert watch.see(2, loss, scalars, {}) == [f"config.loss.{name}: {text} since step 1"]
