"""Narrows the predicted time of a step by one step that was measured on the same kind of chip.

A step is limited by matrix products or by memory traffic, and its communication overlaps with them
or adds to them. One measured time does not say which, so the range holds all four cases.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bigalign.plan import chips
from bigalign.plan.variants import topology_of

# What a step of one device does, as compile_step.measure and `bigalign benchmark` write it.
WORK = (
  "topology",
  "flops_per_chip",
  "peak_flops_per_second",
  "memory_traffic_bytes_per_chip",
  "collectives",
)


class Measured(NamedTuple):
  """A step that was measured.

  Attributes:
    seconds: of the step.
    work: what it does, the entries WORK of a plan.
    name: of the config and the topology, for people.
  """

  seconds: float
  work: Mapping[str, Any]
  name: str


def step_seconds(plan: Mapping[str, Any], measured: Measured) -> tuple[float, float]:
  """Returns (shortest, longest) seconds of a step; both are the measured ones for the same step.

  The shortest is never below the time by the data sheet, chips.step_seconds.

  Args:
    plan: a plan that fits, from compile_step.measure.
    measured: on the same kind of chip.

  Example:
    Half of the products and a quarter of the traffic, without communication:
    >>> work = dict(topology="v5e:1x1", flops_per_chip=8e12, peak_flops_per_second=197e12,
    ...   memory_traffic_bytes_per_chip=24e9, collectives={})
    >>> plan = {**work, "flops_per_chip": 4e12, "memory_traffic_bytes_per_chip": 6e9}
    >>> step_seconds(work, Measured(0.064, work, ""))
    (0.064, 0.064)
    >>> [round(x, 4) for x in step_seconds(plan, Measured(0.064, work, ""))]
    [0.0221, 0.032]
  """
  before, now = chips.parts(measured.work), chips.parts(plan)
  # Links that sent everything in less time than the data sheet says send as fast in this step.
  faster = min(1.0, measured.seconds / before.communication) if before.communication else 1.0
  sent, sends = before.communication * faster, now.communication * faster
  # If communication adds to the rest: the rest is not shorter than by the data sheet.
  rest = min(max(measured.seconds - sent, before.products, before.memory), measured.seconds)
  share = (measured.seconds - rest) / sent if sent else 1.0  # of communication, not hidden
  cases = []
  for growth in (now.products / before.products, now.memory / before.memory):
    cases.append(max(measured.seconds * growth, sends))
    cases.append(rest * growth + share * sends)
  least, _ = chips.step_seconds(plan)
  return max(min(cases), least), max(*cases, least)


def read(
  path: str | os.PathLike[str], kind: str, plan: Callable[[Mapping[str, Any], str], Any]
) -> Measured:
  """Returns the measured step of a file or a run.

  Args:
    path: the JSON of `bigalign benchmark`, or the folder of a run.
    kind: of the chips that are planned for.
    plan: compiles a config for a topology, for a run: its folder does not say what its step does.

  Raises:
    FileNotFoundError, ValueError: without a measured step, or for one from another kind of chip;
      the message says what to give instead.
  """
  where = pathlib.Path(path).expanduser()
  measured = _of_run(where, plan) if where.is_dir() else _of_file(where)
  theirs = chips.kind(measured.work["topology"])
  if theirs != kind:
    raise ValueError(
      f"--calibrate={path}: {measured.name} was measured on {theirs}, and this plan is for {kind};"
      " give a run on the same kind of chip"
    )
  return measured


def _of_file(where: pathlib.Path) -> Measured:
  """The step of a benchmark."""
  try:
    figures = json.loads(where.read_text())
    work, seconds = figures["plan"], float(figures["step"]["seconds_per_step"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"--calibrate={where} is neither the JSON of `bigalign benchmark --json` nor a run's folder:"
      f" {error!r}"
    ) from error
  lacking = [name for name in WORK if name not in (work or {})]
  if lacking:
    device = figures.get("device", {}).get("device_kind")
    raise ValueError(
      f"--calibrate={where} does not say what a step does ({', '.join(lacking)}): it was measured"
      f" on {device}, and plans are for TPUs"
    )
  return Measured(seconds, work, f"{figures['config']} on {work['topology']}")


def _of_run(folder: pathlib.Path, plan: Callable[[Mapping[str, Any], str], Any]) -> Measured:
  """The step of a run: the median of its logged times, in its last stage."""
  from bigalign.run.metrics import read_metrics

  record = json.loads((folder / "config.json").read_text())
  config, hardware = record["config"], record["hardware"]
  topology = topology_of(config)
  same_kind = topology and chips.kind(topology) == chips.of_device(hardware["device_kind"])
  if not same_kind or chips.devices(topology) != hardware["devices"]:
    had = f"{hardware['devices']} x {hardware['device_kind']}"
    raise ValueError(
      f"--calibrate={folder}: the run had {had}, and its config.topology={topology!r} is another"
      " slice, so its shape is unknown; give the JSON of `bigalign benchmark` instead"
    )
  work = plan(config, topology)
  times = sorted(
    row["train/batch_time"] - row["train/data_time"]
    for row in read_metrics(folder)
    if "train/batch_time" in row and row["step"] > work["first_step"]  # of the last stage
  )
  if not times:
    raise ValueError(f"--calibrate={folder}: no step of its last stage was logged")
  return Measured(times[len(times) // 2], work, f"{folder.name} on {topology}")
