"""Post-norm text encoders: BERT https://arxiv.org/abs/1810.04805, RoBERTa, XLM-R, MPNet."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import config, sharding, sphere
from bigalign.towers import base
from bigalign.towers.linear import Dense, lookup

POOLS = ("cls", "pooler", "mean")


def buckets(length: int, count: int, farthest: int = 128) -> np.ndarray:
  """[L, L] int32: T5's bucket of each key's distance, https://arxiv.org/abs/1910.10683.

  Half of the `count` buckets are for keys after the query; half of those count single tokens, the
  others grow as the logarithm up to `farthest` tokens.
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]  # key - query
  half = count // 2
  exact = half // 2
  far = np.maximum(np.abs(distance), 1).astype(np.float32)
  # In float32, as the models were trained: whole logarithms must fall to the same side.
  log = np.log(far / np.float32(exact)) / np.float32(np.log(farthest / exact))
  grown = np.minimum(exact + (log * np.float32(half - exact)).astype(np.int64), half - 1)
  near = np.where(np.abs(distance) < exact, np.abs(distance), grown)
  return (near + half * (distance > 0)).astype(np.int32)


class Block(nn.Module):
  """Post-norm transformer block."""

  heads: int
  hidden: int
  activation: str = "gelu"
  dropout: float = 0.0
  epsilon: float = 1e-12
  dtype: Any = jnp.float32
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    deterministic: bool = True,
    bias: jax.Array | None = None,
  ) -> tuple[jax.Array, None]:
    """[B, N, D] -> [B, N, D], and None; bias [1, H, N, N] of attention."""
    norm = {"epsilon": self.epsilon, "dtype": self.dtype}
    y = base.Attention(self.heads, self.dtype, self.implementation, name="attn")(
      x, x, mask, bias=bias
    )
    y = nn.Dropout(self.dropout, name="attn_dropout")(y, deterministic)
    x = nn.LayerNorm(name="ln1", **norm)(x + y)
    y = base.Mlp(self.hidden, self.activation, dtype=self.dtype, name="mlp")(x, deterministic)
    y = nn.Dropout(self.dropout, name="mlp_dropout")(y, deterministic)
    return sharding.constrain_batch(nn.LayerNorm(name="ln2", **norm)(x + y)), None


class Bert(nn.Module):
  """See `bert` for the options."""

  vocab_size: int
  length: int
  width: int
  depth: int
  types: int
  pad: int
  skip_padding: bool
  buckets: int
  pool: str
  unit: bool
  dropout: float
  scan: bool
  remat: str
  block: flax.core.FrozenDict[str, Any]  # arguments of Block
  dtype: Any

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
    types: jax.Array | None = None,
  ) -> base.TowerOutput:
    """ids [B, L] int32, mask [B, L] bool (True = no padding) -> pooled [B, D], tokens [B, L, D].

    Without a mask, `pad` is padding; without types [B, L] int32, all tokens are of type 0.
    A text may be shorter than `length`, never longer. Random key in training: "dropout".
    """
    length = ids.shape[1]
    if length > self.length:
      raise ValueError(f"texts of {length} tokens; config.model.text.length is {self.length}")
    mask = ids != self.pad if mask is None else mask.astype(bool)
    x = lookup(self._table("embedding", self.vocab_size), ids, self.dtype) + self._positions(ids)
    if self.types:
      of_type = self._table("types", self.types)
      x = x + (self._first(of_type, 1) if types is None else lookup(of_type, types, self.dtype))
    x = nn.LayerNorm(epsilon=self.block["epsilon"], dtype=self.dtype, name="ln_embedding")(x)
    x = nn.Dropout(self.dropout, name="dropout")(x, not train)
    x = base.Encoder(
      self.depth, self.block, self.scan, self.remat, kind=Block, norm=False, name="encoder"
    )(sharding.constrain_batch(x), mask, train, self._distances(length))
    return base.TowerOutput(self._pooled(x, mask), x, mask)

  def _table(self, name: str, rows: int) -> jax.Array:
    return self.param(name, nn.initializers.normal(0.02), (rows, self.width))

  def _first(self, table: jax.Array, rows: int) -> jax.Array:
    """[1, rows, D]"""
    return sharding.replicate(table.astype(self.dtype))[None, :rows]

  def _positions(self, ids: jax.Array) -> jax.Array:
    """[B, L, D] or [1, L, D]; with skip_padding the first token stands at row pad + 1."""
    skipped = self.pad + 1 if self.skip_padding else 0
    table = self._table("positions", self.length + skipped)
    if not self.skip_padding:
      return self._first(table, ids.shape[1])
    real = ids != self.pad
    return lookup(table, jnp.cumsum(real, 1) * real + self.pad, self.dtype)

  def _distances(self, length: int) -> jax.Array | None:
    """[1, H, L, L], added to the logits of every block."""
    if not self.buckets:
      return None
    table = self.param(
      "relative", nn.initializers.normal(0.02), (self.buckets, self.block["heads"])
    )
    bias = table[buckets(length, self.buckets)].astype(self.dtype)  # so its gradient is float32
    return jnp.moveaxis(bias, -1, 0)[None]

  def _pooled(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    if self.pool == "mean":
      pooled = base.masked_mean(x, mask)
    elif self.pool == "cls":
      pooled = x[:, 0]
    else:
      pooled = jnp.tanh(Dense(self.width, dtype=self.dtype, name="pooler")(x[:, 0]))
    return sphere.unit(pooled.astype(jnp.float32)) if self.unit else pooled


def bert(
  *,
  variant: str = "B",
  vocab_size: int,
  length: int,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_ratio: float | None = None,
  types: int = 2,
  pad: int = 0,
  skip_padding: bool = False,
  buckets: int = 0,
  pool: str = "mean",
  unit: bool = False,
  dropout: float = 0.0,
  activation: str = "gelu",
  epsilon: float = 1e-12,
  scan: bool = True,
  remat: str = "none",
  dtype: str = "bfloat16",
  attention: str | None = None,
) -> Bert:
  """A text encoder of BERT's kind; the options that `vit` has mean the same.

  Args:
    vocab_size: rows of the token table; at least the tokenizer's.
    length: longest text in tokens.
    types: rows of the table of token types; 0: no table (MPNet).
    pad: the token that is padding where no mask is given.
    skip_padding: positions count real tokens from pad + 1, and padding has row `pad` (RoBERTa).
    buckets: of distances between tokens, a bias of attention shared by all blocks (MPNet: 32).
    pool: "mean" over the mask, "cls": the first token, "pooler": tanh of a linear map of it.
    unit: the pooled vector has length 1 (the last module of most sentence-transformers).

  Raises:
    ValueError: for an unknown name, with the known ones.
  """
  for name, value, names in (
    ("pool", pool, POOLS),
    ("activation", activation, base.ACTIVATIONS),
    ("remat", remat, base.REMAT),
    ("dtype", dtype, base.DTYPES),
  ):
    config.known(f"config.model.text.{name}", value, names)
  width, depth, heads, hidden = base.size(variant, width, depth, heads, mlp_ratio)
  block: flax.core.FrozenDict[str, Any] = flax.core.FrozenDict(
    heads=heads,
    hidden=hidden,
    activation=activation,
    dropout=dropout,
    epsilon=epsilon,
    dtype=jnp.dtype(dtype),
    implementation=attention,
  )
  return Bert(
    vocab_size,
    length,
    width,
    depth,
    types,
    pad,
    skip_padding,
    buckets,
    pool,
    unit,
    dropout,
    scan,
    remat,
    block,
    jnp.dtype(dtype),
  )
