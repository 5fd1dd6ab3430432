"""Text transformer, pre-norm: bidirectional as in SigLIP, or causal as in CLIP."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign import config, sharding
from bigalign.towers import base
from bigalign.towers.linear import lookup

POOLS = ("last", "eos", "argmax", "map", "mean")


class Text(nn.Module):
  """See `text` for the options."""

  vocab_size: int
  length: int
  width: int
  depth: int
  heads: int
  hidden: int
  pool: str
  eos: int | None
  mask_padding: bool
  dropout: float
  scan: bool
  remat: str
  block: flax.core.FrozenDict[str, Any]  # arguments of base.Block
  dtype: Any

  @nn.compact
  def __call__(
    self, ids: jax.Array, mask: jax.Array | None = None, train: bool = False
  ) -> base.TowerOutput:
    """ids [B, L] int32, mask [B, L] bool (True = no padding) -> pooled [B, D], tokens [B, L, D].

    A text may be shorter than `length`, never longer. Random key in training: "dropout".
    """
    length = ids.shape[1]
    if length > self.length:
      raise ValueError(f"texts of {length} tokens; config.model.text.length is {self.length}")
    table = self.param(
      "embedding", nn.initializers.normal(1 / self.width**0.5), (self.vocab_size, self.width)
    )
    positions = self.param(
      "positions", nn.initializers.normal(1 / self.width**0.5), (1, self.length, self.width)
    )
    x = lookup(table, ids, self.dtype) + positions.astype(self.dtype)[:, :length]
    x = nn.Dropout(self.dropout, name="dropout")(x, not train)
    seen = mask if self.mask_padding else None
    x = base.Encoder(self.depth, self.block, self.scan, self.remat, name="encoder")(
      sharding.constrain_batch(x), seen, train=train
    )
    if self.pool == "map":
      pooled = base.MapHead(
        self.heads,
        self.hidden,
        self.block["activation"],
        self.block["epsilon"],
        self.dtype,
        name="map_head",
      )(x, seen)
    elif self.pool == "mean":
      pooled = base.masked_mean(x, seen)
    else:
      at = self._last(ids, mask)
      pooled = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
    return base.TowerOutput(pooled, x, mask)

  def _last(self, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[B] int32: the position of the token that stands for the text."""
    if self.pool == "argmax":
      return jnp.argmax(ids, 1)
    if self.pool == "eos" and self.eos is not None:
      return jnp.argmax(ids == self.eos, 1)
    if self.pool == "last" or mask is None:
      return jnp.full(ids.shape[:1], ids.shape[1] - 1)
    return jnp.maximum(mask.sum(1) - 1, 0)


def text(
  *,
  variant: str = "B",
  vocab_size: int,
  length: int,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_ratio: float | None = None,
  pool: str = "last",
  eos: int | None = None,
  causal: bool = False,
  mask_padding: bool = True,
  dropout: float = 0.0,
  activation: str = "gelu_tanh",
  epsilon: float = 1e-6,
  scan: bool = True,
  remat: str = "none",
  dtype: str = "bfloat16",
  attention: str | None = None,
) -> Text:
  """A text transformer; the options that `vit` has mean the same.

  Args:
    vocab_size: rows of the token table; at least the tokenizer's.
    length: longest text in tokens.
    pool: "last" position whatever is there (SigLIP), "eos": the first token `eos`, or without one
      the last token that is no padding (CLIP), "argmax": the highest id (open_clip), "map"
      (attention pooling) or "mean".
    causal: a token sees only those before it (CLIP).
    mask_padding: padding is not seen by attention or pooling. SigLIP attends to it.

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
    causal=causal,
    dtype=jnp.dtype(dtype),
    implementation=attention,
  )
  return Text(
    vocab_size,
    length,
    width,
    depth,
    heads,
    hidden,
    pool,
    eos,
    mask_padding,
    dropout,
    scan,
    remat,
    block,
    jnp.dtype(dtype),
  )
