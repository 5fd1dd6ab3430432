"""benchmarks/gpu.py without a GPU: which processes it starts, and what it keeps of them."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from helpers.shipped import ROOT

DONE = dict(seconds=0.5, batch=1024, flops=1.4e14, peak=9.89e14, device="H200", loss=0.1)


@pytest.fixture
def gpu(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # set by step.py
    monkeypatch.setenv(name, "PASSIVE")
  module = importlib.import_module("gpu")
  for name in ("gpu", "step"):
    monkeypatch.delitem(sys.modules, name)
  return module


@pytest.fixture
def run(gpu, monkeypatch, tmp_path):
  """run(results, *arguments): the status, the turns started with their limits, the JSON."""

  def run(results, *arguments):
    file, started, kept = tmp_path / "gpu.json", [], []
    file.unlink(missing_ok=True)

    def process(turn, args, limit):
      kept.append(len(json.loads(file.read_text())["turns"]) if file.exists() else 0)
      started.append((*turn, limit))
      clock[0] += 100
      return results(turn)

    clock = [0.0]
    monkeypatch.setattr(gpu, "in_a_process", process)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", f"--json={file}", *arguments])
    monkeypatch.setattr(gpu, "TINY", dict.fromkeys(["B/16", "L/14"], gpu.step.SMALL))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    status = gpu.main()
    assert kept == list(range(len(kept)))  # the JSON is written after each process
    return status, started, json.loads(file.read_text())

  return run


def test_what_does_not_fit_recomputes_more(run):
  def results(turn):
    fits = turn.remat == ("dots" if turn.runner == "bigalign" else "none")
    return DONE if fits or turn.model == "L/14" else dict(out_of_memory=True)

  status, started, result = run(results, "--turns=1")
  assert [turn[:3] for turn in started] == [
    ("bigalign", "B/16", "none"),
    ("bigalign", "B/16", "dots"),
    ("open_clip", "B/16", "none"),
    ("bigalign", "L/14", "full"),
    ("open_clip", "L/14", "full"),
  ]
  assert status == 1  # 28 % MFU
  assert result["best"]["B/16"]["bigalign"]["mfu"] == pytest.approx(1.4e14 / 0.5 / 9.89e14)


def test_it_ends_with_its_budget_and_keeps_what_it_has(run):
  status, started, result = run(
    lambda turn: DONE | dict(seconds=0.2), "--budget=345", "--limit=150"
  )
  assert [turn[3] for turn in started] == [150, 150, 145, 45]
  assert len(result["turns"]) == 4 and status == 0


def test_slower_than_open_clip_or_no_result_is_a_miss(run):
  def slower(turn):
    return DONE | dict(seconds=0.2 if turn.runner == "open_clip" else 0.21)

  assert run(slower, "--turns=1")[0] == 1
  assert run(lambda turn: dict(error="exit status 1"), "--turns=1")[0] == 1


def test_a_process_ends_at_its_limit(gpu, monkeypatch, tmp_path):
  script = tmp_path / "sleeps.py"
  script.write_text("import time; time.sleep(60)")
  monkeypatch.setattr(gpu, "__file__", str(script))
  args = gpu.argparse.Namespace(steps=1, batch=0, tiny=True)
  assert gpu.in_a_process(gpu.Turn("bigalign", "tiny", "none"), args, 0.2) == dict(
    error="longer than 0 s"
  )
