"""What TPUs can do at best, and what a step takes there: computed, never measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Chip(NamedTuple):
  """One device of a kind: what its maker's data sheet says.

  memory: bytes that the compiler gives a program. bandwidth: bytes/s of it. links: bytes/s that it
  sends over all its links between chips.
  devices: how many of these are one chip.
  """

  memory: float
  bandwidth: float
  links: float
  devices: int = 1


CHIPS = {
  "v4": Chip(30.75 * 2**30, 1228e9, 300e9),
  "v5e": Chip(15.75 * 2**30, 819e9, 200e9),
  "v5p": Chip(95.73 * 2**30, 2765e9, 600e9),
  "v6e": Chip(31.24 * 2**30, 1640e9, 448e9),
  "tpu7x": Chip(94.74 * 2**30, 3690e9, 300e9, devices=2),
}


def kind(topology: str) -> str:
  """ "v5e:16x16*2" -> "v5e"."""
  return topology.split(":")[0]


def seconds(found: Mapping[str, Any]) -> tuple[float, float]:
  """(least, most) of a step, from what plan_step.measure found of it.

  The least is the longer of products and memory traffic at 92 and 95 % of the data sheet; the most
  is their longer one at 55 and 70 %, and all bytes on the wires after it.
  """
  chip = CHIPS[kind(found["topology"])]
  products = found["flops_per_chip"] / found["peak_flops_per_second"]
  memory = found["memory_traffic_bytes_per_chip"] / chip.bandwidth
  wires = sum(x["bytes"] for x in found["collectives"].values()) / chip.links
  return max(products / 0.92, memory / 0.95), max(products / 0.55, memory / 0.70) + wires


def estimate(found: Mapping[str, Any], prices: Mapping[str, float]) -> dict[str, Any]:
  """The figures of a run that fits, each as [worst, best], from its steps in all.

  prices: of a chip for an hour, by kind: {"v5e": 1.2}; without one no cost.
  """
  if not found["fits"]:
    return {}
  least, most = seconds(found)
  rates = [found["batch_size"] / t for t in (most, least)]
  samples = found["batch_size"] * found["total_steps"]
  of = kind(found["topology"])
  chips = found["devices"] / CHIPS[of].devices
  hours = [chips * samples / rate / 3600 for rate in rates]
  return {
    "measured": False,
    "seconds_per_step": [most, least],
    "images_per_second": rates,
    "samples_per_day": [86_400 * rate for rate in rates],
    "total_samples": samples,
    "chip_hours": hours,
    "cost": [prices[of] * x for x in hours] if of in prices else None,
  }
