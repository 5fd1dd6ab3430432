"""More of zero-shot classification: prefixes of embeddings, and images that show no class."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_evals import (
  E,
  Tiny,
  embed_image,
  embed_text,
  image_features,
  make,
  make_params,
  text_features,
  tokenise,
  unit,
)

from bigalign.evals import embed
from bigalign.evals.ood import auroc, certainty, false_positive_rate
from bigalign.evals.zeroshot import fill, measure
from bigalign.losses.logit_head import LogitHead

MESHES = [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)]
TEMPLATES = ["a {}", "{c}s", "the {} here"]


@pytest.fixture
def sources(monkeypatch):
  """A source, and another of other pictures, of which two are broken."""
  sources = dict(tiny=Tiny(), other=Tiny(n=23, seed=9, broken=(0, 7)))
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: sources[spec])
  return sources


@pytest.mark.parametrize("axes", MESHES)
def test_a_prefix_is_what_a_model_of_its_width_finds(sources, axes):
  """That is, prefixes of images and of each prompt are scaled to unit norm, before the mean."""

  def narrow(width):
    @jax.jit
    def image(params, x):
      return unit(image_features(params, x)[:, :width])

    @jax.jit
    def text(params, ids, mask):
      return unit(text_features(params, ids, mask)[:, :width])

    return image, text

  options = dict(type="zeroshot", source="tiny", templates=TEMPLATES, batch_size=10)
  params = make_params(1)
  found = make("x", options | dict(widths=(3, 5)), **axes)(params)
  start = "val/x-zeroshot-val-"
  assert make("x", options, **axes)(params).items() <= found.items()
  for width in (3, 5):
    alone = make("x", options, towers=narrow(width), **axes)(params)
    for name in ("top1", "top5", "mean_per_class_recall"):
      assert found[f"{start}d{width}-{name}"] == pytest.approx(alone[start + name])
  assert found[f"{start}d3-top1"] != found[f"{start}top1"]
  with pytest.raises(ValueError, match=f"widths: 8 must be between 1 and {E - 1}, of {E}"):
    make("x", options | dict(widths=(8,)))(params)


@pytest.mark.slow
def test_the_place_of_a_class_is_that_of_probes():
  """Of equal scores the earlier class is first; no score that is not finite is a hit."""
  weights = jnp.asarray([[1.0], [3.0], [jnp.nan], [3.0], [2.0], [3.0], [jnp.inf]])
  for z, by_class in ((1.0, [5, 1, 7, 2, 4, 3, 7]), (-1.0, [0, 2, 7, 3, 1, 4, 7])):
    scores, label = jnp.full((7, 1), z) @ weights.T, jnp.arange(7)
    assert embed.places(scores, label).tolist() == by_class
    for k, place in enumerate(by_class):
      hits = measure(jnp.full((1, 1), z), weights, jnp.asarray([k]), jnp.asarray([True])).compute()
      assert (hits["top1"], hits["top5"]) == (place < 1, place < 5)
  few = measure(jnp.ones((1, 1)), weights[:3], jnp.asarray([2]), jnp.asarray([True])).compute()
  assert few["top5"] == 0  # NaN among fewer than five classes


def test_equal_scores_count_half_and_nan_never_in_favour():
  rng = np.random.default_rng(0)
  inside, outside = rng.integers(0, 9, 80) + 2.0, rng.integers(0, 9, 50) + 0.0
  inside[3], outside[4] = np.nan, np.nan
  low, high = np.nan_to_num(inside, nan=-1), np.nan_to_num(outside, nan=99)
  above = (low[:, None] > high[None]).mean() + (low[:, None] == high[None]).mean() / 2
  assert auroc(inside, outside) == pytest.approx(above, abs=1e-12)
  rates = [
    (high >= threshold).mean() for threshold in np.unique(low) if (low >= threshold).mean() >= 0.95
  ]
  assert false_positive_rate(inside, outside) == pytest.approx(min(rates), abs=1e-12)
  assert auroc(np.ones(3), np.ones(4)) == 0.5 and false_positive_rate(np.ones(3), np.ones(4)) == 1


def test_certain_images_keep_their_order():
  """In float32 their probabilities are all 1."""
  z = jnp.asarray([[np.cos(a), np.sin(a)] for a in (0.5, 0.3, 0.1)], jnp.float32)
  found = np.asarray(certainty(z, jnp.eye(2), jnp.asarray(100.0)))
  assert (np.diff(found) > 0).all()
  with jax.enable_x64(True):
    wide = jnp.asarray(z, jnp.float64)
    p = jax.nn.softmax(2 * wide @ jnp.eye(2), axis=1).max(1)
    np.testing.assert_allclose(certainty(wide, jnp.eye(2), 2.0), np.log(p / (1 - p)), rtol=1e-9)


@pytest.mark.parametrize("axes", MESHES)
def test_the_certainty_of_images_without_a_class_equals_numpy(sources, axes):
  options = dict(type="zeroshot", source="tiny", ood="other", templates=["a {}"], batch_size=10)
  params, scale = make_params(1), 9.0
  head = lambda params: LogitHead(scale, 0.0, False)  # noqa: E731
  found = make("x", options, logit_head=head, **axes)(params)
  names = [fill("a {}", name) for name in Tiny.classnames]
  weights = np.asarray(embed_text(params, *tokenise(names)), np.float64)
  most = {}
  for name, source in sources.items():
    usable = [i for i in range(len(source)) if i not in source.broken]
    logits = scale * np.asarray(embed_image(params, source.images[usable]), np.float64) @ weights.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    most[name] = 1 / p.sum(1)
  inside, outside = most["tiny"], most["other"]
  threshold = np.sort(inside)[len(inside) - int(np.ceil(0.95 * len(inside)))]
  start = "val/x-zeroshot-val-ood_"
  assert found[f"{start}auroc"] == pytest.approx((inside[:, None] > outside[None]).mean())
  assert found[f"{start}fpr95"] == pytest.approx((outside >= threshold).mean())
  assert found[f"{start}num_samples"] == 21 and found[f"{start}rejected"] == 2
  sources["other"].broken = range(23)
  with pytest.raises(ValueError, match=r"config\.evals\.x\.ood: all 23 samples are rejected"):
    make("x", options, logit_head=head)(params)
  with pytest.raises(ValueError, match=r"config\.evals\.x\.ood needs the logit scale"):
    make("x", options)


@pytest.mark.parametrize("axes", MESHES)
def test_confused_classes_equal_numpy(sources, axes):
  options = dict(type="zeroshot", source="tiny", templates=["a {}"], batch_size=10)
  params, tiny = make_params(1), sources["tiny"]
  shown = make("x", options, **axes).confusion(params)
  names = [fill("a {}", name) for name in tiny.classnames]
  weights = np.asarray(embed_text(params, *tokenise(names)))
  usable = [i for i in range(len(tiny)) if i not in tiny.broken]
  found = (np.asarray(embed_image(params, tiny.images[usable])) @ weights.T).argmax(1)
  label = tiny.labels[usable]
  np.testing.assert_array_equal(shown.label, label)
  np.testing.assert_array_equal(shown.found, found)
  matrix = np.array([[((label == a) & (found == b)).sum() for b in range(6)] for a in range(6)])
  np.testing.assert_array_equal(shown.matrix(), matrix)
  pairs = [(a, b, matrix[a, b], (label == a).sum()) for a in range(6) for b in range(6) if a != b]
  pairs = sorted((pair for pair in pairs if pair[2]), key=lambda pair: -pair[2])
  assert shown.pairs(4) == pairs[:4] and shown.pairs(99) == pairs and len(pairs) > 4
  expected = [(found[label == a] == a).mean() if (label == a).any() else np.nan for a in range(6)]
  np.testing.assert_array_equal(shown.recalls(), expected)
  assert np.isnan(shown.recalls()[5])


def test_confused_classes_are_compiled_once(sources, caplog):
  shown = make("x", dict(type="zeroshot", source="tiny", batch_size=10)).confusion
  shown(make_params(1))
  with jax.log_compiles(True):
    shown(make_params(2))
  assert "Compiling" not in caplog.text


def test_images_of_nan_are_taken_for_no_class(sources):
  nan = (lambda p, x: jnp.full((len(x), E), jnp.nan), embed_text)
  shown = make("x", dict(type="zeroshot", source="tiny"), towers=nan).confusion(make_params())
  assert (shown.found == -1).all() and len(shown.found) == 36
  assert shown.pairs(9) == [] and not shown.matrix().any() and not np.nansum(shown.recalls())
  flat = (lambda p, x: jnp.ones((len(x), E)), lambda p, ids, mask: jnp.ones((len(ids), E)))
  shown = make("x", dict(type="zeroshot", source="tiny"), towers=flat).confusion(make_params())
  assert (shown.found == 0).all()  # of equal scores the first class
