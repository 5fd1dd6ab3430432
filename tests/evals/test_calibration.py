"""Calibration of zero-shot classification equals a loop of numpy and scipy's minimum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from helpers.loss_oracles import cases2, oracles2
from test_evals import Tiny, embed_image, embed_text, make, make_params, tokenise

from bigalign.data.samples.ids import sample_id
from bigalign.evals import calibration, embed
from bigalign.evals.calibration import expected_calibration_error, fit_scale, moments, top_class
from bigalign.evals.zeroshot import fill
from bigalign.losses.logit_head import LogitHead


@pytest.mark.parametrize("case", cases2("ece"))
def test_the_error_and_the_accuracy_of_logits(case):
  inputs = oracles2().inputs(case)
  with jax.enable_x64(True):
    logits, labels = (jnp.asarray(inputs[name]) for name in ("logits", "labels"))
    classes = jnp.eye(logits.shape[1], dtype=logits.dtype)
    confidence, correct = map(np.asarray, top_class(logits, classes, labels, jnp.asarray(1.0)))
  got = dict(
    ece=expected_calibration_error(confidence, correct, case["params"]["bins"]),
    ece_10=expected_calibration_error(confidence, correct, 10),
    accuracy=correct.mean(),
  )
  oracles2().check(case, got, rtol=1e-9, require=("ece", "ece_10", "accuracy"))


def loop(confidence, correct, bins):
  total = 0.0
  for b in range(bins):
    inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
    if inside.any():
      total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
  return total


@pytest.mark.parametrize("bins", [1, 8, 15])
def test_the_error_equals_a_loop_over_bins_that_hold_their_upper_edge(bins):
  rng = np.random.default_rng(bins)
  confidence = np.concatenate([rng.uniform(0.01, 1, 200), np.arange(1, bins + 1) / bins])
  correct = rng.random(len(confidence)) < confidence
  found = expected_calibration_error(confidence, correct, bins)
  assert found == pytest.approx(loop(confidence, correct, bins), abs=1e-12)


def test_nan_counts_as_a_wrong_answer_of_full_confidence():
  z = jnp.asarray([[1.0, 0.0], [jnp.nan, 0.0]])
  confidence, correct = top_class(z, jnp.eye(2), jnp.zeros(2, int), jnp.asarray(50.0))
  assert correct.tolist() == [True, False] and np.isnan(confidence[1])
  assert expected_calibration_error(np.asarray(confidence), np.asarray(correct)) == 0.5
  assert np.isnan(expected_calibration_error(np.zeros(0), np.zeros(0)))


def test_of_equal_logits_the_first_class_is_the_top():
  z = jnp.zeros((2, 3))
  confidence, correct = top_class(z, jnp.ones((4, 3)), jnp.asarray([0, 1]), jnp.asarray(9.0))
  assert correct.tolist() == [True, False]
  np.testing.assert_allclose(confidence, 1 / 4, rtol=1e-6)


def minimum(cosines, label):
  """The scale of the smallest log loss, by scipy."""

  def loss(log_scale):
    logits = np.exp(log_scale) * cosines
    return np.mean(scipy.special.logsumexp(logits, 1) - logits[np.arange(len(label)), label])

  bounds = np.log(calibration.RANGE)
  options = dict(xatol=1e-10)
  found = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options=options)
  return float(np.exp(found.x))


@pytest.mark.parametrize("start", [1e-2, 10.0, 3e4])
def test_the_fitted_scale_is_that_of_scipy(start):
  rng = np.random.default_rng(0)
  cosines = rng.uniform(-0.3, 0.6, (300, 7))
  label = np.array([rng.choice(7, p=scipy.special.softmax(11 * row)) for row in cosines])
  with jax.enable_x64(True):
    used = jnp.arange(300) < 299  # the last has another image, which does not count
    given = (jnp.asarray(cosines).at[299].set(jnp.nan), jnp.eye(7), jnp.asarray(label), used)
    derivatives = jax.jit(lambda s: moments(*given, s))
    found = fit_scale(lambda s: np.asarray(derivatives(jnp.asarray(s))), start)
  assert found == pytest.approx(minimum(cosines[:299], label[:299]), rel=1e-6)
  assert 5 < found < 20


def test_a_scale_without_a_minimum_ends_at_the_bounds():
  assert fit_scale(lambda s: (-1.0, 0.0), 10.0) == pytest.approx(calibration.RANGE[1], rel=1e-3)
  assert fit_scale(lambda s: (1.0, 0.0), 10.0) == pytest.approx(calibration.RANGE[0], rel=1e-3)


def head(scale, sigmoid=False):
  return lambda params: LogitHead(scale, -7.0 if sigmoid else 0.0, sigmoid)


@pytest.fixture
def tiny(monkeypatch):
  """Labels that the model of make_params(1) finds more often than by chance."""
  source = Tiny(n=61)
  zimg = np.asarray(embed_image(make_params(1), source.images))
  cosines = zimg @ of_classes(source, make_params(1)).T
  chosen = np.random.default_rng(0).random(61) < 0.6
  source.labels = np.where(chosen, cosines.argmax(1), source.labels)
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: source)
  return source


def of_classes(source, params):
  return np.asarray(
    embed_text(params, *tokenise([fill("a {}", name) for name in source.classnames]))
  )


def expected(source, params, scale, prefix="val/animals-zeroshot-val-"):
  """By numpy and scipy, in float64: the fifth whose keys' hashes are multiples of 5 fits."""
  usable = [i for i in range(len(source)) if i not in source.broken]
  zimg = np.asarray(embed_image(params, source.images[usable]), np.float64)
  cosines = zimg @ of_classes(source, params).astype(np.float64).T
  label = source.labels[usable]
  fits = np.array([sample_id(f"{i:05}") % 2**32 % 5 == 0 for i in usable])
  fitted = minimum(cosines[fits], label[fits])

  def error(scale, rows):
    p = scipy.special.softmax(scale * cosines[rows], axis=1)
    return loop(p.max(1), cosines[rows].argmax(1) == label[rows], 15)

  metrics = dict(
    ece=error(scale, slice(None)),
    ece_rest=error(scale, ~fits),
    ece_rest_calibrated=error(fitted, ~fits),
    logit_scale=scale,
    calibrated_temperature=scale / fitted,
    calibration_samples=fits.sum(),
  )
  return {prefix + name: x for name, x in metrics.items()}


