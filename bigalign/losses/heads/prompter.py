"""CLOC's Prompter: a transformer block that a box or a phrase asks for a part of an image."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from bigalign import sharding
from bigalign.losses.heads.base import Params
from bigalign.losses.heads.boxes import corner_waves
from bigalign.losses.heads.layers import dense, dense_init
from bigalign.towers.base import HIDDEN, Attention, Mlp, gelu


class PromptBlock(nn.Module):
  """A pre-norm transformer block of one head, read at its prompts alone.

  Each prompt sees its own tokens and the patches, not the other prompts. So this is what the block
  gives there for each prompt with the patches, but the patches are mapped to keys and values once
  per image, and their own output, which nothing reads, is not computed.

  Args:
    dtype: of the computation.
  """

  dtype: Any

  @nn.compact
  def __call__(self, prompts: jax.Array, patches: jax.Array) -> jax.Array:
    """[B, M, P, D]: M prompts of P tokens, after the block; patches [B, N, D]."""
    _, count, length, width = prompts.shape
    x = rearrange(prompts.astype(self.dtype), "b m p d -> b (m p) d")
    norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="ln1")
    y = norm(jnp.concatenate([x, patches.astype(self.dtype)], 1))
    own = np.kron(np.eye(count), np.ones((length, length))) > 0
    seen = np.concatenate([own, np.ones((count * length, patches.shape[1]), bool)], 1)
    bias = jnp.where(seen, 0.0, HIDDEN)[None, None]
    # Not "attn", whose heads are split over the mesh axis tensor: this is one head.
    x = x + Attention(1, self.dtype, name="attention")(y[:, : x.shape[1]], y, bias=bias)
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="ln2")(x)
    x = x + Mlp(4 * width, "gelu", dtype=self.dtype, name="mlp")(y)
    return sharding.constrain_batch(rearrange(x, "b (m p) d -> b m p d", m=count))


def init(key: jax.Array, patches: jax.Array, embed: int, *, grounds: bool) -> Params:
  """The parameters of a Prompter.

  Args:
    key: of the random numbers.
    patches: [b, N, D].
    embed: E, the width of the embeddings.
    grounds: whether it also finds the boxes of phrases.
  """
  width = patches.shape[-1]
  keys = jax.random.split(key, 5)
  prompts = jnp.zeros((len(patches), 1, 2, width), jnp.float32)
  block = PromptBlock(jnp.float32).init(keys[0], prompts, patches.astype(jnp.float32))
  params = {"block": block["params"], "region": dense_init(keys[1], width, embed)}
  if not grounds:
    return params
  return params | {
    "phrase": dense_init(keys[2], embed, width),
    "box_hidden": dense_init(keys[3], width, width),
    "box": dense_init(keys[4], width, 4),
  }


def regions(params: Params, patches: jax.Array, boxes: jax.Array) -> jax.Array:
  """[b, M, E] float32: what the image has in each box, before the norm.

  Two tokens, the encodings of two corners, go through the block with the patches; the mean of both
  is projected.

  Args:
    params: of `init`.
    patches: [b, N, D], tokens of the image tower before pooling.
    boxes: [b, M, 4] float32.
  """
  waves = corner_waves(boxes, patches.shape[-1])
  return dense(params["region"], _prompted(params, waves, patches))


def grounded(params: Params, patches: jax.Array, phrases: jax.Array) -> jax.Array:
  """[b, M, 4] float32: the box that each phrase describes.

  Args:
    params: of `init`.
    patches: [b, N, D].
    phrases: [b, M, E], unit norm.
  """
  prompts = dense(params["phrase"], phrases)[:, :, None]
  hidden = gelu(dense(params["box_hidden"], _prompted(params, prompts, patches)))
  return dense(params["box"], hidden)


def _prompted(params: Params, prompts: jax.Array, patches: jax.Array) -> jax.Array:
  """[b, M, P, D] -> [b, M, D], float32 at least: the mean of the tokens of a prompt."""
  block = PromptBlock(patches.dtype)
  tokens: Any = block.apply({"params": params["block"]}, prompts, patches)
  wide = tokens.astype(jnp.promote_types(patches.dtype, jnp.float32))
  mean: jax.Array = reduce(wide, "b m p d -> b m d", "mean")
  return mean
