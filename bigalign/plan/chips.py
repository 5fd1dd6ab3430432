"""Data sheets of TPU chips, and estimates of a step's time and a run's cost computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Chip(NamedTuple):
  """One device of a kind, by its data sheet.

  Attributes:
    memory: bytes that the compiler can give to a program.
    bandwidth: memory bandwidth, bytes/s.
    links: bytes/s that the device sends over all its links to other chips.
    devices: number of devices in one chip.
  """

  memory: float
  bandwidth: float
  links: float
  devices: int = 1


# Memory: what the TPU compiler reports as available. Bandwidth and links: the table of the chip at
# https://docs.cloud.google.com/tpu/docs/KIND, whose bidirectional interconnect bandwidth is twice
# `links`.
CHIPS = {
  # "HBM2 capacity and bandwidth: 32 GiB, 1200 GBps". The page gives no interconnect; 6 links of 50
  # GB/s: https://arxiv.org/abs/2304.01433.
  "v4": Chip(30.75 * 2**30, 1200e9, 300e9),
  # "HBM2 capacity and bandwidth: 16 GB, 819 GBps", "bidirectional ICI bandwidth per chip: 400 GBps"
  "v5e": Chip(15.75 * 2**30, 819e9, 200e9),
  # "HBM bandwidth per chip: 2765 GBps", "bidirectional ICI bandwidth per chip: 1200 GBps"
  "v5p": Chip(95.73 * 2**30, 2765e9, 600e9),
  # "HBM bandwidth per chip: 1638 GBps", "bidirectional ICI bandwidth per chip: 800 GBps"
  "v6e": Chip(31.24 * 2**30, 1638e9, 400e9),
  # "HBM bandwidth per chip: 7380 GBps", "bidirectional ICI bandwidth per chip: 1200 GBps", for the
  # two devices of a chip
  "tpu7x": Chip(94.74 * 2**30, 3690e9, 300e9, devices=2),
}


# {part of jax.Device.device_kind: kind of chip}; the first that fits.
_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v6": "v6e",
  "TPU7x": "tpu7x",
}


class Parts(NamedTuple):
  """Seconds of the parts of a step at the full speed of the data sheet."""

  products: float
  memory: float
  communication: float


def of_device(device_kind: str) -> str:
  """Returns the kind of chip of a JAX device, "TPU v5 lite" -> "v5e"; "" if it is none of CHIPS."""
  return next((chip for part, chip in _KINDS.items() if part in device_kind), "")


def devices(topology: str) -> int:
  """Returns the number of devices of a topology: "v5e:16x16*2" -> 512."""
  sizes, _, slices = topology.partition(":")[2].partition("*")
  chips = math.prod(int(n) for n in sizes.split("x")) * int(slices or 1)
  return chips * CHIPS[kind(topology)].devices


def kind(topology: str) -> str:
  """Returns the kind of chip of a topology: "v5e:16x16*2" -> "v5e"."""
  return topology.split(":")[0]


def step_seconds(plan: Mapping[str, Any]) -> tuple[float, float]:
  """Returns (shortest, longest) seconds of a step.

  The shortest is the longer of matrix products and memory traffic, at 92 and 95 % of the data
  sheet. The longest is the longer of the two at 55 and 70 %, followed by all communication.

  Args:
    plan: a plan that fits, from compile_step.measure.
  """
  products, memory, communication = parts(plan)
  return max(products / 0.92, memory / 0.95), max(products / 0.55, memory / 0.70) + communication


def parts(plan: Mapping[str, Any]) -> Parts:
  """Returns the parts of a step.

  Args:
    plan: a plan that fits, from compile_step.measure.
  """
  chip = CHIPS[kind(plan["topology"])]
  return Parts(
    plan["flops_per_chip"] / plan["peak_flops_per_second"],
    plan["memory_traffic_bytes_per_chip"] / chip.bandwidth,
    sum(x["bytes"] for x in plan["collectives"].values()) / chip.links,
  )


def shares(plan: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """Returns the seconds of each part of a step at the full speed of the data sheet, and its share.

  A part takes as long as its products or its memory traffic, whichever is longer, and its
  communication without what the compiler schedules during other work.

  Args:
    plan: a plan that fits, from compile_step.measure.

  Returns:
    {part: {"products", "memory", "communication", "overlapped": seconds, "share": of 1}}.
  """
  found = {}
  for name, work in plan.get("parts", {}).items():
    one = parts({**plan, **work})
    hidden = sum(x["asynchronous_bytes"] for x in work["collectives"].values())
    overlapped = hidden / CHIPS[kind(plan["topology"])].links
    found[name] = {**one._asdict(), "overlapped": overlapped}
  seconds = {
    name: max(x["products"], x["memory"]) + x["communication"] - x["overlapped"]
    for name, x in found.items()
  }
  whole = sum(seconds.values())
  return {name: {**x, "share": seconds[name] / whole} for name, x in found.items()}


def estimate(
  plan: Mapping[str, Any],
  prices: Mapping[str, float],
  seconds: tuple[float, float] | None = None,
) -> dict[str, Any]:
  """Returns the estimated speed and cost of a run, each as [worst, best]; {} if it does not fit.

  Args:
    plan: from compile_step.measure.
    prices: {kind of chip: price of one chip for an hour}, such as {"v5e": 1.2}; the cost is None
      for other kinds.
    seconds: of a step, the shortest and the longest; None: those of step_seconds.
  """
  if not plan["fits"]:
    return {}
  shortest, longest = seconds or step_seconds(plan)
  rates = [plan["batch_size"] / seconds for seconds in (longest, shortest)]
  samples = plan["batch_size"] * plan["total_steps"]
  chip_kind = kind(plan["topology"])
  chips = plan["devices"] / CHIPS[chip_kind].devices
  hours = [chips * samples / rate / 3600 for rate in rates]
  return {
    "measured": False,
    "seconds_per_step": [longest, shortest],
    "shares": shares(plan),
    "images_per_second": rates,
    "samples_per_day": [86_400 * rate for rate in rates],
    "total_samples": samples,
    "chip_hours": hours,
    "cost": [prices[chip_kind] * x for x in hours] if chip_kind in prices else None,
  }
