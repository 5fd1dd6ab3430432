"""Schedules, weight decay, multipliers, optimizers; FLOPs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigalign.optim import OPTIMIZERS, learning_rate, make_optimizer
from bigalign.run import flops

PARAMS = {
  "model/encoder/block_0/mlp/fc1/kernel": jnp.ones((4, 8)),
  "model/encoder/block_0/mlp/fc1/bias": jnp.ones((8,)),
  "model/encoder/block_0/attn/query/kernel": jnp.ones((4, 2, 2)),
  "model/encoder/block_0/attn/query/bias": jnp.ones((2, 2)),
  "model/encoder/block_0/attn/out/kernel": jnp.ones((2, 2, 4)),
  "model/image_tower/encoder/blocks/mlp/fc1/kernel": jnp.ones((3, 4, 8)),
  "model/embedding": jnp.ones((5, 4)),
  "loss/clip/t": jnp.ones(()),
}


def make(**options):
  return make_optimizer(
    params=PARAMS,
    total_steps=100,
    to_steps=lambda value, where, **_: int(value),
    **{"lr": 1.0, "schedule": "constant", "clip_norm": None, **options},
  )


def update(gradient=0.0, **options):
  """What one update adds to each parameter."""
  optimizer, _ = make(**options)
  grads = {path: jnp.full_like(x, gradient) for path, x in PARAMS.items()}
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  return updates


def rate(name, steps, **options):
  fn = learning_rate(
    **{
      "name": name,
      "lr": 2.0,
      "total_steps": 100,
      "warmup": 10,
      "cooldown": 0,
      "end": 0.0,
      **options,
    }
  )
  return [float(fn(s)) for s in steps]


def test_warmup_already_moves_and_the_end_is_the_end():
  """open_clip's warmup: lr * (step + 1) / warmup."""
  for name in ("cosine", "linear", "constant", "rsqrt"):
    np.testing.assert_allclose(rate(name, [0, 4, 9]), [0.2, 1.0, 2.0], rtol=1e-6)
  np.testing.assert_allclose(rate("cosine", [10, 55, 100]), [2.0, 1.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(rate("linear", [10, 55, 100], end=0.5), [2.0, 1.25, 0.5], rtol=1e-6)
  np.testing.assert_allclose(rate("constant", [10, 99]), [2.0, 2.0])
  np.testing.assert_allclose(rate("rsqrt", [10, 40, 90]), [2.0, 1.0, 2 / 3], rtol=1e-6)


def test_cooldown_is_linear_from_where_the_shape_was():
  np.testing.assert_allclose(
    rate("constant", [79, 80, 90, 100], cooldown=20), [2.0, 2.0, 1.0, 0.0], atol=1e-6
  )
  np.testing.assert_allclose(
    rate("rsqrt", [90, 95, 100], cooldown=10), [2 / 3, 1 / 3, 0.0], atol=1e-6
  )


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("cooldown", [1, 20])
def test_a_decay_to_zero_before_a_cooldown_is_refused(name, cooldown):
  with pytest.raises(ValueError, match=f"its last {cooldown} updates have a learning rate of 0"):
    rate(name, [0], cooldown=cooldown)
  assert rate(name, [99], cooldown=cooldown, end=0.5) == [0.5]


@pytest.mark.parametrize(
  "name,cooldown",
  [("cosine", 0), ("linear", 0), *itertools.product(("constant", "rsqrt"), (0, 1, 20))],
)
def test_every_update_learns(name, cooldown):
  assert min(rate(name, range(100), cooldown=cooldown)) > 0


def test_weight_decay_only_on_matrices():
  """The bias of a head's projection has two axes and is no matrix; a token table is none either."""
  moved = {path for path, u in update(weight_decay=0.1).items() if np.abs(u).max() > 0}
  assert moved == {path for path in PARAMS if path.endswith("kernel")}
  np.testing.assert_allclose(update(weight_decay=0.1)["model/encoder/block_0/mlp/fc1/kernel"], -0.1)


def test_what_has_a_learning_rate_of_its_own_leaves_the_schedule_alone():
  """A constant, and a line that is given in samples; the first pattern that matches counts."""
  rates = [
    ("query", 0.5),
    ("fc1/kernel$", dict(start=0.25, end=0.75, over=4)),
    ("model/encoder/block_0", 3.0),
  ]
  optimizer, _ = make(name="sgd", momentum=0.0, warmup=10, rates=rates)
  grads = {path: jnp.ones_like(x) for path, x in PARAMS.items()}
  state = optimizer.init(PARAMS)
  for step in range(3):
    updates, state = optimizer.update(grads, state, PARAMS)
    for path, u in updates.items():
      own = [0.5] * ("query" in path) + [0.25 + step / 8] * path.endswith("fc1/kernel")
      own += [3.0] * ("block_0" in path) + [(step + 1) / 10]
      np.testing.assert_allclose(u, -own[0], rtol=1e-6, err_msg=path)
  with pytest.raises(ValueError, match=r"config.optimizer.rates: 'qeury' matches no path"):
    make(rates=[("qeury", 0.1)])
  with pytest.raises(TypeError, match=r"config.optimizer.rates 'query': unknown option 'stop'"):
    make(rates=[("query", dict(start=1.0, stop=0.0, over=4))])


def test_multipliers_first_match_wins_and_typing_errors_raise():
  plain, changed = (
    update(1.0, name="sgd"),
    update(1.0, name="sgd", multipliers=[("query", 0.0), ("model/encoder/block_0", 0.5)]),
  )
  for path, u in plain.items():
    factor = 0.0 if "query" in path else 0.5 if "block_0" in path else 1.0
    np.testing.assert_allclose(changed[path], factor * u)
  with pytest.raises(ValueError, match=r"config.optimizer.multipliers: 'blokc' matches no path"):
    make(multipliers=[("blokc", 0.0)])
  for some in ("block_0", r"encoder/(?!block_2/)", r"(encoder|image_tower/encoder)/block_\d"):
    with pytest.raises(ValueError, match=r"selects some layers of model/image_tower/"):
      make(multipliers=[(some, 0.0)])


@pytest.mark.slow
def test_clip_norm():
  updates = update(1.0, name="sgd", clip_norm=1.0)
  np.testing.assert_allclose(
    np.sqrt(sum(float(jnp.square(u).sum()) for u in updates.values())), 1.0, rtol=1e-5
  )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill(name):
  """Twenty steps on a quadratic bowl; state and parameters keep their dtypes."""
  optimizer, _ = make(name=name, lr=0.02)
  params, state = PARAMS, optimizer.init(PARAMS)

  def bowl(p):
    return sum(jnp.square(x - 0.3).sum() for x in p.values())

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(bowl)(params), state, params)
    return {k: x + updates[k] for k, x in params.items()}, state

  start = bowl(params)
  for _ in range(20):
    params, state = step(params, state)
  assert bowl(params) < 0.9 * start
  assert all(x.dtype == jnp.float32 for x in params.values())


def test_muon_orthogonalises_each_layer_of_a_stack():
  """A stacked kernel is as many matrices as layers; singular values of an update are equal."""
  draws = np.random.default_rng(0)
  grads = {k: jnp.asarray(draws.normal(size=x.shape), jnp.float32) for k, x in PARAMS.items()}
  optimizer, _ = make(name="muon")
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  for matrix in (
    *updates["model/image_tower/encoder/blocks/mlp/fc1/kernel"],
    updates["model/encoder/block_0/attn/query/kernel"].reshape(4, 4),
    updates["model/encoder/block_0/attn/out/kernel"].reshape(4, 4),
  ):
    values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    assert values.max() / values.min() < 3, values


def test_moments_in_bfloat16():
  optimizer, _ = make(moments="bfloat16")
  state = optimizer.init(PARAMS)
  kinds = {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim}
  assert "bfloat16" in kinds


def test_flops_of_scans_products_and_convolutions():
  """Against hand counts; a scan counts as often as it turns, a recomputation too."""
  x, w = jnp.ones((3, 4)), jnp.ones((4, 4))

  def layers(x, w):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0].sum()

  one = 2 * 3 * 4 * 4 * 5
  assert flops.count(layers, x, w) == one
  assert flops.count(jax.grad(layers, (0, 1)), x, w) == 3 * one
  assert flops.count(jax.jit(layers), x, w) == one
  image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

  def conv(image, kernel):
    return jax.lax.conv_general_dilated(
      image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert flops.count(conv, image, kernel) == 2 * (2 * 4 * 4 * 5) * 27
  gradient = jax.grad(lambda i, k: conv(i, k).sum(), (0, 1))
  assert flops.count(gradient, image, kernel) == 3 * 2 * (2 * 4 * 4 * 5) * 27
