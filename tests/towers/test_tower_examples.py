"""The examples in the docstrings of towers and projectors run."""

from __future__ import annotations

import doctest
import inspect

import flax.linen as nn
import pytest
from helpers.marks import slow_unless

from bigalign import projectors
from bigalign.projectors import PROJECTORS
from bigalign.towers import TOWERS, bert, features, mobilenet, naflex, resnet, text, vit

MODULES = (bert, features, mobilenet, naflex, resnet, text, vit, projectors)


@pytest.mark.parametrize(
  "module",
  slow_unless(MODULES, lambda module: module in (features, mobilenet, resnet)),
  ids=lambda module: module.__name__,
)
def test_examples_run(module):
  failures, tried = doctest.testmod(module, verbose=False)
  assert tried and not failures


def test_every_tower_and_projector_has_an_example():
  """The class that the options of a tower build, and the class of a projector."""
  built = {
    name
    for module in MODULES
    for name, member in vars(module).items()
    if inspect.isclass(member)
    and issubclass(member, nn.Module)
    and ">>>" in (inspect.getdoc(member) or "")
  }
  towers = {inspect.signature(options.build).return_annotation for options in TOWERS.values()}
  assert built >= towers | {projector.__name__ for projector in PROJECTORS.values()}
