"""Classifiers of features: a linear probe, ridge regression, and probes of a few images a class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from bigalign import checks, sharding, tree
from bigalign.evals import linear
from bigalign.evals.embed import Context
from bigalign.evals.features import (
  Features,
  Rows,
  check_same_vectors,
  class_names,
  count_classes,
  join,
  measures,
  open_set,
  pick,
  spread,
)

VALIDATION_SHOTS = 4  # at most so many further images per class choose the penalty of a few shots

Run = Callable[[Any], dict[str, float]]


class TrainAndTest:
  """The images of a classifier, and the names of its classes.

  Attributes:
    where: "config.evals.NAME".
    context: of the evaluator.
    train: the images to fit to.
    validation: images that choose a penalty; None without them.
    test: the images to classify.
    names: of the classes; [] if they are not known.

  Args:
    context: of the evaluator.
    train, test, validation: (source with labels, folder of the features), of which one may be "".
    projected, batch_size: see `open_set`.
    classnames: see `class_names`.
  """

  def __init__(
    self,
    context: Context,
    *,
    train: tuple[str, str],
    test: tuple[str, str],
    validation: tuple[str, str] = ("", ""),
    projected: bool,
    classnames: str | None,
    batch_size: int,
  ):
    self.where, self.context = f"config.evals.{context.name}", context
    opened = functools.partial(open_set, context, projected=projected, batch_size=batch_size)
    self.train = opened("train", *train)
    self.validation = opened("validation", *validation) if any(validation) else None
    self.test = opened("test", *test)
    sets = [one for one in (self.train, self.validation, self.test) if one]
    check_same_vectors(sets)
    self.names = class_names(self.where, sets, classnames)

  @property
  def multilabel(self) -> bool:
    """Whether each image has a set of classes."""
    return self.train.multilabel

  def read(self, params: Any) -> Read:
    """All features, and the number of classes.

    Raises:
      ValueError: for images without a class, a class without an image, and features of two widths.
    """
    several = len(self.names) if self.multilabel else 0
    sets = [one for one in (self.train, self.validation, self.test) if one]
    parts = {one.option: one.read(params, several) for one in sets}
    widths = {option: features.x.shape[-1] for option, (features, _) in parts.items()}
    if len({*widths.values()}) > 1:
      raise ValueError(f"{self.where}: features of several widths cannot be compared: {widths}")
    rows = {option: own for option, (_, own) in parts.items()}
    own = rows.pop(self.train.option)
    classes = count_classes(self.names, (self.train.option, own), rows)
    *_, tested = parts.values()
    validation = parts[self.validation.option] if self.validation else None
    self._warn_of_untested(tested[1], classes)
    return Read(parts[self.train.option], validation, tested, classes)

  def _warn_of_untested(self, tested: Rows, classes: int) -> None:
    """Logs the classes of a multilabel set that no image to classify has."""
    if self.multilabel and not (there := tested.target[tested.valid].any(0)).all():
      untested = [self.names[k] for k in np.flatnonzero(~there)]
      logging.warning(
        "%s: classes without images: %d of %d; their average precision counts as 0: %s",
        *(self.test.option, len(untested), classes, tree.shown(untested)),
      )


@dataclasses.dataclass(frozen=True)
class Read:
  """Features of an evaluator's images for some parameters; see TrainAndTest."""

  train: tuple[Features, Rows]
  validation: tuple[Features, Rows] | None
  test: tuple[Features, Rows]
  classes: int

  @property
  def sizes(self) -> dict[str, float]:
    """The numbers of images and classes, as metrics."""
    trained = [self.train, *([self.validation] if self.validation else [])]
    rejected = {
      "rejected": self.test[1].rejected,
      "train_rejected": sum(rows.rejected for _, rows in trained),
    }
    return {
      "num_samples": int(self.test[1].valid.sum()),
      "num_classes": self.classes,
      "num_train": int(sum(rows.valid.sum() for _, rows in trained)),
      **{name: count for name, count in rejected.items() if count},
    }

  @property
  def tested(self) -> tuple[tuple[Features, Rows], np.ndarray, int]:
    """The images to classify, the rows of them that count, and the number of classes."""
    return self.test, self.test[1].valid, self.classes

  def whole(
    self, where: str, share: float, seed: int, *, chosen: bool
  ) -> tuple[tuple[Features, Rows], np.ndarray]:
    """The images of train and validation in one, and which rows are for validation, [N B] bool.

    Args:
      where: "config.evals.NAME".
      share: of the training images that are held out if there is no validation.
      seed: of their draw.
      chosen: whether there is something to choose by validation; if not, no image is held out.

    Raises:
      ValueError: if no image is held out.
    """
    if self.validation:
      whole = join([self.train, self.validation])
      first = len(self.train[1].valid)
      return whole, (np.arange(len(whole[1].valid)) >= first) & whole[1].valid
    rows = self.train[1]
    held = np.zeros(len(rows.valid), bool)
    if chosen:
      held[rows.valid] = linear.hold_out(rows.target[rows.valid], share, seed)
    if chosen and not held.any():
      raise ValueError(
        f"{where}.holdout={share}: no class has enough training images for one to be held out; name"
        " validation images, give a larger share, or set penalty"
      )
    return self.train, held


