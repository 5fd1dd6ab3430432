"""A vision transformer for images of any aspect ratio: SigLIP 2's NaFlex.

https://arxiv.org/abs/2502.14786, after https://arxiv.org/abs/2307.06304
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import sharding
from bigalign.towers import base, vit


def axis_weights(row: jax.Array, size: jax.Array, n: int) -> jax.Array:
  """Weights that resize an axis: linear and antialiased, a triangle as wide as the larger pixel.

  Args:
    row: [B, N], rows of the result.
    size: [B], the number of rows of the result.
    n: rows of the table that is resized.

  Returns:
    [B, N, n]: the weight of each row of the table in each row of the result.
  """
  scale = n / size.astype(jnp.float32)[:, None, None]
  center = (row.astype(jnp.float32)[..., None] + 0.5) * scale
  rows = jnp.arange(n, dtype=jnp.float32)[None, None] + 0.5
  weights = jnp.maximum(1 - jnp.abs(rows - center) / jnp.maximum(scale, 1), 0)
  return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaflexOptions(base.TransformerOptions):
  """The options of a vision transformer that keeps the aspect ratio.

  Args:
    patch: pixels per side of a patch; must divide the image.
    grid: side of the square grid of learned positions, which is resized to each image's patches.

  Raises:
    ValueError: for an unknown name, with the known ones.
  """

  place: ClassVar[str] = "config.model.image"

  patch: int = 16
  grid: int = 16

  def build(self) -> NaFlex:
    """The tower with these options."""
    return NaFlex(self)


class NaFlex(nn.Module):
  """SigLIP 2's NaFlex vision transformer, https://arxiv.org/abs/2502.14786.

  >>> import jax
  >>> tower = NaflexOptions(patch=8, grid=4, width=16, depth=1, heads=2).build()
  >>> images = jax.numpy.zeros((2, 32, 16, 3))
  >>> output, parameters = tower.init_with_output(jax.random.key(0), images)
  >>> output.pooled.shape, output.tokens.shape
  ((2, 16), (2, 8, 16))

  Args:
    options: see NaflexOptions.
  """

  options: NaflexOptions

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    mask: jax.Array | None = None,
    shapes: jax.Array | None = None,
    train: bool = False,
  ) -> base.TowerOutput:
    """Embeds images, or their patches. Random key in training: "dropout".

    Args:
      image: [B, H, W, C], or patches [B, N, p * p * C] of images of different shapes; normalised.
      mask: [B, N] bool, True = a patch, not padding; None: all are patches.
      shapes: [B, 2] int, rows and columns of the patches of each image; needed for patches.
      train: whether dropout is on.

    Returns:
      pooled [B, D], tokens [B, N, D], and the mask.

    Raises:
      ValueError: for patches without shapes.
    """
    options, width, dtype = self.options, self.options.sizes.width, self.options.compute_dtype
    p = options.patch
    if image.ndim == 4:
      rows, cols = (size // p for size in image.shape[1:3])
      image = einops.rearrange(
        image, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p, h=rows, w=cols
      )
      shapes = jnp.broadcast_to(jnp.asarray([[rows, cols]]), (image.shape[0], 2))
    if shapes is None:
      raise ValueError("patches [B, N, p * p * C] need the rows and columns of each image")
    patches = einops.rearrange(image, "b n (p q c) -> b (n p) q c", p=p, q=p)
    x = vit.PatchEmbed(p, width, dtype, name="embedding")(patches)[:, :, 0]
    x = x + self._positions(shapes, x.shape[1]).astype(dtype)
    x = nn.Dropout(options.dropout, name="dropout")(x, not train)
    mask = None if mask is None else mask.astype(bool)
    x = base.Encoder(options, base.block_arguments(options), name="encoder")(
      sharding.constrain_batch(x), mask, train=train
    )
    return base.TowerOutput(base.MapHead(options, name="map_head")(x, mask), x, mask)

  def _positions(self, shapes: jax.Array, count: int) -> jax.Array:
    """[B, N, D]: the square grid of positions, resized to each image's rows and columns."""
    width, side = self.options.sizes.width, self.options.grid
    table = self.param("positions", nn.initializers.normal(1 / np.sqrt(width)), (1, side**2, width))
    index = jnp.arange(count)[None]
    cols = jnp.maximum(shapes[:, 1:], 1)
    down = axis_weights(index // cols, shapes[:, 0], side)
    across = axis_weights(index % cols, shapes[:, 1], side)
    square = einops.rearrange(table, "1 (i j) d -> i j d", i=side)
    return jnp.einsum("bni,bnj,ijd->bnd", down, across, square)
