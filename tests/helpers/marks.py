"""Marks of single cases of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(values: Iterable[Any], fast: Callable[[Any], bool]) -> list[Any]:
  """Cases of a test of which only those that `fast` accepts run among the fast tests.

  Args:
    values: one value per case, or a tuple of the values of several parameters.
    fast: whether a case is fast.
  """

  def case(value: Any) -> Any:
    several = value if isinstance(value, tuple) else (value,)
    return pytest.param(*several, marks=() if fast(value) else pytest.mark.slow)

  return [case(value) for value in values]
