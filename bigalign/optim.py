"""Schedules and the optax chain over {path: array}."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from bigalign import checks, tree
from bigalign.options import resolve

Schedule = Callable[[Any], jax.Array]


def learning_rate(
  *, name: str, lr: float, total_steps: int, warmup: int, cooldown: int, end: float
) -> Schedule:
  """The learning rate of the update that follows `step` updates.

  lr * (step + 1) / warmup at first (open_clip's warmup: the first update already moves), then the
  named shape, then, for any shape, a linear cooldown to `end` over the last steps.

  Args:
    name: "cosine" or "linear" to `end`; "constant"; "rsqrt": lr * sqrt(warmup / step),
      https://arxiv.org/abs/2106.04560, which wants a cooldown.
    warmup, cooldown: steps.
    end: the last learning rate.
  """
  checks.known("config.optimizer.schedule", name, ("cosine", "linear", "constant", "rsqrt"))
  if warmup + cooldown > total_steps:
    raise ValueError(
      f"config.optimizer: warmup ({warmup}) and cooldown ({cooldown}) exceed total_steps"
      f" ({total_steps})"
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
    value = jnp.where(step < warmup, warm, shape(jnp.minimum(step, stop)))
    if not cooldown:
      return value
    left = jnp.clip((total_steps - step) / cooldown, 0.0, 1.0)
    return jnp.where(step > stop, end + (value - end) * left, value)

  return rate


def adamw(
  *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, moments: str = "float32"
) -> optax.GradientTransformation:
  """https://arxiv.org/abs/1711.05101; `moments` is the dtype of the first moment."""
  return optax.scale_by_adam(b1, b2, eps, mu_dtype=moments)


def lion(
  *, b1: float = 0.9, b2: float = 0.99, moments: str = "float32"
) -> optax.GradientTransformation:
  """https://arxiv.org/abs/2302.06675; wants a learning rate 3-10 times below AdamW's."""
  return optax.scale_by_lion(b1, b2, mu_dtype=moments)


def adafactor(
  *, b1: float = 0.9, b2: float = 0.999, clip: float = 1.0, moments: str = "bfloat16"
) -> optax.GradientTransformation:
  """Factored second moments, https://arxiv.org/abs/1804.04235, with a first moment of dtype
  `moments` after the update is clipped, as in https://arxiv.org/abs/2106.04560; their decay grows
  as 1 - step^-0.8 up to `b2`, for which SigLIP takes 0.95."""

  def decay(step: Any, power: Any) -> jax.Array:
    return jnp.minimum(b2, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -power)

  return optax.chain(
    # A head's 64 columns are worth factoring; optax's own bound is 128.
    optax.scale_by_factored_rms(decay_rate=0.8, decay_rate_fn=decay, min_dim_size_to_factor=32),
    optax.clip_by_block_rms(clip),
    optax.ema(b1, debias=False, accumulator_dtype=moments),
  )


def sgd(
  *, momentum: float = 0.9, nesterov: bool = False, moments: str = "float32"
) -> optax.GradientTransformation:
  """Gradient descent with momentum."""
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
) -> optax.GradientTransformation:
  """Orthogonalised momentum for the blocks' matrices, Adam for the rest.

  https://kellerjordan.github.io/posts/muon, scaled as in https://arxiv.org/abs/2502.16982 so that
  an update's root mean square is `rms`, about AdamW's, and one learning rate serves both.
  """

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
  return optax.partition({"muon": orthogonal, "adam": optax.scale_by_adam(b1, b2, eps)}, is_matrix)


OPTIMIZERS = dict(adamw=adamw, lion=lion, adafactor=adafactor, sgd=sgd, muon=muon)


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
  decay: str = r"/kernel$",
  clip_norm: float | None = 1.0,
  multipliers: Sequence[tuple[str, float]] = (),
  rates: Sequence[tuple[str, float | Mapping[str, Any]]] = (),
  **options: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
  """The chain clip -> name -> weight decay -> multipliers -> -learning rate, and the schedule.

  Args:
    params: the trainable parameters (or their shapes) by path.
    total_steps: updates in all.
    to_steps: (duration, where) -> steps from the start; of the cooldown, with back=True, from the
      end.
    lr: the highest learning rate.
    name: adamw, lion, adafactor, sgd, muon; `options` are that function's.
    schedule: cosine, linear, constant, rsqrt.
    warmup, cooldown: durations.
    end: the last learning rate.
    weight_decay: times the learning rate, as in AdamW.
    decay: the parameters that decay; by default matrices alone: no bias, norm, position, token
      table or temperature.
    clip_norm: the largest global norm of the gradient; None does not clip.
    multipliers: (regular expression, factor) pairs, the first that matches; 1 for the rest.
    rates: (regular expression, learning rate) pairs of what has a learning rate of its own, without
      warmup or schedule: a number, or dict(start=2e-4, end=5e-5, over="1e9 samples"), a line.

  Raises:
    ValueError, TypeError: for unknown names and options, and for patterns that match nothing.
  """
  where = "config.optimizer"
  core = checks.choose(OPTIMIZERS, name, f"{where}.name")
  rate = learning_rate(
    name=schedule,
    lr=lr,
    total_steps=total_steps,
    end=end,
    warmup=to_steps(warmup, f"{where}.warmup"),
    cooldown=to_steps(cooldown, f"{where}.cooldown", back=True),
  )
  chain = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  chain.append(resolve(core, options, where).make())
  if weight_decay:
    decayed, _ = tree.partition(
      params, decay, f"{where}.decay (for weight_decay), among what config.frozen leaves to learn"
    )
    chain.append(optax.add_decayed_weights(weight_decay, {p: p in decayed for p in params}))
  if multipliers:
    factors = dict.fromkeys(params, 1.0)
    for pattern, factor in reversed(multipliers):
      hit, _ = tree.partition(params, pattern, f"{where}.multipliers")
      factors |= dict.fromkeys(hit, factor)
    chain.append(
      optax.stateless(lambda updates, _: {p: u * factors[p] for p, u in updates.items()})
    )
  own: dict[str, float | optax.Schedule] = {}
  for pattern, given in reversed(rates):
    hit, _ = tree.partition(params, pattern, f"{where}.rates")
    own |= dict.fromkeys(hit, _own_rate(given, f"{where}.rates {pattern!r}", to_steps))
  descents = {
    path: optax.scale_by_learning_rate(x) for path, x in {"schedule": rate, **own}.items()
  }
  labels = {path: path if path in own else "schedule" for path in params}
  chain.append(optax.partition(descents, labels) if own else descents["schedule"])
  return optax.chain(*chain), rate


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
) -> float | optax.Schedule:
  """A constant, or a line from one learning rate to another."""
  if not isinstance(given, Mapping):
    return given
  line: Line = resolve(Line, given, where)
  return optax.linear_schedule(line.start, line.end, to_steps(line.over, f"{where}.over"))
