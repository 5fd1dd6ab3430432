"""Regression to a teacher's embeddings and tokens: the second oracles, limits, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import AT, FIELDS, both_precisions, cases2, check2, make, run2

from bigalign import losses
from bigalign.losses.heads.base import mean_over_batch
from bigalign.losses.heads.token_distill import regression


def applied(name, options):
  """(inputs, scalars) -> (objective, metrics) of a loss without scalars, see `run2`."""

  def value(inputs, scalars):
    feats = {f"raw_{k}": inputs[k] for k in ("img", "txt") if k in inputs}
    batch = {ours: inputs[k] for k, ours in FIELDS.items() if k in inputs}
    batch |= {f"{k}_stored": x for k, x in batch.items()}
    objective, (_, metrics) = make(name, options).apply({}, {}, feats, batch, AT)
    return objective, metrics

  return value


@both_precisions
@pytest.mark.parametrize("case", cases2("feature_distill"))
def test_feature_distill(case, precision):
  weights = {f"w_{side}": case["params"]["weights"].get(side, 0.0) for side in ("img", "txt")}
  got = run2(
    case, precision, applied("feature_distill", weights | dict(kind=case["params"]["kind"]))
  )
  check2(case, got, precision, require=case["expect"])


@both_precisions
@pytest.mark.parametrize("case", cases2("vl2v"))
def test_vl2v(case, precision):
  got = run2(case, precision, applied("vl2v", dict(share=case["params"]["lambda"])))
  check2(case, got, precision, require=case["expect"])


@both_precisions
@pytest.mark.parametrize("case", cases2("token_distill"))
def test_token_distill(case, precision):
  def value(inputs, scalars):
    given = (inputs["tokens"], inputs["t_tokens"], inputs["mask"] != 0)
    loss = mean_over_batch(regression(*given, case["params"]["kind"]))
    return loss, {"loss": loss}

  check2(case, run2(case, precision, value), precision)


def pair(width=8, size=6, seed=0):
  rng = np.random.default_rng(seed)
  x = {k: jnp.asarray(rng.normal(size=(size, width)), jnp.float32) for k in ("img", "txt")}
  teacher = {f"teacher_{k}{end}": v for k, v in x.items() for end in ("", "_stored")}
  return {f"raw_{k}": v for k, v in x.items()}, teacher


@pytest.mark.parametrize("kind", ["cosine", "mse", "cosine+mse"])
def test_a_student_with_its_teachers_features_has_nothing_to_learn(kind):
  feats, batch = pair()
  loss = make("feature_distill", dict(kind=kind))
  value, grads = jax.value_and_grad(lambda x: loss.apply({}, {}, x, batch, AT)[0])(feats)
  assert value == 0
  for x in grads.values():
    np.testing.assert_allclose(x, 0, atol=1e-7)


def test_mse_of_unit_vectors_is_2_over_the_width_of_the_cosine_term():
  feats, batch = pair(8)
  batch = {k: x[::-1] for k, x in batch.items()}
  mse, cosine = (
    losses.apply_once(make("feature_distill", dict(kind=k, normalise=True)), feats, batch)
    for k in ("mse", "cosine")
  )
  for side in ("img", "txt"):
    np.testing.assert_allclose(mse[side], 2 / 8 * cosine[side], rtol=1e-6)


def test_a_side_without_weight_is_not_read():
  feats, batch = pair()
  loss = losses.make_loss({"feature_distill": dict(w_img=0.0)})
  assert loss.needs == {"raw_text", "teacher_text"}
  one = {"raw_txt": feats["raw_txt"]}, {"teacher_txt": batch["teacher_txt"][::-1]}
  assert losses.apply_once(loss, *one)["loss"] > 0
  with pytest.raises(ValueError, match=r"w_img and w_txt are both 0"):
    make("feature_distill", dict(w_img=0.0, w_txt=0.0))


@pytest.mark.parametrize("name", ["feature_distill", "vl2v"])
def test_two_widths_are_named(name):
  feats, _ = pair(8)
  _, batch = pair(12)
  message = r"raw_img is 8 wide, but the data's teacher_img 12; .*embed_dim=12"
  with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
    losses.apply_once(make(name, {}), feats, batch)


def test_masked_tokens_do_not_count():
  rng = np.random.default_rng(0)
  tokens, teacher = (jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32) for _ in range(2))
  mask = jnp.asarray(rng.random((3, 5)) < 0.5).at[0, 0].set(True)

  def of(*given):
    return mean_over_batch(regression(*given, "mse"))

  chosen = np.asarray(mask)
  expected = ((np.asarray(tokens) - np.asarray(teacher)) ** 2).mean(-1)[chosen].mean()
  np.testing.assert_allclose(of(tokens, teacher, mask), expected, rtol=1e-6)
  assert float(of(tokens, teacher, jnp.zeros((3, 5), bool))) == 0
