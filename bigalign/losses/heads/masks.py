"""Random places of patches, drawn for each image of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

RECTANGLES = 16  # of each image, of which `blocks` covers as many as it needs


def patches(shape: tuple[int, ...], sizes: Mapping[str, Any]) -> int:
  """N, the number of patches of images [..., S, S, 3]."""
  rows, cols = grid(shape, sizes)
  return rows * cols


def grid(shape: tuple[int, ...], sizes: Mapping[str, Any]) -> tuple[int, int]:
  """The rows and columns of patches of images [..., S, S, 3]."""
  patch = sizes["patch"]
  if not patch:
    raise ValueError(
      "config.loss has a term that counts the patches of images, which needs an image tower with"
      " patches: config.model.image.name='vit'"
    )
  return int(shape[-3] // patch), int(shape[-2] // patch)


def uniform(key: jax.Array, batch: int, count: int, ratio: float) -> jax.Array:
  """[B, N] bool: in each row, `ratio` of the N places, rounded, chosen without replacement."""
  order = jnp.argsort(jax.random.uniform(key, (batch, count)), axis=1)
  return jnp.argsort(order, axis=1) < round(ratio * count)


def blocks(key: jax.Array, batch: int, size: tuple[int, int], ratio: float) -> jax.Array:
  """[B, N] bool: in each row, `ratio` of the N places, rounded, in rectangles that may overlap.

  The masks of BEiT, https://arxiv.org/abs/2106.08254: rectangles of random size, shape and place
  are covered one after the other. BEiT ends with the last one that fits; here the last one is cut
  at random, so that each image has the same number of places.

  Args:
    key: of the draws.
    batch: B.
    size: rows and columns of the patches of an image.
    ratio: share of the places.
  """
  rows, cols = size
  count = round(ratio * rows * cols)
  # Areas from 16 patches, as in BEiT, or 8 % of a small image, to what is left at first. BEiT needs
  # few rectangles; what RECTANGLES of them leave uncovered, which is rare, is ordered at random.
  least = min(16.0, 0.08 * rows * cols)
  of_area, of_aspect, of_place, of_ties = jax.random.split(key, 4)
  many = (batch, RECTANGLES)
  area = jax.random.uniform(of_area, many, minval=least, maxval=max(least, count))
  aspect = jnp.exp(jax.random.uniform(of_aspect, many, minval=jnp.log(0.3), maxval=-jnp.log(0.3)))
  heights = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
  widths = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, cols)
  along = jax.random.uniform(of_place, (2, *many))
  tops = jnp.floor(along[0] * (rows - heights + 1))
  lefts = jnp.floor(along[1] * (cols - widths + 1))

  def inside(first: jax.Array, length: jax.Array, total: int) -> jax.Array:
    """[B, K, total] bool."""
    at = jnp.arange(total)[None, None]
    return (at >= first[..., None]) & (at < (first + length)[..., None])

  # The first rectangle that covers a place, by a product of the two sides.
  covered = inside(tops, heights, rows)[..., :, None] & inside(lefts, widths, cols)[..., None, :]
  flat = rearrange(covered, "b k y x -> b k (y x)")
  first = jnp.where(flat.any(1), jnp.argmax(flat, axis=1), RECTANGLES)
  rank = first + jax.random.uniform(of_ties, (batch, rows * cols))
  order = jnp.argsort(rank, axis=1)
  return jnp.argsort(order, axis=1) < count


def ascending(chosen: jax.Array, count: int) -> jax.Array:
  """[B, count] int32: the places that are chosen, ascending.

  Args:
    chosen: [B, N] bool, with `count` places in each row.
    count: at least 1; if fewer are chosen, others follow.
  """
  return jnp.argsort(~chosen, axis=1, stable=True)[:, :count].astype(jnp.int32)
