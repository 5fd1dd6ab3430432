"""The choice of a sub-batch that is worth training on: JEST, https://arxiv.org/abs/2406.17711.

A super-batch of B pairs is scored by the model that learns and by a reference; pairs that the model
finds hard and the reference easy are chosen, in chunks, each given those chosen before. Neither
score matrix is kept: only its diagonal, and sums over the pairs chosen so far. A chunk of c pairs
adds its part with two B x c products of each model, which the engine forms over the mesh; its rows
are exchanged with a sum over the devices. The result depends on the whole super-batch and not on
the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from bigalign import checks, sharding
from bigalign.losses.engine.pairwise import DEFAULT, Engine

KINDS = ("softmax", "sigmoid")
Sums = dict[str, jax.Array]  # [B] each, over the pairs chosen so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """Which part of a batch is trained on: JEST, https://arxiv.org/abs/2406.17711.

  The reference is the teacher of config.data.teachers. Choosing costs a forward pass of the whole
  batch: with a share of 0.2, a step costs about 2.7 times as much as one on the part alone.

  Args:
    share: of the pairs of a batch that are trained on; 0: all, nothing is chosen.
    chunks: in so many parts they are chosen, each given those chosen before.
    scores: "softmax" or "sigmoid", as the loss of the run.
    reference_scale: logit scale of the teacher.
    reference_bias: logit bias of the teacher.
    scale: logit scale of the model in the scores, for losses whose temperature is constant or one
      per sample: the inverse of that temperature. None: the scale that a loss learns.
  """

  share: float = 0.0
  chunks: int = 16
  scores: str = "softmax"
  reference_scale: float = 100.0
  reference_bias: float = 0.0
  scale: float | None = None

  def __post_init__(self) -> None:
    checks.known("config.selection.scores", self.scores, KINDS)
    if not 0 <= self.share <= 1:
      raise ValueError(f"config.selection.share={self.share}: from 0 to 1")
    if self.chunks < 1:
      raise ValueError(f"config.selection.chunks={self.chunks}: at least 1")
    scales = {"reference_scale": self.reference_scale, "scale": self.scale}
    given = {name: x for name, x in scales.items() if x is not None}
    checks.above_zero("config.selection", **given)

  def size(self, batch_size: int) -> int:
    """The number of pairs of a batch that are trained on.

    Raises:
      ValueError: if it is not a whole number, or not a multiple of the chunks.
    """
    size = self.share * batch_size if self.share else batch_size
    if abs(size - round(size)) > 1e-6 or (self.share and round(size) % self.chunks):
      raise ValueError(
        f"config.selection chooses share={self.share} of {batch_size} pairs, {size:g}, in"
        f" chunks={self.chunks}: this must be a multiple of chunks"
      )
    return round(size)


class Model(NamedTuple):
  """What a model makes of a super-batch.

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm.
    scale: [], of its logits.
    bias: [], of its logits; it has no effect on the softmax scores.
  """

  zimg: jax.Array
  ztxt: jax.Array
  scale: Any
  bias: Any = 0.0


def jest(
  learner: Model,
  reference: Model,
  *,
  count: int,
  chunks: int = 16,
  kind: str = "softmax",
  key: jax.Array | None = None,
  engine: Engine = DEFAULT,
) -> jax.Array:
  """[count] int32: positions of the chosen pairs, in the order of their choice.

  A pair's logit is its own score plus what the pairs chosen so far add, see `logits`. A chunk is
  drawn without replacement, in proportion to exp(logit): the largest logits with Gumbel noise. With
  the sigmoid scores, the rule of the first chunk is our choice, since published listings differ.

  Args:
    learner: of the model that learns.
    reference: of a model that is better, or that is tuned on curated data (ACID: a larger one).
    count: pairs to choose; 1/5 of the super-batch in the paper.
    chunks: number of chunks, which divides `count`; 16 in the paper.
    kind: "softmax" or "sigmoid", of the scores.
    key: of the noise, which should be that of the step; None: no noise, the largest logits.
    engine: forms the products.

  Example:
    >>> z = jnp.eye(6)
    >>> swapped = z[jnp.asarray([0, 1, 2, 4, 3, 5])]  # a learner that takes 3 for 4
    >>> chosen = jest(Model(z, swapped, 10.0), Model(z, z, 10.0), count=2, chunks=1)
    >>> sorted(chosen.tolist())
    [3, 4]
  """
  checks.known("kind", kind, KINDS)
  size = len(learner.zimg)
  if chunks < 1 or count % chunks or not 0 < count <= size:
    raise ValueError(
      f"jest chooses count={count} of {size} pairs in chunks={chunks}: count must be at most the"
      " size of the super-batch, and a multiple of chunks"
    )
  both = jax.lax.stop_gradient((learner, reference))
  own = _own(*both, kind, engine)
  draws = count // chunks

  def choose(carry: Any, key: Any) -> tuple[Any, jax.Array]:
    sums, left = carry
    now = jnp.where(left, _logits(own, sums, kind), -jnp.inf)
    if key is not None:
      now += jax.random.gumbel(key, now.shape, now.dtype)
    # All devices sort the same B numbers.
    chosen = jax.lax.top_k(sharding.replicate(now), draws)[1].astype(jnp.int32)
    left &= jnp.ones_like(left).at[chosen].set(False)
    return (_added(sums, *both, chosen, kind, engine), left), chosen

  keys = None if key is None else jax.random.split(key, chunks)
  first = (_nothing(own, kind), jnp.ones(size, bool))
  chosen: jax.Array = jax.lax.scan(choose, first, keys, length=chunks)[1]
  return chosen.reshape(-1)


def logits(
  learner: Model,
  reference: Model,
  chosen: jax.Array,
  *,
  kind: str = "softmax",
  engine: Engine = DEFAULT,
) -> jax.Array:
  """[B]: the logit of each pair, given those chosen; -inf for these themselves.

  With z and r the logits of learner and reference, and A the scores: for "softmax" A = r - z, and
  the chosen pairs add N(z) - N(r), half the log-sum-exps of a pair's logits with them, in both
  directions. For "sigmoid" A is the difference of the pairs' sigmoid losses, and the chosen add
  their scores in both directions.

  Args:
    learner: of the model that learns.
    reference: of the other.
    chosen: [c] int32, positions of pairs; c may be 0.
    kind: "softmax" or "sigmoid".
    engine: forms the products.
  """
  own = _own(learner, reference, kind, engine)
  sums = _nothing(own, kind)
  if len(chosen):
    sums = _added(sums, learner, reference, chosen, kind, engine)
  return _logits(own, sums, kind).at[chosen].set(-jnp.inf)


def score(z: jax.Array, r: jax.Array, own: Any, kind: str) -> jax.Array:
  """How much worse the learner's logits z are than the reference's r, of pairs that are `own`."""
  if kind == "softmax":
    return r - z
  sign = jnp.where(own, -1, 1)
  harder: jax.Array = jax.nn.softplus(sign * z) - jax.nn.softplus(sign * r)
  return harder


def _own(learner: Model, reference: Model, kind: str, engine: Engine) -> jax.Array:
  """[B]: the score of each pair alone."""
  z, r = (x.scale * engine.paired(x.zimg, x.ztxt) + x.bias for x in (learner, reference))
  return score(z, r, True, kind)


def _nothing(own: jax.Array, kind: str) -> Sums:
  """The sums over no pair."""
  if kind == "sigmoid":
    return {"scores": jnp.zeros_like(own)}
  return dict.fromkeys(("z_row", "z_col", "r_row", "r_col"), jnp.full_like(own, -jnp.inf))


def _logits(own: jax.Array, sums: Sums, kind: str) -> jax.Array:
  """[B]: the logits of all pairs, given the sums over the chosen ones."""
  if kind == "sigmoid":
    return own + sums["scores"]
  some = jnp.isfinite(sums["z_row"])
  # Two wheres: -inf - (-inf) is not a number.
  z, r = (
    jnp.where(some, sums[f"{name}_row"], 0) + jnp.where(some, sums[f"{name}_col"], 0)
    for name in ("z", "r")
  )
  return own + (z - r) / 2


def _added(
  sums: Sums, learner: Model, reference: Model, chosen: jax.Array, kind: str, engine: Engine
) -> Sums:
  """The sums with those over the pairs `chosen` [c]."""
  rows = {"x": learner.zimg, "y": learner.ztxt, "rx": reference.zimg, "ry": reference.ztxt}
  columns = {name: rows_of(x, chosen) for name, x in rows.items()}
  shared = dict(zip(("s", "b", "rs", "rb"), (*learner[2:], *reference[2:])))

  def tile(row: Any, col: Any, shared: Any) -> dict[str, jax.Array]:
    def products(x: str, y: str, prefix: str) -> jax.Array:
      scale, bias = (jnp.asarray(shared[f"{prefix}{name}"]) for name in "sb")
      return scale * engine.products(row[x], col[y]) + bias

    # Of image i with the chosen texts, and of text i with the chosen images.
    z_row, z_col = products("x", "y", ""), products("y", "x", "")
    r_row, r_col = products("rx", "ry", "r"), products("ry", "rx", "r")
    if kind == "sigmoid":
      # No unchosen pair is among the chosen ones, so none of these is its own.
      return {"scores": score(z_row, r_row, False, kind) + score(z_col, r_col, False, kind)}
    return {"z_row": z_row, "z_col": z_col, "r_row": r_row, "r_col": r_col}

  reduction = "row_sum" if kind == "sigmoid" else "row_lse"
  new = engine.reduce(tile, rows, columns, shared, outputs=dict.fromkeys(sums, reduction))
  combine = jnp.add if kind == "sigmoid" else jnp.logaddexp
  return {name: combine(sums[name], new[name]) for name in sums}


def rows_of(x: jax.Array, index: jax.Array) -> jax.Array:
  """[c, E]: some rows of [B, E], exactly, without a copy of all rows on any device.

  Args:
    x: [B, E], sharded over the devices in any way.
    index: [c] int32, of rows.
  """
  axes, devices = sharding.devices()
  size = -(-len(x) // devices) * devices
  padded = jnp.pad(x, [(0, size - len(x)), (0, 0)]) if size > len(x) else x
  local = functools.partial(_local_rows, axes)
  rows: jax.Array = sharding.on_each_device(local, (P(axes), P()), P())(padded, index)
  return rows


def _local_rows(axes: tuple[str, ...], x: jax.Array, index: jax.Array) -> jax.Array:
  rows = _own_rows(x, index - (jax.lax.axis_index(axes) * len(x) if axes else 0))
  return jax.lax.psum(rows, axes) if axes else rows


def _own_rows(x: jax.Array, place: jax.Array) -> jax.Array:
  """[c, ...]: the rows at some places of a part [b, ...]; zeros where a place is outside of it."""
  here = (place >= 0) & (place < len(x))
  rows = x[jnp.where(here, place, 0)]
  return jnp.where(jnp.expand_dims(here, tuple(range(1, x.ndim))), rows, jnp.zeros((), x.dtype))


def part(x: jax.Array, index: jax.Array) -> jax.Array:
  """[c, ...]: some rows of a batch [B, ...], exactly, split over the devices as the batch is.

  Each device sends rows to the others in groups of one row for each of them, so that no device ever
  holds more than a few rows of others.

  Args:
    x: [B, ...].
    index: [c] int32, of rows; the parts of the batch divide c.
  """
  axes = sharding.batch_axes()
  if not axes:
    return x[index]
  local = functools.partial(_local_part, axes)
  rows: jax.Array = sharding.on_each_device(local, (P(axes), P()), P(axes))(x, index)
  return rows


def _local_part(axes: tuple[str, ...], x: jax.Array, index: jax.Array) -> jax.Array:
  is_bool = x.dtype == jnp.bool_
  x = x.astype(jnp.uint8) if is_bool else x
  devices = jax.lax.axis_size(axes)
  place = index - jax.lax.axis_index(axes) * len(x)

  def send(_: None, place: jax.Array) -> tuple[None, jax.Array]:
    return None, jax.lax.psum_scatter(_own_rows(x, place), axes, tiled=True)[0]

  # The n-th row of every device in one group.
  groups = rearrange(place, "(w n) -> n w", w=devices)
  rows = jax.lax.scan(send, None, groups)[1]
  return rows.astype(jnp.bool_) if is_bool else rows
