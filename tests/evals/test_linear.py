"""Classifiers of features find what scikit-learn and numpy find, on one device and on eight."""

from __future__ import annotations

import doctest
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.multiclass import OneVsRestClassifier

from bigalign import sharding
from bigalign.evals import embed, features, knn, linear, probe
from bigalign.evals.features import Features, Rows

N, B, D, K = 301, 40, 12, 6  # 301 rows in 8 batches of 40, which divide neither by 8 nor by 40


def rows(seed=0, several=False):
  """Features with a large mean, as towers give them, and the classes of each row."""
  random = np.random.default_rng(seed)
  target = random.integers(0, K, N)
  x = random.normal(size=(K, D))[target] + 1.5 * random.normal(size=(N, D)) + 3
  if several:
    target = np.eye(K, dtype=bool)[target] | (random.random((N, K)) < 0.2)
  return x.astype(np.float32), target


def on_mesh(mesh, x, target, finite=None, size=B):
  padding = -len(x) % size

  def put(a):
    padded = np.pad(a, ((0, padding),) + ((0, 0),) * (a.ndim - 1))
    split = padded.reshape(-1, size, *a.shape[1:])
    return jax.device_put(split, NamedSharding(mesh, features.ROWS))

  there = np.ones(len(x), bool) if finite is None else finite
  dtype = bool if target.ndim == 2 else np.int32
  return Features(put(np.where(there[:, None], x, 0)), put(target.astype(dtype)), put(there))


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def eight_devices():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def raw(classifier):
  """Coefficients and intercepts as scikit-learn has them: of features that are not centred."""
  weight, bias, centre = (np.asarray(x, np.float64) for x in classifier)
  return weight, bias - centre @ weight


both = pytest.mark.parametrize("mesh", [one_device, eight_devices])


@both
@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_logistic_regression_is_that_of_scikit_learn(mesh, several):
  x, target = rows(several=several)
  random = np.random.default_rng(1)
  fitted_to, finite = random.random(N) < 0.8, random.random(N) < 0.95
  mesh = mesh()
  given = on_mesh(mesh, x, target, finite)
  weight = features.spread(mesh, np.pad(fitted_to, (0, -N % B)).astype(np.float32), given.x)
  used = fitted_to & finite
  start = linear.zeros(D, K)
  for penalty in (3.0, 0.1):
    with jax.set_mesh(mesh):
      fitted = linear.fit_logistic(
        given, weight, start, np.float32(penalty), tolerance=np.float32(1e-6)
      )
    assert fitted.converged and 10 < fitted.iterations < 200
    theirs = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10000)
    theirs = OneVsRestClassifier(theirs) if several else theirs
    theirs.fit(x[used].astype(np.float64), target[used])
    parts = theirs.estimators_ if several else [theirs]
    coefficients = np.concatenate([part.coef_ for part in parts])
    intercepts = np.concatenate([part.intercept_ for part in parts])
    ours, bias = raw(fitted.linear)
    np.testing.assert_allclose(ours, coefficients.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(bias, intercepts, rtol=0, atol=1e-3)  # D features of mean 3
    with jax.set_mesh(mesh):
      found = linear.score(fitted.linear, given)[:N]
    if not several:
      assert (found[finite] < 1).mean() == theirs.score(x[finite], target[finite])
      assert (found[~finite] == K).all()  # never a hit
    start = dict(weight=fitted.linear.weight, bias=fitted.linear.bias)


def test_a_fit_that_stops_early_says_so():
  x, target = rows()
  with jax.set_mesh(mesh := one_device()):
    given = on_mesh(mesh, x, target)
    weight = features.spread(mesh, np.ones(given.finite.size, np.float32), given.x)
    fitted = linear.fit_logistic(given, weight, linear.zeros(D, K), np.float32(1), iterations=2)
  assert fitted.iterations == 2 and not fitted.converged


@both
@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_ridge_is_that_of_scikit_learn(mesh, several, monkeypatch):
  monkeypatch.setattr(
    linear, "CHUNK", 7 * D
  )  # seven rows at a time, which do not divide a device's
  x, target = rows(several=several)
  mesh = mesh()
  with jax.set_mesh(mesh):
    given = on_mesh(mesh, x, target)
    weight = np.pad(np.arange(N) % 4 > 0, (0, -N % B)).astype(np.float32)
    found = linear.moments(given, features.spread(mesh, weight, given.x), K)
  used, one_hot = np.arange(N) % 4 > 0, target if several else np.eye(K)[target]
  for penalty in (1e-3, 10.0):
    theirs = Ridge(alpha=penalty).fit(x[used].astype(np.float64), one_hot[used].astype(float))
    ours, bias = raw(linear.solve_ridge(found, penalty))
    np.testing.assert_allclose(ours, theirs.coef_.T, rtol=0, atol=2e-6)
    np.testing.assert_allclose(bias, theirs.intercept_, rtol=0, atol=1e-5)


def numpy_votes(x, target, queries, neighbours, temperature):
  gallery, z = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, queries))
  cosine = z @ gallery.T
  nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :neighbours]
  weight = np.exp(np.take_along_axis(cosine, nearest, 1) / temperature)
  has = target[nearest] if target.ndim == 2 else target[nearest][..., None] == np.arange(K)
  return (weight[..., None] * has).sum(1)


