"""A vision transformer for patches of pictures of any aspect: SigLIP 2's NaFlex.

https://arxiv.org/abs/2502.14786, after https://arxiv.org/abs/2307.06304
"""

from __future__ import annotations

from typing import Any

import einops
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import config, sharding
from bigalign.towers import base, vit


def axis_weights(at: jax.Array, size: jax.Array, n: int) -> jax.Array:
  """[B, N, n]: how row `at` [B, N] of an axis of `size` [B] rows is mixed from n rows.

  Bilinear and antialiased: a triangle as wide as the larger of both pixels.
  """
  scale = n / size.astype(jnp.float32)[:, None, None]
  center = (at.astype(jnp.float32)[..., None] + 0.5) * scale
  rows = jnp.arange(n, dtype=jnp.float32)[None, None] + 0.5
  weights = jnp.maximum(1 - jnp.abs(rows - center) / jnp.maximum(scale, 1), 0)
  return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)


class NaFlex(nn.Module):
  """See `naflex` for the options."""

  patch: int
  grid: int
  width: int
  depth: int
  heads: int
  hidden: int
  dropout: float
  scan: bool
  remat: str
  block: flax.core.FrozenDict[str, Any]  # arguments of base.Block
  dtype: Any

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    mask: jax.Array | None = None,
    shapes: jax.Array | None = None,
    train: bool = False,
  ) -> base.TowerOutput:
    """Images [B, H, W, C], or patches [B, N, p * p * C] of `shapes` [B, 2] (rows, columns) each.

    mask [B, N], True = a patch; pixels normalised -> pooled [B, D], tokens [B, N, D].
    """
    p = self.patch
    if image.ndim == 4:
      rows, cols = (size // p for size in image.shape[1:3])
      image = einops.rearrange(
        image, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p, h=rows, w=cols
      )
      shapes = jnp.broadcast_to(jnp.asarray([[rows, cols]]), (image.shape[0], 2))
    if shapes is None:
      raise ValueError("patches [B, N, p * p * C] come with the rows and columns of each image")
    patches = einops.rearrange(image, "b n (p q c) -> b (n p) q c", p=p, q=p)
    x = vit.PatchEmbed(p, self.width, self.dtype, name="embedding")(patches)[:, :, 0]
    x = x + self._positions(shapes, x.shape[1]).astype(self.dtype)
    x = nn.Dropout(self.dropout, name="dropout")(x, not train)
    mask = None if mask is None else mask.astype(bool)
    x = base.Encoder(self.depth, self.block, self.scan, self.remat, name="encoder")(
      sharding.constrain_batch(x), mask, train=train
    )
    pooled = base.MapHead(
      self.heads,
      self.hidden,
      self.block["activation"],
      self.block["epsilon"],
      self.dtype,
      name="map_head",
    )(x, mask)
    return base.TowerOutput(pooled, x, mask)

  def _positions(self, shapes: jax.Array, count: int) -> jax.Array:
    """[B, N, D]: the square grid of positions, resized to each image's rows and columns."""
    table = self.param(
      "positions",
      nn.initializers.normal(1 / np.sqrt(self.width)),
      (1, self.grid**2, self.width),
    )
    index = jnp.arange(count)[None]
    cols = jnp.maximum(shapes[:, 1:], 1)
    down = axis_weights(index // cols, shapes[:, 0], self.grid)
    across = axis_weights(index % cols, shapes[:, 1], self.grid)
    square = einops.rearrange(table, "1 (i j) d -> i j d", i=self.grid)
    return jnp.einsum("bni,bnj,ijd->bnd", down, across, square)


def naflex(
  *,
  variant: str = "B",
  patch: int = 16,
  grid: int = 16,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_ratio: float | None = None,
  dropout: float = 0.0,
  activation: str = "gelu_tanh",
  epsilon: float = 1e-6,
  scan: bool = True,
  remat: str = "none",
  dtype: str = "bfloat16",
  attention: str | None = None,
) -> NaFlex:
  """A vision transformer that keeps the aspect; the options that `vit` has mean the same.

  Args:
    grid: side of the square of learned positions, which each image's patches resize.

  Raises:
    ValueError: for an unknown name, with the known ones.
  """
  for name, value, names in (
    ("activation", activation, base.ACTIVATIONS),
    ("remat", remat, base.REMAT),
    ("dtype", dtype, base.DTYPES),
  ):
    config.known(f"config.model.image.{name}", value, names)
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
  return NaFlex(
    patch, grid, width, depth, heads, hidden, dropout, scan, remat, block, jnp.dtype(dtype)
  )
