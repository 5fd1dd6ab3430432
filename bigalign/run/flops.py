"""Floating-point operations of a traced function, counted in its jaxpr.

The compiler's own count includes the body of a loop once; here a scan over layers or microbatches
counts as often as it runs.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax

from bigalign.private_apis import FUSED_ATTENTION_PRODUCTS, fused_attention_flops

# Dense bf16 peak of one chip, FLOP/s, by a part of jax.Device.device_kind (vendors' data sheets).
PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  "TPU7x": 1153.5e12,  # one device is half of a chip of 2,307e12
  "A100": 312e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
}


def peak(device: jax.Device) -> float | None:
  """Returns the dense bf16 FLOP/s of one device, or None if it is unknown (every CPU)."""
  return next((p for kind, p in PEAK.items() if kind in device.device_kind), None)


def count(function: Any, *args: Any, **kwargs: Any) -> int:
  """Returns the FLOPs of the matrix products and convolutions in function(*args, **kwargs).

  A multiplication and an addition are two FLOPs. As usual for model FLOPs, elementwise work is left
  out. Rematerialised work counts as often as it runs. Fused attention counts as the products that
  it stands for, so every implementation of attention has the same count.

  Args:
    function: what to count; it is traced, not run.
    *args: arrays, or their shapes (jax.ShapeDtypeStruct).
    **kwargs: the same by name.
  """
  return of_jaxpr(jax.make_jaxpr(function)(*args, **kwargs))


def of_jaxpr(jaxpr: Any) -> int:
  """Returns the same as `count` for a jaxpr, closed or open."""
  return sum(by_name(jaxpr).values())


def by_name(jaxpr: Any, prefix: str = "") -> collections.Counter[str]:
  """Returns the same as `of_jaxpr`, by the names of the scopes in which the products are.

  Args:
    jaxpr: closed or open.
    prefix: of all names.

  Returns:
    {such as "/transpose(jvp(DualEncoder))/image_tower": FLOPs}.
  """
  total: collections.Counter[str] = collections.Counter()
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    scope = str(eqn.source_info.name_stack)
    total.update(_equation(eqn, f"{prefix}/{scope}" if scope else prefix))
  return total


def _equation(eqn: Any, scope: str) -> Mapping[str, int]:
  """FLOPs of an equation by scope; `scope` is its own."""
  name, params = eqn.primitive.name, eqn.params
  own = _products(eqn)
  if own is not None:
    return {scope: own}
  if name == "cond":
    branches = [by_name(branch, scope) for branch in params["branches"]]
    return max(branches, key=lambda counts: sum(counts.values()))
  inner: collections.Counter[str] = collections.Counter()
  for key, value in params.items():
    if (hasattr(value, "eqns") or hasattr(value, "jaxpr")) and key != "cond_jaxpr":
      inner.update(by_name(value, scope))
  times = 1
  if name == "shard_map":  # its body is the work of one device
    mesh: Mapping[str, int] = params["mesh"].shape
    times = math.prod(mesh[axis] for axis in params["newly_manual_axes"])
  elif name == "pallas_call":  # its body is the work of one cell of the grid
    times = int(math.prod(params["grid_mapping"].grid))
  elif name == "scan":  # a `while` counts once: only a scan knows its number of iterations
    times = int(params["length"])
  return {key: count * times for key, count in inner.items()}


def _products(eqn: Any) -> int | None:
  """FLOPs of an equation that is itself a product; None for all others."""
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return int(2 * eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contract))
  if name == "conv_general_dilated":
    kernel = eqn.invars[1].aval
    out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    # A transposed stride puts zeros between the pixels; good kernels do not multiply them.
    stride = math.prod(params["lhs_dilation"])
    return int(2 * eqn.outvars[0].aval.size * (kernel.size // out_features) // stride)
  if name in FUSED_ATTENTION_PRODUCTS:
    return fused_attention_flops(name, params, eqn.invars[0].aval, eqn.invars[1].aval)
  if name == "pallas_call" and params.get("cost_estimate"):
    return int(params["cost_estimate"].flops)  # the products that the kernel stands for
  return None