def fit_logistic(
  mesh: Mesh,
  features: Features,
  rows: np.ndarray,
  classes: int,
  penalty: float,
  *,
  tolerance: float,
  iterations: int,
) -> linear.Fit:
  """Logistic regression of some rows, see linear.fit_logistic.

  Each fit begins at 0. With a large penalty the scores are small; if the fit began with another
  classifier, what is left of its bias within the tolerance would decide.

  Args:
    mesh: of the features.
    features: N batches of B images.
    rows: [N B] bool, to fit to.
    classes: K.
    penalty: lambda.
    tolerance: see linear.fit_logistic.
    iterations: at most.
  """
  weight = spread(mesh, rows.astype(np.float32), features.x)
  start = linear.zeros(features.x.shape[-1], classes)
  with jax.set_mesh(mesh):
    fitted: linear.Fit = linear.fit_logistic(
      features,
      weight,
      start,
      np.float32(penalty),
      tolerance=np.float32(tolerance),
      iterations=iterations,
    )
  return sharding.block_on_cpu(fitted)


def classified(
  mesh: Mesh,
  classifier: linear.Linear,
  images: tuple[Features, Rows],
  among: np.ndarray,
  classes: int,
) -> dict[str, float]:
  """The measures of a classifier of some rows; see features.measures.

  Args:
    mesh: of the features.
    classifier: of them.
    images: N batches of B.
    among: [N B] bool, the rows that count.
    classes: K.
  """
  features, rows = images
  with jax.set_mesh(mesh):
    found = linear.score(classifier, features)
  return measures(found[among], rows.target[among], classes)


def _choose(
  fit: Callable[[float], linear.Linear],
  mesh: Mesh,
  images: tuple[Features, Rows],
  held: np.ndarray,
  classes: int,
) -> tuple[float, float]:
  """The penalty whose classifier is the best for the rows `held`, and its measure there.

  The measure is top1, or mean_average_precision of a multilabel set.
  """
  found: dict[float, float] = {}

  def measure(penalty: float) -> float:
    values = classified(mesh, fit(penalty), images, held, classes)
    found[penalty] = next(iter(values.values()))
    return found[penalty]

  penalty = linear.sweep(measure)
  return penalty, found[penalty]


def _check_penalty(where: str, penalty: float | None) -> None:
  if penalty is not None:
    checks.above_zero(where, penalty=penalty)


