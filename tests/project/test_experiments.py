"""The experiments: each is listed with its command, can be imported, and is run by make."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from helpers.shipped import ROOT

FOLDER = ROOT / "experiments"
SHARED = {"arms", "icons"}
SCRIPTS = sorted({path.stem for path in FOLDER.glob("*.py")} - SHARED)


def test_each_is_listed_with_its_command():
  listed = re.findall(r"^\| .* \| `(\w+)\.py OUT.*` \|", (FOLDER / "README.md").read_text(), re.M)
  assert sorted(listed) == SCRIPTS


def test_make_runs_all():
  lines = subprocess.run(
    ["make", "--dry-run", "--always-make", "experiments", "VENV=none"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  (names,) = re.findall(r"for name in (.*); do", lines)
  assert names.split() == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_says_what_it_finds_and_how_to_run_it(name, monkeypatch):
  monkeypatch.setenv("BIGALIGN_DATA", "/nowhere")
  monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
  module = importlib.import_module(name)
  assert f"python experiments/{name}.py OUT" in module.__doc__
  assert callable(module.main)


def test_a_folder_of_other_options_is_refused(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
  arms = importlib.import_module("arms")

  def given(*words):
    monkeypatch.setattr(sys, "argv", ["x.py", str(tmp_path / "out"), *words])
    return arms.arguments("", steps=10, lr=0.1)

  assert given("--steps", "20").steps == 20
  assert given("--steps", "20", "--seeds", "7").seeds == [7]  # seeds may be added
  with pytest.raises(SystemExit):
    given()
  assert "was made with {'steps': 20, 'lr': 0.1}, not {'steps': 10" in capsys.readouterr().err
