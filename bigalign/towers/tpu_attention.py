"""Attention of short sequences as one kernel for TPUs, written in Pallas.

XLA writes the logits of all heads to memory, reads them for the softmax, and again for the product
with the values; so does its backward pass. Here the logits of one head of one row stay in on-chip
memory: the kernel reads queries, keys and values and writes the result. Its backward pass reads
these again, computes the logits again, and writes three gradients.

Queries and keys stay in the layout of the projections, [B, N, H * K]. 128 / K heads are next to
each other in 128 lanes, the width of a TPU's matrix unit. The other heads in these lanes are set to
zero in one factor of each product, which costs nothing: a product of 64 columns takes as long as
one of 128.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from bigalign import sharding

LANES = 128
LIMITS = "heads whose width divides 128, a multiple of 128 in all, of at most about 600 tokens"
_ROOM = 12 * 2**20  # bytes of on-chip memory for one call, of the 16 MiB that a kernel gets
_BLOCKS = 7  # arrays [N, W] that the backward pass reads and writes, each of which has two buffers
_SQUARES = 5  # arrays [N, N] of one head


def fits(tokens: int, width: int, head: int, itemsize: int) -> bool:
  """Returns whether the kernel can compute attention.

  Args:
    tokens: N, of queries and of keys.
    width: of all heads.
    head: K, width of a head.
    itemsize: bytes of a number.
  """
  return LANES % head == 0 and width % LANES == 0 and _lanes(tokens, width, itemsize) > 0


def _lanes(tokens: int, width: int, itemsize: int) -> int:
  """The width of all heads that one call computes; 0 if not even 128 lanes fit."""
  squares = _SQUARES * 4 * tokens**2
  widths = [w for w in range(LANES, width + 1, LANES) if width % w == 0]
  needed = {w: squares + _BLOCKS * 2 * tokens * w * itemsize for w in widths}
  return max((w for w, size in needed.items() if size <= _ROOM), default=0)


class Kind(NamedTuple):
  """What is computed.

  Attributes:
    head: K, width of a head.
    causal: whether token n attends only to the tokens up to n.
    interpret: whether the kernel is interpreted, on a device that is not a TPU.
  """

  head: int
  causal: bool
  interpret: bool


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  causal: bool,
  interpret: bool = False,
) -> jax.Array:
  """Multi-head attention.

  Args:
    query: [B, N, H, K].
    key: [B, N, H, K].
    value: [B, N, H, K].
    mask: [B, N] bool, True = attended to; None: all of them.
    causal: as of Kind.
    interpret: as of Kind.

  Returns:
    [B, N, H, K].
  """
  rows, tokens, heads, head = query.shape
  seen = jnp.ones((rows, tokens), jnp.float32) if mask is None else mask.astype(jnp.float32)
  flat = [einops.rearrange(x, "b n h k -> b n (h k)") for x in (query, key, value)]
  y = _attend(Kind(head, causal, interpret), *flat, seen[:, None])
  return einops.rearrange(y, "b n (h k) -> b n h k", h=heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kind: Kind, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
  """[B, N, H * K] of queries, keys and values; seen [B, 1, N] float32 -> [B, N, H * K]."""
  return _call(_forward, 1, 2, kind, seen, q, k, v)[0]


def _attend_forward(kind: Kind, *args: jax.Array) -> Any:
  return _attend(kind, *args), args


def _attend_backward(kind: Kind, saved: Any, g: jax.Array) -> Any:
  q, k, v, seen = saved
  return *_call(_backward, 3, 4, kind, seen, q, k, v, g), jnp.zeros_like(seen)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
  kernel: Any, outputs: int, products: int, kind: Kind, seen: jax.Array, *args: jax.Array
) -> tuple[jax.Array, ...]:
  """A kernel applied to the rows and heads of each device.

  Args:
    kernel: _forward or _backward.
    outputs: number of its results, each of the shape of the queries.
    products: of [N, K] and [N, N] matrices of a head that it stands for. The backward pass computes
      one more, the logits.
    kind: of attention.
    seen: [B, 1, N] float32.
    args: [B, N, H * K] each.
  """

  def local(seen: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
    rows, tokens, width = args[0].shape
    dtype = args[0].dtype
    lanes = _lanes(tokens, width, dtype.itemsize) or LANES
    block = pl.BlockSpec((None, tokens, lanes), lambda i, j: (i, 0, j))
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    results: tuple[jax.Array, ...] = pl.pallas_call(
      functools.partial(kernel, kind.head, kind.causal),
      grid=(rows, width // lanes),
      in_specs=[pl.BlockSpec((None, 1, tokens), lambda i, j: (i, 0, 0)), *[block] * len(args)],
      out_specs=[block] * outputs,
      out_shape=[shape] * outputs,
      name=f"attention{kernel.__name__}",
      interpret=kind.interpret,
      cost_estimate=pl.CostEstimate(
        flops=products * 2 * rows * tokens**2 * width,
        transcendentals=rows * tokens**2 * width // kind.head,
        bytes_accessed=(len(args) + outputs) * args[0].nbytes,
      ),
    )(seen, *args)
    return results

  axes, _ = sharding.devices()
  heads = "tensor" if "tensor" in axes and _divides(args[0].shape[-1]) else None
  rows, spec = P(sharding.batch_axes()), P(sharding.batch_axes(), None, heads)
  specs = (rows, *[spec] * len(args))
  on_each = sharding.on_each_device(local, specs, (spec,) * outputs)
  results: tuple[jax.Array, ...] = on_each(seen, *args)
  return results


def _divides(width: int) -> bool:
  """Whether the axis `tensor` of the mesh divides a width into multiples of 128 lanes."""
  parts: int = jax.sharding.get_abstract_mesh().shape["tensor"]
  return width % (LANES * parts) == 0


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
  """The product of two matrices that sums over one axis of each, in float32."""
  dims = (((axes[0],), (axes[1],)), ((), ()))
  return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _heads(head: int) -> list[jax.Array]:
  """For each head in 128 lanes, [1, 128] bool: which lanes are its own."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  return [(lane >= i) & (lane < i + head) for i in range(0, LANES, head)]


