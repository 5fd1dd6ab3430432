"""Small layers of heads as functions of their parameters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign.losses.heads.base import Params
from bigalign.towers.linear import Dense


def dense_init(key: jax.Array, inputs: int, outputs: int, bias: bool = True) -> Params:
  """The parameters of a linear map: normal numbers with the deviation inputs**-0.5; bias 0."""
  kernel = inputs**-0.5 * jax.random.normal(key, (inputs, outputs), jnp.float32)
  return {"kernel": kernel, **({"bias": jnp.zeros((outputs,), jnp.float32)} if bias else {})}


def dense(params: Params, x: jax.Array) -> jax.Array:
  """[..., D] -> [..., K], in the dtype of x."""
  outputs = params["kernel"].shape[1]
  mapped: Any = Dense(outputs, use_bias="bias" in params, dtype=x.dtype).apply(
    {"params": params}, x
  )
  return jnp.asarray(mapped)


def norm_init(width: int) -> Params:
  """The parameters of a layer norm."""
  return {"scale": jnp.ones((width,), jnp.float32), "bias": jnp.zeros((width,), jnp.float32)}


def norm(params: Params, x: jax.Array) -> jax.Array:
  """[..., D] -> [..., D], in the dtype of x."""
  normed: Any = nn.LayerNorm(epsilon=1e-5, dtype=x.dtype).apply({"params": params}, x)
  return jnp.asarray(normed)
