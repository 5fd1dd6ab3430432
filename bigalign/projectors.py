"""From what a tower makes to the shared space.

Each takes a TowerOutput of B rows, D wide, and gives [B, E]. `dropout` is of training.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign.towers.base import TowerOutput, masked_mean
from bigalign.towers.linear import Dense


class Linear(nn.Module):
  """One matrix, with a bias if asked for (CLIP has none, SigLIP's text side has one)."""

  dim: int
  bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    return Dense(self.dim, use_bias=self.bias, dtype=self.dtype, name="out")(_pooled(out))


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
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    x = _pooled(out)
    hidden = self.hidden or (x.shape[-1] + self.dim) // 2
    x = Dense(hidden, use_bias=self.bias, dtype=self.dtype, name="fc1")(x)
    x = nn.gelu(x, approximate=False)
    out_bias = self.bias if self.out_bias is None else self.out_bias
    return Dense(self.dim, use_bias=out_bias, dtype=self.dtype, name="fc2")(x)


class Identity(nn.Module):
  """The pooled vector itself; the tower's width must be the embedding's."""

  dim: int

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    x = _pooled(out)
    if x.shape[-1] != self.dim:
      raise ValueError(
        f"projector 'identity': the tower is {x.shape[-1]} wide, config.model.embed_dim is"
        f" {self.dim}; use 'linear' or make them equal"
      )
    return x


class Gated(nn.Module):
  """SAIL's alignment layer, https://arxiv.org/abs/2412.04616: W3 (ReLU6(a) c) + b3.

  a and c are linear maps, clipped to ±1000, of the LayerNorm of the pooled vector, `ratio` times as
  wide as it: 8 D (2 D + E + 2) + 2 D + E parameters. The gate is ReLU6, as released; the paper
  calls it GLU.
  """

  dim: int
  ratio: int = 8
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    x = nn.LayerNorm(epsilon=1e-5, name="ln")(_pooled(out))
    wide = self.ratio * x.shape[-1]

    def dense(name: str, features: int) -> nn.Dense:
      return Dense(
        features, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name
      )

    gate, value = (jnp.clip(dense(name, wide)(x), -1e3, 1e3) for name in ("gate", "value"))
    return dense("out", self.dim)(nn.relu6(gate) * value)


class Residual(nn.Module):
  """A linear map and a small MLP beside it, of the pooled vector's LayerNorm.

  P(x) = A x + a + W2 GELU(W1 x + b1) + b2, E (D + 1) + H (D + 1) + E (H + 1) parameters and 2 D
  of the norm; the projector that freeze-align has for tokens, https://arxiv.org/abs/2409.19425.

  hidden: H, E if None.
  dropout: of the norm's result, the hidden units by `hidden_dropout`.
  """

  dim: int
  hidden: int | None = None
  dropout: float = 0.1
  hidden_dropout: float = 0.0
  dtype: Any = jnp.float32

  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    return self.rows(_pooled(out), train)

  @nn.compact
  def rows(self, x: jax.Array, train: bool) -> jax.Array:
    """[..., D] -> [..., E]."""
    x = nn.LayerNorm(epsilon=1e-5, name="ln")(x)
    x = nn.Dropout(self.dropout, name="dropout")(x, not train)
    y = Dense(self.hidden or self.dim, dtype=self.dtype, name="fc1")(x)
    y = nn.Dropout(self.hidden_dropout, name="hidden_dropout")(
      nn.gelu(y, approximate=False), not train
    )
    y = Dense(self.dim, dtype=self.dtype, name="fc2")(y)
    return Dense(self.dim, dtype=self.dtype, name="skip")(x) + y


class PatchesAndClass(nn.Module):
  """freeze-align's image side: P_class(pooled) + the mean over tokens of P_patches(token).

  https://arxiv.org/abs/2409.19425; the tower's pool must be its class token. A store for it
  holds tokens: `bigalign embed --tokens`.
  """

  dim: int
  hidden: int | None = None
  dropout: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    options = dict(dim=self.dim, hidden=self.hidden, dropout=self.dropout, dtype=self.dtype)
    tokens = Residual(**options, name="patches").rows(_tokens(out), train)
    return Residual(**options, name="class")(out, train) + masked_mean(tokens, out.mask)


class Tokens(nn.Module):
  """freeze-align's text side: M(the mean over real tokens of P(token)).

  https://arxiv.org/abs/2409.19425, M(x) = LayerNorm(p + dropout(U GELU(p) + c)) with p = W x + b.
  """

  dim: int
  hidden: int | None = None
  dropout: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    tokens = Residual(self.dim, self.hidden, self.dropout, dtype=self.dtype, name="tokens").rows(
      _tokens(out), train
    )
    p = Dense(self.dim, dtype=self.dtype, name="fc1")(masked_mean(tokens, out.mask))
    y = Dense(self.dim, dtype=self.dtype, name="fc2")(nn.gelu(p, approximate=False))
    y = nn.Dropout(self.dropout, name="dropout")(y, not train)
    return nn.LayerNorm(epsilon=1e-5, name="ln")(p + y)


def _pooled(out: TowerOutput) -> jax.Array:
  return out.pooled.astype(jnp.float32)


def _tokens(out: TowerOutput) -> jax.Array:
  if not out.tokens.shape[1]:
    raise ValueError(
      "this projector reads tokens, and config.data.stores holds pooled vectors: choose another,"
      " embed with --tokens, or leave the tower in the loop"
    )
  return out.tokens.astype(jnp.float32)


READ_TOKENS = (PatchesAndClass, Tokens)
PROJECTORS = dict(
  linear=Linear,
  mlp=Mlp,
  identity=Identity,
  gated=Gated,
  residual=Residual,
  patches_and_class=PatchesAndClass,
  tokens=Tokens,
)