@both
@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_the_votes_of_neighbours_are_those_of_numpy(mesh, several):
  x, target = rows(several=several)
  finite = np.arange(N) % 9 != 4
  queries, wanted = rows(1)[0][:77], np.arange(77) % K
  mesh = mesh()
  test = on_mesh(mesh, queries, np.eye(K, dtype=bool)[wanted] if several else wanted, size=16)
  with jax.set_mesh(mesh):
    train = on_mesh(mesh, x, target, finite)
    found = features.flat(np.asarray(knn.vote(train, test, neighbours=20, classes=K)))[:77]
  votes = numpy_votes(x[finite], target[finite], queries, 20, 0.07)
  if several:  # a share of the votes
    total = numpy_votes(x[finite], np.ones((finite.sum(), K), bool), queries, 20, 0.07)
    np.testing.assert_allclose(found, votes / total, rtol=1e-4, atol=1e-6)
  else:
    order = np.argsort(-votes, axis=1, kind="stable")
    np.testing.assert_array_equal(found, (order == wanted[:, None]).argmax(1))


@both
def test_of_equal_neighbours_the_earlier_votes_and_nan_does_not(mesh):
  # Two different vectors; four of the first are equal, in the classes 5, 4, 3, 2.
  x = np.zeros((48, D), np.float32)
  x[:, 1], x[[3, 17, 30, 44], :2] = 1, [1, 0]
  target = np.zeros(48, int)
  target[[3, 17, 30, 44]] = 5, 4, 3, 2
  queries = np.repeat([[1.0, 0.0]], 5, 0) @ np.eye(2, D)
  finite = np.array([True, True, True, True, False])
  mesh = mesh()
  test = on_mesh(mesh, queries.astype(np.float32), np.array([5, 4, 3, 2, 5]), finite, 8)
  with jax.set_mesh(mesh):
    given = on_mesh(mesh, x, target, size=16)
    found = np.asarray(knn.vote(given, test, neighbours=2, classes=K)).ravel()[:5]
    assert found.tolist() == [1, 0, 5, 4, K]  # 4 and 5 vote, then 0, 1, 2 and 3 are equal
    without = given._replace(finite=given.finite & (given.target != 5))
    found = np.asarray(knn.vote(without, test, neighbours=2, classes=K)).ravel()[:5]
    assert found.tolist() == [5, 1, 0, 4, K]


def test_measures_are_those_of_scikit_learn():
  random = np.random.default_rng(0)
  scores, target = random.normal(size=(200, K)).astype(np.float32), random.integers(0, K, 200)
  found = np.asarray(embed.places(jnp.asarray(scores), jnp.asarray(target)))
  labels = [*range(K)]
  assert features.measures(found, target, K) == pytest.approx(
    dict(
      top1=top_k_accuracy_score(target, scores, k=1, labels=labels),
      top5=top_k_accuracy_score(target, scores, k=5, labels=labels),
      mean_per_class_recall=balanced_accuracy_score(target, scores.argmax(1)),
    )
  )
  several = random.random((200, K)) < 0.3
  (value,) = features.measures(scores, several, K).values()
  assert value == pytest.approx(average_precision_score(several, scores, average="macro"))
  assert "top5" not in features.measures(found, target % 4, 4)


def test_equal_scores_go_to_the_first_class_and_nan_is_no_hit():
  scores = jnp.asarray([[1.0, 1, 1], [1, 1, 1], [jnp.nan, 0, 0], [0, jnp.nan, jnp.nan], [0, 0, 1]])
  found = embed.places(scores, jnp.asarray([0, 2, 0, 0, 2]))
  assert found.tolist() == [0, 2, 3, 0, 0]


