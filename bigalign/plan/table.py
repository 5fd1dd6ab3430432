"""Plans for a person to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from bigalign.plan import chips

Found = Mapping[str, Any]


def one(name: str, found: Found) -> str:
  """A plan as lines of text; of a run in stages, each of them and then all together."""
  if "stages" in found:
    each = [one(f"{name}, {_stage(x)}", x) for x in found["stages"]]
    return "\n".join([*each, _together(name, found)])
  mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
  lines = [
    f"{name} on {found['topology']}: {found['devices']} x {found['device_kind']}, {mesh}",
    f"batch {found['batch_size']:,} = {found['batch_per_chip']:g} per chip in"
    f" {found['microbatches']} microbatches; {found['parameters'] / 1e6:,.1f} million parameters,"
    f" {found['trainable'] / 1e6:,.1f} of them learn",
    _verdict(found),
    "",
  ]
  rows = [
    (f"memory: {k.replace('_', ' ')}", _size(x), "")
    for k, x in found["memory_bytes_per_chip"].items()
    if x
  ]
  if found["fits"]:
    rows += _rows(found)
  table = rich.table.Table("per chip", "", "", box=rich.box.SIMPLE, show_header=False)
  table.columns[1].justify = "right"
  for row in rows:
    table.add_row(*row)
  if found["not_checked"]:
    lines.insert(3, f"Not checked: {found['not_checked']}")
  return "\n".join(lines) + _text(table)


def several(plans: Sequence[Found]) -> str:
  """The plans of a sweep as a table; of a run in stages, a row for each of them."""
  staged = any("stages" in found for found in plans)
  table = rich.table.Table(
    *["stage"] * staged,
    "batch",
    "remat",
    "fsdp",
    "memory",
    "TFLOP",
    "wires",
    "images/s at most",
    box=rich.box.SIMPLE,
  )
  for found in (stage for whole in plans for stage in whole.get("stages", [whole])):
    start = (
      *[str(found["stage"])] * staged,
      f"{found['batch_size']:,}",
      "/".join(dict.fromkeys(found["remat"].values())),
      str(found["mesh"]["fsdp"]),
    )
    work = f"{found['flops_per_chip'] / 1e12:,.1f}"
    if found["fits"]:
      wires = sum(x["bytes"] for x in found["collectives"].values())
      table.add_row(
        *start,
        _size(found["peak_bytes_per_chip"]),
        work,
        _size(wires),
        f"{found['images_per_second'][1]:,.0f}, not measured",
      )
    else:
      table.add_row(*start, f"does not fit: {_needs(found)}", work, "", "")
  return _text(table)


def _stage(found: Found) -> str:
  first, last = found["first_step"] + 1, found["first_step"] + found["total_steps"]
  return (
    f"stage {found['stage']}, updates {first:,} to {last:,}, {found['image_size']} pixels and"
    f" {found['text_length']} tokens,"
  )


def _together(name: str, found: Found) -> str:
  bad = [str(x["stage"]) for x in found["stages"] if not x["fits"]]
  verdict = f"DOES NOT FIT: stages {', '.join(bad)}" if bad else "FITS in all stages"
  table = rich.table.Table("", "", "", box=rich.box.SIMPLE, show_header=False)
  for row in _estimates(found) if found["fits"] else ():
    table.add_row(*row)
  return (
    f"{name}, {found['total_steps']:,} updates on {found['topology']}\n{verdict}\n"
    + several([found])
    + (_text(table) if found["fits"] else "")
  )


def _verdict(found: Found) -> str:
  room = chips.CHIPS[chips.kind(found["topology"])].memory
  if found["fits"]:
    return f"FITS: {_size(found['peak_bytes_per_chip'])} of {_size(room)} per chip"
  return f"DOES NOT FIT: {_needs(found)}. The compiler: {found['compiler']}"


def _needs(found: Found) -> str:
  required = found["required_bytes_per_chip"]
  return (
    "size not told"
    if required is None
    else (f"needs {_size(required)} of {_size(found['available_bytes_per_chip'])}")
  )


def _rows(found: Found) -> list[tuple[str, str, str]]:
  rows = [
    ("of the activations, the loss alone", _size(found["loss_alone_bytes_per_chip"]), "at most"),
    ("products", f"{found['flops_per_chip'] / 1e12:,.2f} TFLOP", "a step"),
    ("memory traffic", _size(found["memory_traffic_bytes_per_chip"]), "a step"),
  ]
  for kind, moved in found["collectives"].items():
    share = moved["asynchronous_bytes"] / moved["bytes"] if moved["bytes"] else 0.0
    rows.append(
      (
        f"wires: {kind}",
        _size(moved["bytes"]),
        f"{moved['runs']} a step, {share:.0%} of the bytes asynchronous",
      )
    )
  return rows + _estimates(found)


def _estimates(found: Found) -> list[tuple[str, str, str]]:
  rows = []
  for label, key, form in (
    ("seconds per step", "seconds_per_step", "{:.3f}"),
    ("images per second, all chips", "images_per_second", "{:,.0f}"),
    ("samples per day", "samples_per_day", "{:,.0f}"),
    (f"chip-hours of {found['total_samples'] / 1e6:,.1f} million pairs", "chip_hours", "{:,.0f}"),
    ("cost", "cost", "{:,.0f}"),
  ):
    if found.get(key) is not None:
      rows.append((label, " to ".join(form.format(x) for x in sorted(found[key])), "not measured"))
  return rows


def _size(n: float) -> str:
  return f"{n / 1e9:,.2f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"


def _text(table: rich.table.Table) -> str:
  console = rich.console.Console(width=110)
  with console.capture() as captured:
    console.print(table)
  return captured.get()
