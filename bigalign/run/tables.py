"""What programs print: tables and numbers for people, and the same figures as a JSON file."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import rich.box
import rich.console
import rich.table

from bigalign import tree

_PIPED = 1000  # columns if the output is not a terminal: no table is cut then


def show(*tables: rich.table.Table) -> None:
  """Prints tables to standard output."""
  console().print(*tables)


def text(table: rich.table.Table) -> str:
  """Returns a table as text, as `show` would print it."""
  printer = console()
  with printer.capture() as captured:
    printer.print(table)
  return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def console() -> rich.console.Console:
  """Returns a printer to standard output: as wide as the terminal, or 1,000 columns in a file."""
  found = rich.console.Console(file=sys.stdout, highlight=False)
  if not found.is_terminal:
    found = rich.console.Console(file=sys.stdout, highlight=False, width=_PIPED)
  return found


def write_json(path: str | pathlib.Path, figures: Any) -> None:
  """Writes what a program prints to a file, --json FILE; makes its folder."""
  write_text(path, json.dumps(figures, indent=1) + "\n")


def write_text(path: str | pathlib.Path, content: str) -> None:
  """Writes a file in UTF-8; makes its folder."""
  file = pathlib.Path(path).expanduser()
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(content, encoding="utf-8")


def pairs(title: str = "") -> rich.table.Table:
  """Returns an empty table of two columns without a heading: what, and its value."""
  table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title=title or None)
  table.add_column("", overflow="fold")
  table.add_column("", overflow="fold")
  return table


def counts(values: Mapping[str, int]) -> str:
  """Counts by name, as a list.

  >>> counts({"undecodable": 1200, "empty": 1})
  'undecodable 1,200, empty 1'
  """
  return tree.shown([f"{name} {count:,}" for name, count in values.items()], sep=", ")


def number(x: float) -> str:
  """Three digits, or all digits before the point: 0.0123, 12.3, 12,345.

  >>> [number(x) for x in (0, 0.000123456, 1.5, 12.34, 12345.6)]
  ['0', '0.000123', '1.5', '12.3', '12,346']
  """
  return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def scaled(x: float, units: dict[str, float]) -> str:
  """A number in the largest unit of which it is at least one.

  >>> scaled(0.00123, SECONDS), scaled(2.5e9, FLOP)
  ('1.23 ms', '2.5 GFLOP')
  """
  for unit, size in units.items():
    if x >= size:
      return f"{number(x / size)} {unit}"
  unit, size = list(units.items())[-1]
  return f"{number(x / size)} {unit}"


SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
FLOP = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
