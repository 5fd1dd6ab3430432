"""The examples in the docstrings of the Python API and in docs/python.md run."""

from __future__ import annotations

import doctest
import re

import pytest
from helpers.shipped import ROOT

from bigalign.api import image_inputs, loading, model, names


@pytest.mark.parametrize(
  "module",
  [
    image_inputs,
    names,
    pytest.param(loading, marks=pytest.mark.slow),
    pytest.param(model, marks=pytest.mark.slow),
  ],
  ids=lambda module: module.__name__,
)
def test_examples_run(module, request):
  values = {}
  if module in (loading, model):
    values["run"] = str(request.getfixturevalue("run_folder"))
    values["images"] = request.getfixturevalue("pictures")
  failures, tried = doctest.testmod(module, verbose=False, extraglobs=values)
  assert tried and not failures


@pytest.mark.slow
def test_the_document_runs(run_folder, pictures, tmp_path, monkeypatch):
  """All but the programs, which need data and time."""
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs/quickstart").symlink_to(run_folder)
  (tmp_path / "photos").mkdir()
  for name, picture in zip("abc", pictures):
    picture.save(tmp_path / f"photos/{name}.jpg")
  monkeypatch.chdir(tmp_path)
  text = (ROOT / "docs/python.md").read_text().partition("## The programs")[0]
  values: dict = {}
  for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
    exec(block, values)
  assert values["z"].shape == (3, 64) and values["best"].shape == (3,)
  assert values["gradient"].keys() == values["params"].keys()
