"""Tests of the notebooks: they run from the first cell to the last, and hold no outputs."""

from __future__ import annotations

import nbformat
import pytest
from helpers.shipped import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_committed_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not cell.outputs and cell.execution_count is None
      assert "jax==" not in cell.source and "numpy==" not in cell.source


@pytest.mark.optimized
def test_quickstart_runs_and_shows_its_figures(monkeypatch):
  monkeypatch.setenv("BIGALIGN_STEPS", "10")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  notebook = nbformat.read(ROOT / "colabs/quickstart.ipynb", as_version=4)
  NotebookClient(
    notebook, timeout=500, resources={"metadata": {"path": str(ROOT / "colabs")}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  printed = "".join(output.get("text", "") for output in outputs)
  assert printed.startswith("cpu 1") and "glyphs-unseen-all-top1" in printed
  figures = [output for output in outputs if "image/png" in output.get("data", ())]
  assert len(figures) == 7  # the loss, the sphere, three name queries, two drawings
