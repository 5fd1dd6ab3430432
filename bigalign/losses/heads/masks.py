"""Random places of patches, drawn for each image of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def patches(shape: tuple[int, ...], sizes: Mapping[str, Any]) -> int:
  """N, the number of patches of images [..., S, S, 3]."""
  patch = sizes["patch"]
  if not patch:
    raise ValueError(
      "config.loss has a term that counts the patches of images, which needs an image tower with"
      " patches: config.model.image.name='vit'"
    )
  return int((shape[-3] // patch) * (shape[-2] // patch))


def uniform(key: jax.Array, batch: int, count: int, ratio: float) -> jax.Array:
  """[B, N] bool: in each row, `ratio` of the N places, rounded, chosen without replacement."""
  order = jnp.argsort(jax.random.uniform(key, (batch, count)), axis=1)
  return jnp.argsort(order, axis=1) < round(ratio * count)
