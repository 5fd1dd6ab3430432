"""Products in bfloat16 whose kernels have float32 gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax


def _promote(x: jax.Array, kernel: jax.Array, bias: Any, *, dtype: Any, **_: Any) -> Any:
  """Flax's promotion, but for the kernel, which `_product` casts itself."""
  return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


def _product(
  x: jax.Array, kernel: jax.Array, dims: Any, precision: Any = None, **_: Any
) -> jax.Array:
  """lax.dot_general in x's dtype, with a gradient of the kernel in the kernel's own."""
  if x.dtype == kernel.dtype:
    return jax.lax.dot_general(x, kernel, dims, precision=precision)
  return _mixed(dims, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(dims: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.dot_general(x, kernel.astype(x.dtype), dims)


def _mixed_forward(dims: Any, x: jax.Array, kernel: jax.Array) -> Any:
  # Not by way of _mixed: in a function with a gradient of its own remat="dots" sees no product.
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

# The compiler adds the devices' gradients of a kernel in the dtype in which their product leaves
# them: in bfloat16, were the kernel cast before it. With these the sum over the mesh is float32.
WIDE_GRADIENT: dict[str, Any] = dict(promote_dtype=_promote, dot_general=_product)
