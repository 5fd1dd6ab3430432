"""Times a linear probe against scikit-learn: python benchmarks/linear_probe.py

Fits logistic regressions with one penalty to synthetic features, 50,000 rows of 1,024 numbers in
1,000 classes, and classifies as many others. bigalign and LogisticRegression alternate, both in
float32; the best round of each counts. Exits with 1 if bigalign takes more than LIMIT times as
long, or if the accuracies differ by more than SAME.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
import warnings

import jax
import numpy as np
import sklearn
from jax.sharding import NamedSharding
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from step import made_by

from bigalign import sharding
from bigalign.evals import features, linear
from bigalign.evals.features import Features
from bigalign.run import runtime

LIMIT, SAME = 2.0, 0.002
BATCH = 1000  # rows of a batch of features


def made(rows: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Features [R, D] float32 around a centre per class, with a common mean, and classes [R]."""
  centres = np.random.default_rng(0).normal(size=(classes, width))
  random = np.random.default_rng(seed)
  label = np.concatenate([np.arange(classes), random.integers(0, classes, rows - classes)])
  x = np.empty((rows, width), np.float32)
  for start in range(0, rows, 4096):
    own = label[start : start + 4096]
    x[start : start + 4096] = centres[own] + 6 * random.normal(size=(len(own), width)) + 0.5
  return x, label


def on_mesh(mesh: jax.sharding.Mesh, x: np.ndarray, label: np.ndarray) -> Features:
  """The features as an evaluator holds them."""
  padding = -len(x) % BATCH

  def put(a: np.ndarray) -> jax.Array:
    padded = np.pad(a, ((0, padding),) + ((0, 0),) * (a.ndim - 1))
    split = padded.reshape(-1, BATCH, *a.shape[1:])
    return jax.device_put(split, NamedSharding(mesh, features.ROWS))

  return Features(put(x), put(label.astype(np.int32)), put(np.ones(len(x), bool)))


def main() -> int:
  """Prints a table, writes the JSON, and returns 1 if a target is missed, otherwise 0."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=50_000)
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--classes", type=int, default=1000)
  parser.add_argument("--penalty", type=float, default=1000.0, help="lambda, 1 / C")
  parser.add_argument("--tolerance", type=float, default=0.001, help="see linear.fit_logistic")
  parser.add_argument("--rounds", type=int, default=2)
  path = pathlib.Path("benchmarks/linear_probe.json")
  parser.add_argument("--json", type=pathlib.Path, default=path)
  args = parser.parse_args()
  size = (args.rows, args.width, args.classes)
  (x, label), (z, wanted) = made(*size, seed=1), made(*size, seed=2)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    given, test = on_mesh(mesh, x, label), on_mesh(mesh, z, wanted)
  # Our tolerance is relative to the largest component of this gradient, scikit-learn's is absolute.
  # It is that of a classifier whose parameters are 0: all classes have the same probability.
  residual = np.full((args.rows, args.classes), -1 / args.classes, np.float32)
  residual[np.arange(args.rows), label] += 1
  largest = float(np.abs((x - x.mean(0)).T @ residual).max() / args.rows)
  del residual
  seconds: dict[str, list[float]] = {"bigalign, first": [], "bigalign": [], "scikit-learn": []}
  iterations, accuracy = {}, {}
  for turn in range(args.rounds + 1):
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
      fitted = jax.block_until_ready(
        linear.fit_logistic(
          given,
          given.finite.astype(np.float32),
          linear.zeros(args.width, args.classes),
          np.float32(args.penalty),
          tolerance=np.float32(args.tolerance),
        )
      )
    name = "bigalign" if turn else "bigalign, first"  # which also compiles
    seconds[name].append(time.perf_counter() - begin)
    iterations["bigalign"] = int(fitted.iterations)
    if not turn:
      continue
    theirs = LogisticRegression(C=1 / args.penalty, tol=args.tolerance * largest, max_iter=1000)
    begin = time.perf_counter()
    with warnings.catch_warnings():
      warnings.simplefilter("error", ConvergenceWarning)
      theirs.fit(x, label)
    seconds["scikit-learn"].append(time.perf_counter() - begin)
    iterations["scikit-learn"] = int(theirs.n_iter_[0])
  with jax.set_mesh(mesh):
    accuracy["bigalign"] = float((linear.score(fitted.linear, test)[: args.rows] < 1).mean())
  accuracy["scikit-learn"] = float(theirs.score(z, wanted))
  best = {name: min(every) for name, every in seconds.items()}
  for name, value in best.items():
    more = f"  {iterations[name]} iterations, {accuracy[name]:.4f}" if name in accuracy else ""
    print(f"{name:<16} {value:8.2f} s{more}")
  ratio = best["bigalign"] / best["scikit-learn"]
  apart = abs(accuracy["bigalign"] - accuracy["scikit-learn"])
  print(f"{ratio:.2f} times the seconds of scikit-learn; accuracies differ by {apart:.4f}")
  missed = [f"slower than {LIMIT}x"] if ratio > LIMIT else []
  missed += [f"accuracies differ by more than {SAME}"] if apart > SAME else []
  print("; ".join(missed) or "all targets are met")
  result = dict(
    **made_by(runtime.versions() | {"scikit-learn": sklearn.__version__}),
    size=dict(zip(("rows", "width", "classes"), size)),
    penalty=args.penalty,
    seconds=best,
    turns=seconds,
    iterations=iterations,
    accuracy=accuracy,
    ratio=ratio,
  )
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  return int(bool(missed))


if __name__ == "__main__":
  sys.exit(main())
