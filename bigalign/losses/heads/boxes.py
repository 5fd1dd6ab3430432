"""Boxes of an image: encodings of their corners, how they overlap, and which of two sets belong.

A box is [4]: left, top, right, bottom as shares of the image's sides.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

MOST_ASSIGNMENTS = 10_000  # that are compared; their costs are [B, assignments]
# Of the slowest and the fastest wave of an encoding, across the image. With 64, a Prompter trained
# alone for 600 steps had twice the cross-entropy on held-out boxes.
PERIODS = (0.5, 16.0)


def corner_waves(boxes: jax.Array, width: int) -> jax.Array:
  """[..., 4] -> [..., 2, width]: sinusoidal encodings of the first and the last corner.

  Args:
    boxes: [..., 4].
    width: of an encoding, a multiple of 4: sines and cosines of both coordinates.

  Raises:
    ValueError: for another width.
  """
  if width % 4:
    raise ValueError(
      "config.loss.region_phrase.pooling='prompter' encodes boxes at the width of the image tower,"
      f" {width}, which 4 does not divide; set config.model.image.width, or pooling='boxes'"
    )
  periods = jnp.asarray(np.geomspace(*PERIODS, width // 4), boxes.dtype)
  corners = rearrange(boxes, "... (c p) -> ... c p", p=2)
  angles = 2 * math.pi * corners[..., None] * jnp.expand_dims(periods, tuple(range(corners.ndim)))
  waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -2)
  return rearrange(waves, "... c p k f -> ... c (p k f)")


def of_centres(boxes: jax.Array) -> jax.Array:
  """[..., 4]: boxes of centre x, centre y, width, height."""
  centre, size = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([centre - size / 2, centre + size / 2], -1)


def to_centres(boxes: jax.Array) -> jax.Array:
  """[..., 4]: centre x, centre y, width, height of boxes."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], -1)


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """[...]: the overlap of two boxes, from -1 to 1, GIoU, https://arxiv.org/abs/1902.09630.

  The intersection over the union, less the share of the smallest box around both that neither
  covers. So boxes that do not meet have a gradient. Boxes without an area have the value 0.

  Args:
    a: [..., 4].
    b: [..., 4], of as many axes; those of length 1 are repeated.
  """

  def area(low: jax.Array, high: jax.Array) -> jax.Array:
    return jnp.prod(jnp.maximum(high - low, 0), -1)

  def share(part: jax.Array, whole: jax.Array) -> jax.Array:
    # Two wheres, since a gradient passes through both branches of one.
    there = whole > 0
    return jnp.where(there, part / jnp.where(there, whole, 1), 0)

  (a_low, a_high), (b_low, b_high) = ((x[..., :2], x[..., 2:]) for x in (a, b))
  both = area(jnp.maximum(a_low, b_low), jnp.minimum(a_high, b_high))
  union = area(a_low, a_high) + area(b_low, b_high) - both
  around = area(jnp.minimum(a_low, b_low), jnp.maximum(a_high, b_high))
  return share(both, union) - share(around - union, around)


def assignment(cost: jax.Array, real: jax.Array) -> jax.Array:
  """[..., M] int32: the column of each row, all different, with the smallest sum of costs.

  Exact: all ways to give M rows different columns are compared, Q! / (Q - M)! of them. Rows that
  are not real cost nothing, and take the columns that are left.

  Args:
    cost: [..., M, Q] with M <= Q; no gradient goes through it.
    real: [..., M] bool.

  Raises:
    ValueError: for more rows than columns, or too many ways.
  """
  rows, columns = cost.shape[-2:]
  if rows > columns or math.perm(columns, rows) > MOST_ASSIGNMENTS:
    raise ValueError(
      f"{rows} regions cannot be assigned to {columns} queries here: at most as many regions as"
      f" queries, in at most {MOST_ASSIGNMENTS:,} ways ({columns}! / ({columns} - {rows})!)"
    )
  ways = np.array([*itertools.permutations(range(columns), rows)], np.int32)  # [ways, M]
  chosen = np.eye(columns, dtype=bool)[ways]  # [ways, M, Q]
  counted = jnp.where(real[..., None], jax.lax.stop_gradient(cost), 0)
  # Products in one pass of bfloat16, as on TPUs, would choose another way.
  sums = jnp.einsum(
    "...mq,wmq->...w",
    counted,
    jnp.asarray(chosen, cost.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  return jnp.asarray(ways)[jnp.argmin(sums, -1)]
