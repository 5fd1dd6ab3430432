"""Learning rate schedules, optimizers, and the optax chain over {path: array}."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from bigalign import checks, tree
from bigalign.options import resolve

Schedule = Callable[[Any], jax.Array]


class Decay(NamedTuple):
  """The weight decay of an optimizer that applies it inside of its update, such as LAMB.

  Args:
    weight: times the learning rate, as `weight_decay` of `make_optimizer`.
    paths: of the parameters with weight decay.
  """

  weight: float
  paths: frozenset[str]


# Optimizers whose factors per tensor also scale the weight decay are made from it.
WithDecay = Callable[[Decay], optax.GradientTransformation]


def learning_rate(
  *, name: str, lr: float, total_steps: int, warmup: int, cooldown: int, end: float
) -> Schedule:
  """The learning rate of the update after `step` updates.

  During warmup it is lr * (step + 1) / warmup, as in open_clip, where the first update already
  changes the parameters; optax's warmup starts at 0. Then follows the named shape, and at the end a
  linear cooldown to `end`, which "cosine" and "linear" have reached by then.

  Args:
    name: "cosine" or "linear" decay to `end`; "constant"; "rsqrt": lr * sqrt(warmup / step),
      https://arxiv.org/abs/2106.04560, which is used with a cooldown.
    lr: the highest learning rate.
    total_steps: updates in all.
    warmup: steps.
    cooldown: steps.
    end: the last learning rate.

  Returns:
    step -> learning rate, [] float32.

  Raises:
    ValueError: for an unknown name, if warmup and cooldown exceed the steps, and for a decay to 0
      before a cooldown, in which nothing would be learned.
  """
  checks.known("config.optimizer.schedule", name, ("cosine", "linear", "constant", "rsqrt"))
  if warmup + cooldown > total_steps:
    raise ValueError(
      f"config.optimizer: warmup ({warmup}) and cooldown ({cooldown}) exceed total_steps"
      f" ({total_steps})"
    )
  if cooldown and name in ("cosine", "linear") and not end:
    raise ValueError(
      f"config.optimizer: schedule={name!r} falls to end={end} before the cooldown, so its last"
      f" {cooldown} updates have a learning rate of 0. Leave cooldown out, set end, or use"
      " schedule='constant' or 'rsqrt' with it"
    )
  stop = total_steps - cooldown

  def shape(step: jax.Array) -> jax.Array:
    done = jnp.clip((step - warmup) / max(1, stop - warmup), 0.0, 1.0)
    if name == "cosine":
      return end + (lr - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    if name == "linear":
      return end + (lr - end) * (1 - done)
    if name == "rsqrt":
      timescale = max(1, warmup)
      return lr * jnp.sqrt(timescale / jnp.maximum(step, timescale))
    return jnp.full_like(done, lr)

  def rate(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    warm = lr * (step + 1) / max(1, warmup)
    warming = step < warmup
    # A sum, because XLA for CPUs copies cheap operations on scalars into the update of each
    # parameter, but not sums. With train_step's check for finite values, which had the same fault,
    # these copies were a fifth of the instructions of configs/tiny.py's step.
    both = jnp.stack([warm, shape(jnp.minimum(step, stop))])
    value = jnp.sum(both, where=jnp.stack([warming, ~warming]))
    if not cooldown:
      return value
    left = jnp.clip((total_steps - step) / cooldown, 0.0, 1.0)
    return jnp.where(step > stop, end + (value - end) * left, value)

  return rate


def adamw(
  *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, moments: str = "float32"
) -> optax.GradientTransformation:
  """AdamW, https://arxiv.org/abs/1711.05101; the weight decay follows in the chain.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    moments: dtype of the first moment.
  """
  return optax.scale_by_adam(b1, b2, eps, mu_dtype=moments)


def _over_each(path: str, x: Any) -> tuple[int, ...]:
  """The axes of one tensor: all of an array, without the layer axis of scanned blocks."""
  return tuple(range(int(tree.is_stacked(path)), x.ndim))


def _each(function: Callable[..., Any], first: Mapping[str, Any], *rest: Any) -> dict[str, Any]:
  """{path: function(path, x, ...)}; parameters that another optimizer updates stay as they are."""
  return {
    path: function(path, x, *(other[path] for other in rest)) if hasattr(x, "ndim") else x
    for path, x in first.items()
  }


def _decayed(updates: Mapping[str, Any], params: Any, decay: Decay) -> dict[str, Any]:
  """The updates with weight decay."""
  return _each(
    lambda path, u, p: u + decay.weight * p if path in decay.paths else u, updates, params
  )


def stable_adamw(
  *, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-6, moments: str = "float32"
) -> WithDecay:
  """StableAdamW, https://arxiv.org/abs/2304.13013: AdamW with Adafactor's clipping of updates.

  The learning rate of a tensor, for its update and its weight decay, is divided by
  max(1, RMS), RMS^2 = mean(g^2 / max(v, eps^2)), v the second moment after the update, without
  bias. A layer of scanned blocks is a tensor. The paper clips no gradients: clip_norm=None.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment; the paper's CLIP has 0.95 to 0.99.
    eps: added to the root of the second moment.
    moments: dtype of the first moment.
  """

  def with_decay(decay: Decay) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=moments)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
      updates, state = adam.update(grads, state)
      second = optax.tree.bias_correction(state.nu, b2, state.count)

      def scaled(path: str, u: Any, g: Any, v: Any) -> Any:
        share = g * g / jnp.maximum(v, eps * eps)
        mean = jnp.mean(share, _over_each(path, u), keepdims=True)
        return u / jnp.maximum(1.0, jnp.sqrt(mean))

      return _each(scaled, _decayed(updates, params, decay), grads, second), state

    return optax.GradientTransformation(adam.init, update)

  return with_decay


def lamb(
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  always_adapt: bool = False,
  moments: str = "float32",
) -> WithDecay:
  """LAMB, https://arxiv.org/abs/1904.00962: AdamW with a factor |p| / |u| for each tensor.

  u is Adam's update with weight decay; the factor is 1 where one of the norms is 0. A layer of
  scanned blocks is a tensor, and the norms are those of whole tensors, however they are sharded.
  timm's form, with clip_norm=1.0; optax.lamb is always_adapt=True with clip_norm=None.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment; Perception Encoder has 0.95.
    eps: added to the root of the second moment.
    always_adapt: whether tensors without weight decay (biases, norms, token tables) have the factor
      too.
    moments: dtype of the first moment.
  """

  def with_decay(decay: Decay) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=moments)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
      updates, state = adam.update(grads, state)

      def scaled(path: str, u: Any, p: Any) -> Any:
        if not (always_adapt or (decay.weight and path in decay.paths)):
          return u
        ours, theirs = (
          jnp.sqrt(jnp.sum(x * x, _over_each(path, u), keepdims=True)) for x in (p, u)
        )
        both = (ours > 0) & (theirs > 0)
        return u * jnp.where(both, ours / jnp.where(both, theirs, 1.0), 1.0)

      return _each(scaled, _decayed(updates, params, decay), params), state

    return optax.GradientTransformation(adam.init, update)

  return with_decay


def lion(
  *, b1: float = 0.9, b2: float = 0.99, moments: str = "float32"
) -> optax.GradientTransformation:
  """Lion, https://arxiv.org/abs/2302.06675; use a learning rate 3-10 times below AdamW's.

  Args:
    b1: weight of the momentum in the update.
    b2: decay of the momentum.
    moments: dtype of the momentum.
  """
  return optax.scale_by_lion(b1, b2, mu_dtype=moments)


def adafactor(
  *, b1: float = 0.9, b2: float = 0.999, clip: float | None = None, moments: str = "bfloat16"
) -> optax.GradientTransformation:
  """Factored second moments, https://arxiv.org/abs/1804.04235, as in
  https://arxiv.org/abs/2106.04560: with a first moment, and without clipping of updates.

  Args:
    b1: decay of the first moment.
    b2: largest decay of the second moments, which grows as 1 - step^-0.8; SigLIP uses 0.95.
    clip: largest root mean square of a parameter's update, before the first moment, 1 in the paper
      of 2018; None, as in big_vision, does not clip.
    moments: dtype of the first moment.
  """

  def decay(step: Any, power: Any) -> jax.Array:
    return jnp.minimum(b2, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -power)

  return optax.chain(
    # A head's 64 columns are worth factoring; optax's own bound is 128.
    optax.scale_by_factored_rms(decay_rate=0.8, decay_rate_fn=decay, min_dim_size_to_factor=32),
    # Either has a place in the chain, which is part of the paths in a checkpoint.
    optax.identity() if clip is None else optax.clip_by_block_rms(clip),
    optax.ema(b1, debias=False, accumulator_dtype=moments),
  )


def sgd(
  *, momentum: float = 0.9, nesterov: bool = False, moments: str = "float32"
) -> optax.GradientTransformation:
  """Gradient descent with momentum.

  Args:
    momentum: decay of the momentum.
    nesterov: whether the update looks ahead.
    moments: dtype of the momentum.
  """
  return optax.trace(momentum, nesterov, moments)


def _matrix(path: str, ndim: int) -> MuonDimensionNumbers:
  """Which axes of a block's kernel are inputs and which outputs; a layer axis is neither."""
  first = int(tree.is_stacked(path))
  if path.endswith("attn/out/kernel"):  # [heads, head, D]
    return MuonDimensionNumbers((first, first + 1), (first + 2,))
  return MuonDimensionNumbers((first,), tuple(range(first + 1, ndim)))


