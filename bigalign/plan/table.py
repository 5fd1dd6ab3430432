"""Plans as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table

from bigalign.plan import chips
from bigalign.run import tables

Plan = Mapping[str, Any]  # of one stage, or of a run with "stages": compile_step.measure, main


def format_plan(name: str, plan: Plan) -> str:
  """Returns a plan as text; for a run in stages, each stage and then the whole run.

  Args:
    name: of the config.
    plan: with its estimates, if it fits.
  """
  if "stages" in plan:
    each = [format_plan(f"{name}, {_stage(x)}", x) for x in plan["stages"]]
    return "\n".join([*each, _together(name, plan)])
  mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
  lines = [
    f"{name} on {plan['topology']}: {plan['devices']} x {plan['device_kind']}, {mesh}",
    f"batch {plan['batch_size']:,} = {plan['batch_per_chip']:g} per chip in"
    f" {plan['microbatches']} {_plural(plan['microbatches'], 'microbatch', 'microbatches')};"
    f" {_count(plan['parameters'])} parameters, {_count(plan['trainable'])} of them trained",
    _verdict(plan),
    "",
  ]
  rows = [
    (f"memory: {k.replace('_', ' ')}", _size(x), "")
    for k, x in plan["memory_bytes_per_chip"].items()
    if x
  ]
  if plan["fits"]:
    rows += _rows(plan)
  table = rich.table.Table("per chip", "", "", box=rich.box.SIMPLE, show_header=False)
  table.columns[1].justify = "right"
  for row in rows:
    table.add_row(*row)
  if plan["not_checked"]:
    lines.insert(3, f"Not checked: {plan['not_checked']}")
  shares = _shares(plan["shares"]) if plan.get("shares") else ""
  return "\n".join(lines) + tables.text(table) + shares


def _shares(shares: Mapping[str, Mapping[str, float]]) -> str:
  """The parts of a step as a table, the longest first."""
  table = rich.table.Table(
    "part of the step",
    "share",
    "matrix products",
    "memory traffic",
    "communication",
    "of it overlapped",
    box=rich.box.SIMPLE,
  )
  for column in table.columns[1:]:
    column.justify = "right"
  for part, x in sorted(shares.items(), key=lambda item: -item[1]["share"]):
    seconds = [
      tables.scaled(x[name], tables.SECONDS) if x[name] else ""
      for name in ("products", "memory", "communication")
    ]
    overlapped = f"{x['overlapped'] / x['communication']:.0%}" if x["communication"] else ""
    table.add_row(part, f"{x['share']:.0%}", *seconds, overlapped)
  return tables.text(table) + "Times at the full speed of the data sheet, not measured"


def format_sweep(plans: Sequence[Plan]) -> str:
  """Returns the plans of a sweep as a table, with a row per stage for runs in stages."""
  staged = any("stages" in plan for plan in plans)
  table = rich.table.Table(
    *["stage"] * staged,
    "batch",
    "remat",
    "fsdp",
    "memory",
    "TFLOP",
    "communication",
    "images/s at most",
    box=rich.box.SIMPLE,
  )
  for plan in (stage for run in plans for stage in run.get("stages", [run])):
    if "error" in plan:
      asked = (str(plan["asked"].get(name, "")) for name in ("batch", "remat", "mesh"))
      table.add_row(*[""] * staged, *asked, f"not possible: {plan['error']}")
      continue
    start = (
      *[str(plan["stage"])] * staged,
      f"{plan['batch_size']:,}",
      "/".join(dict.fromkeys(plan["remat"].values())),
      str(plan["mesh"]["fsdp"]),
    )
    work = tables.number(plan["flops_per_chip"] / 1e12)
    if plan["fits"]:
      sent = sum(x["bytes"] for x in plan["collectives"].values())
      table.add_row(
        *start,
        _size(plan["peak_bytes_per_chip"]),
        work,
        _size(sent),
        f"{tables.number(plan['images_per_second'][1])}, not measured",
      )
    else:
      table.add_row(*start, f"does not fit: {_needs(plan)}", work, "", "")
  return tables.text(table)


def _stage(plan: Plan) -> str:
  first, last = plan["first_step"] + 1, plan["first_step"] + plan["total_steps"]
  return (
    f"stage {plan['stage']}, updates {first:,} to {last:,}, {plan['image_size']} pixels and"
    f" {plan['text_length']} tokens,"
  )


def _together(name: str, plan: Plan) -> str:
  bad = [str(x["stage"]) for x in plan["stages"] if not x["fits"]]
  verdict = (
    f"DOES NOT FIT: {_plural(len(bad), 'stage', 'stages')} {', '.join(bad)}"
    if bad
    else "FITS in all stages"
  )
  table = rich.table.Table("", "", "", box=rich.box.SIMPLE, show_header=False)
  for row in _estimates(plan) if plan["fits"] else ():
    table.add_row(*row)
  return (
    f"{name}, {plan['total_steps']:,} updates on {plan['topology']}\n{verdict}\n"
    + format_sweep([plan])
    + (tables.text(table) if plan["fits"] else "")
  )


def _verdict(plan: Plan) -> str:
  room = chips.CHIPS[chips.kind(plan["topology"])].memory
  if plan["fits"]:
    return f"FITS: {_size(plan['peak_bytes_per_chip'])} of {_size(room)} per chip"
  return f"DOES NOT FIT: {_needs(plan)}. The compiler: {plan['compiler']}"


def _needs(plan: Plan) -> str:
  required = plan["required_bytes_per_chip"]
  return (
    "size unknown"
    if required is None
    else (f"needs {_size(required)} of {_size(plan['available_bytes_per_chip'])}")
  )


def _rows(plan: Plan) -> list[tuple[str, str, str]]:
  rows = [
    ("activations of the loss alone", _size(plan["loss_alone_bytes_per_chip"]), "at most"),
    ("matrix products", tables.scaled(plan["flops_per_chip"], tables.FLOP), "per step"),
    ("memory traffic", _size(plan["memory_traffic_bytes_per_chip"]), "per step"),
  ]
  for kind, moved in plan["collectives"].items():
    share = moved["asynchronous_bytes"] / moved["bytes"] if moved["bytes"] else 0.0
    rows.append(
      (
        f"communication: {kind}",
        _size(moved["bytes"]),
        f"{moved['runs']} per step, {share:.0%} of the bytes asynchronous",
      )
    )
  return rows + _estimates(plan)


def _estimates(plan: Plan) -> list[tuple[str, str, str]]:
  known = plan.get("calibrated_by")
  source, rows = f"from {known}" if known else "not measured", []
  for label, key, form in (
    ("time of a step", "seconds_per_step", lambda x: tables.scaled(x, tables.SECONDS)),
    ("images per second, all chips", "images_per_second", tables.number),
    ("samples per day", "samples_per_day", _count),
    (f"chip-hours of {_count(plan['total_samples'])} pairs", "chip_hours", _small),
    ("cost", "cost", _small),
  ):
    if plan.get(key) is not None:
      ends = dict.fromkeys(form(x) for x in sorted(plan[key]))
      rows.append((label, " to ".join(ends), source))
  return rows


def _plural(n: int, one: str, many: str) -> str:
  return one if n == 1 else many


def _count(n: float) -> str:
  """A number to read: 86.2 million; small ones in full: 7,233."""
  if n >= 1e9:
    return f"{n / 1e9:,.1f} billion"
  return f"{n / 1e6:,.1f} million" if n >= 1e6 else f"{n:,.0f}"


def _small(x: float) -> str:
  return tables.number(x) if x >= 0.001 else "less than 0.001"


def _size(n: float) -> str:
  if n < 1e4:
    return f"{n / 1e3:,.2f} KB"
  return f"{n / 1e9:,.2f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"
