"""Linear classifiers of features that are split over the mesh: logistic regression and ridge.

Only sums over rows leave a device: gradients [D, K], or the second moments [D, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import PartitionSpec as P

from bigalign import sharding
from bigalign.evals.embed import places
from bigalign.evals.features import ROWS, Features, flat

CHUNK = 2**24  # numbers at a time on one device: 64 MB of scores, or of features
HIGHEST = jax.lax.Precision.HIGHEST
COARSE = tuple(range(6, -7, -2))  # decades of the penalties that are tried first
HALVINGS = 4  # of the distance in decades between the best penalty and its neighbours: 1 … 1/8


class Linear(NamedTuple):
  """A linear classifier: scores (x - centre) weight + bias.

  Attributes:
    weight: [D, K].
    bias: [K].
    centre: [D], the mean of the features that it was fitted to.
  """

  weight: jax.Array
  bias: jax.Array
  centre: jax.Array

  def __call__(self, x: jax.Array) -> jax.Array:
    """[R, D] -> scores [R, K]."""
    centred = x.astype(jnp.float32) - self.centre[None]
    return jnp.matmul(centred, self.weight, precision=HIGHEST) + self.bias[None]


class Fit(NamedTuple):
  """A fitted classifier.

  Attributes:
    linear: the classifier.
    iterations: of L-BFGS.
    converged: whether the gradient is as small as was asked.
  """

  linear: Linear
  iterations: jax.Array
  converged: jax.Array


def losses(scores: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The loss of each row [R], and its gradient [R, K] with regard to the scores.

  Args:
    scores: [R, K].
    target: [R] int32: softmax cross-entropy; or [R, K] bool: the sum of the binary ones.
  """
  if target.ndim == 2:
    loss = (jax.nn.softplus(scores) - jnp.where(target, scores, 0)).sum(1)
    return loss, jax.nn.sigmoid(scores) - target
  log_sum = jax.nn.logsumexp(scores, axis=1)
  own = jnp.take_along_axis(scores, target[:, None], axis=1)[:, 0]
  one_hot = jnp.arange(scores.shape[1])[None] == target[:, None]
  return log_sum - own, jnp.exp(scores - log_sum[:, None]) - one_hot


