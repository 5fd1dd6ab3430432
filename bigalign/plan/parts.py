"""Parts of a train step: products, memory traffic and communication of each.

The scopes in which an operation was traced are part of its name in the program, and the compiler
keeps this name. A fused operation belongs to the part of its result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bigalign.plan import hlo_collectives, hlo_memory
from bigalign.run import flops

# name: scopes, of which the first that matches decides.
PARTS = {
  "recomputation": r"rematted_computation|\bfirst_pass\b",  # remat; microbatches: gradcache.py
  "attention": r"\bdot_product_attention\b",  # without its projections
  "encoders": r"\bDualEncoder\b",
  "heads": r"\bheads\b",  # without what they read of the towers
  "loss": r"\bloss\b",
  "update": "",  # everything else: the optimizer, averages
}


def part_of(name: str) -> str:
  """Returns the part of a name, "jit(train_step)/transpose(jvp(loss))/psum": "loss"."""
  return next(part for part, scopes in PARTS.items() if re.search(scopes, name))


def split(jaxpr: Any, text: str, devices: int) -> dict[str, dict[str, Any]]:
  """Returns the work of one device by part, with the names of the figures of the whole step.

  Args:
    jaxpr: of the step.
    text: of the compiled step, `compiled.as_text()`.
    devices: their number, which share the products of the jaxpr.
  """
  found: dict[str, dict[str, Any]] = {
    part: {"flops_per_chip": 0.0, "memory_traffic_bytes_per_chip": 0.0, "collectives": {}}
    for part in PARTS
  }
  for name, n in flops.by_name(jaxpr).items():
    found[part_of(name)]["flops_per_chip"] += n / devices
  for name, moved in hlo_memory.by_name(text).items():
    found[part_of(name)]["memory_traffic_bytes_per_chip"] += moved
  for (kind, name), x in hlo_collectives.by_name(text).items():
    kinds = found[part_of(name)]["collectives"]
    kinds[kind] = hlo_collectives.added(kinds.get(kind), x)
  for part in found.values():
    part["collectives"] = shown(part["collectives"])
  return found


def shown(collectives: Mapping[str, hlo_collectives.Collective]) -> dict[str, dict[str, float]]:
  """Collectives by kind, as a plan holds them."""
  return {
    kind: {"runs": x.runs, "bytes": x.bytes, "asynchronous_bytes": x.hidden}
    for kind, x in collectives.items()
  }
