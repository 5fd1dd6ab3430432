"""Heads on tokens (FDT, VLAP, Gram, regions, lexical): the second oracles, limits, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import AT, both_precisions, cases2, check2, oracles2, run2

from bigalign import losses
from bigalign.losses.clip import contrast
from bigalign.losses.engine.pairwise import DEFAULT
from bigalign.losses.heads import scores
from bigalign.losses.heads.fdt import mixture, sparsemax
from bigalign.losses.heads.gram import gram_mse
from bigalign.losses.heads.lexical import overuse
from bigalign.losses.heads.region_phrase import _hashed, cloc_region, pooling
from bigalign.losses.heads.sinkhorn import sinkhorn
from bigalign.losses.heads.vlap import swapped
from bigalign.sphere import unit


@both_precisions
@pytest.mark.parametrize("case", cases2("gram_mse"))
def test_gram(case, precision):
  def value(inputs, scalars):
    tokens, teacher = inputs["tokens"], inputs["t_tokens"]
    if "index" in inputs:  # some of the patches
      tokens, teacher = (x[:, inputs["index"]] for x in (tokens, teacher))
    total = gram_mse(tokens, teacher, case["params"]["normalize"])
    loss = total.sum() / (len(tokens) * tokens.shape[1] ** 2)
    return loss, {"loss": loss}

  check2(case, run2(case, precision, value), precision)


@both_precisions
@pytest.mark.parametrize("case", cases2("fdt"))
def test_codes(case, precision):
  options = case["params"]

  def value(inputs, scalars):
    found = {}
    for side, mask in (("img", None), ("txt", inputs["pad"] == 0)):
      weights, mixed = mixture(
        inputs[f"q_{side}"], inputs["codebook"], options["temperature"], mask, options["pad_value"]
      )
      found |= {f"w_{side}": weights, f"f_{side}": mixed}
    scale = jnp.exp(scalars["log_scale"])
    loss = contrast(unit(found["f_img"]), unit(found["f_txt"]), scale, engine=DEFAULT)
    return loss, {"loss": loss, **found}

  got = run2(case, precision, value)
  if precision == "float32" and options["temperature"] == 1_000:
    # The oracles' README: these gradients are 1e-4 small, and agree to 1e-3 in float32.
    small = {k: got.pop(k) for k in ("d_log_scale", "d_q_img", "d_q_txt")}
    oracles2().check(case, small, rtol=1e-3, require=small)
    oracles2().check(case, got, rtol=1e-4, require=("loss", "w_img", "w_txt", "d_codebook"))
    return
  check2(case, got, precision, require=("w_img", "w_txt", "f_img", "f_txt"))


@both_precisions
@pytest.mark.parametrize("case", cases2("sinkhorn"))
def test_assignments(case, precision):
  def value(inputs, scalars):
    q = sinkhorn(
      inputs["teacher"],
      eps=case["params"]["eps"],
      iterations=case["params"]["iterations"],
      prior=inputs.get("prior"),
    )
    return q.sum(), {"Q": q}

  check2(case, run2(case, precision, value), precision, require=("Q",))


@both_precisions
@pytest.mark.parametrize("case", cases2("vlap"))
def test_swapped_assignments(case, precision):
  def value(inputs, scalars):
    table = unit(inputs["table"])
    found = swapped(
      unit(inputs["img"]) @ table.T,
      unit(inputs["txt"]) @ table.T,
      prior=inputs.get("prior"),
      **{name: case["params"][name] for name in ("eps", "tau", "iterations")},
    )
    return (found["img"] + found["txt"]) / 2, {
      **found,
      "loss": (found["img"] + found["txt"]) / 2,
    }

  got = run2(case, precision, value)
  check2(case, got, precision, require=("img", "txt", "Q_img", "Q_txt"))


@both_precisions
@pytest.mark.parametrize("case", cases2("region_phrase"))
def test_regions(case, precision):
  def value(inputs, scalars):
    weights = pooling(inputs["boxes"], case["params"]["grid"])
    regions = unit(jnp.einsum("bmn,bnd->bmd", weights, inputs["tokens"]))
    scale = jnp.exp(scalars["log_scale"])
    phrases = unit(inputs["phrases"]) if case["normalize"] else inputs["phrases"]
    r2q, q2r = cloc_region(regions, phrases, inputs["mask"], inputs["phrase_id"], scale)
    loss = (r2q + q2r) / 2
    return loss, {"loss": loss, "r2q": r2q, "q2r": q2r, "weights": weights}

  # Of the rows that the case normalises, tokens are not: only what they are pooled to is.
  own = case | dict(normalize=False)
  got = run2(own, precision, value, key=(case["normalize"],))
  check2(case, got, precision, require=("r2q", "q2r", "weights"))


@both_precisions
@pytest.mark.parametrize("case", cases2("overuse"))
def test_words_that_are_used_everywhere(case, precision):
  def value(inputs, scalars):
    return overuse(inputs["lex"]), {"loss": overuse(inputs["lex"])}

  check2(case, run2(case, precision, value), precision)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
  z = np.asarray(normal(3, 8))
  weights = np.asarray(sparsemax(z))
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
  assert (weights == 0).any() and (weights >= 0).all()
  # No other point of a thousand is nearer.
  others = np.random.default_rng(1).dirichlet(np.ones(8), (1_000, 3))
  assert (((weights - z) ** 2).sum(-1) <= ((others - z[None]) ** 2).sum(-1).min(0)).all()
  g = np.asarray(normal(3, 8, seed=2))
  support = weights > 0
  (grad,) = jax.vjp(sparsemax, z)[1](g)
  mean = (g * support).sum(-1, keepdims=True) / support.sum(-1, keepdims=True)
  np.testing.assert_allclose(grad, support * (g - mean), atol=1e-6)


def test_padding_changes_nothing_where_it_takes_no_part():
  queries, codebook = normal(2, 5, 6), normal(9, 6, seed=1) - 1
  mask = jnp.asarray([[True] * 3 + [False] * 2] * 2)
  short = mixture(queries[:, :3], codebook, 20.0)[0]
  padded = {k: mixture(queries, codebook, 20.0, mask, k)[0] for k in ("inf", "zero")}
  np.testing.assert_allclose(padded["inf"], short, atol=1e-6)
  assert np.abs(padded["zero"] - short).max() > 1e-4  # as released


def test_scores_in_parts_are_those_of_the_whole_table(monkeypatch):
  tokens, table = normal(2, 5, 6), normal(12, 6, seed=1)
  mask = jnp.asarray([[True] * 4 + [False], [True] * 5])

  def value(tokens):
    return (scores.largest(tokens, table, mask) ** 2).sum()

  whole = jax.value_and_grad(value)(tokens)
  monkeypatch.setattr(scores, "AT_ONCE", 5)  # parts of 4
  for a, b in zip(jax.value_and_grad(value)(tokens), whole):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_boxes_cover_patches_by_area():
  boxes = jnp.asarray([[0, 0, 1, 1], [0.25, 0.5, 0.5, 1], [0, 0, 0.375, 0.25]], jnp.float32)
  whole, one_column, corner = np.asarray(pooling(boxes, (2, 4)))
  np.testing.assert_allclose(whole, 1 / 8)
  np.testing.assert_allclose(one_column, [0, 0, 0, 0, 0, 1, 0, 0], atol=1e-6)  # that very patch
  np.testing.assert_allclose(corner, [2 / 3, 1 / 3, 0, 0, 0, 0, 0, 0], rtol=1e-6)


def test_a_mirrored_box_pools_mirrored_patches():
  box, patches = jnp.asarray([0.1, 0.3, 0.6, 0.9]), normal(3, 4, 5)
  mirrored = jnp.stack([1 - box[2], box[1], 1 - box[0], box[3]])
  pooled = [
    jnp.einsum("n,nd->d", pooling(b, (3, 4)), x.reshape(12, 5))
    for b, x in ((box, patches), (mirrored, patches[:, ::-1]))
  ]
  np.testing.assert_allclose(*pooled, rtol=1e-5)


def test_equal_phrases_have_equal_ids():
  ids = jnp.asarray([[[3, 4, 0], [4, 3, 0]], [[3, 4, 0], [3, 4, 4]]])
  (a, b), (c, d) = np.asarray(_hashed(ids))
  assert a == c and len({a, b, d}) == 3


def test_a_prior_of_words_is_checked(tmp_path):
  make = losses.HEADS["vlap"]
  with pytest.raises(ValueError, match=r"config.loss.vlap.prior=.*there is no such file"):
    make(prior=str(tmp_path / "none.npy"))
  np.save(tmp_path / "shares.npy", np.ones(5))
  loss = make(prior=str(tmp_path / "shares.npy"))
  feats = {f"cosines_{side}": normal(4, 7) for side in ("img", "txt")}
  with pytest.raises(ValueError, match=r"has 5 shares, but the token table .* has 7 rows"):
    loss.apply({}, {}, feats, {}, AT)
