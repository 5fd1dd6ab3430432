"""Accuracy per group and macro F1 equal scikit-learn's, on one device and on eight."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from test_evals import E, Tiny, embed_image, embed_text, make, make_params, tokenise

from bigalign.evals import embed

START = "val/x-zeroshot-val-"
OPTIONS = dict(type="zeroshot", source="s", templates=["a {}"], batch_size=10)


class Grouped(Tiny):
  """Images from three regions; the number of the region is in KEY.npy too."""

  def __init__(self):
    super().__init__()
    self.regions = ["south", "north", "other"]

  def value(self, i, path):
    if path == "npy":
      file = io.BytesIO()
      np.save(file, np.array([i % 3, 7, 2.5]))
      return file.getvalue()
    return {"json.region": self.regions[i % 3], "json.key": f"{i}"}.get(path)


@pytest.fixture
def source(monkeypatch):
  opened = Grouped()
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: opened)
  return opened


def scores_of(source):
  params = make_params(1)
  rows = np.array([i for i in range(37) if i not in source.broken])
  z = np.asarray(embed_image(params, source.images[rows]))
  weights = np.asarray(embed_text(params, *tokenise([f"a {x}" for x in source.classnames])))
  return rows, source.labels[rows], z @ weights.T


@pytest.mark.parametrize("axes", [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)])
def test_groups_and_macro_f1_equal_scikit_learn(source, axes):
  found = make("x", OPTIONS | dict(groups="json.region", groups_without=("other",)), **axes)
  found = found(make_params(1))
  rows, label, scores = scores_of(source)
  order = np.argsort(-scores, axis=1, kind="stable")
  wanted = {"macro_f1": f1_score(label, order[:, 0], average="macro", labels=np.unique(label))}
  for metric, k in (("top1", 1), ("top5", 5)):
    hit = (order[:, :k] == label[:, None]).any(1)
    shares = {}
    for n, name in enumerate(source.regions):
      inside = rows % 3 == n
      shares[name] = accuracy_score(hit[inside], np.ones(inside.sum(), bool))
      wanted[f"group_{name}-num_samples"] = inside.sum()
    wanted |= {f"group_{name}-{metric}": x for name, x in shares.items()}
    wanted[f"worst_group_{metric}"] = min(shares["north"], shares["south"])
    wanted[f"group_gap_{metric}"] = abs(shares["north"] - shares["south"])
  assert {START + k: pytest.approx(x, abs=1e-6) for k, x in wanted.items()}.items() <= found.items()
  numbered = make("x", OPTIONS | dict(groups="npy.0"), **axes)(make_params(1))
  for n, name in enumerate(source.regions):
    assert numbered[f"{START}group_{n}-top1"] == found[f"{START}group_{name}-top1"]


def test_ties_and_nan_in_groups(source):
  flat = (lambda p, x: jnp.ones((len(x), E)), lambda p, ids, mask: jnp.ones((len(ids), E)))
  nan = (lambda p, x: jnp.full((len(x), E), jnp.nan), flat[1])
  options = OPTIONS | dict(groups="json.region")
  rows, label, _ = scores_of(source)
  found = make("x", options, towers=flat)(make_params())
  for n, name in enumerate(source.regions):  # the first class is found for all
    assert found[f"{START}group_{name}-top1"] == pytest.approx((label[rows % 3 == n] == 0).mean())
  first = f1_score(label, np.zeros(36, int), average="macro", labels=np.unique(label))
  assert found[f"{START}macro_f1"] == pytest.approx(first)
  found = make("x", options, towers=nan)(make_params())
  assert found[f"{START}worst_group_top5"] == found[f"{START}macro_f1"] == 0


def test_groups_that_cannot_be_measured_are_named(source, monkeypatch):
  def fails(message, **options):
    with pytest.raises(ValueError, match=message):
      make("x", OPTIONS | options)(make_params())

  fails(r"x\.groups='json\.none': no sample has such a value", groups="json.none")
  fails(r"groups='npy\.2': no sample has such a value", groups="npy.2")  # 2.5 is no whole number
  fails(r"groups='npy\.9': no sample has", groups="npy.9")
  fails(
    r"no sample has \['west'\]; groups: \['north', 'other', 'south'\]",
    groups="json.region",
    groups_without=("west",),
  )
  fails("groups_without has an effect with `groups` only", groups_without=("west",))
  monkeypatch.setattr("bigalign.evals.groups.MOST", 36)
  fails("has 37 different values; groups are at most 36", groups="json.key")
  source.regions[1] = ""
  fails("12 of 36 samples have no such value", groups="json.region")