def _probabilities(q: Any, k: Any, visible: jax.Array, scale: float) -> jax.Array:
  """[N, 128] of the queries of one head, and keys -> [N, N] float32, as jax.nn computes them."""
  logits = jnp.where(visible, _dot(q, k, (1, 1)) * scale, -0.7 * jnp.finfo(jnp.float32).max)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def _visible(seen_ref: Any, causal: bool) -> jax.Array:
  """[1, N] or [N, N] bool: which keys each query attends to."""
  seen: jax.Array = seen_ref[...] > 0
  tokens = seen.shape[1]
  if not causal:
    return seen
  query, key = (jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in (0, 1))
  return seen & (key <= query)


def _forward(
  head: int, causal: bool, seen_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any
) -> None:
  """Writes the result for some heads of a row; every array but `seen` is [N, W]."""
  visible, scale = _visible(seen_ref, causal), head**-0.5
  for start in range(0, q_ref.shape[1], LANES):
    lanes = slice(start, start + LANES)
    q, k, v = (ref[:, lanes] for ref in (q_ref, k_ref, v_ref))
    y = jnp.zeros(q.shape, jnp.float32)
    for own in _heads(head):
      p = _probabilities(jnp.where(own, q, 0), k, visible, scale)
      y += _dot(p.astype(v.dtype), jnp.where(own, v, 0), (1, 0))
    y_ref[:, lanes] = y.astype(y_ref.dtype)


def _backward(
  head: int,
  causal: bool,
  seen_ref: Any,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  g_ref: Any,
  dq_ref: Any,
  dk_ref: Any,
  dv_ref: Any,
) -> None:
  """Writes three gradients for some heads of a row, from that of the result."""
  visible, scale = _visible(seen_ref, causal), head**-0.5
  for start in range(0, q_ref.shape[1], LANES):
    lanes = slice(start, start + LANES)
    q, k, v, g = (ref[:, lanes] for ref in (q_ref, k_ref, v_ref, g_ref))
    dq = dk = dv = jnp.zeros(q.shape, jnp.float32)
    for own in _heads(head):
      q1, k1, g1 = (jnp.where(own, x, 0) for x in (q, k, g))
      p = _probabilities(q1, k, visible, scale)
      dv += _dot(p.astype(g.dtype), g1, (0, 0))
      dp = _dot(g1, v, (1, 1))
      ds = (p * (dp - (p * dp).sum(-1, keepdims=True)) * scale).astype(q.dtype)
      dq += _dot(ds, k1, (1, 0))
      dk += _dot(ds, q1, (0, 0))
    for ref, x in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
      ref[:, lanes] = x.astype(ref.dtype)
