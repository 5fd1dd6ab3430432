"""Agreement of frozen embeddings: equal to references that hold all rows, and to known answers."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import scipy.linalg
from helpers.loss_oracles import cases2, oracles2
from PIL import Image

from bigalign.data.stores import writer
from bigalign.frozen import alignment, compare

DRAWS = np.random.default_rng(0)
SHARED = DRAWS.normal(size=(400, 5))
X = SHARED @ DRAWS.normal(size=(5, 12)) + 0.5 * DRAWS.normal(size=(400, 12)) + 3
Y = SHARED @ DRAWS.normal(size=(5, 7)) + 0.5 * DRAWS.normal(size=(400, 7)) - 1
FIT, CHOOSE = slice(0, 300), slice(300, 400)


def of(x, y, chunk=None):
  """Moments of one chunk, or of several."""
  step = chunk or len(x)
  return alignment.moments((x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))


def gram_cka(x, y):
  """By N x N kernels, as CKA is defined."""
  n = len(x)
  h = np.eye(n) - 1 / n
  k, m = (h @ z @ z.T @ h for z in (x, y))
  return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def test_streaming_is_in_memory():
  whole = of(X, Y)
  for other in (of(X, Y, 33), of(X[:150], Y[:150]) + of(X[150:], Y[150:])):
    for a, b in zip(vars(whole).values(), vars(other).values()):
      np.testing.assert_allclose(a, b, rtol=1e-12)
  for a, b in zip(whole.covariances, (np.cov(X.T, ddof=0), np.cov(Y.T, ddof=0))):
    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_linear_cka_is_that_of_kernels():
  assert alignment.linear_cka(of(X, Y)) == pytest.approx(gram_cka(X, Y), rel=1e-9)
  rotation = scipy.linalg.qr(DRAWS.normal(size=(12, 12)))[0]
  assert alignment.linear_cka(of(X, 2 * X @ rotation + 1)) == pytest.approx(1)


def test_local_cka_is_that_of_one_pair_more():
  cka = alignment.local_cka(of(X[FIT], Y[FIT]), X[300:304], Y[300:306])
  for i, j in itertools.product(range(4), range(6)):
    x = np.concatenate([X[FIT], X[300 + i : 301 + i]])
    y = np.concatenate([Y[FIT], Y[300 + j : 301 + j]])
    assert cka[i, j] == pytest.approx(gram_cka(x, y), rel=1e-9)


def test_neighbours_rank_and_uniformity():
  expected = []
  for i in range(60):
    near = []
    for z in (X[:60], Y[:60]):
      z = z / np.linalg.norm(z, axis=1, keepdims=True)
      near.append({*np.argsort(-np.where(np.arange(60) == i, -9, z @ z[i]))[:10].tolist()})
    expected.append(len(near[0] & near[1]) / 10)
  assert alignment.mutual_knn(X[:60], Y[:60]) == pytest.approx(np.mean(expected))
  assert alignment.mutual_knn(X, X) == 1
  s = scipy.linalg.svdvals(X - X.mean(0))
  p = s / s.sum()
  assert alignment.effective_rank(np.cov(X.T)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
  z = X[:50] / np.linalg.norm(X[:50], axis=1, keepdims=True)
  spread = [np.exp(-2 * ((a - b) ** 2).sum()) for a, b in itertools.permutations(z, 2)]
  assert alignment.uniformity(X[:50]) == pytest.approx(np.log(np.mean(spread)))


def test_ridge_is_regression_with_the_best_penalty():
  a, b = alignment.ridge(of(X[FIT], Y[FIT]), of(X[CHOOSE], Y[CHOOSE]))
  centred, target = X[FIT] - X[FIT].mean(0), Y[FIT] - Y[FIT].mean(0)
  tried = {}
  for penalty in alignment.RIDGES:
    amount = 300 * penalty * np.var(X[FIT], 0).mean()
    w = np.linalg.solve(centred.T @ centred + amount * np.eye(12), centred.T @ target)
    predicted = (X[CHOOSE] - X[FIT].mean(0)) @ w
    tried[((Y[CHOOSE] - Y[FIT].mean(0) - predicted) ** 2).sum()] = predicted
  np.testing.assert_allclose(a(X[CHOOSE]), tried[min(tried)], rtol=1e-7)
  np.testing.assert_allclose(b(Y[CHOOSE]), Y[CHOOSE] - Y[FIT].mean(0))


def test_procrustes_is_scipys_where_widths_are_equal():
  a, b = alignment.procrustes(of(X[:, :7], Y))
  rotation, _ = scipy.linalg.orthogonal_procrustes(X[:, :7] - X[:, :7].mean(0), Y - Y.mean(0))
  cosines = a(X[:, :7]) @ b(Y).T
  np.testing.assert_allclose(
    cosines, (X[:, :7] - X[:, :7].mean(0)) @ rotation @ (Y - Y.mean(0)).T, atol=1e-8
  )


def test_canonical_correlations_are_those_of_whitened_sides():
  fit = of(X[FIT], Y[FIT])
  a, b = alignment.cca(fit, of(X[CHOOSE], Y[CHOOSE]))
  x, y = a(X[FIT]), b(Y[FIT])
  correlations = [abs(np.corrcoef(x[:, k], y[:, k])[0, 1]) for k in range(5)]
  sides = [scipy.linalg.orth(z[FIT] - z[FIT].mean(0)) for z in (X, Y)]
  expected = scipy.linalg.svdvals(sides[0].T @ sides[1])[:5]
  np.testing.assert_allclose(correlations, expected, atol=0.02)  # penalised
  assert correlations == sorted(correlations, reverse=True)


@pytest.mark.parametrize("case", cases2("qap"))
def test_the_best_of_all_permutations_is_found(case):
  inputs = oracles2().inputs(case)
  found, objective = alignment.match(inputs["A"], inputs["B"], starts=20)
  got = dict(match=found, true_match=found, objective=objective)
  oracles2().check(case, got, rtol=1e-9, require=tuple(got))


def test_items_are_matched_by_what_is_near_them():
  draws = np.random.default_rng(0)
  x = draws.normal(size=(40, 6))
  true = np.append(np.arange(8), 8 + draws.permutation(32))
  y = np.empty_like(x)
  y[true] = x @ np.linalg.qr(draws.normal(size=(6, 6)))[0]
  kernels = alignment.kernel(x), alignment.kernel(y)
  found, objective = alignment.match(*kernels, known=8, starts=3)
  np.testing.assert_array_equal(found, true)
  assert objective == pytest.approx(1)  # the CKA of equal kernels
  other = alignment.kernel(draws.normal(size=(40, 6)))
  found, objective = alignment.match(kernels[0], other, known=8, starts=3)
  assert (found[:8] == np.arange(8)).all() and (found[8:] == np.arange(8, 40)).mean() < 0.2
  assert objective < 0.9


def test_recalls_count_what_stands_before():
  scores = np.array([[9, 1, 5, 4], [3, 2, 1, 8], [1, 7, 6, 2.0]])
  recalls = alignment.recalls(scores, np.array([0, 0, 1, 2]))
  assert recalls["text_to_image_R@1"] == 1 / 4 and recalls["image_to_text_R@1"] == 1 / 3
  assert recalls["text_to_image_R@5"] == recalls["image_to_text_R@5"] == 1


def test_what_is_all_alike_finds_nothing():
  for scores in (np.ones((50, 50)), np.full((50, 50), np.nan)):
    assert set(alignment.recalls(scores, np.arange(50)).values()) == {0.0}


def write(folder, rows, captions=1, first=0):
  """A store of the vectors of samples `first`, `first` + 1, …, `captions` each."""
  count = len(rows) // captions
  writer.begin(folder, dict(side=folder.name, width=rows.shape[1], dtype="float32"))
  writer.claim(folder, "x", count, "x", batch_size=count, batches=1, write=True)
  place = np.repeat(np.arange(count), captions).astype(np.uint64)
  ids = (place + np.uint64(first)) * np.uint64(0x9E3779B97F4A7C15)
  writer.write(folder, 0, rows.astype(np.float32), np.stack([ids, place], 1))
  writer.finish(folder, captions=captions > 1)
  return str(folder)


@pytest.fixture
def stores(tmp_path):
  """A good and a bad image tower and one text tower with two captions each."""
  count, draws = 600, np.random.default_rng(1)
  shared = draws.normal(size=(count, 6))

  def noisy(rows, width, noise):
    return rows @ draws.normal(size=(6, width)) + noise * draws.normal(size=(len(rows), width))

  return (
    [
      write(tmp_path / "good", noisy(shared, 20, 0.1)),
      write(tmp_path / "bad", noisy(shared, 20, 8.0)),
    ],
    write(tmp_path / "text", noisy(np.repeat(shared, 2, 0), 10, 0.3), captions=2),
  )


def test_the_program_ranks_towers_and_draws(stores, tmp_path, capsys):
  images, text = stores
  rows = compare.main(
    [
      "--image",
      *reversed(images),
      "--text",
      text,
      "--json",
      str(tmp_path / "found.json"),
      "--heatmap",
      str(tmp_path / "grid.png"),
    ]
  )
  assert [row["image"] for row in rows] == images
  good, bad = rows
  for name in ("linear_cka", "mutual_knn"):
    assert good[name] > bad[name] + 0.1
  for name in compare.MAPS:
    assert good[name][compare.SHOWN] > bad[name][compare.SHOWN] + 0.2
  assert 90 < good["heldout"] < 150 and good["pairs"] == 2 * (600 - good["heldout"])
  with Image.open(tmp_path / "grid.png") as picture:
    assert picture.size[0] > 100
  printed = capsys.readouterr().out
  assert "local CKA" in printed and "effective rank" in printed


def test_stores_of_one_side_are_compared_with_each_other(stores, tmp_path, monkeypatch):
  """And held-out pairs are matched without a map."""
  images, _ = stores
  again = tmp_path / "again"
  shutil.copytree(images[0], again)
  monkeypatch.setattr(compare, "BASE", 30)
  monkeypatch.setattr(compare, "STARTS", 1)
  rows = compare.main(["--image", *images, str(again), "--match", "20"])
  by_pair = {(row["image"], row["text"]): row for row in rows}
  assert by_pair.keys() == {(*pair,) for pair in itertools.combinations([*images, str(again)], 2)}
  same = by_pair[images[0], str(again)]
  assert same["linear_cka"] == pytest.approx(1) and same["matched"] == 1.0
  assert same["queries"] == 20 and by_pair[tuple(images)]["matched"] < 0.5
  with pytest.raises(SystemExit):
    compare.main(["--image", images[0]])


def test_what_cannot_be_compared_is_named(stores, tmp_path):
  images, text = stores
  other = write(tmp_path / "other", np.ones((49, 3)), first=1000)
  with pytest.raises(ValueError, match="0 of the 49 images"):
    compare.compare(other, text)
  with pytest.raises(ValueError, match=r"600 samples are too few to hold out 0\.0 of them"):
    compare.compare(images[0], text, heldout=0.0)
  for value, message in ((1.0, "all embeddings are equal"), (np.nan, "holds NaN or infinity")):
    same = write(tmp_path / f"all_{value}", np.full((600, 3), value))
    with pytest.raises(ValueError, match=message):
      compare.compare(same, text)
  with pytest.raises(FileNotFoundError, match="not an embedding store"):
    compare.main(["--image", str(tmp_path), "--text", text])


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 50])
def test_canonical_correlations_of_a_low_rank(monkeypatch, offset):
  """Directions beyond the rank count for nothing, and the penalty is that of the others.

  Both sides share 4 of 6 factors in 300 channels, so with few pairs a large penalty is best.
  """
  rng = np.random.default_rng(3)
  factors = rng.standard_normal((400, 8))
  mixes = [rng.standard_normal((6, 300)) for _ in range(2)]
  x, y = (factors[:, i : i + 6] @ mix + offset for i, mix in zip((0, 2), mixes))
  fit, choose = of(x[:200], y[:200]), of(x[200:300], y[200:300])
  a, b = alignment.cca(fit, choose)
  assert a(x).shape[1] == b(y).shape[1] == 6

  def correlation(penalty):
    monkeypatch.setattr(alignment, "RIDGES", (penalty,))
    maps = alignment.cca(fit, choose)
    left, right = (f(z[200:300]) for f, z in zip(maps, (x, y)))
    means = [f(z[:200]).mean(0) for f, z in zip(maps, (x, y))]
    left, right = left - means[0], right - means[1]
    norms = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return ((left * right).sum(0) / norms).sum(), left

  every = {penalty: correlation(penalty) for penalty in tuple(alignment.RIDGES)}
  best = max(every, key=lambda penalty: every[penalty][0])
  assert np.isfinite([value for value, _ in every.values()]).all()
  np.testing.assert_allclose(a(x[200:300]) - a(x[:200]).mean(0), every[best][1], rtol=1e-6)