@pytest.mark.parametrize("axes", [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)])
def test_the_evaluator_equals_numpy_and_scipy(tiny, axes):
  options = dict(type="zeroshot", source="tiny", templates=["a {}"], batch_size=10)
  params = make_params(1)
  plain = make("animals", options, **axes)(params)
  found = make("animals", options | dict(calibration=True), logit_head=head(20.0), **axes)(params)
  wanted = expected(tiny, params, 20.0)
  assert found == pytest.approx(plain | wanted, rel=1e-4, abs=1e-6)
  assert 5 < wanted["val/animals-zeroshot-val-calibration_samples"] < 20
  assert 0.5 < wanted["val/animals-zeroshot-val-calibrated_temperature"] < 20  # not at a bound
  same = make("animals", options | dict(calibration=True), logit_head=head(20.0, True), **axes)
  assert same(params) == found  # the bias of a sigmoid loss drops out


def test_calibration_that_cannot_be_measured_is_named(tiny, caplog):
  options = dict(type="zeroshot", source="tiny", calibration=True)
  with pytest.raises(
    ValueError, match=r"animals\.calibration needs the logit scale, which this mod"
  ):
    make("animals", options)
  tiny.dataset_type = "multilabel"
  with pytest.raises(ValueError, match=r"animals\.calibration: the images of a multilabel dataset"):
    make("animals", options, logit_head=head(20.0))
  del tiny.dataset_type
  tiny.broken = [i for i in range(61) if sample_id(f"{i:05}") % 2**32 % 5 == 0]
  found = make("animals", options, logit_head=head(20.0))(make_params())
  assert "val/animals-zeroshot-val-ece" in found
  assert "val/animals-zeroshot-val-ece_rest_calibrated" not in found
  assert "has no calibrated ECE: of its" in caplog.text
