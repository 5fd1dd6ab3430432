"""Schedules, weight decay, multipliers, optimizers; FLOPs.

The cases of the second set of expected values with "oracle" and "losses2" in their names hold five
updates of two tensors.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import loss_oracles

from bigalign import sharding, tree
from bigalign.optim import OPTIMIZERS, layer_factors, learning_rate, make_optimizer
from bigalign.run import flops
from bigalign.towers import TOWERS

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


@pytest.mark.parametrize("case", loss_oracles.cases2("stable_adamw", "lamb", "adamw_big_vision"))
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_five_updates_are_those_of_the_reference(case, precision):
  with jax.enable_x64(precision == "float64"):
    inputs = loss_oracles.floats(loss_oracles.oracles2().inputs(case), precision)
    options = {k: case["params"][k] for k in ("b1", "b2", "eps", "lr")}
    decay, schedule = case["params"]["weight_decay"], jnp.asarray(case["params"]["schedule"])
    if case["loss"] == "adamw_big_vision":
      options |= dict(name="adamw", independent_weight_decay=decay)
    else:
      options |= dict(name=case["loss"], weight_decay=decay)
    if case["loss"] == "lamb":
      options["always_adapt"] = case["params"]["always_adapt"]
    params = {"w/kernel": inputs["w0"], "b/bias": inputs["b0"]}
    optimizer, _ = make_optimizer(
      params=params,
      total_steps=5,
      to_steps=lambda value, where, **_: int(value),
      rate=lambda step: (options["lr"] * schedule)[step],
      clip_norm=None,
      moments=precision,
      **options,
    )
    state, seen = optimizer.init(params), []
    for step in range(5):
      grads = {
        path: inputs[f"g{path[0]}"][step]
        if f"g{path[0]}" in inputs
        else inputs[f"h{path[0]}"] * (x - inputs[f"c{path[0]}"])
        for path, x in params.items()
      }
      updates, state = optimizer.update(grads, state, params)
      params = {path: x + updates[path] for path, x in params.items()}
      seen.append(params)
    got = {path[0]: np.stack([step[path] for step in seen]) for path in params}
    rtol = 1e-9 if precision == "float64" else 1e-4
    loss_oracles.oracles2().check(case, got, rtol=rtol, require=("w", "b"))


def draws(seed, scale=1.0):
  """Random arrays like PARAMS; scale: of a whole tree, or {path: array or number}."""
  rng = np.random.default_rng(seed)
  scale = scale if isinstance(scale, dict) else dict.fromkeys(PARAMS, scale)
  return {
    path: jnp.asarray(rng.normal(size=x.shape) * scale[path], jnp.float32)
    for path, x in PARAMS.items()
  }


STACK = "model/image_tower/encoder/blocks/mlp/fc1/kernel"


@pytest.mark.parametrize("name", ["stable_adamw", "lamb"])
def test_a_layer_of_a_stack_and_a_shard_of_a_tensor_are_updated_as_if_alone(name):
  """Factors are those of one layer of scanned blocks, and of whole tensors on any mesh."""
  scales = {**dict.fromkeys(PARAMS, 1.0), STACK: np.asarray([0.1, 1.0, 9.0])[:, None, None]}
  params, first, second = draws(0, scales), draws(1), draws(2, {**scales, STACK: 50.0})

  def after_two(params, first, second):
    optimizer, _ = make_optimizer(
      params=params,
      total_steps=2,
      to_steps=lambda value, where, **_: int(value),
      **dict(lr=0.1, schedule="constant", clip_norm=None, name=name, weight_decay=0.3),
    )
    state = optimizer.init(params)
    for grads in (first, second):
      updates, state = optimizer.update(grads, state, params)
    return updates

  whole = after_two(params, first, second)
  for layer in range(3):
    alone = [{"layer/kernel": arrays[STACK][layer]} for arrays in (params, first, second)]
    np.testing.assert_allclose(
      whole[STACK][layer], after_two(*alone)["layer/kernel"], rtol=1e-5, err_msg=f"layer {layer}"
    )
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  rules = sharding.shardings(params, mesh)
  spread = [{path: jax.device_put(x, rules[path]) for path, x in params.items()}]
  spread += [
    {path: jax.device_put(x, rules[path]) for path, x in grads.items()} for grads in (first, second)
  ]
  assert len(spread[0][STACK].sharding.device_set) == 4
  for path, x in jax.jit(after_two)(*spread).items():
    np.testing.assert_allclose(x, whole[path], rtol=1e-5, err_msg=path)


def test_one_large_gradient_moves_stable_adamw_less():
  """With gradients that do not grow it is AdamW, to the bit of its formula."""

  def last(name, scale):
    optimizer, _ = make(name=name, b2=0.99, eps=1e-6, weight_decay=0.1)
    state = optimizer.init(PARAMS)
    for size in (*[1.0] * 5, scale):
      grads = {path: jnp.full_like(x, size) for path, x in PARAMS.items()}
      updates, state = optimizer.update(grads, state, PARAMS)
    return np.asarray(updates["model/encoder/block_0/mlp/fc1/bias"])

  assert np.abs(last("stable_adamw", 1000.0)).max() < 0.5 * np.abs(last("adamw", 1000.0)).min()
  np.testing.assert_array_equal(last("stable_adamw", 0.5), last("adamw", 0.5))


def test_adafactor_clips_large_updates_only_if_asked():
  """Of a gradient that grows a hundredfold, the update is 100 / sqrt(2^-0.8 1e4 + 1 - 2^-0.8)."""

  def second(**options):
    optimizer, _ = make(name="adafactor", b1=0.0, moments="float32", **options)
    state = optimizer.init(PARAMS)
    for size in (1.0, 100.0):
      grads = {path: jnp.full_like(x, size) for path, x in PARAMS.items()}
      updates, state = optimizer.update(grads, state, PARAMS)
    return updates["model/encoder/block_0/mlp/fc1/kernel"]

  share = 2**-0.8
  np.testing.assert_allclose(second(), -100 / np.sqrt(share * 1e4 + 1 - share), rtol=1e-3)
  np.testing.assert_allclose(second(clip=1.0), -1, rtol=1e-3)


@pytest.mark.parametrize("rest", ["stable_adamw", "lamb"])
def test_muon_leaves_the_rest_to_another_optimizer(rest):
  params, grads = draws(0), draws(1)

  def first(**options):
    optimizer, _ = make(weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-6, **options)
    return optimizer.update(grads, optimizer.init(params), params)[0]

  both, muon, alone = first(name="muon", rest=rest), first(name="muon"), first(name=rest)
  for path, x in both.items():
    is_matrix = path.endswith("kernel")
    np.testing.assert_allclose(x, (muon if is_matrix else alone)[path], rtol=1e-6, err_msg=path)


def test_independent_weight_decay_follows_the_schedule_and_not_the_learning_rate():
  """Nor factors of the learning rate; of a rate of its own, it follows the course."""
  kernel = "model/encoder/block_0/mlp/fc1/kernel"
  for options in (dict(lr=1e-30), dict(multipliers=[(".", 0.0)], layer_decay=0.5)):
    moved = update(1.0, independent_weight_decay=0.1, **options)
    np.testing.assert_allclose(moved[kernel], -0.1, rtol=1e-6)
  np.testing.assert_allclose(
    update(independent_weight_decay=0.1, warmup=10, schedule="cosine")[kernel], -0.01, rtol=1e-6
  )
  own = [("fc1", dict(start=0.25, end=0.75, over=4))]
  np.testing.assert_allclose(
    update(independent_weight_decay=0.1, rates=own)[kernel], -0.1 / 3, rtol=1e-6
  )
  with pytest.raises(ValueError, match="set one of the two"):
    make(independent_weight_decay=0.1, weight_decay=0.1)
  with pytest.raises(ValueError, match=r"is 0 for \['model/encoder/block_0/mlp/fc1/kernel'"):
    make(independent_weight_decay=0.1, lr=0.0)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_layer_decay_is_a_share(value):
  with pytest.raises(ValueError, match=f"layer_decay={value} must be above 0 and at most 1"):
    make(layer_decay=value)


def test_layer_decay_slows_what_is_deeper_scanned_or_not():
  """BEiT's: embeddings lowest, the last block one step below the head, projectors 1."""
  image = dict(patch=8, width=8, depth=2, heads=2, pool="map", pre_norm=True, registers=1)

  def factors(**options):
    tower = TOWERS["vit"](**image, **options).build()
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"]
    every = {**tree.flatten(shapes, "model/image_tower/"), "model/image_projector/kernel": 0}
    return layer_factors(every, 0.5)

  plain, scanned = factors(scan=False), factors()
  layers = dict(embedding=3, positions=3, extra_tokens=3, ln_pre=3, block_0=2, block_1=1)
  for path, x in plain.items():
    part = path.removeprefix("model/image_tower/").removeprefix("encoder/").split("/")[0]
    assert x == 0.5 ** layers.get(part, 0), path
  for path, x in scanned.items():
    each = x.ravel() if tree.is_stacked(path) else [x]
    assert [plain[tree.layer_path(path, i)] for i in range(len(each))] == [*each], path


