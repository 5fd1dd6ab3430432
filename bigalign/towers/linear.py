"""Matmuls and lookups in bfloat16 whose kernels and tables have float32 gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bigalign import sharding


def _promote(x: jax.Array, kernel: jax.Array, bias: Any, *, dtype: Any, **_: Any) -> Any:
  """Flax's promotion of the inputs and the bias; `product` casts the kernel itself."""
  return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


def product(
  x: jax.Array, kernel: jax.Array, dims: Any, precision: Any = None, **_: Any
) -> jax.Array:
  """lax.dot_general in the dtype of x, with a gradient of the kernel in the kernel's dtype.

  Args:
    x: [..., K], inputs.
    kernel: [K, ...], parameters.
    dims: dimension numbers of lax.dot_general; kernel axes that are summed over come first.
    precision: of lax.dot_general, if both have the same dtype.
  """
  if x.dtype == kernel.dtype:
    return jax.lax.dot_general(x, kernel, dims, precision=precision)
  return _mixed(dims, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(dims: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """lax.dot_general with a kernel of a wider dtype than x."""
  return jax.lax.dot_general(x, kernel.astype(x.dtype), dims)


def _mixed_forward(dims: Any, x: jax.Array, kernel: jax.Array) -> Any:
  # This does not call _mixed: remat="dots" does not see a matmul inside of a custom_vjp.
  return jax.lax.dot_general(x, kernel.astype(x.dtype), dims), (x, kernel)


def _mixed_backward(dims: Any, saved: Any, g: jax.Array) -> Any:
  x, kernel = saved
  n = len(dims[0][1])  # axes of the kernel that are summed over: its first, and the last of x
  rows, outs = range(x.ndim - n), range(kernel.ndim - n)
  dx = jax.lax.dot_general(
    g, kernel.astype(x.dtype), (([len(rows) + i for i in outs], [n + i for i in outs]), ((), ()))
  )
  return dx, jax.lax.dot_general(
    x, g, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype
  )


_mixed.defvjp(_mixed_forward, _mixed_backward)

# The compiler sums the gradients of a kernel over devices in the dtype that the matmul returns. If
# the kernel were cast before the matmul, that would be bfloat16; with these layers it is float32.
_WIDE: dict[str, Any] = dict(promote_dtype=_promote, dot_general=product)
Dense: Callable[..., nn.Dense] = functools.partial(nn.Dense, **_WIDE)
DenseGeneral: Callable[..., nn.DenseGeneral] = functools.partial(nn.DenseGeneral, **_WIDE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
  """The rows of a table for some ids. The table is first gathered onto every device.

  Each device sums its gradient in float32, whatever `dtype` is: in bfloat16, a token that occurs a
  thousand times (padding, "a") would count as 256. The sum over devices is in the table's dtype.

  Args:
    table: [V, D], parameters.
    ids: [B, ...] int.
    dtype: of the result.

  Returns:
    [B, ..., D].
  """
  return sharding.replicate(table.astype(dtype))[ids]


def _lookup_forward(table: jax.Array, ids: jax.Array, dtype: Any) -> Any:
  return lookup(table, ids, dtype), (table, ids)


def _lookup_backward(dtype: Any, saved: Any, g: jax.Array) -> Any:
  table, ids = saved
  wide = jnp.promote_types(table.dtype, jnp.float32)

  def local_sum(ids: jax.Array, g: jax.Array) -> jax.Array:
    local = jnp.zeros(table.shape, wide).at[ids].add(g.astype(wide)).astype(table.dtype)
    summed = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(local, summed) if summed else local

  axes = sharding.batch_axes()
  rows = P(axes)
  return sharding.on_each_device(local_sum, (rows, rows), P())(ids, g), None


lookup.defvjp(_lookup_forward, _lookup_backward)
