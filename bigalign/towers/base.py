"""What all towers are made of: blocks, a stack of them under scan and remat, pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign import config, sharding
from bigalign.towers.linear import Dense, DenseGeneral

# name: (width, depth, heads, hidden units per width). ViT and scaling-ViT sizes,
# https://arxiv.org/abs/2010.11929, 2106.04560; So400m https://arxiv.org/abs/2305.13035.
VARIANTS = {
  "Ti": (192, 12, 3, 4.0),
  "S": (384, 12, 6, 4.0),
  "M": (512, 12, 8, 4.0),
  "B": (768, 12, 12, 4.0),
  "L": (1024, 24, 16, 4.0),
  "So400m": (1152, 27, 16, 4304 / 1152),
  "H": (1280, 32, 16, 4.0),
  "g": (1408, 40, 16, 6144 / 1408),
  "G": (1664, 48, 16, 8192 / 1664),
}

ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "silu": nn.silu,
}

DTYPES = ("bfloat16", "float16", "float32", "float64")

REMAT = {
  "none": None,  # keep every activation
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the matmuls of weights
  "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each layer
}


class TowerOutput(NamedTuple):
  """pooled [B, D]; tokens [B, N, D], normed; mask [B, N] bool where tokens can be padding."""

  pooled: jax.Array
  tokens: jax.Array
  mask: jax.Array | None = None


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
  """Turns each half of a head against the other: x [B, N, H, K], rotation [2, N, K] cos and sin."""
  cos, sin = rotation[:, None, :, None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return (x * cos + jnp.concatenate([-second, first], -1) * sin).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head attention; `biases`: which of q, k, v and o(ut) have one."""

  heads: int
  dtype: Any = jnp.float32
  implementation: Any = None  # see vit
  biases: str = "qkvo"

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array,
    mask: jax.Array | None = None,
    causal: bool = False,
    rotation: jax.Array | None = None,
    bias: jax.Array | None = None,
  ) -> jax.Array:
    """Queries [B, N, D] from x, keys and values from memory [B, M, D]; mask [B, M], True = seen.

    rotation [2, N, K] of queries and keys; bias [1, H, N, M] is added to the logits.
    """
    width = x.shape[-1]

    def project(name: str, inputs: jax.Array) -> jax.Array:
      return DenseGeneral(
        (self.heads, width // self.heads),
        use_bias=name[0] in self.biases,
        dtype=self.dtype,
        kernel_init=nn.initializers.xavier_uniform(),
        name=name,
      )(inputs)

    query, key, value = project("query", x), project("key", memory), project("value", memory)
    if rotation is not None:
      query, key = rotate(query, rotation), rotate(key, rotation)
    y = jax.nn.dot_product_attention(
      query,
      key,
      value,
      bias=bias,
      mask=None if mask is None else mask[:, None, None, :],
      is_causal=causal,
      implementation=self.implementation,
    )
    return DenseGeneral(
      width,
      axis=(-2, -1),
      use_bias="o" in self.biases,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      name="out",
    )(y)


class Mlp(nn.Module):
  """Two layers with an activation between; gated: https://arxiv.org/abs/2002.05202."""

  hidden: int
  activation: str = "gelu_tanh"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  gated: bool = False
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """[..., D] -> [..., D]."""
    kwargs: dict[str, Any] = dict(
      use_bias=self.bias,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    y = Dense(self.hidden, name="fc1", **kwargs)(x)
    act = ACTIVATIONS[self.activation]
    y = act(Dense(self.hidden, name="gate", **kwargs)(x)) * y if self.gated else act(y)
    y = nn.Dropout(self.dropout, name="dropout")(y, deterministic)
    return Dense(x.shape[-1], name="fc2", **kwargs)(y)


class Block(nn.Module):
  """Pre-norm transformer block."""

  heads: int
  hidden: int
  activation: str = "gelu_tanh"
  dropout: float = 0.0
  epsilon: float = 1e-6
  causal: bool = False
  dtype: Any = jnp.float32
  implementation: str | None = None
  biases: str = "qkvo"
  gated: bool = False
  mlp_bias: bool = True
  layer_scale: float | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    deterministic: bool = True,
    rotation: jax.Array | None = None,
  ) -> tuple[jax.Array, None]:
    """[B, N, D] -> [B, N, D], and None: the second half of a scan's pair."""
    norm = {"epsilon": self.epsilon, "dtype": self.dtype}
    y = nn.LayerNorm(name="ln1", **norm)(x)
    y = Attention(self.heads, self.dtype, self.implementation, self.biases, name="attn")(
      y, y, mask, self.causal, rotation
    )
    x = x + nn.Dropout(self.dropout, name="attn_dropout")(self._scaled("scale1", y), deterministic)
    y = nn.LayerNorm(name="ln2", **norm)(x)
    y = Mlp(
      self.hidden, self.activation, self.dropout, self.dtype, self.gated, self.mlp_bias, name="mlp"
    )(y, deterministic)
    x = x + nn.Dropout(self.dropout, name="mlp_dropout")(self._scaled("scale2", y), deterministic)
    return sharding.constrain_batch(x), None

  def _scaled(self, name: str, y: jax.Array) -> jax.Array:
    """LayerScale, https://arxiv.org/abs/2103.17239."""
    if self.layer_scale is None:
      return y
    scale = self.param(name, nn.initializers.constant(self.layer_scale), (y.shape[-1],))
    return y * scale.astype(self.dtype)[None, None]


class Encoder(nn.Module):
  """`depth` blocks and a last norm.

  With scan the layers are one program and one stacked array per parameter, "blocks/…": compile
  time does not grow with depth. Without, each has its own, "block_3/…", can be frozen or given a
  learning rate alone, and runs about 1.15 times faster on CPUs.
  """

  depth: int
  block: Mapping[str, Any]  # arguments of `kind`
  scan: bool = True
  remat: str = "none"
  kind: Any = Block
  norm: bool = True

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
    relation: jax.Array | None = None,
  ) -> jax.Array:
    """[B, N, D] -> [B, N, D], normed; mask [B, N], True = a key that is seen.

    relation: how tokens lie to each other, for every block: a rotation, or a bias of attention.
    """
    block: Any = self.kind
    policy = config.choose(REMAT, self.remat, "remat")
    if policy is not None:
      # Inside a scan the compiler cannot undo the remat, and the guards against it cost fusions.
      block = nn.remat(block, policy=policy, prevent_cse=not self.scan, static_argnums=(3,))
    if self.scan:
      stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=self.depth,
      )
      x, _ = stack(name="blocks", **self.block)(x, mask, not train, relation)
    else:
      for i in range(self.depth):
        x, _ = block(name=f"block_{i}", **self.block)(x, mask, not train, relation)
    if not self.norm:
      return x
    return nn.LayerNorm(epsilon=self.block["epsilon"], dtype=self.block["dtype"], name="ln")(x)