def test_layer_decay_of_towers_with_other_paths():
  """BERT and both convolutional towers, whose blocks are counted in their order."""
  steps = {
    "text_tower": dict(
      embedding=2,
      types=2,
      relative=2,
      **{"ln_embedding/scale": 2, "pooler/kernel": 0},
      **{"encoder/block_0/ln1/scale": 1},
    ),
    "image_tower": {
      "conv1/kernel": 4,
      "bn1/scale": 4,
      "stage_1_block_0/conv1/kernel": 3,
      "stage_1_block_1/conv1/kernel": 2,
      "stage_2_block_0/bn1/scale": 1,
    },
  }
  for tower in (
    steps,
    {
      "image_tower": {
        "stem/kernel": 12,
        "head/kernel": 0,
        **{f"bottleneck_{i}/project/kernel": 12 - i for i in range(1, 12)},
      }
    },
  ):
    expected = {f"model/{t}/{p}": 0.5**n for t, paths in tower.items() for p, n in paths.items()}
    assert layer_factors(expected, 0.5) == expected


def test_layer_decay_is_a_factor_of_the_learning_rate_beside_multipliers():
  plain = update(1.0, name="sgd", layer_decay=0.5, multipliers=[("fc1/kernel", 0.1)])
  np.testing.assert_allclose(
    plain[STACK][:, 0, 0], -0.1 * np.asarray([0.125, 0.25, 0.5]), rtol=1e-6
  )


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
