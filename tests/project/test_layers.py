"""The picture of docs/architecture.md, held by the imports: an arrow points down only."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys

import pytest
from helpers.shipped import ROOT

FILES = sorted((ROOT / "bigalign").rglob("*.py"))

# Packages and root modules from the bottom; each imports only from the layers below its own.
LAYERS = [
  {"tree", "private_apis", "sphere", "durations"},
  {"checks", "options", "sharding"},
  {"data"},
  {"towers"},
  {"run", "losses", "gradcache", "checkpoint", "optim"},
  {"projectors", "state", "evals"},
  {"model"},
  {"weights", "reading"},
  {"config"},
  {"stages"},
  {"inputs", "program"},
  {"step", "evaluate", "border", "untrained", "captions"},
  {"report"},
  {"frozen", "shards", "export", "plan", "cli"},
  {"train", "benchmark"},
  {"api"},
  {"search", "merge", "suites"},
  {"__main__"},
]
# The packages of data/, likewise.
DATA = [
  {"files"},
  {"samples"},
  {"tar", "image", "text"},
  {"sources", "stores"},
  {"order"},
  {"fields"},
  {"loader"},
]
# Libraries that take seconds to import, or may be replaced, are imported in few places.
PLACES = {
  "flax": {"towers", "losses", "projectors", "model", "private_apis"},
  "optax": {"optim", "program", "step", "evals"},
  "orbax": {"checkpoint", "private_apis"},
  "grain": {"data", "private_apis"},
  "torch": set(),
  "tensorflow": set(),
}
# What a data worker may import of ours: none of it imports JAX.
FOR_WORKERS = {"data", "options", "checks", "tree", "private_apis"}


def _parts(path):
  """bigalign/data/tar/parse.py -> ("data", "tar", "parse"), bigalign/tree.py -> ("tree",)."""
  parts = path.relative_to(ROOT / "bigalign").with_suffix("").parts
  return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path, *, top=False, typing=True):
  """Dotted names that a file imports.

  Args:
    path: of the file.
    top: only those that importing it imports.
    typing: also those for type checkers, in `if TYPE_CHECKING`.
  """
  found = set()

  def visit(node):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import; write it from the root"
      found.update(f"{node.module}.{alias.name}" for alias in node.names)
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    if (top and later) or (checked and not typing):
      return
    for child in ast.iter_child_nodes(node):
      visit(child)

  visit(ast.parse(path.read_text()))
  return found


def _ours(path):
  """What a file imports of bigalign, as tuples of names: ("data", "tar", "parse", "sample")."""
  return {tuple(x.split(".")[1:]) for x in _imports(path) if x.startswith("bigalign.")}


def _level(layers, name):
  return next(i for i, layer in enumerate(layers) if name in layer)


def test_every_file_has_its_layer():
  names = {_parts(path)[0] for path in FILES if _parts(path)}
  assert names == set().union(*LAYERS), "give new packages their layer, and take old ones off it"
  packages = {
    _parts(path)[1] for path in FILES if len(_parts(path)) > 1 and _parts(path)[0] == "data"
  }
  assert packages == set().union(*DATA)


def test_the_root_is_what_a_training_run_reads():
  assert len([*(ROOT / "bigalign").glob("*.py")]) <= 30
  assert [path.name for path in (ROOT / "bigalign/data").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
  parts = _parts(path)
  if not parts:  # imported in a moment; it names the public API for type checkers only
    names = {x.split(".")[0] for x in _imports(path, top=True, typing=False)}
    assert names <= {*sys.stdlib_module_names}
    return
  level = _level(LAYERS, parts[0])
  above = set().union(*LAYERS[level:]) - {parts[0]}
  assert not {x[0] for x in _ours(path)} & above
  if parts[0] == "data" and len(parts) > 1:
    level = _level(DATA, parts[1])
    above = set().union(*DATA[level:]) - {parts[1]}
    assert not {x[1] for x in _ours(path) if x[0] == "data"} & above
  for library, places in PLACES.items():
    if parts[0] not in places:
      names = {name.split(".")[0] for name in _imports(path, top=not places)}
      assert library not in names, f"{library} belongs in {sorted(places) or 'no import on top'}"


def test_no_module_imports_itself_through_others():
  """No circle, inside a package either."""
  modules = {_parts(path): path for path in FILES}

  def module(name):
    return name if name in modules else name[:-1]

  graph = {}
  for parts, path in modules.items():
    names = {x for x in _imports(path, top=True, typing=False) if x.startswith("bigalign.")}
    graph[parts] = {module(tuple(x.split(".")[1:])) for x in names} - {parts}
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
  "path", sorted(ROOT.glob("bigalign/data/**/*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_data_workers_never_start_jax(path):
  """A data worker is a process of its own; a JAX call there would take the accelerator."""
  assert not {name.split(".")[0] for name in _imports(path)} & {"jax", "flax", "jaxlib"}
  assert {x[0] for x in _ours(path)} <= FOR_WORKERS


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda p: p.stem)
def test_configs_are_read_without_starting_jax(path):
  names = {name.split(".")[0] for name in _imports(path)}
  assert names <= {"ml_collections", "os", "configs", "__future__"}


def test_programs_import_neither_tensorflow_nor_torch():
  code = """
import sys
from bigalign import evaluate, train
from bigalign.export import main
from bigalign.report import main
from bigalign.suites import main
print(sorted({"tensorflow", "torch"} & {name.split(".")[0] for name in sys.modules}))
"""
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert found.stdout == "[]\n"


def test_private_interfaces_of_libraries_are_in_one_file():
  """An upgrade that changes one of them breaks in private_apis.py, which has a test for each."""
  for path in FILES:
    if path.name == "private_apis.py":
      continue
    private = [x for x in _imports(path) if "._" in x and not x.startswith("bigalign")]
    assert not private, f"{path}: {private}"
    assert "mock" not in {x.split(".")[-1] for x in _imports(path)}, path
