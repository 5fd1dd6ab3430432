"""Communication of a compiled program, read from its scheduled HLO.

The compiler's own cost analysis counts the body of a loop once. Here a loop counts as often as it
runs: the trip count that XLA annotates, or the constant that the loop counter is compared with, as
in a scan. Of a conditional, the longest branch counts.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(r" = (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_CALLED = re.compile(
  r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
  r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
DTYPE = r"pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c64|c128"  # such as f32, s4 and f8e4m3fn
_SHAPE = re.compile(rf"\b({DTYPE})\[([\d,]*)\]")
_NAMED = re.compile(r'  (?:ROOT )?%([\w.\-]+) = .*op_name="((?:[^"\\]|\\.)*)"')
_FUSED = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_SENT = re.compile(r" [a-z\-]+\((?:[^%()]* )?%([\w.\-]+)")
NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class Collective(NamedTuple):
  """The collectives of one kind.

  Attributes:
    runs: how many run.
    bytes: bytes of all of them in which one device takes part.
    hidden: those of these bytes that are communicated asynchronously, during other work.
  """

  runs: int
  bytes: float
  hidden: float = 0.0


def collectives(text: str) -> dict[str, Collective]:
  """Returns the collectives of a compiled program by kind.

  A device takes part in the result of an all-gather, the operand of a reduce-scatter, twice the
  operand of an all-reduce, and what it sends in a permute or an all-to-all.

  Args:
    text: `compiled.as_text()`.
  """
  total: dict[str, Collective] = {}
  for (kind, _), x in by_name(text).items():
    total[kind] = added(total.get(kind), x)
  return total


def added(one: Collective | None, other: Collective) -> Collective:
  """The sum of two counts; None counts nothing."""
  if one is None:
    return other
  return Collective(one.runs + other.runs, one.bytes + other.bytes, one.hidden + other.hidden)


def by_name(text: str) -> dict[tuple[str, str], Collective]:
  """Returns the same as `collectives` by kind and by the name of the operation in the program.

  If the compiler states no name, such as "jit(f)/transpose(jvp(loss))/psum", it is that of what the
  collective sends, or "".

  Args:
    text: `compiled.as_text()`.
  """
  own: dict[str, list[tuple[str, str, float, bool]]] = {}
  names: dict[str, str] = {}  # of instructions
  callers: dict[str, str] = {}  # of fused computations
  counted_elsewhere: set[str] = set()
  asynchronous: set[str] = set()
  parts = re.search(r"num_partitions=(\d+)", text)
  devices = int(parts.group(1)) if parts else 1
  name = ""
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      name = head.group(1)
      own[name] = []
    elif name:
      if named := _NAMED.match(line):
        names[named.group(1)] = named.group(2)
      if fused := _FUSED.search(line):
        callers[fused.group(1)] = line
      # A collective that TPUs run during other work appears where it starts, in each computation
      # that it overlaps, and where it ends. Only the start is counted.
      if name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in line:
        counted_elsewhere.add(name)
      if "AsyncCollectiveStart" in line:
        asynchronous.add(name)
      if collective := _collective(line, devices):
        # TPUs run a reduce-scatter as a fusion of this name that contains an all-reduce.
        if name.startswith("all-reduce-scatter"):
          collective = ("reduce-scatter", collective[1] / 2, collective[2])
        kind, size, hidden = collective
        own[name].append((kind, line, size, hidden))
  times = runs(text)
  total: dict[tuple[str, str], Collective] = {}
  for computation in times.keys() - counted_elsewhere:
    n = times[computation]
    for kind, line, size, hidden in own[computation]:
      sent = _SENT.search(callers.get(computation, line))
      stated = NAME.search(line)
      operation = stated.group(1) if stated else names.get(sent.group(1), "") if sent else ""
      moved, is_hidden = n * size, hidden or computation in asynchronous
      one = Collective(n, moved, moved if is_hidden else 0.0)
      total[kind, operation] = added(total.get((kind, operation)), one)
  return total


def runs(text: str) -> dict[str, int]:
  """Returns {computation: how often it runs} for one run of a compiled program.

  Of the branches of a conditional one runs. Which one is not known, so it is the longest.

  Args:
    text: `compiled.as_text()`.
  """
  called: dict[str, list[tuple[list[str], int]]] = {}  # (one of these, how often)
  length: collections.Counter[str] = collections.Counter()  # instructions, without those called
  limits = _limits(text)
  entry = name = ""
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      name = head.group(1)
      called[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      length[name] += 1
      trips = _trips(line, limits)
      callees = [
        x
        for callee, branches in _CALLED.findall(line)
        for x in re.findall(r"[\w.\-]+", callee or branches)
      ]
      one_runs = " conditional(" in line
      called[name] += [(callees, trips)] if one_runs else [([x], trips) for x in callees]
  times: collections.Counter[str] = collections.Counter()

  @functools.cache
  def work(computation: str) -> int:
    """Instructions that run, with those of what it calls."""
    return length[computation] + sum(
      trips * max((work(x) for x in callees if x in called), default=0)
      for callees, trips in called[computation]
    )

  def visit(computation: str, n: int) -> None:
    times[computation] += n
    for callees, trips in called[computation]:
      known = [x for x in callees if x in called]
      if known:
        visit(max(known, key=work), n * trips)

  visit(entry, 1)
  return dict(times)


def _limits(text: str) -> dict[str, int]:
  """{computation: the largest integer constant in it}; the condition of a loop has one."""
  limits: dict[str, int] = {}
  name = ""
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      name = head.group(1)
    elif constant := _LIMIT.search(line):
      limits[name] = max(limits.get(name, 0), int(constant.group(1)))
  return limits


def _trips(line: str, limits: dict[str, int]) -> int:
  """How often the loop in a line runs; 1 if the line is not a loop."""
  if known := _TRIPS.search(line):
    return int(known.group(1))
  loop = _CONDITION.search(line)
  return limits.get(loop.group(1), 1) if loop else 1


def _collective(line: str, devices: int) -> tuple[str, float, bool] | None:
  """(kind, bytes, whether it is asynchronous) of a line of HLO, or None for other instructions."""
  parsed = _COLLECTIVE.search(line)
  if not parsed:
    return None
  shapes, kind, start = parsed.groups()
  sizes = [size(*array) for array in _SHAPE.findall(shapes)]
  if start and kind in ("all-gather", "collective-permute"):
    # The tuple holds the operands, as many results and, for a permute, context words.
    context = shapes.count("u32[]") if kind == "collective-permute" else 0
    sizes = sizes[: len(sizes) - context]
    sizes = sizes[len(sizes) // 2 :]
  factor = {"all-reduce": 2, "reduce-scatter": _group(line, devices)}.get(kind, 1)
  return kind, factor * sum(sizes), bool(start)


def size(dtype: str, dims: str) -> float:
  """Returns the bytes of an array.

  Args:
    dtype: as HLO writes it: "bf16".
    dims: as HLO writes them: "128,512".
  """
  return math.prod(int(d) for d in dims.split(",") if d) * _width(dtype)


def _width(dtype: str) -> float:
  """Bytes of a number: its bits follow the first letters of its type."""
  bits = re.search(r"\d+", dtype)
  return int(bits.group()) / 8 if bits else 1.0  # pred


def _group(line: str, devices: int) -> int:
  """Number of devices in one group of a collective; all of them if the line names no groups."""
  if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(tiled.group(1))
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
    sizes = dict(axis.split("=") for axis in mesh.group(1).split(","))
    return math.prod(int(sizes[axis]) for axis in mesh.group(2).split(","))
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  return listed.group(1).count(",") + 1 if listed else devices
