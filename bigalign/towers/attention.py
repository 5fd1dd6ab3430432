"""Implementations of attention: XLA's products, or cuDNN's fused kernel on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import sharding

IMPLEMENTATIONS = ("auto", "xla", "cudnn")
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


def is_fused(
  asked: str | None, device: Device, *, dtype: np.dtype, head: int, mask: str, bias: bool
) -> bool:
  """Returns whether a tower uses cuDNN's attention.

  "auto" does for heads of 16 bits on Ampere and later. It does not with a bias: cuDNN's gradient of
  a bias has exceptions of its own, https://github.com/jax-ml/jax/issues/30593.

  Args:
    asked: the option `attention`.
    device: that the program is for.
    dtype: of queries, keys and values.
    head: width of a head.
    mask: "none", "end" (padding follows all tokens that are not padding) or "any".
    bias: whether a bias is added to the logits.

  Raises:
    ValueError: for "cudnn" with a mask that its kernel cannot read.
  """
  if asked == "cudnn" and mask == "any":
    raise ValueError(
      "attention='cudnn' needs padding at the end of each row, which a mask of this tower does not"
      " promise; leave attention out, or set it to 'xla'"
    )
  if asked != "auto":
    return asked == "cudnn"
  return (
    device.platform == "gpu"
    and (device.capability or (0, 0)) >= (8, 0)
    and dtype.itemsize == 2
    and head % 8 == 0
    and head <= _WIDEST_HEAD
    and mask != "any"
    and not bias
  )


def prepare(
  x: jax.Array, mask: jax.Array | None, relation: jax.Array | None
) -> tuple[jax.Array, Lengths, jax.Array | None]:
  """Returns the arguments of a stack of blocks as cuDNN's attention needs them.

  cuDNN has no gradient for an odd number of tokens. The token of zeros that makes it even goes
  through the whole stack, which costs 0.5 % more products at 197 tokens; to append it to queries,
  keys and values in each block would cost a copy of them all. No token attends to it, so it does
  not change the others, and its gradients are zero.

  The number of tokens is always stated: without, some versions of cuDNN return NaN gradients if 128
  does not divide it, https://github.com/NVIDIA/cudnn-frontend/issues/160.

  Args:
    x: [B, N, D], tokens.
    mask: [B, N] bool, True = no padding, which is at the end; None: no padding.
    relation: [2, N, K], a rotation, or [1, H, N, N], a bias.
  """
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


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | Lengths | None = None,
  *,
  causal: bool = False,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Multi-head attention.

  Args:
    query: [B, N, H, K].
    key: [B, M, H, K].
    value: [B, M, H, K].
    mask: [B, M] bool, True = attended to; Lengths: the same, computed by cuDNN; None: all of them.
    causal: whether token n attends only to the tokens up to n.
    bias: [1, H, N, M], added to the logits.

  Returns:
    [B, N, H, K].
  """
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