def linear_probe(
  context: Context,
  *,
  train: str = "",
  test: str = "",
  validation: str = "",
  train_store: str = "",
  test_store: str = "",
  validation_store: str = "",
  projected: bool = False,
  classnames: str | None = None,
  penalty: float | None = None,
  holdout: float = 0.2,
  seed: int = 0,
  iterations: int = 1000,
  tolerance: float = 1e-4,
  batch_size: int = 256,
) -> Run:
  """A linear probe, by the protocol of CLIP (https://arxiv.org/abs/2103.00020, appendix A.3).

  Logistic regression by L-BFGS of the features before the projection, which are not normalised. The
  weight lambda of the L2 penalty is chosen by the validation images: 1e-6 to 1e6, see
  `linear.sweep`. The last fit is to training and validation images together. In scikit-learn it is
  LogisticRegression(C=1 / lambda). Images with several classes have one binary classifier per
  class, and are measured by the mean average precision.

  Args:
    context: model, mesh and data options.
    train: source of the images to fit to, with labels, as in config.data.source; "" if
      `train_store` has them.
    test: source of the images to classify, likewise.
    validation: source of the images that choose lambda, likewise. Without it, `holdout` of the
      training images do.
    train_store: folder of the features of the training images, as `bigalign embed` writes them.
    test_store: those of the images to classify.
    validation_store: those of the images that choose lambda.
    projected: classify embeddings, after the projector, instead of the outputs of the tower. The
      vectors of stores go through the projector then.
    classnames: file of class names in the order of the labels; None: the names of the training
      source, or else the classes are counted.
    penalty: lambda; None: chosen.
    holdout: share of the training images of each class that choose lambda, rounded down.
    seed: of their draw.
    iterations: at most, of a fit.
    tolerance: a fit ends when no component of the gradient is above this fraction of the largest
      one of a classifier that is 0.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-linear_probe-top1": fraction, ...}: mean_per_class_recall, from five
    classes on top5, or of a multilabel set mean_average_precision; penalty, and what the validation
    images measured with it (validation); iterations of the last fit, and the numbers of images.

  Raises:
    ValueError: for missing sources; when run, for images without a class, a class without a
      training image, or features of two widths.
  """
  where = f"config.evals.{context.name}"
  checks.between(where, 0.0, 0.9, holdout=holdout)
  _check_penalty(where, penalty)
  checks.between(where, 1, iterations=iterations)
  checks.above_zero(where, tolerance=tolerance)
  images = TrainAndTest(
    context,
    train=(train, train_store),
    test=(test, test_store),
    validation=(validation, validation_store),
    projected=projected,
    classnames=classnames,
    batch_size=batch_size,
  )

  def run(params: Any) -> dict[str, float]:
    read = images.read(params)
    whole, held = read.whole(where, holdout, seed, chosen=penalty is None)

    def fit(rows: np.ndarray, penalty: float) -> linear.Fit:
      options: Any = dict(tolerance=tolerance, iterations=iterations)
      return fit_logistic(context.mesh, whole[0], rows, read.classes, penalty, **options)

    best, validated = penalty, {}
    if best is None:
      part = whole[1].valid & ~held
      best, value = _choose(lambda x: fit(part, x).linear, context.mesh, whole, held, read.classes)
      validated = {"validation": value}
    fitted = fit(whole[1].valid, best)
    if not fitted.converged:
      logging.warning(
        "%s: L-BFGS did not converge in %d iterations with the penalty %g",
        *(where, int(fitted.iterations), best),
      )
    metrics = classified(context.mesh, fitted.linear, *read.tested)
    more = {"penalty": best, **validated, "iterations": int(fitted.iterations)}
    return named(context, "linear_probe", metrics | more | read.sizes)

  return run


