"""Losses with teachers, noisy pairs, words and patches, against the oracle cases."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracles import AT, at, both_precisions, cases, check, floats, ids, make, oracles, run, unit

from bigalign import losses, sharding
from bigalign.losses import functions, pairwise

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def parts(loss, case, precision, names, fields=None):
  """Compares logged parts: {the oracle's name: ours}."""
  inputs = floats(oracles().inputs(case), precision)
  feats = {
    ours: unit(inputs[k]) if case["normalize"] else inputs[k] for k, ours in
    dict(img="zimg", txt="ztxt", txt_syn="ztxt_second", patches="tokens_img", tokens="tokens_txt",
         mask="mask_txt").items() if k in inputs
  }
  params = {ours: jnp.asarray(case["scalars"][k], precision) for k, ours in
            dict(log_scale="t", bias="b").items() if k in case["scalars"]}
  batch = {ours: inputs[k] for k, ours in dict(
    t_img="teacher_img", t_txt="teacher_txt", t_txt_syn="teacher_txt_second",
    noise_prob="noise_prob").items() if k in inputs}
  _, (_, metrics) = loss.apply(params, {}, feats, batch, AT)
  got = {theirs: metrics[ours] for theirs, ours in names.items()}
  oracles().check(case, got, rtol=TOLERANCE[precision], require=tuple(names))


@both_precisions
@pytest.mark.parametrize("case", cases("clip_distill"))
def test_clip_distill(case, precision):
  loss = make("clip_distill", case["params"])
  check(case, run(loss, case, precision), precision)
  parts(loss, case, precision, {"hard": "contrastive_loss", "soft": "distill_loss"})


@both_precisions
@pytest.mark.parametrize("case", cases("mobileclip_dr"))
def test_mobileclip_dr(case, precision):
  options = dict(case["params"])
  options |= dict(soft_share=options.pop("lambda"), second_text="txt_syn" in case["inputs"])
  loss = make("mobileclip_dr", options)
  check(case, run(loss, case, precision), precision)
  parts(loss, case, precision, {"hard": "contrastive_loss", "soft": "distill_loss"})


@both_precisions
@pytest.mark.parametrize("case", cases("siglip_distill"))
def test_siglip_distill(case, precision):
  options = dict(case["params"])
  share = options.pop("lambda")
  check(case, run(make("siglip_distill", options | dict(soft_share=share)), case, precision),
        precision)
  for part, share in (("hard", 0.0), ("soft", 1.0)):
    loss = make("siglip_distill", options | dict(soft_share=share))
    parts(loss, case, precision, {part: "loss"})


@both_precisions
@pytest.mark.parametrize("case", cases("nitc"))
def test_nitc(case, precision):
  loss = make("nitc", dict(smoothing=case["params"]["lambda"]))
  noise = jnp.asarray(oracles().inputs(case)["noise_prob"], precision)
  check(case, run(loss, case, precision, {"noise_prob": noise}), precision)
  parts(loss, case, precision, {"i2t": "image_to_text_loss", "t2i": "text_to_image_loss"})
