"""MobileNetV2 of width 1.0, https://arxiv.org/abs/1801.04381."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign import sharding
from bigalign.towers import base
from bigalign.towers.linear import Dense

# The paper's table 2: (expansion, channels, blocks, stride of the first).
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
STEM, WIDTH = 32, 1280


def pointwise(x: jax.Array, features: int, dtype: Any, name: str) -> jax.Array:
  """A 1 x 1 convolution with a bias: a matmul."""
  return Dense(features, dtype=dtype, name=name)(x)


class Depthwise(nn.Module):
  """A 3 x 3 convolution of each channel, with a bias and TensorFlow's padding.

  It is computed as nine products: XLA's grouped convolutions take 5 to 13 times as long on CPUs.
  """

  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, C], rounded up."""
    kernel = self.param("kernel", nn.initializers.he_normal(), (3, 3, x.shape[-1]))
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    strides = (self.stride, self.stride)
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (3, 3), strides, "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, cols = ((n - 3) // self.stride * self.stride + 1 for n in x.shape[1:3])
    y = sum(
      x[:, i : i + rows : self.stride, j : j + cols : self.stride] * kernel[i, j][None, None, None]
      for i in range(3)
      for j in range(3)
    )  # in float32, the kernel's dtype
    return (y + bias[None, None, None]).astype(self.dtype)


class Bottleneck(nn.Module):
  """Inverted residual: a wide depthwise convolution between two narrow linear ends."""

  expansion: int
  features: int
  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, features], rounded up."""
    y = x
    if self.expansion > 1:
      y = nn.relu6(pointwise(y, self.expansion * x.shape[-1], self.dtype, "expand"))
    y = nn.relu6(Depthwise(self.stride, self.dtype, name="depthwise")(y))
    y = pointwise(y, self.features, self.dtype, "project")
    return sharding.constrain_batch(x + y if x.shape == y.shape else y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobilenetOptions(base.TowerOptions):
  """The options of MobileNetV2 with batch norm folded into its convolutions.

  The tower is meant to start from pretrained weights.

  Raises:
    ValueError: for an unknown name, with the known ones.
  """

  place: ClassVar[str] = "config.model.image"

  @property
  def token_width(self) -> int:
    """D, the width of the tower's tokens."""
    return WIDTH

  def build(self) -> MobileNetV2:
    """The tower with these options."""
    return MobileNetV2(self)


class MobileNetV2(nn.Module):
  """MobileNetV2 of width 1.0.

  >>> import jax
  >>> tower = MobilenetOptions().build()
  >>> images = jax.ShapeDtypeStruct((2, 64, 64, 3), "float32")
  >>> output, parameters = jax.eval_shape(tower.init_with_output, jax.random.key(0), images)
  >>> output.pooled.shape, output.tokens.shape
  ((2, 1280), (2, 4, 1280))

  Args:
    options: see MobilenetOptions.
  """

  options: MobilenetOptions

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> base.TowerOutput:
    """Embeds images.

    Args:
      image: [B, H, W, 3], normalised.
      train: changes nothing.

    Returns:
      pooled [B, 1280], tokens [B, N, 1280]: the pixels of the last feature map.
      N = H / 32 * W / 32, each rounded up: 49 for images of 224 x 224.
    """
    dtype, policy = self.options.compute_dtype, base.REMAT[self.options.remat]
    x = nn.Conv(
      STEM,
      (3, 3),
      2,
      "SAME",
      dtype=dtype,
      kernel_init=nn.initializers.he_normal(),
      name="stem",
    )(image.astype(dtype))
    x = nn.relu6(x)
    bottleneck: Any = Bottleneck if policy is None else nn.remat(Bottleneck, policy=policy)
    blocks = ((t, c, s if i == 0 else 1) for t, c, n, s in STAGES for i in range(n))
    for i, (expansion, features, stride) in enumerate(blocks, 1):
      x = bottleneck(expansion, features, stride, dtype, name=f"bottleneck_{i}")(x)
    x = nn.relu6(pointwise(x, WIDTH, dtype, "head"))
    tokens = einops.rearrange(x, "b h w d -> b (h w) d")
    return base.TowerOutput(base.masked_mean(tokens, None), tokens)
