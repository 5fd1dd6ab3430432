"""How well two sets of frozen vectors agree before anything is trained; numpy, float64.

All but the neighbours are functions of moments, D x D, so that any number of pairs can be passed
over once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

RECALL_AT = (1, 5, 10)
RIDGES = tuple(10.0**k for k in range(-4, 2))  # in units of the mean variance
Map = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass
class Moments:
  """Sums over pairs of rows x [N, D], y [N, E]: what every linear measure needs of them."""

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
    """[D], [E]."""
    return self.x / self.n, self.y / self.n

  @property
  def covariances(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[D, D], [E, E], [D, E], about the means; divided by N."""
    mx, my = self.means
    return (
      self.xx / self.n - np.outer(mx, mx),
      self.yy / self.n - np.outer(my, my),
      self.xy / self.n - np.outer(mx, my),
    )


def moments(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Moments:
  """Of chunks of pairs, each [N, D], [N, E]."""
  total = None
  for x, y in pairs:
    x, y = (z.astype(np.float64) for z in (x, y))
    some = Moments(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y)
    total = some if total is None else total + some
  if total is None:
    raise ValueError("there are no pairs to compare")
  return total


def linear_cka(m: Moments) -> float:
  """|Cxy|² / (|Cxx| |Cyy|), Frobenius; https://arxiv.org/abs/1905.00414."""
  xx, yy, xy = m.covariances
  return float((xy**2).sum() / (np.linalg.norm(xx) * np.linalg.norm(yy)))


def effective_rank(covariance: np.ndarray) -> float:
  """exp of the entropy of the singular values of centred rows; https://arxiv.org/abs/2210.02885."""
  s = np.sqrt(np.maximum(np.linalg.eigvalsh(covariance), 0))
  p = s[s > 1e-12 * s.max()] / s.sum()
  return float(np.exp(-(p * np.log(p)).sum()))


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
  """log of the mean of exp(-t |a - b|²) over pairs of unit rows; https://arxiv.org/abs/2005.10242."""
  z = unit(x.astype(np.float64))
  spread = np.exp(2 * t * (z @ z.T - 1))
  n = len(z)
  return float(np.log((spread.sum() - np.trace(spread)) / (n * (n - 1))))


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int = 10) -> float:
  """The share of the k nearest neighbours, by cosine, that x [N, D] and y [N, E] have in common.

  https://arxiv.org/abs/2405.07987. N x N cosines are formed: a sample will do.
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
  """[N, D], [M, E] → [N, M]: the CKA of the pairs of `m` with one more, (x_i, y_j), among them.

  The score that retrieves without any training, https://arxiv.org/abs/2401.05224. One more pair
  adds a matrix of rank one to each scatter, so nothing is formed per pair but its products.
  """
  (mx, my), (xx, yy, xy) = m.means, (c * m.n for c in m.covariances)
  x, y = x.astype(np.float64) - mx, y.astype(np.float64) - my
  a = m.n / (m.n + 1)
  square_x, square_y = (np.einsum("nd,nd->n", z, z) for z in (x, y))

  def own(z: np.ndarray, scatter: np.ndarray, square: np.ndarray) -> np.ndarray:
    return (scatter**2).sum() + 2 * a * np.einsum("nd,nd->n", z @ scatter, z) + (a * square) ** 2

  cross = (xy**2).sum() + 2 * a * (x @ xy @ y.T) + a**2 * np.outer(square_x, square_y)
  return cross / np.sqrt(np.outer(own(x, xx, square_x), own(y, yy, square_y)))


def ridge(fit: Moments, choose: Moments) -> tuple[Map, Map]:
  """Linear regression of y on centred x; the penalty that explains `choose` best."""
  (mx, my), (xx, _, xy) = fit.means, fit.covariances
  values, vectors = np.linalg.eigh(xx)
  other_xx, _, other_xy = _about(choose, mx, my)

  def solve(penalty: float) -> np.ndarray:
    scaled = (vectors.T @ xy) / (values + penalty * values.mean())[:, None]
    return vectors @ scaled

  def error(w: np.ndarray) -> float:
    return float(np.einsum("de,df,fe->", w, other_xx, w, optimize=True) - 2 * (w * other_xy).sum())

  best = min(map(solve, RIDGES), key=error)
  return lambda x: (x - mx) @ best, lambda y: y - my


def procrustes(fit: Moments) -> tuple[Map, Map]:
  """Rotations that bring the centred sides together: the singular vectors of their covariance."""
  (mx, my), (_, _, xy) = fit.means, fit.covariances
  u, _, vt = np.linalg.svd(xy, full_matrices=False)
  return lambda x: (x - mx) @ u, lambda y: (y - my) @ vt.T


def cca(fit: Moments, choose: Moments, dims: int = 256) -> tuple[Map, Map]:
  """Canonical correlations: the `dims` directions of either side that correlate most, weighted so.

  Penalty on the variances: the one of RIDGES whose directions correlate most on `choose`.
  """
  (mx, my), (xx, yy, xy) = fit.means, fit.covariances
  other = _about(choose, mx, my)
  sides = [np.linalg.eigh(c) for c in (xx, yy)]

  def solve(penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    root_x, root_y = (
      (vectors / np.sqrt(np.maximum(values, 0) + penalty * values.mean())) @ vectors.T
      for values, vectors in sides
    )
    u, s, vt = np.linalg.svd(root_x @ xy @ root_y, full_matrices=False)
    return root_x @ u[:, :dims], root_y @ vt[:dims].T, s[:dims]

  def gain(found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    a, b, _ = found
    var_x, var_y, both = (
      np.einsum("dk,de,ek->k", p, c, q, optimize=True)
      for p, c, q in ((a, other[0], a), (b, other[1], b), (a, other[2], b))
    )
    return float((both / np.sqrt(var_x * var_y)).sum())

  a, b, s = max(map(solve, RIDGES), key=gain)
  return lambda x: (x - mx) @ (a * s), lambda y: (y - my) @ (b * s)


def recalls(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """[images, texts] scores and the image of each text → recalls at 1, 5, 10, both ways.

  An image's query is a hit if any of its texts is among the first k. What is equal stands before,
  so that vectors that are all alike score nothing.
  """
  mine = owner[None] == np.arange(len(scores))[:, None]
  own = scores[owner, np.arange(scores.shape[1])]
  to_image = (~mine & ~(scores < own)).sum(0)  # the images before the right one
  best = np.where(mine, scores, -np.inf).max(1)
  to_text = (~mine & ~(scores < best[:, None])).sum(1)[mine.any(1)]
  return {
    f"{way}_R@{k}": float((found < k).mean())
    for way, found in (("text_to_image", to_image), ("image_to_text", to_text))
    for k in RECALL_AT
  }


def unit(x: np.ndarray) -> np.ndarray:
  """[..., D] → unit L2 norm; zero stays zero."""
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def retrieval(
  maps: tuple[Map, Map], x: np.ndarray, y: np.ndarray, owner: np.ndarray
) -> dict[str, float]:
  """`recalls` of images x [N, D] and texts y [M, E] by the cosine of what the maps make of them."""
  a, b = (unit(f(z.astype(np.float64))) for f, z in zip(maps, (x, y)))
  return recalls(a @ b.T, owner)


def _about(m: Moments, mx: np.ndarray, my: np.ndarray) -> Sequence[np.ndarray]:
  """Second moments about given points."""
  (x, y), xx, yy, xy = m.means, m.xx / m.n, m.yy / m.n, m.xy / m.n

  def centred(
    c: np.ndarray, a: np.ndarray, b: np.ndarray, p: np.ndarray, q: np.ndarray
  ) -> np.ndarray:
    return c - np.outer(a, q) - np.outer(p, b) + np.outer(p, q)

  return (centred(xx, x, x, mx, mx), centred(yy, y, y, my, my), centred(xy, x, y, mx, my))
