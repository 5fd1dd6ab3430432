"""The residual networks for CIFAR of https://arxiv.org/abs/1512.03385, section 4.2."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign import sharding
from bigalign.towers import base

WIDTHS = (16, 32, 64)  # of the three stages


class FrozenBatchNorm(nn.Module):
  """Batch norm with the statistics of pretraining, also in training: an affine map per channel.

  The statistics are parameters, so that checkpoints hold them. They have no gradient, and weight
  decay is by default for kernels only. Statistics of the batch would couple its samples.
  """

  dtype: Any
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, C]."""
    zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, x.shape[-1:]
    scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
    mean, var = (
      jax.lax.stop_gradient(self.param(name, init, shape)).astype(jnp.float32)
      for name, init in (("mean", zeros), ("var", ones))
    )
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    factor, shift = (v.astype(self.dtype)[None, None, None] for v in (factor, bias - mean * factor))
    return x * factor + shift


def shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
  """The paper's option A, without parameters: strided pixels, and zeros for the new channels."""
  more = (features - x.shape[-1]) // 2
  return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (more, more)))


def convolve(x: jax.Array, features: int, stride: int, dtype: Any, number: int) -> jax.Array:
  """A 3 x 3 convolution and its norm, padded by one pixel on each side for any stride, as torch."""
  x = nn.Conv(
    features,
    (3, 3),
    stride,
    padding=1,
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.he_normal(),
    name=f"conv{number}",
  )(x)
  return FrozenBatchNorm(dtype, name=f"bn{number}")(x)


class Block(nn.Module):
  """Two 3 x 3 convolutions and a shortcut."""

  features: int
  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, features]."""
    y = nn.relu(convolve(x, self.features, self.stride, self.dtype, 1))
    y = convolve(y, self.features, 1, self.dtype, 2)
    return sharding.constrain_batch(nn.relu(y + shortcut(x, self.features, self.stride)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResnetOptions(base.TowerOptions):
  """The options of a small residual network for small images.

  The tower is meant to start from pretrained weights.

  Args:
    depth: layers with weights, including the classifier: 20, 32, 44, 56, 110, any 6 n + 2.

  Raises:
    ValueError: for a depth of another form or an unknown name.
  """

  place: ClassVar[str] = "config.model.image"

  depth: int = 20

  def __post_init__(self) -> None:
    """Checks the values."""
    if self.depth < 8 or self.depth % 6 != 2:
      raise ValueError(f"{self.place}.depth={self.depth}: must be 6 n + 2, as 20 or 56")
    super().__post_init__()

  @property
  def token_width(self) -> int:
    """D, the width of the tower's tokens."""
    return WIDTHS[-1]

  def build(self) -> ResNetCifar:
    """The tower with these options."""
    return ResNetCifar(self)


class ResNetCifar(nn.Module):
  """A residual network for CIFAR.

  >>> import jax
  >>> tower = ResnetOptions(depth=8).build()
  >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
  >>> output, parameters = jax.eval_shape(tower.init_with_output, jax.random.key(0), images)
  >>> output.pooled.shape, output.tokens.shape
  ((2, 64), (2, 64, 64))

  Args:
    options: see ResnetOptions.
  """

  options: ResnetOptions

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> base.TowerOutput:
    """Embeds images.

    Args:
      image: [B, H, W, 3], normalised.
      train: changes nothing.

    Returns:
      pooled [B, 64], tokens [B, N, 64]: the pixels of the last feature map. N = H / 4 * W / 4, 64
      for images of 32 x 32.
    """
    dtype, policy = self.options.compute_dtype, base.REMAT[self.options.remat]
    x = nn.relu(convolve(image.astype(dtype), WIDTHS[0], 1, dtype, 1))
    block: Any = Block if policy is None else nn.remat(Block, policy=policy)
    for stage, features in enumerate(WIDTHS, 1):
      for i in range((self.options.depth - 2) // 6):
        stride = 2 if stage > 1 and i == 0 else 1
        x = block(features, stride, dtype, name=f"stage_{stage}_block_{i}")(x)
    tokens = einops.rearrange(x, "b h w d -> b (h w) d")
    return base.TowerOutput(base.masked_mean(tokens, None), tokens)
