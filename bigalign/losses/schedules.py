"""Numbers that change while a loss is trained, and the durations they are given in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks, durations
from bigalign.losses.base import Context
from bigalign.options import call


def duration(value: int | str, where: str) -> durations.Duration:
  """A durations.duration that has a length; ValueError for one of 0."""
  length = durations.duration(value, where)
  if not length.number:
    raise ValueError(f"{where}: {value!r} is no duration to divide by; it must be above 0")
  return length


def elapsed(length: durations.Duration, context: Context) -> jax.Array:
  """[]: how many times `length` has passed, from 0 on; in epochs only whole ones count, as the
  published schedules do, which change between epochs."""
  done = {
    "step": context.step,
    "sample": context.samples_seen,
    "epoch": jnp.floor(context.epochs),
    "%": context.progress * 100,
  }[length.unit]
  return done.astype(float) / length.number


def ramp(value: float | Mapping[str, Any], where: str) -> Callable[[Context], Any]:
  """A number of a config, or dict(start=8.0, end=6.0, over="50%", shape="cosine"), by place.

  From `start` it goes to `end` in the duration `over`, by half a cosine or in a "linear" way.

  Raises:
    TypeError, ValueError: for a dict with other keys, a duration or a shape that is none.
  """
  if isinstance(value, int | float):
    return lambda context: value
  if not isinstance(value, Mapping):
    raise TypeError(f"{where}={value!r} must be a number, or dict(start=…, end=…, over=…)")
  return call(_ramp, value, where, name=where)


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
  """Weight of what is new in FastCLIP's moving average, https://arxiv.org/abs/2407.01445.

  1 in the first epoch, when nothing has been seen before (the released code does so for "constant"
  too); then a half cosine from 1 to `end`, which it reaches after `over`, or `end` at once.
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
  """Step size of iSogCLR's temperatures, https://arxiv.org/abs/2305.11965.

  "constant"; "cosine", a quarter of a wave from `start` to `end` in `over`; "exponential", whose
  part above `end` shrinks by `decay` in each `over`, and is larger by 1 / `decay` at first: the
  released code counts from one before its first epoch.
  """
  share = elapsed(over, context)
  return {
    "constant": jnp.full_like(share, start),
    "cosine": end + (start - end) * jnp.cos(jnp.pi / 2 * jnp.minimum(share, 1)),
    "exponential": end + (start - end) * decay ** (share - 1),
  }[name]