def ridge(
  context: Context,
  *,
  train: str = "",
  test: str = "",
  validation: str = "",
  train_store: str = "",
  test_store: str = "",
  validation_store: str = "",
  projected: bool = False,
  classnames: str | None = None,
  penalty: float | None = None,
  holdout: float = 0.2,
  seed: int = 0,
  batch_size: int = 256,
) -> Run:
  """Ridge regression of the classes, 1 or 0, in closed form: a linear probe that takes seconds.

  One pass over the features gives their moments, from which the classifiers of all penalties
  follow. In scikit-learn it is Ridge(alpha=lambda) of those targets; RidgeClassifier, whose targets
  are 1 and -1, doubles the differences of scores, and classifies equally.

  Args:
    context: model, mesh and data options.
    train, test, validation, train_store, test_store, validation_store, projected, classnames: as of
      `linear_probe`.
    penalty: lambda; None: chosen as in `linear_probe`.
    holdout: share of the training images of each class that choose lambda, rounded down.
    seed: of their draw.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-ridge-top1": fraction, ...}, as of `linear_probe`.

  Raises:
    ValueError: as `linear_probe`.
  """
  where = f"config.evals.{context.name}"
  checks.between(where, 0.0, 0.9, holdout=holdout)
  _check_penalty(where, penalty)
  images = TrainAndTest(
    context,
    train=(train, train_store),
    test=(test, test_store),
    validation=(validation, validation_store),
    projected=projected,
    classnames=classnames,
    batch_size=batch_size,
  )

  def run(params: Any) -> dict[str, float]:
    read = images.read(params)
    whole, held = read.whole(where, holdout, seed, chosen=penalty is None)

    def moments(rows: np.ndarray) -> linear.Moments:
      weight = spread(context.mesh, rows.astype(np.float32), whole[0].x)
      with jax.set_mesh(context.mesh):
        return linear.moments(whole[0], weight, read.classes)

    best, validated = penalty, {}
    if best is None:
      part = moments(whole[1].valid & ~held)
      best, value = _choose(
        lambda x: linear.solve_ridge(part, x), context.mesh, whole, held, read.classes
      )
      validated = {"validation": value}
    fitted = linear.solve_ridge(moments(whole[1].valid), best)
    metrics = classified(context.mesh, fitted, *read.tested)
    return named(context, "ridge", metrics | {"penalty": best, **validated} | read.sizes)

  return run


def few_shot(
  context: Context,
  *,
  train: str = "",
  test: str = "",
  train_store: str = "",
  test_store: str = "",
  projected: bool = False,
  classnames: str | None = None,
  shots: Sequence[int] = (1, 2, 4, 8, 16),
  seeds: int = 5,
  penalty: float | None = None,
  iterations: int = 1000,
  tolerance: float = 1e-4,
  batch_size: int = 256,
) -> Run:
  """Linear probes that are fitted to a few images of each class, drawn by several seeds.

  The images of fewer shots are among those of more. As in CoOp (https://arxiv.org/abs/2109.01134),
  lambda is chosen for each draw by further training images, as many per class as shots but at most
  four, to which no classifier is fitted.

  Args:
    context: model, mesh and data options.
    train, test, train_store, test_store, projected, classnames: as of `linear_probe`.
    shots: training images of each class, one probe for each number.
    seeds: draws.
    penalty: lambda; None: chosen.
    iterations, tolerance: of a fit, as of `linear_probe`.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-few_shot-4_shots-top1": mean over the seeds, ...}, with
    mean_per_class_recall and top5 as of `linear_probe`. From two seeds on "..._interval" is half
    the width of the 95 % confidence interval of a mean, by Student's distribution.

  Raises:
    ValueError: when run, for images without a class, or a class with too few training images.
  """
  where = f"config.evals.{context.name}"
  shots = tuple(sorted({*shots}))
  if not shots or shots[0] < 1:
    raise ValueError(f"{where}.shots={shots} must be numbers of images, 1 or more")
  checks.between(where, 1, seeds=seeds, iterations=iterations)
  checks.above_zero(where, tolerance=tolerance)
  _check_penalty(where, penalty)
  images = TrainAndTest(
    context,
    train=(train, train_store),
    test=(test, test_store),
    projected=projected,
    classnames=classnames,
    batch_size=batch_size,
  )
  if images.multilabel:
    raise ValueError(f"{where}: images with several classes cannot be drawn by class")
  extra = 0 if penalty is not None else min(shots[-1], VALIDATION_SHOTS)

  def probe(read: Read, seed: int) -> dict[int, dict[str, float]]:
    """{shots: measures} of one draw."""
    features, rows = read.train
    drawn = draw(rows, read.classes, shots[-1] + extra, seed)  # [K, shots]
    few = pick(context.mesh, features, rows, drawn.ravel())
    ordinal = np.full(len(few[1].valid), drawn.size)
    ordinal[: drawn.size] = np.tile(np.arange(drawn.shape[1]), read.classes)

    def fit(few_rows: np.ndarray, penalty: float) -> linear.Linear:
      options: Any = dict(tolerance=tolerance, iterations=iterations)
      return fit_logistic(context.mesh, few[0], few_rows, read.classes, penalty, **options).linear

    found = {}
    for k in shots:
      part, best = ordinal < k, penalty
      if best is None:
        held = (ordinal >= shots[-1]) & (ordinal < shots[-1] + min(k, extra))
        best, _ = _choose(functools.partial(fit, part), context.mesh, few, held, read.classes)
      found[k] = classified(context.mesh, fit(part, best), *read.tested)
    return found

  def run(params: Any) -> dict[str, float]:
    read = images.read(params)
    _check_shots(where, images.names, read, shots[-1], extra)
    found = [probe(read, seed) for seed in range(seeds)]
    metrics: dict[str, float] = {}
    for k in shots:
      for name in found[0][k]:
        values = np.array([one[k][name] for one in found])
        metrics[f"{k}_shots-{name}"] = float(values.mean())
        if seeds > 1:
          metrics[f"{k}_shots-{name}_interval"] = interval(values)
    return named(context, "few_shot", metrics | {"seeds": seeds} | read.sizes)

  return run


