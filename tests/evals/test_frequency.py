"""Frequency of classes against accuracy, and effective robustness, as scipy fits them."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import scipy.stats
from scipy.special import expit, logit
from test_evals import Tiny, embed_image, embed_text, make, make_params, tokenise

from bigalign.data.text.lemmas import lemma
from bigalign.evals import embed, frequency
from bigalign.shards.balance import Matcher
from bigalign.suites import results
from bigalign.suites.robustness import effective_robustness
from bigalign.suites.runner import Result
from bigalign.suites.suite import read_suite

COUNTS = dict(ant=3, bee=1000, cat=0, dog=99, eel=100, fox=7)  # no image shows a fox


@pytest.mark.parametrize("axes", [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)])
def test_the_fit_is_that_of_scipy(monkeypatch, tmp_path, axes):
  tiny = Tiny()
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: tiny)
  (tmp_path / "c.json").write_text(json.dumps(COUNTS | dict(other=5)))
  options = dict(type="zeroshot", source="s", templates=["a {}"], frequency=f"{tmp_path}/c.json")
  found = make("x", options | dict(batch_size=10), **axes)(make_params(1))
  params, rows = make_params(1), [i for i in range(37) if i not in tiny.broken]
  weights = np.asarray(embed_text(params, *tokenise([f"a {x}" for x in tiny.classnames])))
  top = (np.asarray(embed_image(params, tiny.images[rows])) @ weights.T).argmax(1)
  labels = tiny.labels[rows]
  recalls = {name: (top == k)[labels == k].mean() for k, name in enumerate(COUNTS) if k < 5}
  fit = scipy.stats.linregress(
    *zip(*((np.log10(COUNTS[name]), x) for name, x in recalls.items() if COUNTS[name]))
  )
  wanted = dict(
    frequency_slope=fit.slope,
    frequency_pearson_r=fit.rvalue,
    frequency_classes=4,
    frequency_unnamed=1,
    **{
      "frequency_0-mean_top1": recalls["cat"],
      "frequency_1e0-mean_top1": recalls["ant"],
      "frequency_1e1-mean_top1": recalls["dog"],
      "frequency_1e2-mean_top1": recalls["eel"],
      "frequency_1e3-mean_top1": recalls["bee"],
    },
  )
  start = "val/x-zeroshot-val-"
  own = {name: x for name, x in found.items() if "frequency" in name}
  assert own == pytest.approx({start + name: x for name, x in wanted.items()}, abs=1e-6)

  def fails(message, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      make("x", options)

  fails("has no number of 5 of 6 classes .*balance SHARDS --lemmas", '{"ant": 1}')
  fails("holds -1; expected whole numbers", json.dumps(COUNTS | dict(eel=-1)))
  fails("is not JSON", "{")
  fails("must hold an object", "[1]")


def test_without_a_spread_there_is_no_slope(caplog):
  found = frequency.measure(np.array([5, 5, 5, 0]), np.array([0.1, 0.2, np.nan, np.nan]), "x")
  assert found == {
    "frequency_classes": 2,
    "frequency_unnamed": 0,
    "frequency_1e0-mean_top1": pytest.approx(0.15),
  }
  assert "captions name 2 classes" in caplog.text
  level = frequency.measure(np.array([1, 10, 100]), np.full(3, 0.5), "x")
  assert level["frequency_slope"] == 0 and "frequency_pearson_r" not in level


def test_names_match_in_the_singular_and_in_lower_case():
  singular = dict(Dogs="dog", cities="city", boxes="box", horses="horse", women="woman", ties="tie")
  singular |= dict(grass="grass", bus="bus", buses="bus", potatoes="potato", glasses="glasses")
  assert {word: lemma(word) for word in singular} == singular
  matcher = Matcher(["tabby cat", "Cats", "cat", "polar bears"], lemmas=True)
  assert matcher.find("Two TABBY cats, sleeping.") == {0, 1, 2}
  assert matcher.find("a polar bear!") == {3} and matcher.find("category") == set()
  assert Matcher(["cat"]).find("cats Cat") == set()  # as before


def test_effective_robustness_is_the_residual_of_a_line_on_logit_scales():
  rng = np.random.default_rng(0)
  x = rng.uniform(0.2, 0.9, 7)
  y = expit(1.2 * logit(x) - 0.5 + 0.1 * rng.normal(size=7))
  fit = scipy.stats.linregress(logit(x), logit(y))
  expected = y - expit(fit.intercept + fit.slope * logit(x))
  np.testing.assert_allclose(effective_robustness(x, y), expected, atol=1e-12)
  more = effective_robustness(np.append(x, [0.5, 1, np.nan]), np.append(y, [0, 0.5, 0.5]))
  np.testing.assert_allclose(more[:7], expected, atol=1e-12)
  assert np.isnan(more[7:]).all()
  assert np.isnan(effective_robustness(x[:2], y[:2])).all()
  assert np.isnan(effective_robustness(np.full(4, 0.5), y[:4])).all()


def test_a_table_of_models_shows_effective_robustness(tmp_path):
  x, y = (0.3, 0.5, 0.8), (0.2, 0.45, 0.6)

  def result(task, model, value, **more):
    return Result(task, "zeroshot", model, {"top1": value}, ("top1",), **more)

  some = [result("i", f"m{k}", value) for k, value in enumerate(x)]
  some += [result("v2", f"m{k}", value, shift_of="i") for k, value in enumerate(y)]
  rows = {(row.task, row.metric): row for row in results.rows_of(some)}
  assert [*rows] == [("i", "top1"), ("v2", "top1"), ("v2", "effective_robustness")]
  found = [value for value, _, _ in rows["v2", "effective_robustness"].values.values()]
  np.testing.assert_allclose(found, effective_robustness(np.array(x), np.array(y)))
  assert "v2,effective_robustness,m1" in results.as_csv(some)
  two = [one for one in some if one.model != "m2"]
  assert [row.metric for row in results.rows_of(two)] == ["top1", "top1"]
  path = tmp_path / "s.toml"
  path.write_text('[a]\ntype = "zeroshot"\nsource = "x"\nshift_of = "b"\n')
  with pytest.raises(ValueError, match=r"s\.toml: a\.shift_of: unknown 'b'"):
    read_suite(str(path))
