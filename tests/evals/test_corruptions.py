"""Corruptions equal scipy, scikit-image's formulas and Pillow; their accuracy equals a loop."""

from __future__ import annotations

import io

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from test_evals import Tiny, embed_image, embed_text, make, make_params, tokenise

from bigalign.data.samples.ids import sample_id
from bigalign.evals import embed
from bigalign.evals.corruptions import PARAMETERS, SEVERITIES, corrupt, generator, summary

IMAGE = np.random.default_rng(0).integers(0, 256, (45, 38, 3), np.uint8)
IMAGE[:5] = 0  # black has no hue


def exact(kind, severity):
  """uint8: the kinds without noise, from other libraries."""
  amount, x = PARAMETERS[kind][severity - 1], IMAGE / 255
  if kind == "gaussian_blur":
    x = scipy.ndimage.gaussian_filter(x, (amount, amount, 0), mode="nearest", truncate=4)
  elif kind == "brightness":
    hsv = rgb_to_hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    x = hsv_to_rgb(hsv)
  elif kind == "contrast":
    x = np.stack([(c - c.mean()) * amount + c.mean() for c in x.transpose(2, 0, 1)], -1)
  elif kind == "pixelate":
    small = Image.fromarray(IMAGE).resize(
      (int(38 * amount), int(45 * amount)), Image.Resampling.BOX
    )
    return np.asarray(small.resize((38, 45), Image.Resampling.BOX))
  else:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG", quality=amount)
    return np.asarray(Image.open(file))
  return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["gaussian_blur", "brightness", "contrast", "pixelate", "jpeg"])
def test_kinds_without_noise_equal_other_libraries(kind):
  for severity in SEVERITIES:
    found = corrupt(IMAGE, kind, severity, np.random.default_rng(0)).astype(int)
    # A value between two levels may be rounded either way.
    assert abs(found - exact(kind, severity)).max() <= (kind in ("gaussian_blur", "brightness"))


def test_noise_has_the_moments_of_its_distribution():
  grey = np.full((400, 400, 3), 128, np.uint8)
  x = 128 / 255
  for severity in SEVERITIES:
    noise, photons, share = (
      PARAMETERS[f"{k}_noise"][severity - 1] for k in ("gaussian", "shot", "impulse")
    )
    drawn = {
      kind: corrupt(grey, kind, severity, generator(7, kind, severity)) / 255
      for kind in ("gaussian_noise", "shot_noise", "impulse_noise")
    }
    inside = abs(drawn["gaussian_noise"] - x) < 0.49  # the others are cut off
    within = scipy.stats.norm.cdf(0.49 / noise) * 2 - 1
    assert inside.mean() == pytest.approx(within, abs=0.01)
    assert np.median(abs(drawn["gaussian_noise"] - x)) == pytest.approx(0.6745 * noise, rel=0.03)
    expected = np.minimum(np.arange(200) / photons, 1)
    chances = scipy.stats.poisson.pmf(np.arange(200), x * photons)
    assert drawn["shot_noise"].mean() == pytest.approx((expected * chances).sum(), abs=0.005)
    for level in (0, 1):
      assert (drawn["impulse_noise"] == level).mean() == pytest.approx(share / 2, rel=0.03)


def test_the_noise_of_an_image_depends_on_its_key_alone():
  first = [corrupt(IMAGE, "shot_noise", 2, generator(i, "shot_noise", 2)) for i in (1, 1, 2)]
  np.testing.assert_array_equal(first[0], first[1])
  assert (first[0] != first[2]).any()
  assert (first[0] != corrupt(IMAGE, "shot_noise", 2, generator(1, "shot_noise", 3))).any()


@pytest.fixture
def source(monkeypatch):
  opened = Tiny()
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: opened)
  return opened


OPTIONS = dict(type="corruptions", source="s", templates=["a {}"], batch_size=10)


@pytest.mark.parametrize("axes", [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)])
def test_the_evaluator_equals_a_loop(source, axes):
  options = OPTIONS | dict(kinds=("gaussian_noise", "contrast"), severities=(1, 5))
  found = make("x", options, **axes)(make_params(1))
  params, rows = make_params(1), [i for i in range(37) if i not in source.broken]
  weights = np.asarray(embed_text(params, *tokenise([f"a {x}" for x in source.classnames])))

  def share(kind, severity):
    images = [
      corrupt(
        source.images[i], kind, severity, generator(int(sample_id(f"{i:05}")), kind, severity)
      )
      if kind
      else source.images[i]
      for i in rows
    ]
    scores = np.asarray(embed_image(params, np.stack(images))) @ weights.T
    return (scores.argmax(1) == source.labels[rows]).mean()

  shares = {(k, s): share(k, s) for k in options["kinds"] for s in options["severities"]}
  wanted = {f"{k}-{s}-top1": x for (k, s), x in shares.items()}
  for kind in options["kinds"]:
    wanted[f"{kind}-mean_top1"] = (shares[kind, 1] + shares[kind, 5]) / 2
  for s in (1, 5):
    wanted[f"severity_{s}-mean_top1"] = (shares["gaussian_noise", s] + shares["contrast", s]) / 2
  mean, clean = sum(shares.values()) / 4, share("", 0)
  wanted |= dict(top1=clean, mean_top1=mean, relative_drop=1 - mean / clean)
  wanted |= dict(num_samples=36, num_classes=6, rejected=1)
  assert found == pytest.approx({f"val/x-corruptions-{k}": x for k, x in wanted.items()}, abs=1e-6)


def test_a_model_that_finds_nothing_has_no_drop():
  assert "relative_drop" not in summary(0.0, {("jpeg", 1): 0.0})


def test_what_cannot_be_corrupted_is_named(source):
  def fails(message, **options):
    with pytest.raises(ValueError, match=message):
      make("x", OPTIONS | options)(make_params())

  fails(r"x\.kinds: unknown 'fog'", kinds=("fog",))
  fails(r"x\.severities: \[0, 6\] are not among", severities=(0, 3, 6))
  fails("name some", kinds=())
  source.labels[1] = 9
  fails("1 of 36 samples have no label of 6 class names", kinds=("jpeg",), severities=(1,))
  source.classnames = ()
  fails("s has no class names")
