"""The residual networks for CIFAR of https://arxiv.org/abs/1512.03385, section 4.2."""

from __future__ import annotations

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign import config, sharding
from bigalign.towers import base

WIDTHS = (16, 32, 64)  # of the three stages


class FrozenBatchNorm(nn.Module):
  """Batch norm with the statistics of pretraining, in training too: an affine map per channel.

  The statistics are parameters, so that checkpoints hold them; no gradient reaches them, and by
  default only kernels decay. A batch's own would tie its samples to each other.
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
  """Option A, without parameters: every second pixel, and zeros for the new channels."""
  more = (features - x.shape[-1]) // 2
  return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (more, more)))


def convolve(x: jax.Array, features: int, stride: int, dtype: Any, number: int) -> jax.Array:
  """3 x 3 and its norm; one pixel of zeros on every side whatever the stride, as in torch."""
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


class ResNetCifar(nn.Module):
  """See `resnet_cifar` for the options."""

  depth: int
  remat: str
  dtype: Any
  width: int = WIDTHS[-1]

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> base.TowerOutput:
    """[B, H, W, 3] normalised -> pooled [B, 64], tokens [B, N, 64]: the last map's pixels.

    N = H / 4 * W / 4, 64 for images of 32 x 32. `train` changes nothing.
    """
    x = nn.relu(convolve(image.astype(self.dtype), WIDTHS[0], 1, self.dtype, 1))
    block: Any = Block
    if base.REMAT[self.remat] is not None:
      block = nn.remat(Block, policy=base.REMAT[self.remat])
    for stage, features in enumerate(WIDTHS, 1):
      for i in range((self.depth - 2) // 6):
        stride = 2 if stage > 1 and i == 0 else 1
        x = block(features, stride, self.dtype, name=f"stage_{stage}_block_{i}")(x)
    tokens = einops.rearrange(x, "b h w d -> b (h w) d")
    return base.TowerOutput(base.masked_mean(tokens, None), tokens)


def resnet_cifar(*, depth: int = 20, remat: str = "none", dtype: str = "bfloat16") -> ResNetCifar:
  """A small residual network for small images, to start from pretrained weights.

  Args:
    depth: weighted layers, classifier included: 20, 32, 44, 56, 110, any 6 n + 2.
    remat, dtype: as in `vit`, for each block.

  Raises:
    ValueError: for a depth of another form or an unknown name.
  """
  if depth < 8 or depth % 6 != 2:
    raise ValueError(f"config.model.image.depth={depth}: must be 6 n + 2, as 20 or 56")
  config.known("config.model.image.remat", remat, base.REMAT)
  config.known("config.model.image.dtype", dtype, base.DTYPES)
  return ResNetCifar(depth, remat, jnp.dtype(dtype))