def muon(
  *,
  beta: float = 0.95,
  rms: float = 0.2,
  steps: int = 5,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  matrices: str = r"/block(s|_\d+)/.*kernel$",
  rest: str = "adam",
) -> optax.GradientTransformation | WithDecay:
  """Orthogonalised momentum for the blocks' matrices, Adam or a variant of it for the rest.

  https://kellerjordan.github.io/posts/muon, scaled as in https://arxiv.org/abs/2502.16982.

  Args:
    beta: decay of the momentum of matrices.
    rms: root mean square of a matrix's update, about that of AdamW, so that one learning rate works
      for both.
    steps: Newton-Schulz iterations.
    b1: decay of Adam's first moment, for the other parameters.
    b2: decay of Adam's second moment.
    eps: added to the root of Adam's second moment.
    matrices: regular expression of the paths that Muon updates.
    rest: optimizer of the other parameters: adam, stable_adamw or lamb.
  """
  checks.known("config.optimizer.rest", rest, ("adam", *WITH_DECAY))

  def is_matrix(params: Mapping[str, Any]) -> dict[str, str]:
    return {path: "muon" if re.search(matrices, path) else "adam" for path in params}

  def numbers(params: Mapping[str, Any]) -> dict[str, Any]:
    return {path: _matrix(path, x.ndim) if hasattr(x, "ndim") else x for path, x in params.items()}

  def scale(path: str, u: Any) -> Any:
    if not hasattr(u, "ndim"):
      return u
    inputs, outputs = (math.prod(u.shape[i] for i in axes) for axes in _matrix(path, u.ndim))
    return u * (rms * math.sqrt(max(inputs, outputs)))

  orthogonal = optax.chain(
    scale_by_muon(ns_steps=steps, beta=beta, weight_dimension_numbers=numbers),
    optax.stateless(lambda updates, _: {path: scale(path, u) for path, u in updates.items()}),
  )
  if rest == "adam":
    return optax.partition(
      {"muon": orthogonal, "adam": optax.scale_by_adam(b1, b2, eps)}, is_matrix
    )

  def with_decay(decay: Decay) -> optax.GradientTransformation:
    decayed = optax.stateless(lambda updates, params: _decayed(updates, params, decay))
    others = WITH_DECAY[rest](b1=b1, b2=b2, eps=eps)(decay)
    return optax.partition({"muon": optax.chain(orthogonal, decayed), "adam": others}, is_matrix)

  return with_decay


