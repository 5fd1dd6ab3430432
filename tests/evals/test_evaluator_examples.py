"""The examples in the docstrings of the evaluators run and give the values that they show."""

from __future__ import annotations

import doctest
import importlib

import pytest
from helpers.marks import slow_unless


@pytest.mark.parametrize(
  "name",
  slow_unless(
    [
      *(
        "calibration",
        "chance",
        "compositional",
        "confusion",
        "geometry",
        "glyphs",
        "ood",
        "retrieval",
        "zeroshot",
      ),
    ],
    "geometry".__ne__,
  ),
)
def test_examples_of_evaluators(name):
  results = doctest.testmod(importlib.import_module(f"bigalign.evals.{name}"))
  assert results.attempted and not results.failed
