"""Implementations of attention: XLA's products, or a fused kernel on NVIDIA GPUs or on TPUs."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import sharding
from bigalign.towers import tpu_attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "tpu")
_WIDEST_HEAD = 128  # of cuDNN's gradients on every GPU since Ampere


class Device(NamedTuple):
  """What the choice depends on.

  Args:
    platform: of JAX: "cpu", "gpu", "tpu".
    capability: compute capability of an NVIDIA GPU; None for all other devices.
  """

  platform: str
  capability: tuple[int, int] | None = None


class Lengths(NamedTuple):
  """The tokens that cuDNN's attention attends to, for texts or images whose padding is at the end.

  Args:
    counts: [B] int32, tokens of each row that are attended to, at least one.
    mask: [B, N] bool, the same as a mask; None if each row has the same count.
  """

  counts: jax.Array
  mask: jax.Array | None = None


class Seen(NamedTuple):
  """The tokens that the kernel for TPUs attends to.

  Args:
    mask: [B, N] bool, True = attended to; None: all of them.
  """

  mask: jax.Array | None = None


Mask: TypeAlias = jax.Array | Lengths | Seen | None  # of Attention and attend, from prepare


def device() -> Device:
  """Returns the kind of device that the traced program is for: that of the mesh, if there is one.

  A program may be compiled for other devices than those of this machine.
  """
  mesh, own = jax.sharding.get_abstract_mesh(), jax.devices()[0]
  aimed: Any = own if mesh.empty else mesh.abstract_device or own
  if aimed.platform not in ("gpu", "cuda"):
    return Device(aimed.platform)
  if own.platform != aimed.platform:
    return Device("gpu", (8, 0) if aimed.device_kind.startswith("NVIDIA") else None)
  major, _, minor = str(getattr(own, "compute_capability", "")).partition(".")
  known = major.isdecimal() and minor.isdecimal()  # AMD's are names such as "gfx942"
  return Device("gpu", (int(major), int(minor)) if known else None)


def choose(
  asked: str | None,
  device: Device,
  *,
  dtype: np.dtype,
  tokens: int,
  heads: int,
  head: int,
  mask: str,
  bias: bool,
) -> str:
  """Returns the implementation of a tower's attention: "xla", "cudnn" or "tpu".

  "auto" is cuDNN for heads of 16 bits on Ampere and later. It is not with a bias: cuDNN's gradient
  of a bias has exceptions of its own, https://github.com/jax-ml/jax/issues/30593. On TPUs, "auto"
  is the kernel of tpu_attention for bfloat16 heads that fit into it.

  Args:
    asked: the option `attention`.
    device: that the program is for.
    dtype: of queries, keys and values.
    tokens: of a row.
    heads: their number.
    head: width of a head.
    mask: "none", "end" (padding follows all tokens that are not padding) or "any".
    bias: whether a bias is added to the logits.

  Raises:
    ValueError: for "cudnn" with a mask that its kernel cannot read, or "tpu" with sizes or a bias
      that its kernel cannot compute.
  """
  if asked == "cudnn" and mask == "any":
    raise ValueError(
      "attention='cudnn' needs padding at the end of each row, which a mask of this tower does not"
      " promise; leave attention out, or set it to 'xla'"
    )
  by_tpu = not bias and tpu_attention.fits(tokens, heads * head, head, dtype.itemsize)
  if asked == "tpu" and not by_tpu:
    has = f"{heads} heads of {head} and {tokens} tokens{' with a bias' if bias else ''}"
    raise ValueError(
      f"attention='tpu' computes {tpu_attention.LIMITS}, and this tower has {has}; leave attention"
      " out, or set it to 'xla'"
    )
  if asked != "auto":
    return asked or "xla"
  if device.platform == "tpu" and by_tpu and dtype.name == "bfloat16":
    return "tpu"
  by_cudnn = (
    device.platform == "gpu"
    and (device.capability or (0, 0)) >= (8, 0)
    and dtype.itemsize == 2
    and head % 8 == 0
    and head <= _WIDEST_HEAD
    and mask != "any"
    and not bias
  )
  return "cudnn" if by_cudnn else "xla"


def prepare(
  implementation: str, x: jax.Array, mask: jax.Array | None, relation: jax.Array | None
) -> tuple[jax.Array, Mask, jax.Array | None]:
  """Returns the arguments of a stack of blocks as an implementation of attention needs them.

  cuDNN has no gradient for an odd number of tokens. The token of zeros that makes it even goes
  through the whole stack, which costs 0.5 % more products at 197 tokens; to append it to queries,
  keys and values in each block would cost a copy of them all. No token attends to it, so it does
  not change the others, and its gradients are zero.

  The number of tokens is always stated: without, some versions of cuDNN return NaN gradients if 128
  does not divide it, https://github.com/NVIDIA/cudnn-frontend/issues/160.

  Args:
    implementation: from `choose`.
    x: [B, N, D], tokens.
    mask: [B, N] bool, True = no padding, which is at the end for cuDNN; None: no padding.
    relation: [2, N, K], a rotation, or [1, H, N, N], a bias.
  """
  if implementation != "cudnn":
    return x, Seen(mask) if implementation == "tpu" else mask, relation
  rows, count = x.shape[:2]
  if mask is None:
    counts = jnp.full(rows, count, jnp.int32)
  else:
    counts = jnp.maximum(mask.sum(1, dtype=jnp.int32), 1)
  counts = sharding.constrain_batch(counts)
  if count % 2:
    x = _one_more(x, 1)
    mask = None if mask is None else _one_more(mask, 1)
    if relation is not None:
      relation = _one_more(relation, *((1,) if relation.ndim == 3 else (2, 3)))
  return x, Lengths(counts, mask), relation


def _one_more(x: jax.Array, *axes: int) -> jax.Array:
  """x with a zero at the end of some axes."""
  return jnp.pad(x, [(0, int(axis in axes)) for axis in range(x.ndim)])


@jax.named_scope("dot_product_attention")  # a part of `bigalign plan`
def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: Mask = None,
  *,
  causal: bool = False,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Multi-head attention.

  Args:
    query: [B, N, H, K].
    key: [B, M, H, K].
    value: [B, M, H, K].
    mask: [B, M] bool, True = attended to; None: all of them. Lengths and Seen: the same, computed
      by cuDNN and by the kernel for TPUs.
    causal: whether token n attends only to the tokens up to n.
    bias: [1, H, N, M], added to the logits.

  Returns:
    [B, N, H, K].
  """
  if isinstance(mask, Seen):
    interpret = device().platform != "tpu"
    return tpu_attention.attend(query, key, value, mask.mask, causal, interpret)
  if not isinstance(mask, Lengths):
    hidden = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(
      query, key, value, bias=bias, mask=hidden, is_causal=causal, implementation="xla"
    )
  if mask.mask is not None:
    # Its gradients may stay unset where whole tiles of keys are padding.
    key, value = (jnp.where(mask.mask[:, :, None, None], x, 0) for x in (key, value))
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    bias=bias,
    is_causal=causal,
    key_value_seq_lengths=mask.counts,
    implementation="cudnn",
  )
