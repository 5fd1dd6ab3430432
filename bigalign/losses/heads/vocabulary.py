"""Cross-entropy over a large vocabulary, whose logits [B, L, V] never exist as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from bigalign import sharding

# Logits that exist at a time on a device, 64 MiB in float32. A block has at least _NARROWEST words,
# so that the product of tokens and words is not limited by the memory bandwidth.
_LOGITS = 2**24
_NARROWEST = 512

_TENSOR = "tensor"


class TokenLosses(NamedTuple):
  """The losses of tokens.

  Args:
    nll: [b, L] float32, the negative log likelihood of each label, smoothed.
    correct: [b, L] bool, whether no other word has a higher logit; without gradient.
  """

  nll: jax.Array
  correct: jax.Array


class _Plan(NamedTuple):
  """What the products depend on besides arrays: label smoothing, and words of a block or None."""

  smoothing: float
  chunk: int | None


def token_losses(
  hidden: jax.Array,
  kernel: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
  chunk: int | None = None,
) -> TokenLosses:
  """The cross-entropy of each token, by blocks of words, which the backward pass computes again.

  A pass over blocks of words reads the kernel once and keeps a running log-sum-exp for each token,
  as fused attention does. Products are in the dtype of `hidden`; logits, exponentials and sums are
  float32 (float64 for float64). With an axis "tensor" in the mesh, each part of it computes its
  part of the words.

  Args:
    hidden: [b, L, D], states of the last layer.
    kernel: [D, V], parameters.
    labels: [b, L] int32, in [0, V).
    label_smoothing: e of (1 - e) nll + e / V * (sum over all words of their nll).
    chunk: words of a block; None: as many as fit into 64 MiB of logits, at least 512.
  """
  plan = _Plan(label_smoothing, chunk)
  nll, correct = _losses(plan, hidden, kernel, labels)
  return TokenLosses(nll, jax.lax.stop_gradient(correct))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
  plan: _Plan, hidden: jax.Array, kernel: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  losses: tuple[jax.Array, jax.Array] = _forward(plan, hidden, kernel, labels)[0]
  return losses


def _forward(plan: _Plan, hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
  words = kernel.shape[1]
  axes, split = sharding.batch_axes(), _tensor_parts(words)

  def local(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    x, y = _flat(hidden), labels.reshape(-1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first = _first_word(kernel, split)

    def add(sums: tuple[jax.Array, ...], start: Any, block: jax.Array) -> tuple[jax.Array, ...]:
      top, total, of_label, mean = sums
      logits = _logits(x, block, wide)
      higher = jnp.maximum(top, logits.max(1))
      total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(1)
      of_label += jnp.where(_is_label(y, first + start, block), logits, 0).sum(1)
      return higher, total, of_label, mean + logits.sum(1) / words

    zeros = jnp.zeros(len(y), wide)
    sums = (jnp.full(len(y), -jnp.inf, wide), zeros, zeros, zeros)
    top, total, of_label, mean = _over_blocks(plan, len(y), kernel, sums, add)
    if split:
      top, own = jax.lax.pmax(top, _TENSOR), top
      total, of_label, mean = jax.lax.psum((total * jnp.exp(own - top), of_label, mean), _TENSOR)
    lse = top + jnp.log(total)
    e = plan.smoothing
    nll = lse - (1 - e) * of_label - (e * mean if e else 0)
    shape = labels.shape
    return nll.reshape(shape), (of_label >= top).reshape(shape), lse.reshape(shape)

  rows, columns = P(axes), P(None, _TENSOR) if split else P()
  device = sharding.on_each_device(local, (rows, columns, rows), (rows, rows, rows))
  nll, correct, lse = device(hidden, _gathered(kernel, hidden.dtype), labels)
  return (nll, correct), (hidden, kernel, labels, lse)


def _backward(plan: _Plan, saved: Any, cotangents: Any) -> Any:
  hidden, kernel, labels, lse = saved
  words = kernel.shape[1]
  axes, split = sharding.batch_axes(), _tensor_parts(words)

  def local(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, lse: jax.Array, g: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    x, y, lse, g = _flat(hidden), labels.reshape(-1), lse.reshape(-1), g.reshape(-1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, e = _first_word(kernel, split), plan.smoothing

    def add(sums: tuple[jax.Array, ...], start: Any, block: jax.Array) -> tuple[jax.Array, ...]:
      dx, dkernel = sums
      p = jnp.exp(_logits(x, block, wide) - lse[:, None])
      d = p - jnp.where(_is_label(y, first + start, block), 1 - e, 0.0) - e / words
      d = (d * g[:, None]).astype(x.dtype)
      dx += jax.lax.dot_general(
        d, block.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=wide
      )
      dblock = jax.lax.dot_general(
        x, d, (((0,), (0,)), ((), ())), preferred_element_type=dkernel.dtype
      )
      return dx, jax.lax.dynamic_update_slice_in_dim(dkernel, dblock, start, 1)

    sums = jnp.zeros(x.shape, wide), jnp.zeros(kernel.shape, wide)
    dx, dkernel = _over_blocks(plan, len(y), kernel, sums, add)
    if split:
      dx = jax.lax.psum(dx, _TENSOR)
    summed = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    dkernel = jax.lax.psum(dkernel, summed) if summed else dkernel
    return dx.astype(hidden.dtype).reshape(hidden.shape), dkernel

  rows, columns = P(axes), P(None, _TENSOR) if split else P()
  device = sharding.on_each_device(local, (rows, columns, rows, rows, rows), (rows, columns))
  dhidden, dkernel = device(hidden, _gathered(kernel, hidden.dtype), labels, lse, cotangents[0])
  return dhidden, dkernel.astype(kernel.dtype), None


_losses.defvjp(_forward, _backward)


def _over_blocks(
  plan: _Plan,
  tokens: int,
  kernel: jax.Array,
  sums: tuple[jax.Array, ...],
  add: Callable[[tuple[jax.Array, ...], Any, jax.Array], tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
  """add(sums, first word, [D, width]) for each block of words; the last one may be narrower."""
  words = kernel.shape[1]
  fitting = max(_NARROWEST, _LOGITS // tokens // 128 * 128)
  width = min(words, plan.chunk or fitting)

  def one(sums: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    block = jax.lax.dynamic_slice_in_dim(kernel, start, width, 1)
    # As integers, the block keeps the compiler for TPUs from casting all of a float32 kernel to
    # bfloat16 before the loop and keeping the copy: 393 MB at V = 256,000 and D = 768.
    bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(block, unsigned))
    return add(sums, start, jax.lax.bitcast_convert_type(bits, kernel.dtype)), None

  unsigned = jnp.dtype(f"uint{8 * kernel.dtype.itemsize}")
  whole = words // width * width
  sums, _ = jax.lax.scan(one, sums, jnp.arange(0, whole, width))
  return add(sums, whole, kernel[:, whole:]) if whole < words else sums


def _logits(x: jax.Array, block: jax.Array, wide: Any) -> jax.Array:
  """[N, D], [D, C] -> [N, C]."""
  logits: jax.Array = jax.lax.dot_general(
    x, block.astype(x.dtype), (((1,), (0,)), ((), ())), preferred_element_type=wide
  )
  return logits


def _is_label(labels: jax.Array, start: Any, block: jax.Array) -> jax.Array:
  """[N] ids, first word of a block of C -> [N, C] bool."""
  here: jax.Array = labels[:, None] == start + jnp.arange(block.shape[1])[None]
  return here


def _flat(x: jax.Array) -> jax.Array:
  """[b, L, D] -> [b L, D]."""
  flat: jax.Array = rearrange(x, "b l d -> (b l) d")
  return flat


def _gathered(kernel: jax.Array, dtype: Any) -> jax.Array:
  """The kernel; where devices hold parts of it, in the dtype of the products before its gather."""
  axes, _ = sharding.devices()
  parts = jax.sharding.get_abstract_mesh().shape["fsdp"] if "fsdp" in axes else 1
  return kernel.astype(dtype) if parts > 1 else kernel


def _tensor_parts(words: int) -> bool:
  """Whether the parts of the mesh axis "tensor" compute parts of the words."""
  axes, _ = sharding.devices()
  parts = jax.sharding.get_abstract_mesh().shape[_TENSOR] if _TENSOR in axes else 1
  return bool(parts > 1 and words % parts == 0)


def _first_word(kernel: jax.Array, split: bool) -> Any:
  """The number of the first word of the local kernel."""
  return jax.lax.axis_index(_TENSOR) * kernel.shape[1] if split else 0