def by_age(
  core: optax.GradientTransformation, since: Mapping[str, int]
) -> optax.GradientTransformation:
  """An optimizer with one state for the parameters that are trained since the same stage.

  Adam corrects the bias of young moments by a count of updates. With one count for all, the first
  updates of a parameter that became trainable late would be up to 1 / sqrt(1 - b2) times too large.

  Args:
    core: the optimizer.
    since: {path: number of the stage since which the parameter is trained}.
  """
  groups = {
    str(age): [path for path, x in since.items() if x == age] for age in sorted({*since.values()})
  }

  def part(flat: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    return {path: flat[path] for path in paths}

  def init(params: Any) -> Any:
    return {age: core.init(part(params, paths)) for age, paths in groups.items()}

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    scaled: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for age, paths in groups.items():
      own = None if params is None else part(params, paths)
      one, after[age] = core.update(part(updates, paths), state[age], own)
      scaled |= dict(one)
    return {path: scaled[path] for path in updates}, after

  return optax.GradientTransformation(init, update)


WITH_DECAY: dict[str, Callable[..., WithDecay]] = dict(stable_adamw=stable_adamw, lamb=lamb)
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation | WithDecay]] = dict(
  adamw=adamw, lion=lion, adafactor=adafactor, sgd=sgd, muon=muon, **WITH_DECAY
)

