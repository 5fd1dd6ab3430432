"""Floating point operations of a traced function, counted on its jaxpr.

The compiler's own count takes the body of a loop once; a scan over layers or microbatches is
counted here as often as it runs.
"""

from __future__ import annotations

import math
from typing import Any

import jax

# Dense bf16 peak of one chip, FLOP/s, by a part of jax.Device.device_kind (makers' data sheets).
PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  "TPU7x": 1153.5e12,  # one device is half of a chip of 2,307
  "A100": 312e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
}


def peak(device: jax.Device) -> float | None:
  """Dense bf16 FLOP/s of one device, None where it is not known (every CPU)."""
  return next((p for kind, p in PEAK.items() if kind in device.device_kind), None)


def count(function: Any, *args: Any, **kwargs: Any) -> int:
  """FLOPs of matrix products and convolutions in function(*args), shapes suffice.

  A multiplication and an addition are two. Elementwise work is left out, as in the usual model
  FLOPs. What is rematerialised counts as often as it runs.
  """
  return of_jaxpr(jax.make_jaxpr(function)(*args, **kwargs))


def of_jaxpr(jaxpr: Any) -> int:
  """`count` for what is traced already: a jaxpr, closed or open."""
  return sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(eqn: Any) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contract)
  if name == "conv_general_dilated":
    kernel = eqn.invars[1].aval
    out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    # Zeros put between the pixels by a transposed stride are not multiplied by good kernels.
    spread = math.prod(params["lhs_dilation"])
    return 2 * eqn.outvars[0].aval.size * (kernel.size // out_features) // spread
  if name == "cond":
    return max(of_jaxpr(branch) for branch in params["branches"])
  if name == "while":
    return of_jaxpr(params["body_jaxpr"])  # nobody knows how often it turns; a scan does
  inner = sum(
    of_jaxpr(value)
    for value in params.values()
    if hasattr(value, "eqns") or hasattr(value, "jaxpr")
  )
  if name == "shard_map":  # its inside is what one device does
    return inner * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
  return inner * params["length"] if name == "scan" else inner