def _sum_over_rows(part: Callable[..., Any], features: Features, weight: jax.Array, k: int) -> Any:
  """The sum of part(x [R, D], target [R, …], weight [R]) over all rows, R at a time per device.

  Args:
    part: of some rows; it is a sum over them.
    features: of N batches of B images.
    weight: [N, B]; 0 leaves a row out.
    k: numbers of a row in `part`, if they are more than its features.
  """
  axes = sharding.devices()[0]

  def local(x: jax.Array, target: jax.Array, weight: jax.Array) -> Any:
    every = [rearrange(a, "n b ... -> (n b) ...") for a in (x, target, weight)]
    count = len(every[0])
    chunk = min(count, max(1, CHUNK // max(k, x.shape[-1])))

    def rows(i: Any) -> Any:
      first = jnp.minimum(i * chunk, count - chunk)  # the last chunk begins among earlier rows
      x, target, weight = (jax.lax.dynamic_slice_in_dim(a, first, chunk) for a in every)
      fresh = first + jnp.arange(chunk) >= i * chunk
      return part(x.astype(jnp.float32), target, jnp.where(fresh, weight, 0))

    sums = rows(0)
    if chunk < count:
      more = range(1, -(-count // chunk))
      sums = jax.lax.fori_loop(
        more.start, more.stop, lambda i, s: jax.tree.map(jnp.add, s, rows(i)), sums
      )
    return jax.lax.psum(sums, axes) if axes else sums

  return sharding.on_each_device(local, (ROWS,) * 3, P())(features.x, features.target, weight)


def _mean(features: Features, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean of the features [D], and the sum of the weights."""

  def part(x: jax.Array, target: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.einsum("r,rd->d", weight, x, precision=HIGHEST), weight.sum()

  total, count = _sum_over_rows(part, features, weight, 1)
  count = jnp.maximum(count, 1)
  return total / count, count


@jax.custom_vjp
def _loss(
  params: dict[str, jax.Array],
  centre: jax.Array,
  count: jax.Array,
  features: Features,
  weight: jax.Array,
) -> jax.Array:
  """The mean loss of the rows."""
  return _loss_and_gradient(params, centre, count, features, weight)[0]


def _loss_and_gradient(
  params: dict[str, jax.Array],
  centre: jax.Array,
  count: jax.Array,
  features: Features,
  weight: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  # Value and gradient come from one pass over the rows, whose scores are not kept.
  linear = Linear(**params, centre=centre)

  def part(x: jax.Array, target: jax.Array, weight: jax.Array) -> Any:
    loss, residual = losses(linear(x), target)
    residual = residual * weight[:, None]
    by_weight = jnp.einsum("rd,rk->dk", x - centre[None], residual, precision=HIGHEST)
    return jnp.vdot(weight, loss), dict(weight=by_weight, bias=residual.sum(0))

  sums = _sum_over_rows(part, features, weight, len(params["bias"]))
  loss, gradient = jax.tree.map(lambda x: x / count, sums)
  return loss, gradient


def _backward(gradient: dict[str, jax.Array], cotangent: jax.Array) -> Any:
  return jax.tree.map(lambda x: x * cotangent, gradient), None, None, None, None


_loss.defvjp(_loss_and_gradient, _backward)


@functools.partial(jax.jit, static_argnames="iterations")
def fit_logistic(
  features: Features,
  weight: jax.Array,
  start: dict[str, jax.Array],
  penalty: jax.Array | float,
  *,
  tolerance: jax.Array | float = 1e-4,
  iterations: int = 1000,
) -> Fit:
  """Logistic regression by L-BFGS, over the current mesh.

  It minimises the sum of the losses of the rows plus penalty / 2 times the sum of the squared
  weights; the bias is not penalised. That is LogisticRegression(C=1 / penalty) of scikit-learn, and
  of a multilabel set one such binary classifier per class.

  Args:
    features: of N batches of B images.
    weight: [N, B]: 1 for rows to fit, 0 for others.
    start: {"weight": [D, K], "bias": [K]} to begin with.
    penalty: lambda.
    tolerance: ends when no component of the gradient is above this fraction of the largest one of a
      classifier that is 0.
    iterations: at most.
  """
  weight = jnp.where(features.finite, weight, 0).astype(jnp.float32)
  centre, count = _mean(features, weight)

  def objective(params: dict[str, jax.Array]) -> jax.Array:
    square = jnp.sum(params["weight"] ** 2)
    return _loss(params, centre, count, features, weight) + penalty / (2 * count) * square

  zero = jax.tree.map(jnp.zeros_like, start)
  largest = optax.tree.norm(jax.grad(objective)(zero), ord=jnp.inf)
  optimizer = optax.lbfgs()
  value_and_gradient = optax.value_and_grad_from_state(objective)

  def step(carry: Any) -> Any:
    params, state, i, _, _ = carry
    value, gradient = value_and_gradient(params, state=state)
    update, state = optimizer.update(
      gradient, state, params, value=value, grad=gradient, value_fn=objective
    )
    norm = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
    # The line search gives up at the precision of float32, and would do so again.
    moved = optax.tree.norm(update, ord=jnp.inf) > 0
    return optax.apply_updates(params, update), state, i + 1, norm, moved

  def unfinished(carry: Any) -> jax.Array:
    _, _, i, norm, moved = carry
    more: jax.Array = (i < iterations) & (norm > tolerance * largest) & moved
    return more

  norm = optax.tree.norm(jax.grad(objective)(start), ord=jnp.inf)
  begin = (start, optimizer.init(start), jnp.asarray(0), norm, jnp.asarray(True))
  params, _, i, norm, _ = jax.lax.while_loop(unfinished, step, begin)
  fitted = Fit(Linear(**params, centre=centre), i, norm <= tolerance * largest)
  on_every_device: Fit = jax.tree.map(sharding.replicate, fitted)
  return on_every_device


def zeros(width: int, classes: int) -> dict[str, Any]:
  """The start of `fit_logistic` for D features and K classes."""
  return dict(weight=np.zeros((width, classes), np.float32), bias=np.zeros(classes, np.float32))


class Moments(NamedTuple):
  """Sums over N rows of features x [D] and targets y [K] around their means, on the host.

  Attributes:
    values: [D], the eigenvalues of the sum of x xᵀ.
    vectors: [D, D], its eigenvectors in columns.
    cross: [D, K], the sum of x yᵀ in the basis of the eigenvectors.
    centre: [D], the mean of x.
    bias: [K], the mean of y.
  """

  values: np.ndarray
  vectors: np.ndarray
  cross: np.ndarray
  centre: np.ndarray
  bias: np.ndarray


def moments(features: Features, weight: jax.Array, classes: int) -> Moments:
  """The moments of the rows whose weight is not 0; targets are 1 for a class of a row, else 0.

  Args:
    features: of N batches of B images.
    weight: [N, B].
    classes: K.
  """
  sums = jax.tree.map(np.float64, sharding.block_on_cpu(_sums(features, weight, classes)))
  values, vectors = np.linalg.eigh(sums["square"])
  return Moments(
    np.maximum(values, 0), vectors, vectors.T @ sums["cross"], sums["centre"], sums["bias"]
  )


@functools.partial(jax.jit, static_argnames="classes")
def _sums(features: Features, weight: jax.Array, classes: int) -> dict[str, jax.Array]:
  weight = jnp.where(features.finite, weight, 0).astype(jnp.float32)
  centre, count = _mean(features, weight)

  def part(x: jax.Array, target: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    y = target if target.ndim == 2 else jnp.arange(classes)[None] == target[:, None]
    y = y * weight[:, None]
    x = x - centre[None]
    return dict(
      square=jnp.einsum("rd,r,re->de", x, weight, x, precision=HIGHEST),
      cross=jnp.einsum("rd,rk->dk", x, y, precision=HIGHEST),
      bias=y.sum(0),
    )

  sums = _sum_over_rows(part, features, weight, classes)
  found = {**sums, "bias": sums["bias"] / count, "centre": centre}
  on_every_device: dict[str, jax.Array] = jax.tree.map(sharding.replicate, found)
  return on_every_device


def solve_ridge(found: Moments, penalty: float) -> Linear:
  """Ridge regression in closed form.

  It minimises the sum of the squared differences of scores and targets plus penalty times the sum
  of the squared weights; the bias is not penalised. That is Ridge(alpha=penalty) of scikit-learn,
  with targets of 1 and 0.

  Args:
    found: the moments of the rows. They are sums in float32, so a penalty far below 1e-6 of their
      largest eigenvalue adds what rounding gives.
    penalty: lambda, above 0.
  """
  weight = found.vectors @ (found.cross / (found.values + penalty)[:, None])
  return Linear(*(jnp.asarray(x, jnp.float32) for x in (weight, found.bias, found.centre)))


def score(linear: Linear, features: Features) -> np.ndarray:
  """What `measures` takes, on every host: [N B] places, or [N B, K] scores of a multilabel set.

  Args:
    linear: the classifier.
    features: of N batches of B images; those that are not finite get NaN.
  """
  found = sharding.block_on_cpu(_score(linear, features))
  return flat(np.asarray(found))


@jax.jit
def _score(linear: Linear, features: Features) -> jax.Array:
  def one(batch: Features) -> jax.Array:
    scores = jnp.where(batch.finite[:, None], linear(batch.x), jnp.nan)
    return scores if batch.target.ndim == 2 else places(scores, batch.target)

  return sharding.replicate(jax.lax.map(one, features))


def sweep(measure: Callable[[float], float]) -> float:
  """Chooses a penalty as CLIP does (https://arxiv.org/abs/2103.00020, appendix A.3).

  The penalties 1e6, 1e4 … 1e-6 are tried, then those a decade around the best one, half a decade
  around the best of these, and so on until there are 8 steps per decade. Of equal measures, the
  larger penalty is better.

  >>> tried = []
  >>> def measure(penalty):
  ...   tried.append(penalty)
  ...   return -abs(np.log10(penalty) + 2.4)
  >>> round(float(np.log10(sweep(measure))), 3), len(tried)
  (-2.375, 15)

  Args:
    measure: penalty -> number, of images that the classifier was not fitted to.
  """
  found: dict[float, float] = {}

  def attempt(decade: float) -> None:
    if COARSE[-1] <= decade <= COARSE[0] and decade not in found:
      found[decade] = measure(10.0**decade)

  def best() -> float:
    return max(found, key=lambda decade: (found[decade], decade))

  for first in COARSE:
    attempt(first)
  for n in range(HALVINGS):
    middle = best()
    for decade in (middle + 0.5**n, middle - 0.5**n):
      attempt(decade)
  return float(10.0 ** best())


def hold_out(target: np.ndarray, share: float, seed: int) -> np.ndarray:
  """Chooses rows for validation, the same share of each class, rounded down.

  Args:
    target: [R] int32, the class of each row. Or [R, K] bool: then rows are drawn regardless of
      their classes, but each class that occurs keeps a row with it.
    share: of the rows.
    seed: of the draw.

  Returns:
    [R] bool.
  """
  order = np.random.default_rng(seed).permutation(len(target))
  chosen = np.zeros(len(target), bool)
  if target.ndim == 2:
    chosen[order[: int(share * len(target))]] = True
    for k in np.flatnonzero(target.any(0) & ~target[~chosen].any(0)):
      chosen[np.flatnonzero(target[:, k])[0]] = False
    return chosen
  for k in np.unique(target):
    own = order[target[order] == k]
    chosen[own[: int(share * len(own))]] = True
  return chosen
