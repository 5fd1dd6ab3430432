"""The examples in the docstrings of the losses run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from bigalign import losses

MODULES = sorted(
  module.name for module in pkgutil.walk_packages(losses.__path__, f"{losses.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
  assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_every_loss_has_an_example_and_a_source(name):
  text = losses.LOSSES[name].__doc__
  assert "Example:" in text and ">>> " in text
  assert "Args:" in text
