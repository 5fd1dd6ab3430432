"""The learned scalars that losses on logits share: the logit scale and the bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bigalign.losses.base import Params


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
