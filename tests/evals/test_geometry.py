"""The geometry of the sphere: against the oracle cases, over a mesh, as an evaluator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers.loss_oracles import both_precisions, cases, floats, oracles, unit
from helpers.marks import slow_unless
from test_evals import Tiny, make, make_params, on_host

from bigalign.evals import embed, geometry

measure = jax.jit(geometry.measure, static_argnames=("uniformity_t", "logreg_c"))


@both_precisions
@pytest.mark.parametrize("case", cases("metrics"))
def test_metrics(case, precision):
  inputs, params = floats(oracles().inputs(case), precision), case["params"]
  if case["normalize"]:
    inputs = {k: unit(x) for k, x in inputs.items()}
  train = np.isin(np.arange(len(inputs["img"])), params["split"]["train"])
  found = measure(
    inputs["img"],
    inputs["txt"],
    train=jnp.asarray(train),
    uniformity_t=params["uniformity_t"],
    logreg_c=params["logreg_C"],
  )
  rtol = 1e-9 if precision == "float64" else 1e-4
  oracles().check(case, found, rtol=rtol, require=tuple(case["expect"]))


def numpy_geometry(x, y, t=2.0):
  """Some figures, as their definitions say."""
  n = len(x)
  i, j = np.triu_indices(n, 1)

  def uniformity(z):
    i, j = np.triu_indices(len(z), 1)
    return np.log(np.exp(-t * ((z[i] - z[j]) ** 2).sum(1)).mean())

  s = x @ y.T
  off = ~np.eye(n, dtype=bool)
  cross = ((x[:, None] - y[None]) ** 2).sum(-1)[off]
  p = np.linalg.svd(x - x.mean(0), compute_uv=False)
  p = p[p > 1e-6] / p.sum()
  counts = np.bincount(np.argsort(-s, axis=1, kind="stable")[:, :10].ravel(), minlength=n)
  return {
    "hubness_i2t": scipy.stats.skew(counts),
    "centroid_distance": np.linalg.norm(x.mean(0) - y.mean(0)),
    "mean_pair_distance": np.linalg.norm(x - y, axis=1).mean(),
    "mean_offdiag_cosine_txt": (y[i] * y[j]).sum(1).mean(),
    "uniformity_img": uniformity(x),
    "uniformity_txt": uniformity(y),
    "uniformity_joint": uniformity(np.concatenate([x, y])),
    "xuniformity": np.log(np.exp(-t * cross).mean()),
    "effective_rank_img_centered": np.exp(-(p * np.log(p)).sum()),
    "i2t_recall@5": ((s > np.diag(s)[:, None]).sum(1) < 5).mean(),
    "t2i_recall@1": ((s > np.diag(s)[None]).sum(0) < 1).mean(),
    "num_samples": n,
  }


@pytest.mark.parametrize("axes", slow_unless([dict(), dict(data=2, fsdp=2, tensor=2)], bool))
def test_the_evaluator_equals_numpy(monkeypatch, axes):
  # 37 samples, one of them broken and one without a caption, over 8 devices.
  tiny = Tiny(captions=1)
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: tiny)
  found = make("sphere", dict(type="geometry", source="tiny", batch_size=10), **axes)(make_params())
  zimg, ztxt, _ = on_host(tiny, make_params())
  expected = numpy_geometry(zimg.astype(np.float64), ztxt.astype(np.float64))
  assert {
    f"val/sphere/{k}": pytest.approx(v, abs=2e-5) for k, v in expected.items()
  }.items() <= found.items()
  assert all(np.isfinite(x) for x in found.values())


def test_too_few_pairs_are_an_error(monkeypatch):
  tiny = Tiny(n=9, captions=1, broken=range(5), silent=())
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: tiny)
  with pytest.raises(ValueError, match=r"config\.evals\.x: 4 of 9.*at least 5"):
    make("x", dict(type="geometry", source="tiny"))(make_params())


def points(n=64, shift=0.0, spread=1.0):
  """[2, n, 8] unit rows, the modalities `shift` apart before the norm."""
  z = spread * np.random.default_rng(0).normal(size=(2, n, 8)) + 1
  z[0, :, 0] += shift
  return jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)


def test_a_gap_is_found_and_none_is_not():
  train = jnp.arange(64) % 5 != 4
  apart, mixed = (measure(*points(shift=shift), train=train) for shift in (20.0, 0.0))
  assert apart["linsep_test_accuracy"] > 0.9 and mixed["linsep_test_accuracy"] < 0.8
  assert apart["centroid_distance"] > 3 * mixed["centroid_distance"]


def test_collapse_has_rank_one_and_ties_are_hits():
  z = jnp.broadcast_to(points()[0, :1], (64, 8))
  found = measure(z, z, train=jnp.arange(64) % 5 != 4)
  np.testing.assert_allclose(found["effective_rank_img"], 1, atol=0.02)
  np.testing.assert_allclose(found["uniformity_joint"], 0, atol=1e-5)
  assert found["i2t_recall@1"] == found["t2i_recall@1"] == 1


def test_a_hub_is_found_and_the_earlier_of_equal_ones_is_nearer(monkeypatch):
  z = np.random.default_rng(3).normal(size=(2, 50, 8)).astype(np.float32)
  z[1, 7] = 20 * z[0].mean(0)  # near to most queries
  valid = np.arange(50) % 9 != 2
  monkeypatch.setattr(geometry, "CHUNK", 7 * 50)  # 50 queries do not divide by 7
  for gallery in (z[1], np.round(z[1])):
    order = np.argsort(-np.where(valid, z[0] @ gallery.T, -np.inf), axis=1, kind="stable")[valid]
    counts = np.bincount(order[:, :10].ravel(), minlength=50)[valid]
    found = geometry.hubness(jnp.asarray(z[0]), jnp.asarray(gallery), jnp.asarray(valid))
    np.testing.assert_allclose(found, scipy.stats.skew(counts), rtol=1e-4)
  same = jnp.ones((10, 4))
  assert geometry.hubness(same, same, jnp.ones(10, bool)) == 0  # each finds all ten


def test_more_pairs_take_no_more_memory_at_a_time():
  shape = jax.ShapeDtypeStruct((16384, 64), jnp.float32)
  mask = jax.ShapeDtypeStruct((16384,), bool)
  compiled = jax.jit(geometry.pairs).lower(shape, shape, mask).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 4 * 16384**2
