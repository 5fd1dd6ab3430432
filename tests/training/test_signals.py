"""SIGTERM at each part of a run, of one and of several processes: what was learned is written.

Run as a program, this file is `bigalign train` whose first process gets SIGTERM at MOMENT.
"""

from __future__ import annotations

import os
import signal
import time

import jax
import pytest
from absl import app
from helpers import small_runs

from bigalign import train
from bigalign.checkpoint import Checkpoints
from bigalign.config import Config
from bigalign.run import flags, preemption, timing
from bigalign.run.metrics import read_metrics

BEST = "val/image_to_text_mean_rank"
CONFIG = {
  "total_steps": 6,
  "checkpoint_every": 0,
  "eval_every": 2,
  "diagnose_every": 2,
  "keep": {"last": 9, "best": BEST, "mode": "min"},
  "ema": 0.0,
}
# Where the signal comes; the step of the checkpoint that the run then leaves, and how many of this
# step's rows are left to the next start.
MOMENTS = {
  "updated 1": (1, 0),
  "updated 2": (2, 2),
  "evaluated 2": (2, 1),
  "evaluated 4": (4, 1),
  "updated 6": (6, 2),
}


def _rows(workdir, step):
  """Which parts of a step wrote rows: "log", "diagnose", "evaluate"."""
  kinds = []
  for row in read_metrics(workdir):
    if row["step"] == step:
      logged = "perf/flops_per_step" in row
      kinds.append("log" if logged else "evaluate" if BEST in row else "diagnose")
  return kinds


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_at_any_moment_loses_nothing(processes, tmp_path):
  """The last checkpoint is written, and the resumed runs write the rows of an undisturbed one."""
  mesh = {"data": 4, "fsdp": 2, "tensor": 1}
  config = small_runs.write(
    tmp_path / "config.py", small_runs.config(mesh, **CONFIG, evals=small_runs.evals(tmp_path))
  )

  def codes(workdir, moment):
    os.environ["MOMENT"] = moment
    words = [f"--config={config}", "--workdir", workdir]
    folder = tmp_path / f"{workdir.name} {moment}"
    with small_runs.Run(folder, processes, *words, program=__file__) as run:
      return run.codes(), run.read()

  whole, cut = tmp_path / "whole", tmp_path / "cut"
  ended, text = codes(whole, "write")
  assert ended == [0] * processes, text[-3000:]
  assert (whole / "checkpoints/6/commit_success.txt").exists()
  for moment, (step, left_out) in MOMENTS.items():
    ended, text = codes(cut, moment)
    assert ended == [143] * processes, (moment, text[-3000:])
    assert f"checkpoint saved at step {step}." in text
    assert max(int(folder.name) for folder in (cut / "checkpoints").iterdir()) == step
    assert _rows(cut, step) == _rows(whole, step)[: len(_rows(whole, step)) - left_out], moment
  ended, text = codes(cut, "never")
  assert ended == [0] * processes, text[-3000:]
  assert small_runs.exact(cut) == small_runs.exact(whole)
  ranks = {row["step"]: row[BEST] for row in read_metrics(cut) if BEST in row and row["step"]}
  with Checkpoints(cut, best=BEST, mode="min", read_only=True) as checkpoints:
    assert checkpoints.find("best") == min(ranks, key=ranks.get)


def test_a_trace_that_an_early_end_cuts_is_written(monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  with timing.Profile((2, 9), tmp_path, 0) as profile:
    assert (profile.begin, profile.end) == (2, 9)
    profile.start()
    assert calls == [str(tmp_path)]
  assert calls == [str(tmp_path), "stop"]
  with timing.Profile((2, 9), tmp_path, 3) as profile:
    assert (profile.begin, profile.end) == (-1, -1)  # a run that continues within the span
  assert calls[2:] == []


def test_evaluation_stops_once_a_signal_came():
  listener = preemption.PreemptionListener()
  embed = listener.interruptible(lambda params, x: x + params)
  with listener:
    assert embed(1, 2) == 3
    os.kill(os.getpid(), signal.SIGTERM)
    assert jax.jit(embed)(1, 2) == 3  # it is called while it is traced, and not once per batch
    with pytest.raises(preemption.EvaluationStopped):
      embed(1, 2)
    assert listener.should_stop(0)
  assert embed(1, 2) == 3


def main(argv):
  """The program's main; every process waits at the moment, so that all hear of the signal."""

  def pause(*moment):
    if " ".join(map(str, moment)) == os.environ["MOMENT"]:
      if jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.1 if jax.process_count() == 1 else 3)
      if moment == ("write",):  # schedulers send it again
        os.kill(os.getpid(), signal.SIGTERM)

  completed, evaluate, close = preemption.Watchdog.completed, train._evaluate, Checkpoints.close

  def completed_and_pause(self, step):
    completed(self, step)
    pause("updated", step)

  def pause_and_evaluate(evaluators, state, step, *rest):
    pause("evaluated", step)
    return evaluate(evaluators, state, step, *rest)

  def pause_and_close(self):
    pause("write")
    close(self)

  preemption.Watchdog.completed = completed_and_pause
  train._evaluate, Checkpoints.close = pause_and_evaluate, pause_and_close
  small_runs.main(argv)


if __name__ == "__main__":
  flags.define_flags(lambda: Config)
  app.run(main, flags_parser=flags.parse_flags)
