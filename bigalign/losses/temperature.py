"""The learned scalars that losses on logits share: the logit scale and the bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses.base import Params


def check(name: str, t_init: float, t_max: float | None, *, learned: bool = True) -> None:
  """Checks the first value of a logit scale and its upper bound.

  Args:
    name: of the loss.
    t_init: first value of the scale.
    t_max: as for `clamped`.
    learned: whether the scale is learned; a constant one has no bounds.

  Raises:
    ValueError: if t_max is below 1, or t_init is not positive or not within the bounds.
  """
  where = f"config.loss.{name}"
  checks.above_zero(where, t_init=t_init)
  if t_max is not None:
    checks.between(where, 1, t_max=t_max)
    if learned and not 1 <= t_init <= t_max:
      raise ValueError(
        f"{where}.t_init={t_init!r} must be between 1 and t_max={t_max!r}, the bounds of the"
        " learned scale; t_max=None removes them"
      )


def init(t_init: float, *, b_init: float | None = None, learned: bool = True) -> Params:
  """The learned scalars of a loss, float32.

  Args:
    t_init: first value of the logit scale.
    b_init: first value of the bias; None: no bias.
    learned: whether the scale is learned; else there is no "t".

  Returns:
    {"t": log of the scale, "b": bias}.
  """
  params = {"t": jnp.asarray(math.log(t_init), jnp.float32)} if learned else {}
  if b_init is not None:
    params["b"] = jnp.asarray(b_init, jnp.float32)
  return params


def scale(params: Params, t_init: float, like: jax.Array) -> jax.Array:
  """[]: the logit scale, learned or `t_init`, in the dtype of `like`."""
  return jnp.exp(params["t"]) if "t" in params else jnp.asarray(t_init, like.dtype)


def clamped(t_max: float | None) -> Callable[[Params, Params], Params]:
  """A `constrain` of a loss that keeps the scale in [1, t_max]; None: no bounds."""

  def constrain(params: Params, before: Params) -> Params:
    del before
    if t_max is None or "t" not in params:
      return params
    return {**params, "t": jnp.clip(params["t"], 0.0, math.log(t_max))}

  return constrain
