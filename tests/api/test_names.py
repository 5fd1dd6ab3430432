"""The names that `import bigalign` offers, and what importing it costs."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types

import pytest

import bigalign
from bigalign.api import names as listing
from bigalign.api import programs

LIGHT = """
import sys, time
begin = time.perf_counter()
import bigalign
seconds = time.perf_counter() - begin
assert bigalign.__version__
assert "tiny" in bigalign.configs()
{statements}
print(seconds, "jax" in sys.modules)
"""


@pytest.mark.parametrize(
  "statements",
  [
    "f = bigalign.plan; import bigalign.plan.chips; assert bigalign.plan is f and callable(f)",
    "import bigalign.plan.chips; assert callable(bigalign.plan)",
    "from bigalign.plan import chips; assert callable(bigalign.plan)",
  ],
)
def test_importing_is_quick_and_no_order_hides_a_function(statements):
  code = LIGHT.format(statements=statements)
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  seconds, jax = found.stdout.split()
  assert float(seconds) < 0.3 and jax == "False"


@pytest.mark.parametrize("name", [x for x in bigalign.__all__ if x != "__version__"])
def test_every_name_is_there_and_documented(name):
  value = getattr(bigalign, name)
  assert callable(value) and name in dir(bigalign)
  if isinstance(value, types.ModuleType):
    assert value is importlib.import_module(f"bigalign.{name}")
    function = getattr(programs if hasattr(programs, name) else listing, name)
    assert inspect.signature(value) == inspect.signature(function)
    value = function
  assert inspect.getdoc(value)


def test_functions_are_called_through_their_modules():
  assert bigalign.losses() == sorted(bigalign.losses.LOSSES)
  assert bigalign.projectors() == sorted(bigalign.projectors.PROJECTORS)
  assert bigalign.towers() == sorted(bigalign.towers.TOWERS)


def test_an_unknown_name_is_an_error():
  with pytest.raises(AttributeError, match="'lod'"):
    _ = bigalign.lod
