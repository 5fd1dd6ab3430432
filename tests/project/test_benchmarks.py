"""Tests of benchmarks/: what is missing is said, and `make bench` sums all of them up."""

from __future__ import annotations

import importlib
import json
import re
import sys
import time

import pytest
from helpers.shipped import ROOT

SET_BY_SCRIPTS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "RAYON_NUM_THREADS")


@pytest.fixture
def script(monkeypatch):
  """Imports a benchmark as Python does when it runs; undoes it at the end."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  for name in SET_BY_SCRIPTS:
    monkeypatch.setenv(name, "1")
  before = {*sys.modules}
  yield importlib.import_module
  for name in {*sys.modules} - before:
    if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
      del sys.modules[name]


def test_the_loader_benchmark_says_what_installs_open_clip(script, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
  monkeypatch.setattr(sys, "argv", ["loader.py"])
  with pytest.raises(SystemExit) as ended:
    script("loader").main()
  said = capsys.readouterr().err
  assert ended.value.code == 1
  assert said.startswith("open_clip cannot be imported: ") and "`make bench` installs" in said


@pytest.fixture
def folder(script, monkeypatch, tmp_path):
  """run.py over a folder of three small benchmarks, and the folder of their results."""
  programs = {
    "step": 'file.write_text(\'{"ratio": {"wall_seconds": 1.25}}\')',
    "slow": "file.write_text('{}'); print('a target is missed'); sys.exit(1)",
    "broken": "print('why'); sys.exit(3)",
  }
  for name, code in programs.items():
    (tmp_path / f"{name}.py").write_text(
      "import pathlib, sys\n"
      'file = pathlib.Path(sys.argv[1].removeprefix("--json" + "="))  # "--json"\n' + code
    )
  (tmp_path / "helper.py").write_text("not a program")
  run = script("run")
  monkeypatch.setattr(run, "FOLDER", tmp_path)
  monkeypatch.setattr(run, "NEEDS", {"loader": ["BIGALIGN_DATA"]})
  return run, tmp_path


def test_every_benchmark_runs_and_the_table_says_how_it_ended(folder, monkeypatch, capsys):
  run, path = folder
  monkeypatch.setattr(sys, "argv", ["run.py", f"--out={path}/results"])
  assert run.main() == 1
  rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
  for name, end in (
    ("step", "met .* 1.25x of open_clip"),
    ("slow", "missed .* a target is missed"),
    ("broken", "failed .* status 3: why"),
  ):
    assert re.search(end.replace(" .* ", " +"), rows[name]), rows[name]
  assert "helper" not in rows
  assert {x.name for x in (path / "results").glob("*.json")} == {"step.json", "slow.json"}


def test_a_benchmark_that_hangs_is_ended_with_its_processes_and_the_next_one_runs(
  folder, monkeypatch, capsys
):
  run, path = folder
  (path / "broken.py").write_text(
    "# --json\nimport os, time\nif not os.fork(): time.sleep(60)\n"
    "print('step 1', flush=True); time.sleep(60)"
  )
  monkeypatch.setattr(run, "names", lambda: ["broken", "step"])
  monkeypatch.setattr(sys, "argv", ["run.py", f"--out={path}/results", "--limit=1"])
  begin = time.monotonic()
  assert run.main() == 1
  assert time.monotonic() - begin < 30
  out = capsys.readouterr().out
  assert re.search("broken +failed +ended after 1 s: step 1", out)
  assert re.search("step +met", out) and re.search("in all 0 minutes, 0 CPU minutes", out)


def test_a_benchmark_without_its_data_is_left_out_with_the_reason(folder, monkeypatch, capsys):
  run, path = folder
  (path / "loader.py").write_text('"--json"; raise SystemExit(9)')
  monkeypatch.delenv("BIGALIGN_DATA", raising=False)
  monkeypatch.setattr(sys, "argv", ["run.py", "loader", "step", f"--out={path}/results"])
  assert run.main() == 0
  assert re.search("loader +left out +BIGALIGN_DATA not set", capsys.readouterr().out)
  assert not run.missing("loader", {"BIGALIGN_DATA": "/data"})


def test_a_wrong_name_is_said_before_anything_runs(folder, monkeypatch, capsys):
  run, _ = folder
  monkeypatch.setattr(sys, "argv", ["run.py", "stpe"])
  with pytest.raises(SystemExit):
    run.main()
  assert "unknown: stpe; there are broken, slow, step" in capsys.readouterr().err


def test_summaries_and_needs_name_benchmarks_and_git_ignores_the_results(script):
  run = script("run")
  assert {*run.SUMMARIES, *run.NEEDS} <= {*run.names()}
  assert "/benchmarks/results/" in (ROOT / ".gitignore").read_text().split()


def test_the_summary_is_found_in_what_a_benchmark_writes(script):
  run = script("run")
  written = {"500px": {"ratio": {"bigalign": 2.667}}}
  assert run.summary("loader", json.loads(json.dumps(written))) == "2.67x of open_clip at 500 px"
  assert run.summary("step", {"ratio": {}}) == run.summary("another", written) == ""
