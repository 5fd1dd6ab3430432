"""Losses with hard negatives, bags of texts and patches: the second oracles, and limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import AT, both_precisions, cases2, check2, make, oracles2, run2, unit

from bigalign import losses
from bigalign.losses.engine.pairwise import DEFAULT
from bigalign.losses.radzero import attended


def applied(name, texts):
  """(inputs, scalars) -> (objective, metrics), with texts: (inputs) -> (ztxts, kinds)."""

  def value(inputs, scalars):
    ztxts, kinds = texts(inputs)
    feats = {"zimg": inputs["img"], "ztxts": ztxts}
    params = {"t": scalars["log_scale"]}
    objective, (_, logs) = make(name, {}).apply(params, {}, feats, {"texts_kind": kinds}, AT)
    return objective, logs

  return value


def with_own_negatives(inputs):
  kinds = jnp.where(inputs["neg_mask"] != 0, 2, 0)
  kinds = jnp.concatenate([jnp.ones_like(kinds[:, :1]), kinds], 1)
  return jnp.concatenate([inputs["txt"][:, None], inputs["neg"]], 1), kinds


@both_precisions
@pytest.mark.parametrize("case", cases2("negclip", "hardneg_own"))
def test_hard_negatives(case, precision):
  got = run2(case, precision, applied(case["loss"], with_own_negatives))
  check2(case, got, precision, require=case["expect"])


@both_precisions
@pytest.mark.parametrize("case", cases2("dac_mil"))
def test_dac_mil(case, precision):
  def texts(inputs):
    parts = [inputs[k] for k in ("texts", "negs") if k in inputs]
    kinds = [jnp.full(x.shape[:2], kind, jnp.int32) for kind, x in enumerate(parts, 1)]
    return jnp.concatenate(parts, 1), jnp.concatenate(kinds, 1)

  got = run2(case, precision, applied("dac_mil", texts))
  check2(case, got, precision, require=case["expect"])


@both_precisions
@pytest.mark.parametrize("case", cases2("radzero"))
def test_radzero(case, precision):
  def value(inputs, scalars):
    t, tokens, texts = -scalars["log_tau"], inputs["tokens"], inputs["texts"]
    kinds = {"texts_kind": (inputs["texts_mask"] != 0).astype(jnp.int32)}
    feats = {"tokens_img": tokens, "ztxts": texts}
    loss = make("radzero", dict(eps=case["params"]["eps"]))
    objective, (_, logs) = loss.apply({"t": t}, {}, feats, kinds, AT)
    flat = unit(texts.reshape(-1, texts.shape[-1]))
    cosines = attended(unit(tokens), flat, jnp.exp(t), engine=DEFAULT)
    return objective, {**logs, "logits": cosines.T}

  got = run2(case, precision, value)
  expected, _ = oracles2().expected(case)["logits"]
  if len(expected) < len(got["logits"]):  # of the phrases that are there
    got["logits"] = got["logits"][oracles2().inputs(case)["texts_mask"].reshape(-1) != 0]
  check2(case, got, precision, require=("row", "col", "logits"))


def example(seed=0):
  rng = np.random.default_rng(seed)
  img = rng.normal(size=(8, 6))
  feats = {"zimg": unit(img), "ztxts": unit(img[:, None] + rng.normal(size=(8, 3, 6)))}
  feats["tokens_img"] = rng.normal(size=(8, 5, 6))
  return {k: jnp.asarray(x, jnp.float32) for k, x in feats.items()}


def value(name, feats, kinds, options=None):
  return losses.apply_once(make(name, options or {}), feats, {"texts_kind": jnp.asarray(kinds)})


@pytest.mark.slow
def test_negclip_is_clip_with_hard_negatives_as_candidates():
  feats, kinds = example(), [[1, 2, 2]] * 8
  expected = value("clip", feats, kinds, dict(texts="uniform"))["loss"]
  assert value("negclip", feats, kinds)["loss"] == expected
  plain = losses.apply_once(make("clip", {}), {**feats, "ztxt": feats["ztxts"][:, 0]})["loss"]
  np.testing.assert_allclose(value("negclip", feats, [[1, 0, 0]] * 8)["loss"], plain, rtol=1e-6)


@pytest.mark.slow
def test_images_without_a_negative_leave_the_mean():
  feats, kinds = example(), np.array([[1, 2, 2]] * 4 + [[1, 1, 0]] * 4)
  half = {k: x[:4] for k, x in feats.items()}
  expected = value("hardneg_own", half, kinds[:4])["loss"]
  np.testing.assert_allclose(value("hardneg_own", feats, kinds)["loss"], expected, rtol=1e-6)
  assert value("hardneg_own", feats, [[1, 1, 0]] * 8)["loss"] == 0


@pytest.mark.parametrize("name", ["negclip", "hardneg_own", "dac_mil", "radzero"])
def test_absent_texts_have_no_effect_and_no_gradient_on_hard_negatives(name):
  feats = example()
  kinds = {"texts_kind": jnp.asarray([[1, 2, 0]] * 4 + [[1, 0, 0]] * 2 + [[1, 1, 2]] * 2)}
  absent = (kinds["texts_kind"] == 0)[..., None]
  other = {**feats, "ztxts": jnp.where(absent, jnp.nan, feats["ztxts"])}
  loss = make(name, {})
  params, _ = loss.init({})
  graded = jax.jit(jax.value_and_grad(lambda x: loss.apply(params, {}, x, kinds, AT)[0]))
  one, two = graded(feats), graded(other)
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert np.isfinite(one[0]) and not np.where(absent, one[1]["ztxts"], 0).any()


def test_patches_and_phrases_of_two_widths_are_named():
  feats = example() | {"tokens_img": jnp.ones((8, 5, 7))}
  with pytest.raises(ValueError, match=r"radzero .* tokens_img are 7 wide and ztxts 6"):
    value("radzero", feats, [[1, 2, 0]] * 8)
