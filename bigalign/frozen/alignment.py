"""Measures of the agreement of two sets of frozen embeddings, without training; numpy, float64.

Except for the nearest neighbours, all are functions of D x D moments, so that one pass over any
number of pairs suffices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

RECALL_AT = (1, 5, 10)
RIDGES = tuple(10.0**k for k in range(-4, 2))  # in units of the mean variance
Map = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass
class Moments:
  """Sums over pairs of rows x [N, D], y [N, E], from which all linear measures follow.

  Attributes:
    n: number of pairs.
    x: [D], sum of x.
    y: [E], sum of y.
    xx: [D, D], sum of the outer products of x with itself.
    yy: [E, E], the same of y.
    xy: [D, E], sum of the outer products of x with y.
  """

  n: int
  x: np.ndarray
  y: np.ndarray
  xx: np.ndarray
  yy: np.ndarray
  xy: np.ndarray

  def __add__(self, other: Moments) -> Moments:
    fields = (f.name for f in dataclasses.fields(self))
    return Moments(*(getattr(self, name) + getattr(other, name) for name in fields))

  @property
  def means(self) -> tuple[np.ndarray, np.ndarray]:
    """The means of x [D] and y [E]."""
    return self.x / self.n, self.y / self.n

  @property
  def covariances(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The covariances xx [D, D], yy [E, E], xy [D, E], divided by N."""
    mx, my = self.means
    return (
      self.xx / self.n - np.outer(mx, mx),
      self.yy / self.n - np.outer(my, my),
      self.xy / self.n - np.outer(mx, my),
    )


def moments(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Moments:
  """Sums up chunks of pairs.

  Args:
    pairs: chunks (x [N, D], y [N, E]).

  Raises:
    ValueError: if there are none.
  """
  total = None
  for x, y in pairs:
    x, y = (z.astype(np.float64) for z in (x, y))
    some = Moments(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y)
    total = some if total is None else total + some
  if total is None:
    raise ValueError("there are no pairs to compare")
  return total


def linear_cka(m: Moments) -> float:
  """Returns |Cxy|² / (|Cxx| |Cyy|) in Frobenius norms; https://arxiv.org/abs/1905.00414."""
  xx, yy, xy = m.covariances
  return float((xy**2).sum() / (np.linalg.norm(xx) * np.linalg.norm(yy)))


def effective_rank(covariance: np.ndarray) -> float:
  """Returns exp of the entropy of the singular values of the centred rows.

  https://arxiv.org/abs/2210.02885

  Args:
    covariance: [D, D].
  """
  s = np.sqrt(np.maximum(np.linalg.eigvalsh(covariance), 0))
  p = s[s > 1e-12 * s.max()] / s.sum()
  return float(np.exp(-(p * np.log(p)).sum()))


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
  """Returns log of the mean of exp(-t |a - b|²) over pairs of rows; arxiv.org/abs/2005.10242.

  Args:
    x: [N, D]; rows are normalised first. N x N similarities are formed.
    t: as in the paper.
  """
  z = unit(x.astype(np.float64))
  spread = np.exp(2 * t * (z @ z.T - 1))
  n = len(z)
  return float(np.log((spread.sum() - np.trace(spread)) / (n * (n - 1))))


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int = 10) -> float:
  """Returns the share of the k nearest neighbours that both sides have in common.

  https://arxiv.org/abs/2405.07987. N x N cosines are formed, so pass a sample of the data.

  Args:
    x: [N, D].
    y: [N, E], row i belongs to row i of x.
    k: number of neighbours by cosine.
  """
  neighbours = []
  for z in (x, y):
    z = unit(z.astype(np.float64))
    cosine = z @ z.T
    np.fill_diagonal(cosine, -np.inf)
    nearest = np.argpartition(-cosine, k, axis=1)[:, :k]
    mask = np.zeros(cosine.shape, bool)
    np.put_along_axis(mask, nearest, True, axis=1)
    neighbours.append(mask)
  return float((neighbours[0] & neighbours[1]).sum(1).mean() / k)