class MapHead(nn.Module):
  """Multi-head attention pooling: a learned query, then a residual MLP."""

  heads: int
  hidden: int
  activation: str = "gelu_tanh"
  epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, N, D] -> [B, D]."""
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
    probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, x.shape[-1]))
    y = Attention(self.heads, self.dtype, name="attn")(probe, x, mask)
    z = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="ln")(y)
    y = y + Mlp(self.hidden, self.activation, dtype=self.dtype, name="mlp")(z)
    return einops.rearrange(y, "b 1 d -> b d")


def masked_mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """[B, N, D] -> [B, D], float32: the mean over the tokens that the mask [B, N] keeps."""
  x = x.astype(jnp.float32)
  if mask is None:
    return x.mean(1)
  w = mask.astype(jnp.float32)[..., None]
  return (x * w).sum(1) / jnp.maximum(w.sum(1), 1.0)


def size(
  variant: str, width: int | None, depth: int | None, heads: int | None, mlp_ratio: float | None
) -> tuple[int, int, int, int]:
  """(width, depth, heads, hidden) of a named variant, with what is given in its place."""
  w, d, h, r = config.choose(VARIANTS, variant, "variant")
  width, depth, heads = width or w, depth or d, heads or h
  if width % heads:
    raise ValueError(f"width {width} does not divide into {heads} heads; set heads or the width")
  return width, depth, heads, round(width * (mlp_ratio or r))
