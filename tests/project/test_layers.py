"""The picture of the design, held by the imports: an arrow points down only."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "bigalign").rglob("*.py"))

# From the bottom; a file imports from its own layer and from those below it.
LAYERS = [
  {
    "tree",
    "sharding",
    "config",
    "vectors",
    "flops",
    "hlo",
    "hlo_memory",
    "pods",
    "runtime",
    "gradcache",
    "command_line",
    "chips",
    "survival",
    "stages",
  },
  {
    "metrics",
    "projectors",
    "losses",
    "towers",
    "data",
    "inputs",
    "throughput",
    "pictures",
    "identity",
    "workdirs",
    "batches",
  },
  {"model", "weights", "optim", "checkpoint"},
  {"evals", "state", "step", "frozen"},
  {
    "train",
    "evaluate",
    "report",
    "costs",
    "index",
    "view",
    "embed",
    "compare",
    "curate",
    "inspection",
    "inspection_html",
    "convert",
    "source_flags",
    "report_html",
    "__main__",
    "export",
    "export_card",
    "export_check",
    "export_formats",
    "plan",
    "plan_batch",
    "plan_step",
    "plan_table",
  },
]
# What takes seconds or gigabytes to import, or may be replaced one day, has its few places.
PLACES = {
  "flax": {"towers", "projectors", "model"},
  "optax": {"optim", "state", "step"},
  "orbax": {"checkpoint"},
  "grain": {"data"},
  "torch": set(),
  "tensorflow": set(),
}


def _subject(path):
  """bigalign/data/order.py -> "data", bigalign/tree.py -> "tree"."""
  return path.relative_to(ROOT / "bigalign").with_suffix("").parts[0]


def _imports(path, *, top=False):
  """Dotted names that a file imports; with `top` only those that importing it imports."""
  found = set()

  def visit(node):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import; write it from the root"
      found.update(f"{node.module}.{alias.name}" for alias in node.names)
    elif top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      return
    for child in ast.iter_child_nodes(node):
      visit(child)

  visit(ast.parse(path.read_text()))
  return found


def _ours(path):
  """The subjects of bigalign that a file imports."""
  return {name.split(".")[1] for name in _imports(path) if name.startswith("bigalign.")}


def test_every_file_has_its_layer():
  subjects = {_subject(path) for path in FILES} - {"__init__"}
  placed = set().union(*LAYERS)
  assert subjects == placed, "give new files their layer in the picture, and take old ones off it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
  if path == ROOT / "bigalign/__init__.py":
    assert not _imports(path)
    return
  level = next((i for i, layer in enumerate(LAYERS) if _subject(path) in layer), len(LAYERS))
  above = set().union(*LAYERS[level + 1 :])
  assert not _ours(path) & above
  for package, places in PLACES.items():
    if _subject(path) not in places:
      names = {name.split(".")[0] for name in _imports(path, top=not places)}
      assert package not in names, f"{package} belongs in {sorted(places) or 'no import on top'}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("bigalign/data/**/*.py")), ids=lambda p: p.stem)
def test_data_workers_never_start_jax(path):
  """A data worker is a process of its own; a JAX call there would take the accelerator."""
  assert not {name.split(".")[0] for name in _imports(path)} & {"jax", "flax", "jaxlib"}
  assert _ours(path) <= {"data"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda p: p.stem)
def test_configs_are_read_without_starting_jax(path):
  names = {name.split(".")[0] for name in _imports(path)}
  assert names <= {"ml_collections", "os", "configs", "__future__"}


def test_programs_import_neither_tensorflow_nor_torch():
  code = """
import sys
from bigalign import evaluate, export, report, train
print(sorted({"tensorflow", "torch"} & {name.split(".")[0] for name in sys.modules}))
"""
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert found.stdout == "[]\n"
