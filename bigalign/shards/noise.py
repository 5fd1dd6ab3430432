"""How likely each pair is wrong, from the losses of all: bigalign noise losses --out noise.

Losses of matching and of mismatched pairs are taken for two normal distributions, which are fitted
by EM; the column is the posterior of the one with the larger mean, as in NLIP and NEVLP
(https://arxiv.org/abs/2212.07086). `bigalign score --what=loss` writes losses. A sample without a
loss has no probability either.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign.data.fields import column_files

EXACT = 1 << 20  # losses that are fitted one by one; more are counted in BINS first
BINS = 1 << 16
CHUNK = 1 << 20
FLOOR = 1e-6  # of a variance
STEPS = 10_000  # of EM, at most


class Mixture(NamedTuple):
  """Two normal distributions: weight, mean and variance, [2] each, the smaller mean first."""

  weight: np.ndarray
  mean: np.ndarray
  variance: np.ndarray

  def posterior(self, x: np.ndarray) -> np.ndarray:
    """[...] -> [...], the probability that a loss belongs to the second one."""
    logs = [
      np.log(w) - np.log(v) / 2 - (x - m) ** 2 / (2 * v)
      for w, m, v in zip(self.weight, self.mean, self.variance)
    ]
    found: np.ndarray = 1 / (1 + np.exp(np.minimum(logs[0] - logs[1], 700)))
    return found

  def noise(self, x: np.ndarray) -> np.ndarray:
    """As posterior, but 0 below the smaller mean, where the wider distribution has more weight."""
    return np.where(x < self.mean[0], 0, self.posterior(x))


def fit(x: np.ndarray, count: np.ndarray | None = None) -> Mixture:
  """Fits two normal distributions by EM, from the halves below and above the median.

  >>> made = fit(np.array([0.0, 0.2, 0.1, 0.1, 5.0, 5.2, 5.1]))
  >>> [round(m, 2) for m in made.mean.tolist()]
  [0.1, 5.1]

  Args:
    x: [N], finite.
    count: [N], how often each occurs; None: once.

  Raises:
    ValueError: if there are not two different numbers.
  """
  x = np.asarray(x, np.float64)
  count = np.ones(len(x)) if count is None else count.astype(np.float64)
  order = np.argsort(x, kind="stable")
  x, count = x[order], count[order]
  if not len(x) or x[0] == x[-1]:
    raise ValueError("the losses are all equal, so there are no two groups of them")
  high = (np.cumsum(count) - count / 2 > count.sum() / 2).astype(np.float64)
  before = None
  for _ in range(STEPS):
    share = count * np.stack([1 - high, high])
    total = np.maximum(share.sum(1), 1e-12)
    mean = share @ x / total
    variance = np.maximum((share * (x - mean[:, None]) ** 2).sum(1) / total, FLOOR)
    found = Mixture(total / count.sum(), mean, variance)
    if before is not None and np.allclose(found, before, rtol=1e-12, atol=0):
      break
    high, before = found.posterior(x), found
  swapped = np.argsort(found.mean, kind="stable")
  return Mixture(*(part[swapped] for part in found))


def noise(path: str, out: str) -> dict[str, Any]:
  """Writes the column of probabilities; returns its manifest.

  Args:
    path: of the column of losses, without an ending.
    out: of the new column.
  """
  losses = column_files.ColumnFile(path, None, "LOSSES")
  mixture = fit(*_counted(losses.numbers))
  made_by = dict(
    what="noise", losses=losses.manifest, **{k: x.tolist() for k, x in mixture._asdict().items()}
  )
  parts = (mixture.noise(part.astype(np.float64)) for part in _chunks(losses.numbers))
  return column_files.write(out, losses, parts, made_by=made_by)


def _chunks(numbers: np.ndarray) -> Iterator[np.ndarray]:
  return (numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK))


def _counted(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  """Numbers and how often each occurs, without NaN: the middles of bins if there are many."""
  if len(numbers) <= EXACT:
    return numbers[np.isfinite(numbers)], None
  low = min((float(part.min()) for part in _finite(numbers)), default=0.0)
  high = max((float(part.max()) for part in _finite(numbers)), default=0.0)
  edges = np.linspace(low, high, BINS + 1)
  counts = np.zeros(BINS)
  for part in _finite(numbers):
    counts += np.histogram(part, edges)[0]
  filled = counts > 0
  return ((edges[1:] + edges[:-1]) / 2)[filled], counts[filled]


def _finite(numbers: np.ndarray) -> Iterator[np.ndarray]:
  """The finite numbers, by chunks that have any."""
  for part in _chunks(numbers):
    if len(some := part[np.isfinite(part)]):
      yield some


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program; returns the manifest of the column."""
  parser = argparse.ArgumentParser(
    "bigalign noise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("losses", help="a column of losses, without .npy")
  parser.add_argument("--out", required=True, metavar="NAME", help="writes NAME.npy, NAME.json")
  given = parser.parse_args(words)
  manifest = noise(given.losses, given.out)
  (_, share), means = manifest["weight"], manifest["mean"]
  print(
    f"{share:.1%} of the samples belong to the group of larger losses: mean {means[1]:.3f} against"
    f" {means[0]:.3f}\n{given.out}.npy"
  )
  return manifest


def run() -> None:
  """The program `bigalign noise`."""
  main()