# What is below the first block of a tower: tables, positions, stems, and their norms.
_EMBEDDINGS = re.compile(
  r"(embedding|positions|extra_tokens|class_token|class_position|types|relative|ln_pre|ln_embedding|stem"
  r"|conv1|bn1)(/|$)"
)
_BLOCK = re.compile(r"(?:encoder/)?(blocks|(?:stage_\d+_)?block_\d+|bottleneck_\d+)/")


def layer_factors(params: Mapping[str, Any], decay: float) -> dict[str, Any]:
  """Factors of the learning rate by the depth of a parameter in its tower, as BEiT counts them.

  https://arxiv.org/abs/2106.08254. decay^(n + 1) for what is below the n blocks of a tower,
  decay^(n - i) for block i, 1 for what is above them (the last norm, a pooling head) and for what
  is not in a tower: projectors, heads, the loss.

  Args:
    params: {path: array or shape} of all parameters that the run trains. Blocks that it does not
      train are not counted.
    decay: the factor from one block to the one below it.

  Returns:
    {path: number, or [n, 1, ...] for the layers of scanned blocks}.
  """
  factors: dict[str, Any] = dict.fromkeys(params, 1.0)
  for tower in ("model/image_tower/", "model/text_tower/"):
    inside = tree.subtree(params, tower)
    block = {path: found[1] for path in inside if (found := _BLOCK.match(path))}
    stacked = {inside[path].shape[0] for path, name in block.items() if name == "blocks"}
    names = sorted({*block.values()}, key=lambda name: [int(x) for x in re.findall(r"\d+", name)])
    depth = max(stacked, default=len(names))
    for path, x in inside.items():
      if block.get(path) == "blocks":
        layers = decay ** (depth - np.arange(depth))
        factors[tower + path] = layers.reshape(depth, *[1] * (x.ndim - 1))
      elif path in block:
        factors[tower + path] = decay ** (depth - names.index(block[path]))
      elif _EMBEDDINGS.match(path):
        factors[tower + path] = decay ** (depth + 1)
  return factors


