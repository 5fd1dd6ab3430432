"""Memory traffic of a compiled program: bytes read from and written to HBM, read from its HLO.

Each instruction of the entry computation and of loop bodies, a kernel of Pallas too, reads its
operands and writes its result. Arrays in on-chip memory, S(1), do not count, and neither do
instructions inside a fusion. A slice counts as a slice, also inside a fusion. A loop counts as
often as it runs. An array counts with the padding of its tiles, which is moved too: bf16[8,64] in
tiles of (8, 128) is twice as large as its numbers.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

from bigalign.plan import hlo_collectives

_LINE = re.compile(r"^  (ROOT )?%([\w.\-]+) = (.*?[\])}]) ([a-z][a-z\-]*)\((.*?)\)(?:, |$)(.*)")
_ARRAY = re.compile(rf"\b({hlo_collectives.DTYPE})\[([\d,]*)\](\{{[^}}]*\}})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_ORDER = re.compile(r"^\{([\d,]*)")
_TILE = re.compile(r"T\(([\d,]*)\)")
_MOVES_NOTHING = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "optimization-barrier",
}


class Instruction(NamedTuple):
  """One line of HLO.

  Attributes:
    op: its operation.
    size: bytes of its result in HBM.
    full_size: bytes of its result in any memory.
    operands: names of the instructions that it reads.
    calls: the computation of a fusion, else "".
    result: shapes of the result as text; of a parameter, its number.
    name: of the operation in the program. A copy that the compiler adds has that of its first user.
  """

  op: str
  size: float
  full_size: float
  operands: tuple[str, ...]
  calls: str
  result: str
  name: str


def traffic(text: str) -> float:
  """Returns the bytes that one device reads from and writes to its HBM in one run.

  Args:
    text: `compiled.as_text()`.
  """
  return sum(by_name(text).values())


def by_name(text: str) -> dict[str, float]:
  """Returns the same as `traffic` by the name of the operation in the program.

  Args:
    text: `compiled.as_text()`.
  """
  programs, roots = _read(text)
  inside = {x.calls for program in programs.values() for x in program.values() if x.op == "fusion"}
  total: dict[str, float] = collections.defaultdict(float)
  for computation, n in hlo_collectives.runs(text).items():
    if computation in inside:
      continue
    program, users = programs[computation], dict[str, str]()
    for own, x in reversed(program.items()):
      name = x.name or users.get(own, "")
      users |= dict.fromkeys(x.operands, name)
      total[name] += n * _moved(programs, roots, computation, x)
  return total


def _read(text: str) -> tuple[dict[str, dict[str, Instruction]], dict[str, str]]:
  """({computation: {name: Instruction}}, {computation: name of its root instruction})."""
  programs: dict[str, dict[str, Instruction]] = {}
  roots: dict[str, str] = {}
  name = ""
  # Attributes of a kernel are on several lines.
  for line in re.sub(r"\n(?=\"|}})", "", text).splitlines():
    if head := hlo_collectives.COMPUTATION.match(line):
      name = head.group(1)
      programs[name] = {}
    elif name and (parsed := _LINE.match(line)):
      root, own, result, op, inside, rest = parsed.groups()
      calls, named = _CALLS.search(rest), hlo_collectives.NAME.search(rest)
      programs[name][own] = Instruction(
        op,
        _size(result, "S(1)"),
        _size(result),
        tuple(_OPERAND.findall(inside)),
        calls.group(1) if calls else "",
        inside if op == "parameter" else result,
        named.group(1) if named else "",
      )
      if root:
        roots[name] = own
  return programs, roots


def _size(arrays: str, without: str = "nothing") -> float:
  """Bytes of the arrays in a text, except those whose layout contains `without`."""
  return sum(
    _tiled(dtype, dims, layout)
    for dtype, dims, layout in _ARRAY.findall(arrays)
    if without not in layout
  )


def _tiled(dtype: str, dims: str, layout: str) -> float:
  """Bytes of an array with the padding of its tiles, such as T(8,128) of the last two axes."""
  sizes, tile = [int(n) for n in dims.split(",") if n], _TILE.search(layout)
  if not (sizes and tile):
    return hlo_collectives.size(dtype, dims)
  order = _ORDER.match(layout)
  axes = [int(n) for n in order.group(1).split(",")] if order else [*reversed(range(len(sizes)))]
  units = [int(n) for n in tile.group(1).split(",")]
  for axis, unit in zip(axes, reversed(units)):  # the axis whose numbers are adjacent comes first
    sizes[axis] = math.ceil(sizes[axis] / unit) * unit
  return hlo_collectives.size(dtype, ",".join(map(str, sizes)))


def _moved(
  programs: dict[str, dict[str, Instruction]], roots: dict[str, str], name: str, x: Instruction
) -> float:
  """Bytes that one instruction of computation `name` reads and writes."""
  if x.op in _MOVES_NOTHING or x.op.endswith("-done") or not x.operands:
    return 0.0
  around = programs[name]
  if x.op in ("copy-start", "slice-start"):  # its result includes the operand
    both = _ARRAY.findall(x.result)[:2]
    part = both[0 if x.op == "copy-start" else 1]
    return _tiled(*part) * sum("S(1)" not in layout for _, _, layout in both)
  if x.op == "fusion" and x.calls in programs:
    return _fused(programs, roots, around, x)
  read = sum(around[y].size for y in x.operands if y in around)
  return _part(x, around, read) + (x.size if x.op != "dynamic-update-slice" else 0.0)


def _part(x: Instruction, around: dict[str, Instruction], read: float) -> float:
  """Bytes that a slice or the update of a slice moves; `read` for other instructions."""
  if x.op in ("dynamic-slice", "slice", "gather"):
    return x.full_size if around[x.operands[0]].size else 0.0
  if x.op == "dynamic-update-slice":
    return around[x.operands[1]].full_size if x.size else 0.0
  return read


def _fused(
  programs: dict[str, dict[str, Instruction]],
  roots: dict[str, str],
  around: dict[str, Instruction],
  x: Instruction,
) -> float:
  """Bytes that a fusion moves: the used parts of its operands, the changed part of its result."""
  read = sum(
    min(around[operand].size, _used(programs, x.calls, i))
    for i, operand in enumerate(x.operands)
    if operand in around and around[operand].size
  )
  return read + min(x.size, _changed(programs, roots, x.calls))


def _used(programs: dict[str, dict[str, Instruction]], name: str, index: int) -> float:
  """Bytes of parameter number `index` that a fused computation reads."""
  inside = programs[name]
  ours = next((k for k, x in inside.items() if x.op == "parameter" and x.result == str(index)), "")
  total = 0.0
  for x in inside.values():
    for i, operand in enumerate(x.operands):
      if operand != ours:
        continue
      if x.op in ("dynamic-slice", "slice", "gather") and i == 0:
        total += x.full_size
      elif x.op == "fusion" and x.calls in programs:
        total += _used(programs, x.calls, i)
      elif not (x.op == "dynamic-update-slice" and i == 0):  # updated in place
        total += inside[ours].full_size
  return total


def _changed(
  programs: dict[str, dict[str, Instruction]], roots: dict[str, str], name: str, of: str = ""
) -> float:
  """Bytes that a fused computation writes of its result, or of the instruction `of`."""
  inside = programs[name]
  x = inside[of or roots[name]]
  if x.op == "tuple":
    return sum(_changed(programs, roots, name, y) for y in x.operands)
  if x.op == "dynamic-update-slice":
    return inside[x.operands[1]].full_size
  if x.op == "bitcast":
    return _changed(programs, roots, name, x.operands[0])
  if x.op == "fusion" and x.calls in programs:
    return _changed(programs, roots, x.calls)
  return x.full_size
