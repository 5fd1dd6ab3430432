"""From a tower's pooled vector to the shared space."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Linear(nn.Module):
  """One matrix, with a bias if asked for (CLIP has none, SigLIP's text side has one)."""

  dim: int
  bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, D] -> [B, E]."""
    return nn.Dense(self.dim, use_bias=self.bias, dtype=self.dtype, name="out")(x)


class Mlp(nn.Module):
  """Linear, GELU, linear; `hidden` units between, (D + E) // 2 if None.

  bias: of both layers, or of the first if `out_bias` says another thing of the last.
  """

  dim: int
  hidden: int | None = None
  bias: bool = False
  out_bias: bool | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, D] -> [B, E]."""
    hidden = self.hidden or (x.shape[-1] + self.dim) // 2
    x = nn.Dense(hidden, use_bias=self.bias, dtype=self.dtype, name="fc1")(x)
    x = nn.gelu(x, approximate=False)
    out_bias = self.bias if self.out_bias is None else self.out_bias
    return nn.Dense(self.dim, use_bias=out_bias, dtype=self.dtype, name="fc2")(x)


class Identity(nn.Module):
  """The pooled vector itself; the tower's width must be the embedding's."""

  dim: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, E] -> [B, E]."""
    if x.shape[-1] != self.dim:
      raise ValueError(
        f"projector 'identity': the tower is {x.shape[-1]} wide, config.model.embed_dim is"
        f" {self.dim}; use 'linear' or make them equal"
      )
    return x


PROJECTORS = dict(linear=Linear, mlp=Mlp, identity=Identity)
