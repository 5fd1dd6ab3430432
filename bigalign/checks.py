"""Checks of values that a config names: known words and numbers within bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bigalign import tree


def choose(registry: Mapping[str, Any], name: str, where: str) -> Any:
  """registry[name].

  Raises:
    ValueError: for another name; it gives the nearest known one and all of them.
  """
  if name not in registry:
    raise ValueError(
      f"{where}: unknown {name!r}.{tree.nearest(name, registry)} Known: {sorted(registry)}"
    )
  return registry[name]


def known(where: str, value: Any, names: Iterable[str]) -> None:
  """Raises ValueError, naming `where`, unless `value` is one of `names`."""
  names = list(names)
  if value not in names:
    raise ValueError(f"{where}: unknown {value!r}; known: {sorted(names)}")


def between(where: str, least: float, most: float = math.inf, **numbers: float) -> None:
  """Raises ValueError, naming `where` and the option, for a number not in [least, most]."""
  for name, value in numbers.items():
    # A traced number has no value yet.
    if isinstance(value, int | float) and not least <= value <= most:
      bound = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
      raise ValueError(f"{where}.{name}={value!r} must be {bound}")


def below_one(where: str, **numbers: float) -> None:
  """Raises ValueError, naming `where` and the option, for a number not in [0, 1)."""
  for name, value in numbers.items():
    if not 0 <= value < 1:
      raise ValueError(f"{where}.{name}={value!r} must be at least 0 and below 1")


def above_zero(where: str, most: float = math.inf, **numbers: float) -> None:
  """Raises ValueError, naming `where` and the option, for a number not in (0, most]."""
  for name, value in numbers.items():
    # A traced number has no value yet.
    if isinstance(value, int | float) and not 0 < value <= most:
      bound = "" if most == math.inf else f" and at most {most:g}"
      raise ValueError(f"{where}.{name}={value!r} must be above 0{bound}")
