"""Vision transformer, https://arxiv.org/abs/2010.11929."""

from __future__ import annotations

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import sharding
from bigalign.towers import base

POOLS = ("map", "cls", "mean")
POSITIONS = ("learned", "sincos2d")


def sincos2d(rows: int, cols: int, width: int, temperature: float = 10_000.0) -> np.ndarray:
  """[rows * cols, width] float32: sines and cosines of both coordinates, as in MoCo v3."""
  if width % 4:
    raise ValueError(f"sincos2d positions need a width that 4 divides, not {width}")
  omega = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
  y, x = np.mgrid[:rows, :cols]
  angles = [np.outer(a.ravel(), omega) for a in (x, y)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


class PatchEmbed(nn.Module):
  """Non-overlapping patches through one linear map, as a product: a strided convolution."""

  patch: int
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/p, W/p, D]."""
    p = self.patch
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
      (p, p, image.shape[-1], self.width),
    )
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    patches = einops.rearrange(image, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
    flat = einops.rearrange(kernel, "p q c d -> (p q c) d")
    bias = bias.astype(self.dtype)[None, None, None]
    return patches.astype(self.dtype) @ flat.astype(self.dtype) + bias


class ConvStem(nn.Module):
  """3 x 3 convolutions of stride 2 down to the patch grid, https://arxiv.org/abs/2106.14881."""

  patch: int
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/p, W/p, D]."""
    steps = self.patch.bit_length() - 1
    x = image.astype(self.dtype)
    for i in range(steps):
      features = self.width >> (steps - i)
      x = nn.Conv(features, (3, 3), (2, 2), dtype=self.dtype, name=f"conv_{i}")(x)
      x = nn.LayerNorm(dtype=self.dtype, name=f"ln_{i}")(x)
      x = nn.gelu(x)
    return nn.Dense(self.width, dtype=self.dtype, name="out")(x)


STEMS = {"patch": PatchEmbed, "conv": ConvStem}


class ViT(nn.Module):
  """See `vit` for the options."""

  patch: int
  width: int
  depth: int
  heads: int
  hidden: int
  stem: str
  pool: str
  positions: str
  registers: int
  patch_dropout: float
  dropout: float
  activation: str
  scan: bool
  remat: str
  dtype: Any
  attention: str | None

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> base.TowerOutput:
    """[B, H, W, 3] normalised -> pooled [B, D], tokens [B, N, D] of the patches.

    Random keys in training: "dropout" for dropout, "patch_dropout" for patch dropout.
    """
    batch, height, width, _ = image.shape
    if height % self.patch or width % self.patch:
      raise ValueError(
        f"model.image.patch={self.patch} does not divide the image of {height} x {width} pixels"
      )
    x = STEMS[self.stem](self.patch, self.width, self.dtype, name="embedding")(image)
    rows, cols = x.shape[1:3]
    x = einops.rearrange(x, "b h w d -> b (h w) d")
    x = x + self._positions(rows, cols).astype(self.dtype)
    if train and self.patch_dropout:
      x = self._keep_some(x)

    extra = (self.pool == "cls") + self.registers
    if extra:
      tokens = self.param("extra_tokens", nn.initializers.normal(0.02), (1, extra, self.width))
      tokens = jnp.broadcast_to(tokens.astype(self.dtype), (batch, extra, self.width))
      x = jnp.concatenate([tokens, x], 1)
    x = nn.Dropout(self.dropout, name="dropout")(x, not train)
    block = dict(
      heads=self.heads, hidden=self.hidden, activation=self.activation, dropout=self.dropout,
      epsilon=1e-6, dtype=self.dtype, implementation=self.attention,
    )
    x = base.Encoder(self.depth, block, self.scan, self.remat, name="encoder")(
      sharding.pin(x), train=train
    )
    patches = x[:, extra:]
    if self.pool == "cls":
      pooled = x[:, 0]
    elif self.pool == "mean":
      pooled = base.masked_mean(patches, None)
    else:
      pooled = base.MapHead(
        self.heads, self.hidden, self.activation, dtype=self.dtype, name="map_head"
      )(x)
    return base.TowerOutput(pooled, patches)

  def _positions(self, rows: int, cols: int) -> jax.Array:
    """[1, rows * cols, D]."""
    if self.positions == "sincos2d":
      return jnp.asarray(sincos2d(rows, cols, self.width))[None]
    return self.param(
      "positions", nn.initializers.normal(1 / np.sqrt(self.width)), (1, rows * cols, self.width)
    )

  def _keep_some(self, x: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, n, D]: another random subset for each image, in the patches' order."""
    batch, n, _ = x.shape
    keep = max(1, round(n * (1 - self.patch_dropout)))
    draws = jax.random.uniform(self.make_rng("patch_dropout"), (batch, n))
    chosen = jnp.sort(jnp.argsort(draws, axis=1)[:, :keep], axis=1)
    return jnp.take_along_axis(x, chosen[..., None], axis=1)


def vit(
  *,
  variant: str = "B",
  patch: int = 16,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_ratio: float | None = None,
  stem: str = "patch",
  pool: str = "map",
  positions: str = "learned",
  registers: int = 0,
  patch_dropout: float = 0.0,
  dropout: float = 0.0,
  activation: str = "gelu_tanh",
  scan: bool = True,
  remat: str = "none",
  dtype: str = "bfloat16",
  attention: str | None = None,
) -> ViT:
  """A vision transformer.

  Args:
    variant: Ti, S, M, B, L, So400m, H, g, G: width, depth, heads and MLP ratio, each of which can
      be given in its place.
    patch: pixels per side of a patch; must divide the image.
    stem: "patch", or "conv": 3 x 3 convolutions of stride 2 (patch must be a power of 2).
    pool: "map" (attention pooling, SigLIP), "cls" (a class token), "mean" of the patches.
    positions: "learned" (for one image size) or "sincos2d" (fixed).
    registers: extra tokens without a position, https://arxiv.org/abs/2309.16588.
    patch_dropout: share of the patches left out in training, https://arxiv.org/abs/2212.00794.
    dropout: on the embedding and both branches of each block.
    scan: one program for all layers; False gives each layer its own parameters.
    remat: "none", "dots" or "full": activations kept, kept for weight matmuls, recomputed.
    dtype: of the computation; parameters are float32.
    attention: implementation in jax.nn.dot_product_attention: None (its choice), "xla", "cudnn".

  Raises:
    ValueError: for an unknown name, with the known ones.
  """
  for name, value, known in (
    ("stem", stem, STEMS), ("pool", pool, POOLS), ("positions", positions, POSITIONS),
    ("activation", activation, base.ACTIVATIONS), ("remat", remat, base.REMAT),
    ("dtype", dtype, base.DTYPES),
  ):
    if value not in known:
      raise ValueError(f"config.model.image.{name}: unknown {value!r}; known: {sorted(known)}")
  if stem == "conv" and patch & (patch - 1):
    raise ValueError(f"config.model.image.patch={patch}: a conv stem needs a power of 2")
  width, depth, heads, hidden = base.size(variant, width, depth, heads, mlp_ratio)
  return ViT(
    patch, width, depth, heads, hidden, stem, pool, positions, registers, patch_dropout, dropout,
    activation, scan, remat, jnp.dtype(dtype), attention,
  )