def local_cka(m: Moments, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the CKA of given pairs with one more pair (x_i, y_j) added, for all i and j.

  This score retrieves without training, https://arxiv.org/abs/2401.05224. One more pair adds a
  matrix of rank one to each scatter, so each (i, j) needs only a few products.

  Args:
    m: moments of the given pairs.
    x: [N, D].
    y: [M, E].

  Returns:
    [N, M].
  """
  (mx, my), (xx, yy, xy) = m.means, (c * m.n for c in m.covariances)
  x, y = x.astype(np.float64) - mx, y.astype(np.float64) - my
  a = m.n / (m.n + 1)
  square_x, square_y = (np.einsum("nd,nd->n", z, z) for z in (x, y))

  def own(z: np.ndarray, scatter: np.ndarray, square: np.ndarray) -> np.ndarray:
    linear = np.einsum("nd,nd->n", z @ scatter, z)
    total: np.ndarray = (scatter**2).sum() + 2 * a * linear + (a * square) ** 2
    return total

  cross = (xy**2).sum() + 2 * a * (x @ xy @ y.T) + a**2 * np.outer(square_x, square_y)
  cka: np.ndarray = cross / np.sqrt(np.outer(own(x, xx, square_x), own(y, yy, square_y)))
  return cka


def kernel(x: np.ndarray) -> np.ndarray:
  """The centred kernel exp(-d² / (2 median d²)) of rows, [N, D] -> [N, N], of Frobenius norm 1.

  The sum of the products of two of them is the CKA of the two sides.
  """
  x = x.astype(np.float64)
  square = (x**2).sum(1)
  distance = np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0)
  np.fill_diagonal(distance, 0)
  c = np.exp(-distance / (2 * np.median(distance[distance > 0])))
  centred = c - c.mean(0) - c.mean(1)[:, None] + c.mean()
  k: np.ndarray = centred / np.linalg.norm(centred)
  return k


def match(
  a: np.ndarray, b: np.ndarray, *, known: int = 0, starts: int = 500, seed: int = 0
) -> tuple[np.ndarray, float]:
  """Matches the items of two sides by their similarities within each side.

  The quadratic assignment problem, https://arxiv.org/abs/2401.05224: the permutation p that
  maximises the sum of a[i, j] * b[p[i], p[j]], by FAQ from random starts. One start takes N³.

  Args:
    a, b: [N, N], such as `kernel` of each side.
    known: the first items whose match is known: item i of the other side.
    starts: number of starts; the best result counts.
    seed: of the starts.

  Returns:
    p [N], and the sum.
  """
  from scipy import optimize  # takes a moment, which most programs do not need

  rng, best = np.random.default_rng(seed), None
  options: dict[str, Any] = dict(maximize=True, tol=1e-5, maxiter=100, rng=rng)
  options["partial_match"] = np.repeat(np.arange(known)[:, None], 2, 1)
  for start in range(starts):
    # Doubly stochastic, from the middle first.
    options["P0"] = "randomized" if start else "barycenter"
    found = optimize.quadratic_assignment(a, b, method="faq", options=options)
    if best is None or found.fun > best.fun:
      best = found
  assert best is not None, "at least one start"
  return best.col_ind, float(best.fun)


def ridge(fit: Moments, choose: Moments) -> tuple[Map, Map]:
  """Fits a linear regression of y on centred x.

  Args:
    fit: pairs to fit.
    choose: pairs on which the best of the penalties in RIDGES is chosen.

  Returns:
    Maps of x and y into a common space.
  """
  (mx, my), (xx, _, xy) = fit.means, fit.covariances
  values, vectors = np.linalg.eigh(xx)
  other_xx, _, other_xy = _about(choose, mx, my)

  def solve(penalty: float) -> np.ndarray:
    scaled = (vectors.T @ xy) / (values + penalty * values.mean())[:, None]
    weights: np.ndarray = vectors @ scaled
    return weights

  def error(w: np.ndarray) -> float:
    return float(np.einsum("de,df,fe->", w, other_xx, w, optimize=True) - 2 * (w * other_xy).sum())

  best = min(map(solve, RIDGES), key=error)
  return lambda x: (x - mx) @ best, lambda y: y - my


def procrustes(fit: Moments) -> tuple[Map, Map]:
  """Fits rotations that align the centred sides: the singular vectors of their covariance.

  Returns:
    Maps of x and y into a common space.
  """
  (mx, my), (_, _, xy) = fit.means, fit.covariances
  u, _, vt = np.linalg.svd(xy, full_matrices=False)
  return lambda x: (x - mx) @ u, lambda y: (y - my) @ vt.T


def cca(fit: Moments, choose: Moments, dims: int = 256) -> tuple[Map, Map]:
  """Fits canonical correlations: the directions of both sides that correlate most.

  Args:
    fit: pairs to fit.
    choose: pairs on which the penalty on the variances, one of RIDGES, is chosen by correlation.
    dims: largest number of directions, weighted by their correlation; not more than the rank.

  Returns:
    Maps of x and y into a common space.
  """
  (mx, my), (xx, yy, xy) = fit.means, fit.covariances
  other = _about(choose, mx, my)
  sides = [np.linalg.eigh(c) for c in (xx, yy)]
  # Beyond the rank of a side, directions have no variance and no correlation (0 / 0).
  # A covariance is a difference of second moments, so its rounding errors grow with the moments.
  ranks = [
    int((v > max(v[-1], np.trace(moment) / fit.n) * len(v) * np.finfo(v.dtype).eps).sum())
    for (v, _), moment in zip(sides, (fit.xx, fit.yy))
  ]
  kept = min(dims, *ranks)

  def solve(penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    root_x, root_y = (
      (vectors / np.sqrt(np.maximum(values, 0) + penalty * values.mean())) @ vectors.T
      for values, vectors in sides
    )
    u, s, vt = np.linalg.svd(root_x @ xy @ root_y, full_matrices=False)
    return root_x @ u[:, :kept], root_y @ vt[:kept].T, s[:kept]

  def correlation(solution: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    a, b, _ = solution
    var_x, var_y, both = (
      np.einsum("dk,de,ek->k", p, c, q, optimize=True)
      for p, c, q in ((a, other[0], a), (b, other[1], b), (a, other[2], b))
    )
    spread = np.sqrt(np.maximum(var_x, 0) * np.maximum(var_y, 0))
    return float(np.divide(both, spread, out=np.zeros_like(both), where=spread > 0).sum())

  a, b, s = max(map(solve, RIDGES), key=correlation)
  return lambda x: (x - mx) @ (a * s), lambda y: (y - my) @ (b * s)


def recalls(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """Returns the recalls at 1, 5 and 10 in both directions.

  The query of an image is a hit if any of its texts is among the first k. Equal scores rank before
  the correct one, so that constant embeddings score nothing.

  Args:
    scores: [images, texts].
    owner: [texts], the image of each text.

  Returns:
    {"text_to_image_R@1": share of hits, …}.
  """
  mine = owner[None] == np.arange(len(scores))[:, None]
  own = scores[owner, np.arange(scores.shape[1])]
  to_image = (~mine & ~(scores < own)).sum(0)  # number of images before the correct one
  best = np.where(mine, scores, -np.inf).max(1)
  to_text = (~mine & ~(scores < best[:, None])).sum(1)[mine.any(1)]
  return {
    f"{direction}_R@{k}": float((before < k).mean())
    for direction, before in (("text_to_image", to_image), ("image_to_text", to_text))
    for k in RECALL_AT
  }


def unit(x: np.ndarray) -> np.ndarray:
  """Returns the rows [..., D] with unit L2 norm; zero rows stay zero."""
  z: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return z


def retrieval(
  maps: tuple[Map, Map], x: np.ndarray, y: np.ndarray, owner: np.ndarray
) -> dict[str, float]:
  """Returns `recalls` by the cosine of mapped images and texts.

  Args:
    maps: of x and y into a common space.
    x: [N, D], images.
    y: [M, E], texts.
    owner: [M], the image of each text.
  """
  a, b = (unit(f(z.astype(np.float64))) for f, z in zip(maps, (x, y)))
  return recalls(a @ b.T, owner)


def _about(m: Moments, mx: np.ndarray, my: np.ndarray) -> Sequence[np.ndarray]:
  """Second moments xx, yy, xy about given points."""
  (x, y), xx, yy, xy = m.means, m.xx / m.n, m.yy / m.n, m.xy / m.n

  def centred(
    c: np.ndarray, a: np.ndarray, b: np.ndarray, p: np.ndarray, q: np.ndarray
  ) -> np.ndarray:
    moment: np.ndarray = c - np.outer(a, q) - np.outer(p, b) + np.outer(p, q)
    return moment

  return (centred(xx, x, x, mx, mx), centred(yy, y, y, my, my), centred(xy, x, y, mx, my))
