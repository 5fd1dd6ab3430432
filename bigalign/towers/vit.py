"""Vision transformer, https://arxiv.org/abs/2010.11929."""

from __future__ import annotations

from typing import Any

import einops
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import config, sharding
from bigalign.towers import base
from bigalign.towers.linear import Dense, product

POOLS = ("map", "cls", "pooler", "mean", "cls+mean")
POSITIONS = ("learned", "sincos2d", "rope")


def sincos2d(rows: int, cols: int, width: int, temperature: float = 10_000.0) -> np.ndarray:
  """[rows * cols, width] float32: sines and cosines of both coordinates, as in MoCo v3."""
  if width % 4:
    raise ValueError(f"sincos2d positions need a width that 4 divides, not {width}")
  omega = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
  y, x = np.mgrid[:rows, :cols]
  angles = [np.outer(a.ravel(), omega) for a in (x, y)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


def rope(rows: int, cols: int, before: int, width: int, theta: float) -> np.ndarray:
  """[2, before + rows * cols, width] float32: cos and sin of patch centres, as in DINOv3.

  Centres lie in [-1, 1] on both axes whatever the grid; the tokens `before` are not turned.
  https://arxiv.org/abs/2508.10104
  """
  if width % 4:
    raise ValueError(f"positions='rope' needs heads of a width that 4 divides, not {width}")
  centers = [2 * (np.arange(n) + 0.5) / n - 1 for n in (rows, cols)]
  frequency = 2 * np.pi * theta ** -np.arange(0, 1, 4 / width)
  angles = np.stack(np.meshgrid(*centers, indexing="ij"), -1)[..., None] * frequency
  angles = np.tile(angles.reshape(rows * cols, -1), 2)
  angles = np.concatenate([np.zeros((before, width)), angles])
  return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def resampled(table: jax.Array, grid: tuple[int, int], to: tuple[int, int]) -> jax.Array:
  """Positions [1, n, D] of a grid of n patches for another grid, linear and antialiased: [1, m, D].

  In each step, as FlexiViT does, https://arxiv.org/abs/2212.08013. Those of the same grid stay.
  """
  if grid == to:
    return table
  square = einops.rearrange(table, "1 (y x) d -> y x d", y=grid[0])
  square = jax.image.resize(square, (*to, table.shape[-1]), "linear", antialias=True)
  return einops.rearrange(square, "y x d -> 1 (y x) d")


class PatchEmbed(nn.Module):
  """Non-overlapping patches through one linear map, as a product: a strided convolution."""

  patch: int
  width: int
  dtype: Any
  bias: bool = True

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/p, W/p, D]."""
    p = self.patch
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
      (p, p, image.shape[-1], self.width),
    )
    patches = einops.rearrange(image, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
    flat = einops.rearrange(kernel, "p q c d -> (p q c) d")
    x = product(patches.astype(self.dtype), flat, (((3,), (0,)), ((), ())))
    if not self.bias:
      return x
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    return x + bias.astype(self.dtype)[None, None, None]


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
    return Dense(self.width, dtype=self.dtype, name="out")(x)


STEMS = {"patch": PatchEmbed, "conv": ConvStem}


class ViT(nn.Module):
  """See `vit` for the options."""

  patch: int
  width: int
  depth: int
  heads: int
  hidden: int
  stem: str
  patch_bias: bool
  pool: str
  positions: str
  rope_theta: float
  class_token: bool
  class_position: bool
  registers: int
  patch_dropout: float
  dropout: float
  pre_norm: bool
  scan: bool
  remat: str
  block: flax.core.FrozenDict[str, Any]  # arguments of base.Block
  dtype: Any
  grid: tuple[int, int] | None = None  # of the learned positions; None: that of the image
  drawn: tuple[int, int] | None = None  # grid that they begin on, resampled; None: their own

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> base.TowerOutput:
    """[B, H, W, 3] normalised -> pooled [B, D or 2 D], tokens [B, N, D] of the patches.

    Random keys in training: "dropout" for dropout, "patch_dropout" for patch dropout.
    """
    _, height, width, _ = image.shape
    if height % self.patch or width % self.patch:
      raise ValueError(
        f"model.image.patch={self.patch} does not divide the image of {height} x {width} pixels"
      )
    options = {} if self.patch_bias else {"bias": False}
    x = STEMS[self.stem](self.patch, self.width, self.dtype, name="embedding", **options)(image)
    rows, cols = x.shape[1:3]
    x = einops.rearrange(x, "b h w d -> b (h w) d")
    rotation = None
    extra = self.class_token + self.registers
    if self.positions == "rope":
      rotation = jnp.asarray(rope(rows, cols, extra, self.width // self.heads, self.rope_theta))
    else:
      x = x + self._positions(rows, cols).astype(self.dtype)
    if train and self.patch_dropout:
      x = self._keep_some(x)
    if extra:
      x = jnp.concatenate([self._extra_tokens(x, extra), x], 1)
    if self.pre_norm:
      x = nn.LayerNorm(epsilon=self.block["epsilon"], dtype=self.dtype, name="ln_pre")(x)
    x = nn.Dropout(self.dropout, name="dropout")(x, not train)
    x = base.Encoder(self.depth, self.block, self.scan, self.remat, name="encoder")(
      sharding.constrain_batch(x), train=train, relation=rotation
    )
    patches = x[:, extra:]
    if self.pool == "cls":
      pooled = x[:, 0]
    elif self.pool == "pooler":
      pooled = jnp.tanh(Dense(self.width, dtype=self.dtype, name="pooler")(x[:, 0]))
    elif self.pool == "mean":
      pooled = base.masked_mean(patches, None)
    elif self.pool == "cls+mean":
      pooled = jnp.concatenate([x[:, 0], base.masked_mean(patches, None)], -1)
    else:
      pooled = base.MapHead(
        self.heads,
        self.hidden,
        self.block["activation"],
        self.block["epsilon"],
        self.dtype,
        name="map_head",
      )(x)
    return base.TowerOutput(pooled, patches)

  def _positions(self, rows: int, cols: int) -> jax.Array:
    """[1, rows * cols, D]."""
    if self.positions == "sincos2d":
      return jnp.asarray(sincos2d(rows, cols, self.width))[None]
    grid = self.grid or (rows, cols)
    drawn = self.drawn or grid

    def init(key: jax.Array) -> jax.Array:
      draw = nn.initializers.normal(1 / np.sqrt(self.width))
      return resampled(draw(key, (1, drawn[0] * drawn[1], self.width)), drawn, grid)

    return resampled(self.param("positions", init), grid, (rows, cols))

  def _extra_tokens(self, x: jax.Array, extra: int) -> jax.Array:
    """[B, extra, D]: the class token, which alone can have a position, and the registers."""
    tokens = self.param("extra_tokens", nn.initializers.normal(0.02), (1, extra, self.width))
    tokens = jnp.asarray(tokens, self.dtype)
    if self.class_position:
      position = self.param("class_position", nn.initializers.zeros, (1, 1, self.width))
      tokens = tokens.at[:, :1].add(position.astype(self.dtype))
    return jnp.broadcast_to(tokens, (x.shape[0], extra, self.width))

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
  patch_bias: bool = True,
  pool: str = "map",
  positions: str = "learned",
  rope_theta: float = 100.0,
  class_token: bool | None = None,
  class_position: bool = False,
  registers: int = 0,
  patch_dropout: float = 0.0,
  dropout: float = 0.0,
  activation: str = "gelu_tanh",
  epsilon: float = 1e-6,
  pre_norm: bool = False,
  biases: str = "qkvo",
  gated: bool = False,
  mlp_bias: bool = True,
  layer_scale: float | None = None,
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
    patch_bias: of the patch stem; CLIP has none.
    pool: "map" (attention pooling, SigLIP), "cls" (a class token), "pooler" (tanh of a linear map
      of it), "mean" of the patches, "cls+mean" (SAIL: one behind the other, 2 D wide).
    positions: "learned" (for one image size; stages of a run resample them), "sincos2d" (fixed) or
      "rope" (DINOv3), with frequencies from 1 down to 1 / rope_theta.
    class_token: whether there is one; None: where `pool` reads it.
    class_position: it has a learned position of its own.
    registers: extra tokens without a position, https://arxiv.org/abs/2309.16588.
    patch_dropout: share of the patches left out in training, https://arxiv.org/abs/2212.00794.
    dropout: on the embedding and both branches of each block.
    epsilon: of every layer norm.
    pre_norm: a layer norm before the first block (CLIP).
    biases: which of the q, k, v and o(ut) maps have one; mlp_bias: whether the MLP's have.
    gated: a gated MLP; SwiGLU with activation="silu".
    layer_scale: first value of a factor per channel on each branch; None: no such factor.
    scan: one program for all layers; False gives each layer its own parameters.
    remat: "none", "dots" or "full": activations kept, kept for weight matmuls, recomputed.
    dtype: of the computation; parameters are float32.
    attention: implementation in jax.nn.dot_product_attention: None (its choice), "xla", "cudnn".

  Raises:
    ValueError: for an unknown name, with the known ones, or options that exclude each other.
  """
  for name, value, names in (
    ("stem", stem, STEMS),
    ("pool", pool, POOLS),
    ("positions", positions, POSITIONS),
    ("activation", activation, base.ACTIVATIONS),
    ("remat", remat, base.REMAT),
    ("dtype", dtype, base.DTYPES),
  ):
    config.known(f"config.model.image.{name}", value, names)
  if stem == "conv" and (patch & (patch - 1) or not patch_bias):
    raise ValueError(f"config.model.image.patch={patch}: a conv stem needs a power of 2, and bias")
  needs_class = pool in ("cls", "pooler", "cls+mean")
  class_token = needs_class if class_token is None else class_token
  if not class_token and (needs_class or class_position):
    raise ValueError(f"config.model.image.class_token=False: pool={pool!r} or a position needs it")
  if positions == "rope" and patch_dropout:
    raise ValueError("config.model.image.patch_dropout: not with positions='rope'")
  width, depth, heads, hidden = base.size(variant, width, depth, heads, mlp_ratio)
  block: flax.core.FrozenDict[str, Any] = flax.core.FrozenDict(
    heads=heads,
    hidden=hidden,
    activation=activation,
    dropout=dropout,
    epsilon=epsilon,
    dtype=jnp.dtype(dtype),
    implementation=attention,
    biases=biases,
    gated=gated,
    mlp_bias=mlp_bias,
    layer_scale=layer_scale,
  )
  return ViT(
    patch,
    width,
    depth,
    heads,
    hidden,
    stem,
    patch_bias,
    pool,
    positions,
    rope_theta,
    class_token,
    class_position,
    registers,
    patch_dropout,
    dropout,
    pre_norm,
    scan,
    remat,
    block,
    jnp.dtype(dtype),
  )
