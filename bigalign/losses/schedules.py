"""Schedules of a loss's numbers, and the durations in which they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks, durations
from bigalign.losses.base import Context
from bigalign.options import call


def duration(value: int | str, where: str) -> durations.Duration:
  """A duration of a config, which must be above 0; else raises ValueError."""
  length = durations.duration(value, where)
  if not length.number:
    raise ValueError(f"{where}: {value!r} must be a duration above 0")
  return length


def elapsed(length: durations.Duration, context: Context) -> jax.Array:
  """[]: the time since the start of training, in units of `length`.

  A length in epochs counts whole epochs only, as the published schedules do: they change between
  epochs.
  """
  done = {
    "step": context.step,
    "sample": context.samples_seen,
    "epoch": jnp.floor(context.epochs),
    "%": context.progress * 100,
  }[length.unit]
  return done.astype(float) / length.number


def ramp(value: float | Mapping[str, Any], where: str) -> Callable[[Context], Any]:
  """A function of the context, from a number or a ramp of a config.

  Args:
    value: a number, which does not change, or dict(start=8.0, end=6.0, over="50%", shape="cosine"),
      which changes from `start` to `end` in the duration `over`, along half a cosine or "linear".
    where: the name of the option, for errors.

  Raises:
    TypeError: for a dict with other keys.
    ValueError: for an invalid duration or shape.
  """
  if isinstance(value, int | float):
    return lambda context: value
  if not isinstance(value, Mapping):
    raise TypeError(f"{where}={value!r} must be a number, or dict(start=…, end=…, over=…)")
  ramped: Callable[[Context], Any] = call(_ramp, value, where, name=where)
  return ramped


def _ramp(
  *, name: str, start: float, end: float, over: int | str, shape: str = "cosine"
) -> Callable[[Context], jax.Array]:
  checks.known(f"{name}.shape", shape, ("cosine", "linear"))
  length = duration(over, f"{name}.over")

  def value(context: Context) -> jax.Array:
    share = jnp.minimum(elapsed(length, context), 1)
    if shape == "cosine":
      share = (1 - jnp.cos(jnp.pi * share)) / 2
    return start + (end - start) * share

  return value


def gamma(name: str, end: float, over: durations.Duration, context: Context) -> jax.Array:
  """[]: weight of the new value in FastCLIP's moving average, https://arxiv.org/abs/2407.01445.

  It is 1 in the first epoch, in which every sample is new, also for "constant", as in the released
  code.

  Args:
    name: "cosine": after the first epoch, half a cosine from 1 to `end`; "constant": `end`.
    end: the last value.
    over: the duration of the cosine.
    context: of the step.
  """
  share = jnp.minimum(elapsed(over, context), 1)
  later = {
    "cosine": 0.5 * (1 + jnp.cos(jnp.pi * share)) * (1 - end) + end,
    "constant": jnp.full_like(share, end),
  }[name]
  return jnp.where(context.epochs < 1, 1, later)


def eta(
  name: str, start: float, end: float, over: durations.Duration, decay: float, context: Context
) -> jax.Array:
  """[]: step size of iSogCLR's temperatures, https://arxiv.org/abs/2305.11965.

  Args:
    name: "constant": `start`. "cosine": a quarter of a wave from `start` to `end` in `over`.
      "exponential": the part above `end` shrinks by the factor `decay` in each `over`; it begins at
      1 / `decay` times (start - end), since the released code counts from -1.
    start: the first value.
    end: the last value.
    over: duration of the cosine, or of one decay.
    decay: factor of the exponential schedule.
    context: of the step.
  """
  share = elapsed(over, context)
  return {
    "constant": jnp.full_like(share, start),
    "cosine": end + (start - end) * jnp.cos(jnp.pi / 2 * jnp.minimum(share, 1)),
    "exponential": end + (start - end) * decay ** (share - 1),
  }[name]