def test_a_sweep_ends_at_an_eighth_of_a_decade():
  tried = []

  def measure(penalty, top=1.2):
    tried.append(round(math.log10(penalty), 9))
    return -abs(tried[-1] - top)

  assert linear.sweep(measure) == pytest.approx(10**1.25)
  assert tried == [6, 4, 2, 0, -2, -4, -6, 3, 1, 1.5, 0.5, 1.25, 0.75, 1.375, 1.125]
  assert linear.sweep(lambda penalty: 0.5) == 1e6  # of equal ones the largest
  tried.clear()
  assert linear.sweep(lambda penalty: measure(penalty, -9)) == 1e-6
  assert min(tried) == -6


def test_the_same_share_of_each_class_is_held_out():
  target = np.repeat([0, 1, 2, 3], [4, 10, 100, 1])
  held = linear.hold_out(target, 0.25, seed=0)
  assert np.bincount(target[held], minlength=4).tolist() == [1, 2, 25, 0]
  assert (held != linear.hold_out(target, 0.25, seed=1)).any()
  several = np.zeros((40, 3), bool)
  several[:, 0], several[7, 1], several[20:, 2] = True, True, True
  for seed in range(20):  # in some of them row 7 is drawn
    held = linear.hold_out(several, 0.5, seed)
    assert several[~held].any(0).all() and held.sum() in (19, 20) and not held[7]


def test_draws_have_as_many_of_each_class_and_are_nested():
  random = np.random.default_rng(0)
  target, valid = random.integers(0, K, 200), random.random(200) < 0.9
  given = Rows(target, valid, 0)
  most = np.bincount(target[valid]).min()
  drawn = probe.draw(given, K, most, seed=3)
  assert drawn.shape == (K, most) and len({*drawn.ravel()}) == drawn.size
  assert valid[drawn].all() and (target[drawn] == np.arange(K)[:, None]).all()
  np.testing.assert_array_equal(probe.draw(given, K, 2, seed=3), drawn[:, :2])
  assert (probe.draw(given, K, 2, seed=4) != drawn[:, :2]).any()


@both
def test_rows_are_picked_from_all_devices(mesh):
  x, target = rows()
  finite, padded = np.arange(N) % 5 > 0, -N % B
  given = Rows(np.pad(target, (0, padded)), np.arange(N + padded) < N, 0)
  chosen = np.array([300, 0, 41, 41, 7, 160, 299])
  mesh = mesh()
  with jax.set_mesh(mesh):
    picked, own = features.pick(mesh, on_mesh(mesh, x, target, finite), given, chosen)
  assert len(own.valid) % mesh.size == 0 and own.valid.sum() == 7
  there = finite[chosen]
  np.testing.assert_array_equal(picked.x[0, :7], np.where(there[:, None], x[chosen], 0))
  np.testing.assert_array_equal(picked.target[0, :7], target[chosen])
  np.testing.assert_array_equal(picked.finite[0], np.pad(there, (0, len(own.valid) - 7)))


def moved(lowered):
  """The numbers of elements of the arrays that a compiled program sends between devices."""
  text = lowered.compile().as_text()
  shapes = re.findall(r"= (.*?) (?:all-[-a-z]+|collective-permute|reduce-scatter)\(", text)
  return [
    sum(
      math.prod(int(n) for n in dims.split(",") if n)
      for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
    )
    for shape in shapes
  ]


def test_features_stay_on_their_devices():
  mesh, (n, size) = eight_devices(), (16, 64)

  def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, features.ROWS))

  given = Features(shape(n, size, D), shape(n, size, dtype=jnp.int32), shape(n, size, dtype=bool))
  with jax.set_mesh(mesh):
    fit = linear.fit_logistic.lower(given, shape(n, size), linear.zeros(D, K), 1.0)
    sums = linear._sums.lower(given, shape(n, size), K)
    nearest = knn.vote.lower(given, given, neighbours=5, classes=K)
  assert 0 < max(moved(fit)) <= 2 * (D + 1) * K  # two gradients
  assert 0 < max(moved(sums)) <= D * D + D * K + K
  assert 0 < max(moved(nearest)) <= size * max(D, 8 * 5)  # one batch of queries, or its candidates


@pytest.mark.parametrize("module", [features, linear, probe])
def test_examples_of_classifiers(module):
  results = doctest.testmod(module)
  assert results.attempted and not results.failed
