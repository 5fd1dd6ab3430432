"""Masked images whose patches resemble those of the whole images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.losses.heads import masks
from bigalign.losses.heads.base import Head, Read, mean_loss
from bigalign.sphere import unit

PLACES = ("hidden", "all")


def mask_regularization(*, every: int = 16, ratio: float = 0.4, places: str = "hidden") -> Loss:
  """The patches of partly hidden images come close to those of the whole images.

  A copy of every 16th image goes through the image tower once more, with a learned vector in place
  of some patches. The loss is the mean over patches of 1 - cos(token of the copy, token of the
  whole image); the whole image gets no gradient of it, and the contrastive loss never sees the
  copies.

  Perception Encoder, https://arxiv.org/abs/2504.13181, section 2.1, which states every=16 and
  ratio=0.4; it says neither which patches count nor the weight of the term, so `places` and a
  weight of 1 are choices of this implementation.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(clip={}, mask_regularization=dict(weight=0.5))).terms]
  ['clip', 'mask_regularization']

  Args:
    every: one image out of this many is copied; it divides the rows of a microbatch on a device.
    ratio: share of the patches that are hidden, more than 0 and less than 1.
    places: which patches count: "hidden", or "all".

  Raises:
    ValueError: for an unknown name or a ratio out of range.
  """
  where = "config.loss.mask_regularization"
  checks.known(f"{where}.places", places, PLACES)
  if not 0 < ratio < 1:
    raise ValueError(f"{where}.ratio={ratio}: more than 0 and less than 1")
  if every < 1:
    raise ValueError(f"{where}.every={every}: at least 1")

  def some(x: jax.Array) -> jax.Array:
    """Every `every`-th row."""
    if len(x) % every and len(x) > 1:
      raise ValueError(f"{where}.every={every} does not divide the {len(x)} images of a microbatch")
    return rearrange(x, "(b k) ... -> b k ...", k=every if len(x) > 1 else 1)[:, 0]

  def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    shape = shapes["image"]
    return {"hidden": masks.uniform(key, shape[0], masks.patches(shape, sizes), ratio)}

  def init(key: jax.Array, read: Read) -> dict[str, Any]:
    width = read.features["tokens_img"].shape[-1]
    return {"vector": 0.02 * jax.random.normal(key, (width,), jnp.float32)}

  def apply_head(params: dict[str, Any], averaged: Any, read: Read) -> dict[str, jax.Array]:
    hidden = some(read.batch["hidden"])
    copies = read.image(some(read.batch["image"]), hidden=(hidden, params["vector"])).tokens
    whole = jax.lax.stop_gradient(some(read.features["tokens_img"]))
    cosines = (unit(copies.astype(jnp.float32)) * unit(whole.astype(jnp.float32))).sum(-1)
    count = hidden if places == "hidden" else jnp.ones_like(hidden)
    return {"sum": jnp.where(count, 1 - cosines, 0).sum(1), "count": count.sum(1)}

  return Loss(
    frozenset(),
    lambda sizes: ({}, {}),
    mean_loss,
    pair=False,
    head=Head(init, apply_head, draw=draw),
  )
