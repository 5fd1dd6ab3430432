"""The examples in the docstrings of the losses run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from helpers.marks import slow_unless

from bigalign import losses

MODULES = sorted(
  module.name for module in pkgutil.walk_packages(losses.__path__, f"{losses.__name__}.")
)
# Their examples take seconds to compile.
COMPILED = [
  f"bigalign.losses.{name}" for name in ("albef", "m3co", "mixup", "per_sample.fastclip", "sparc")
]


@pytest.mark.parametrize("name", slow_unless(MODULES, lambda name: name not in COMPILED))
def test_examples_print_what_they_say(name):
  assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_every_loss_has_an_example_and_a_source(name):
  text = losses.LOSSES[name].__doc__
  assert "Example:" in text and ">>> " in text
  assert "Args:" in text