def _check_shots(where: str, names: Sequence[str], read: Read, shots: int, extra: int) -> None:
  """Raises ValueError for classes with fewer training images than are drawn."""
  rows = read.train[1]
  counts = np.bincount(rows.target[rows.valid], minlength=read.classes)
  few = np.flatnonzero(counts < shots + extra)
  if len(few):
    shown = {names[k] if names else k: int(counts[k]) for k in few[: tree.SHOWN].tolist()}
    choose = f", and {extra} to choose the penalty (none if penalty is set)" if extra else ""
    raise ValueError(
      f"{where}.train: {len(few)} of {read.classes} classes have fewer images than {shots} shots"
      f"{choose}: {shown}. Set fewer shots"
    )


def draw(rows: Rows, classes: int, count: int, seed: int) -> np.ndarray:
  """Draws images of each class.

  Args:
    rows: of the training images, at least `count` of each class.
    classes: K.
    count: images of each class.
    seed: of the draw. The first images of a larger draw are those of a smaller one.

  Returns:
    [K, count], numbers of rows.
  """
  order = np.random.default_rng(seed).permutation(np.flatnonzero(rows.valid))
  by_class = order[np.argsort(rows.target[order], kind="stable")]
  counts = np.bincount(rows.target[order], minlength=classes)
  first = np.cumsum(counts) - counts
  chosen: np.ndarray = by_class[first[:, None] + np.arange(count)]
  return chosen


def interval(values: np.ndarray) -> float:
  """Half the width of the 95 % confidence interval of the mean of some values, by Student's t.

  >>> round(interval(np.array([0.5, 0.6, 0.7])), 4)  # 4.303 standard deviations / sqrt(3)
  0.2484

  Args:
    values: [S], two or more.
  """
  from scipy import stats  # takes a moment, which most programs do not need

  quantile = stats.t.ppf(0.975, len(values) - 1)
  return float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def named(context: Context, kind: str, metrics: Mapping[str, float]) -> dict[str, float]:
  """The metrics under their names in a run: "val/NAME-KIND-METRIC"."""
  return {f"val/{context.name}-{kind}-{name}": value for name, value in metrics.items()}
