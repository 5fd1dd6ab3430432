"""What crosses the wires in a compiled program, read from its scheduled HLO.

The compiler's own cost analysis takes the body of a loop once; here a loop counts as often as it
turns: as XLA notes beside it, else as the constant says that its counter is compared with, which is
how a scan ends.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_WIDTH = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(r" = (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_CALLED = re.compile(
  r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
  r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|c64|c128)\[([\d,]*)\]")


class Collective(NamedTuple):
  """Collectives of one kind: how many are run, the bytes that one device sees of them, and how many
  of these bytes travel beside other work."""

  runs: int
  bytes: float
  hidden: float = 0.0


def collectives(text: str) -> dict[str, Collective]:
  """{kind: Collective} of a compiled program, `compiled.as_text()`.

  Bytes are what a device takes part in: the result of an all-gather, the operand of a
  reduce-scatter, twice the operand of an all-reduce, what a permute or an all-to-all sends.
  """
  own: dict[str, list[tuple[str, float, bool]]] = {}
  seen_before: set[str] = set()
  beside: set[str] = set()
  parts = re.search(r"num_partitions=(\d+)", text)
  devices = int(parts.group(1)) if parts else 1
  name = ""
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      name = head.group(1)
      own[name] = []
    elif name:
      # A collective that TPUs run beside other work is written where it starts, in each of these
      # works and where it ends.
      if name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in line:
        seen_before.add(name)
      if "AsyncCollectiveStart" in line:
        beside.add(name)
      if found := _collective(line, devices):
        # TPUs run a reduce-scatter as a fusion of this name, with an all-reduce written inside.
        if name.startswith("all-reduce-scatter"):
          found = ("reduce-scatter", found[1] / 2, found[2])
        own[name].append(found)
  times = runs(text)
  total: dict[str, Collective] = {}
  for computation in times.keys() - seen_before:
    n = times[computation]
    for kind, size, hidden in own[computation]:
      before = total.get(kind, Collective(0, 0.0))
      moved = n * size
      total[kind] = Collective(
        before.runs + n,
        before.bytes + moved,
        before.hidden + (moved if hidden or computation in beside else 0.0),
      )
  return total


def runs(text: str) -> dict[str, int]:
  """{computation: how often it runs} in one run of a compiled program."""
  called: dict[str, list[tuple[str, int]]] = {}
  limits = _limits(text)
  entry = name = ""
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      name = head.group(1)
      called[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      trips = _trips(line, limits)
      for one, several in _CALLED.findall(line):
        called[name] += [(callee, trips) for callee in re.findall(r"[\w.\-]+", one or several)]
  times: collections.Counter[str] = collections.Counter()

  def visit(computation: str, n: int) -> None:
    times[computation] += n
    for callee, trips in called[computation]:
      if callee in called:
        visit(callee, n * trips)

  visit(entry, 1)
  return dict(times)


def _limits(text: str) -> dict[str, int]:
  """{computation: the largest integer constant in it}; a loop's condition has one."""
  limits: dict[str, int] = {}
  name = ""
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      name = head.group(1)
    elif found := _LIMIT.search(line):
      limits[name] = max(limits.get(name, 0), int(found.group(1)))
  return limits


def _trips(line: str, limits: dict[str, int]) -> int:
  if known := _TRIPS.search(line):
    return int(known.group(1))
  loop = _CONDITION.search(line)
  return limits.get(loop.group(1), 1) if loop else 1


def _collective(line: str, devices: int) -> tuple[str, float, bool] | None:
  """(kind, bytes, whether it only starts) of one line of HLO, if it is a collective."""
  found = _COLLECTIVE.search(line)
  if not found:
    return None
  shapes, kind, start = found.groups()
  sizes = [size(*array) for array in _SHAPE.findall(shapes)]
  if start and kind in ("all-gather", "collective-permute"):
    # Operands, as many results and, of a permute, words of context.
    context = shapes.count("u32[]") if kind == "collective-permute" else 0
    sizes = sizes[: len(sizes) - context]
    sizes = sizes[len(sizes) // 2 :]
  factor = {"all-reduce": 2, "reduce-scatter": _group(line, devices)}.get(kind, 1)
  return kind, factor * sum(sizes), bool(start)


def size(dtype: str, dims: str) -> float:
  """Bytes of an array as HLO writes it: "bf16", "128,512"."""
  return math.prod(int(d) for d in dims.split(",") if d) * _width(dtype)


def _width(dtype: str) -> float:
  return _WIDTH.get(dtype) or int(dtype[1:]) / 8


def _group(line: str, devices: int) -> int:
  """Devices that take part in one group of a collective; all of them if it names none."""
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(found.group(1))
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
    sizes = dict(axis.split("=") for axis in found.group(1).split(","))
    return math.prod(int(sizes[axis]) for axis in found.group(2).split(","))
  found = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  return found.group(1).count(",") + 1 if found else devices
