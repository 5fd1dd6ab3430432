"""The learned scalars that losses on logits share: the logit scale and a bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bigalign.losses.base import Params


def init(t_init: float, *, b_init: float | None = None, learned: bool = True) -> Params:
  """{"t": log of the scale, "b": bias}, float32; no "t" for a scale that stays, no "b" for None."""
  params = {"t": jnp.asarray(math.log(t_init), jnp.float32)} if learned else {}
  if b_init is not None:
    params["b"] = jnp.asarray(b_init, jnp.float32)
  return params


def scale(params: Params, t_init: float, like: jax.Array) -> jax.Array:
  """[]: the logit scale, learned or `t_init`, in the dtype of `like`."""
  return jnp.exp(params["t"]) if "t" in params else jnp.asarray(t_init, like.dtype)


def clamped(t_max: float | None) -> Callable[[Params, Params], Params]:
  """A loss's `constrain`: the scale stays in [1, t_max]; None leaves it free."""

  def constrain(params: Params, before: Params) -> Params:
    del before
    if t_max is None or "t" not in params:
      return params
    return {**params, "t": jnp.clip(params["t"], 0.0, math.log(t_max))}

  return constrain