def make_optimizer(
  *,
  params: Mapping[str, Any],
  total_steps: int,
  to_steps: Callable[..., int],
  lr: float,
  name: str = "adamw",
  schedule: str = "cosine",
  warmup: int | str = 0,
  cooldown: int | str = 0,
  end: float = 0.0,
  weight_decay: float = 0.0,
  independent_weight_decay: float = 0.0,
  decay: str = r"/kernel$",
  clip_norm: float | None = 1.0,
  multipliers: Sequence[tuple[str, float]] = (),
  layer_decay: float = 1.0,
  rates: Sequence[tuple[str, float | Mapping[str, Any]]] = (),
  rate: Schedule | None = None,
  since: Mapping[str, int] | None = None,
  every: Mapping[str, Any] | None = None,
  **options: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
  """The chain clip -> name -> weight decay -> multipliers -> -learning rate, and the schedule.

  In stable_adamw and lamb, the weight decay is part of the update that they scale.

  Args:
    params: the trainable parameters (or their shapes) by path.
    total_steps: updates in all.
    to_steps: (duration, where) -> steps, counted from the start, or with back=True from the end.
    lr: the highest learning rate.
    name: adamw, stable_adamw, lamb, lion, adafactor, sgd or muon.
    schedule: cosine, linear, constant, rsqrt.
    warmup: duration in which the learning rate rises to `lr`.
    cooldown: duration, at the end, in which it falls linearly to `end`.
    end: the last learning rate.
    weight_decay: times the learning rate, as in AdamW of PyTorch and optax.
    independent_weight_decay: times the schedule but not times `lr`, as big_vision's `wd`: p <- p -
      s(t) (lr u + wd p). With lr 1e-3, 1e-4 is the same as a weight_decay of 0.1. Factors of the
      learning rate (multipliers, layer_decay) do not change it.
    decay: regular expression of the parameters with weight decay; by default kernels only, not
      biases, norms, positions, token tables or temperatures.
    clip_norm: the largest global norm of the gradient; None does not clip.
    multipliers: (regular expression, factor) pairs, factors of the learning rate; the first match
      counts, 1 for the rest.
    layer_decay: factor of the learning rate from one block of a tower to the one below it, see
      `layer_factors`; times `multipliers`. 1: every layer has the same.
    rates: (regular expression, learning rate) pairs of parameters with a learning rate of their
      own, without warmup or schedule: a number, or dict(start=2e-4, end=5e-5, over="1e9 samples"),
      a line.
    rate: the learning rate; None: as `lr`, `schedule`, `warmup`, `cooldown` and `end` say.
    since: as of `by_age`; None: all parameters share one state.
    every: the parameters that some stage of the run trains, which patterns may match; None: those
      of `params`.
    options: those of the optimizer `name`.

  Raises:
    ValueError, TypeError: for unknown names and options, for both kinds of weight decay at once,
      and for patterns that match nothing.
  """
  where = "config.optimizer"
  core = checks.choose(OPTIMIZERS, name, f"{where}.name")
  if rate is None:
    rate = make_rate(
      total_steps=total_steps,
      to_steps=to_steps,
      lr=lr,
      schedule=schedule,
      warmup=warmup,
      cooldown=cooldown,
      end=end,
    )
  every = params if every is None else every
  if weight_decay and independent_weight_decay:
    raise ValueError(
      f"{where}: weight_decay={weight_decay} is times the learning rate,"
      f" independent_weight_decay={independent_weight_decay} is not; set one of the two"
    )
  chain = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  made = resolve(core, options, where).make()
  decayed: Mapping[str, Any] = {}
  if weight_decay or independent_weight_decay:
    one = "weight_decay" if weight_decay else "independent_weight_decay"
    decayed, _ = tree.partition(
      every, decay, f"{where}.decay (for {one}), among what config.frozen leaves to learn"
    )
  if isinstance(made, optax.GradientTransformation):
    chain.append(by_age(made, since) if since else made)
    if weight_decay:
      chain.append(optax.add_decayed_weights(weight_decay, {p: p in decayed for p in params}))
  else:
    made = made(Decay(weight_decay, frozenset(decayed)))
    chain.append(by_age(made, since) if since else made)
  if multipliers or layer_decay != 1.0:
    checks.above_zero(where, 1.0, layer_decay=layer_decay)
    factors = layer_factors(every, layer_decay)
    outer = dict.fromkeys(every, 1.0)
    for pattern, factor in reversed(multipliers):
      hit, _ = tree.partition(every, pattern, f"{where}.multipliers")
      outer |= dict.fromkeys(hit, factor)
    factors = {path: x * outer[path] for path, x in factors.items()}
    chain.append(
      optax.stateless(
        lambda updates, _: {p: u * jnp.asarray(factors[p], u.dtype) for p, u in updates.items()}
      )
    )
  own: dict[str, float | optax.Schedule] = {}
  highest: dict[str, float] = {}
  for pattern, given in reversed(rates):
    hit, _ = tree.partition(every, pattern, f"{where}.rates")
    own_rate, top = _own_rate(given, f"{where}.rates {pattern!r}", to_steps)
    own |= dict.fromkeys(hit, own_rate)
    highest |= dict.fromkeys(hit, top)
  if independent_weight_decay:
    chain.append(_independent_decay(independent_weight_decay, lr, highest, [*decayed]))
  descents = {
    path: optax.scale_by_learning_rate(x) for path, x in {"schedule": rate, **own}.items()
  }
  labels = {path: path if path in own else "schedule" for path in params}
  chain.append(optax.partition(descents, labels) if own else descents["schedule"])
  return optax.chain(*chain), rate


def make_rate(
  *,
  total_steps: int,
  to_steps: Callable[..., int],
  lr: float,
  schedule: str,
  warmup: int | str,
  cooldown: int | str,
  end: float,
) -> Schedule:
  """`learning_rate` of durations; the arguments are those of `make_optimizer`."""
  return learning_rate(
    name=schedule,
    lr=lr,
    total_steps=total_steps,
    end=end,
    warmup=to_steps(warmup, "config.optimizer.warmup"),
    cooldown=to_steps(cooldown, "config.optimizer.cooldown", back=True),
  )


def joined_rate(rest: Schedule, own: Sequence[tuple[int, int, Schedule]]) -> Schedule:
  """The learning rate of a run whose stages have schedules of their own.

  Args:
    rest: the schedule of all other updates, which counts these alone.
    own: (begin, end, schedule) of stages, in their order; a schedule counts from its begin.
  """

  def rate(step: Any) -> jax.Array:
    step = jnp.asarray(step)
    left = step - sum(jnp.clip(step - begin, 0, end - begin) for begin, end, _ in own)
    value = rest(left)
    for begin, end, schedule in own:
      inside = (step >= begin) & (step < end)
      value = jnp.where(inside, schedule(jnp.clip(step - begin, 0, end - begin)), value)
    return value

  return rate if own else rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """A learning rate that changes linearly, for the parameters of one entry of `rates`.

  Args:
    start: the first learning rate.
    end: the last one.
    over: the stretch of training from one to the other, a duration.
  """

  start: float
  end: float
  over: int | str


def _own_rate(
  given: float | Mapping[str, Any], where: str, to_steps: Callable[..., int]
) -> tuple[float | optax.Schedule, float]:
  """A constant, or a line from one learning rate to another; and the highest value."""
  if not isinstance(given, Mapping):
    return given, given
  line: Line = resolve(Line, given, where)
  steps = to_steps(line.over, f"{where}.over")
  return optax.linear_schedule(line.start, line.end, steps), max(line.start, line.end)


def _independent_decay(
  weight: float, lr: float, own: Mapping[str, float], paths: Sequence[str]
) -> optax.GradientTransformation:
  """Adds weight * p / lr, which the learning rate that follows makes weight * p * schedule.

  Args:
    weight: `independent_weight_decay` of `make_optimizer`.
    lr: the highest learning rate of the schedule.
    own: {path: highest learning rate} of the parameters that have one of their own.
    paths: of the parameters with weight decay.

  Raises:
    ValueError: for a learning rate of 0.
  """
  lrs = {path: own.get(path, lr) for path in paths}
  if zero := [path for path, x in lrs.items() if not x]:
    raise ValueError(
      "config.optimizer.independent_weight_decay follows the schedule of the learning rate, which"
      f" is 0 for {tree.shown(zero)}. Freeze what is not trained (config.frozen), or set the"
      " learning rate"
    )
  return optax.stateless(
    lambda updates, params: {
      path: u + (weight / lrs[path]) * params[path] if path in lrs else u
      for path, u in updates.items()
    }
  )
