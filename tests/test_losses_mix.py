"""Losses around the softmax: intra-modal, focal, labelled, mixed and nested, against the oracles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracles import AT, both_precisions, cases, check, floats, make, oracles, run, unit

from bigalign import losses
from bigalign.losses.base import Loss
from bigalign.losses.m3co import mixed_direction
from bigalign.losses.mixup import mixture


def compare(loss, case, precision):
  """Value, gradients and the parts that the case names."""
  got = run(loss, case, precision)
  if "contrastive_loss" in got:
    got["clip"] = got["contrastive_loss"]
  missing = set(case["expect"]) - set(got)
  assert not missing, f"{case['id']}: {sorted(missing)} of the case is not among {sorted(got)}"
  check(case, got, precision)


@both_precisions
@pytest.mark.parametrize(
  "case", [c for k in ("cyclip", "clip_intra_neg", "focal_itc", "sail", "unicl") for c in cases(k)]
)
def test_options_are_those_of_the_case(case, precision):
  compare(make(case["loss"], case["params"]), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("clip_gap"))
def test_clip_gap(case, precision):
  compare(make("clip_gap", {**case["params"], "t_learned": True}), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("alignclip"))
def test_alignclip(case, precision):
  flags = {k: bool(case["params"][k]) for k in ("separate_text", "separate_image")}
  compare(make("alignclip", case["params"] | flags), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("matryoshka"))
def test_matryoshka(case, precision):
  options = dict(case["params"])
  assert options.pop("renormalize"), "every prefix has unit norm"
  compare(make("matryoshka", options), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("m3mix"))
def test_m3mix(case, precision):
  options = case["params"]
  names = dict(v="v", l="l", vl="vl", m2="m")

  def apply(params, state, feats, batch, at):
    shares = {ours: options[f"lam_{k}"] for ours, k in names.items()}
    weights = {ours: options[f"w_{k}"] for ours, k in names.items()}
    loss, parts = mixture(
      feats["zimg"], feats["ztxt"], jnp.exp(params["t"]), shares, weights,
      tau2=options["tau2"], m2_average=options["m2_average"],
    )
    return loss, (state, {"loss": loss, **parts})

  compare(Loss(frozenset(), None, apply), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("m3co"))
def test_m3co(case, precision):
  drawn = floats(oracles().inputs(case), precision)

  def apply(params, state, feats, batch, at):
    img, txt = feats["raw_img"], feats["raw_txt"]
    scale = jnp.asarray(1 / case["params"]["tau"], img.dtype)
    parts = {
      f"{k}_mix": mixed_direction(a, c, drawn[f"lam_{k}"], drawn[f"perm_{k}"], scale)
      for k, a, c in (("img", img, txt), ("txt", txt, img))
    }
    loss = sum(parts.values())
    return loss, (state, {"loss": loss, **parts})

  compare(Loss(frozenset(), None, apply), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("softclip_m3co"))
def test_softclip_m3co(case, precision):
  compare(make("softclip_m3co", case["params"]), case, precision)
