"""SIGTERM at each part of a run, of one and of several processes: what was learned is written.

Run as a program, this file is `bigalign train` of which one process gets SIGTERM at MOMENT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from unittest import mock

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
  "loss": {"siglip": {"weight": 1.0}, "isogclr": {"tau_init": 0.07}},  # with tables of samples
}
# Where the signal comes; the step of the checkpoint that the run then leaves, how many of this
# step's rows are left to the next start, and which of two processes gets the signal.
MOMENTS = {
  "updated 1": (1, 0, 1),
  "updated 2": (2, 2, 0),
  "evaluated 2": (2, 1, 1),
  "evaluated 4": (4, 1, 0),
  "updated 6": (6, 2, 1),
}
# Two processes start for each: the others before a release.
SOME_MOMENTS = ("updated 1", "evaluated 2")


def _rows(workdir, step):
  """Which parts of a step wrote rows: "log", "diagnose", "evaluate"."""
  kinds = []
  for row in read_metrics(workdir):
    if row["step"] == step:
      logged = "perf/flops_per_step" in row
      kinds.append("log" if logged else "evaluate" if BEST in row else "diagnose")
  return kinds


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  "processes,moments",
  [
    pytest.param(1, MOMENTS, id="1", marks=pytest.mark.slow),
    pytest.param(2, SOME_MOMENTS, id="2", marks=pytest.mark.slow),
    pytest.param(2, MOMENTS, id="2 at every one", marks=pytest.mark.long),
  ],
)
def test_a_signal_at_any_moment_loses_nothing(processes, moments, tmp_path, caplog):
  """The last checkpoint is written, and the resumed runs write the rows of an undisturbed one."""
  mesh = {"data": 4, "fsdp": 2, "tensor": 1}
  c = small_runs.config(mesh, **CONFIG, evals=small_runs.evals(tmp_path))
  config = small_runs.write(tmp_path / "config.py", c)

  def codes(workdir, moment):
    """What each process ends with, and the log of the first; a single run is in this process."""
    if processes == 1:
      caplog.clear()
      code = 0
      try:
        with signal_at(moment):
          train.train(c, workdir)
      except preemption.Preempted as ended:
        code = ended.code
      return [code], caplog.text
    os.environ["MOMENT"] = moment
    words = [f"--config={config}", "--workdir", workdir]
    folder = tmp_path / f"{workdir.name} {moment}"
    with small_runs.Run(folder, processes, *words, program=__file__) as run:
      return run.codes(), run.read()

  whole, cut = tmp_path / "whole", tmp_path / "cut"
  ended, text = codes(whole, "write")
  assert ended == [0] * processes, text[-3000:]
  assert (whole / "checkpoints/6/commit_success.txt").exists()
  for moment in moments:
    step, left_out, _ = MOMENTS[moment]
    ended, text = codes(cut, moment)
    assert ended == [143] * processes, (moment, text[-3000:])
    assert f"checkpoint saved at step {step}." in text
    assert max(int(folder.name) for folder in (cut / "checkpoints").iterdir()) == step
    assert _rows(cut, step) == _rows(whole, step)[: len(_rows(whole, step)) - left_out], moment
  ended, text = codes(cut, "never")
  assert ended == [0] * processes, text[-3000:]
  assert small_runs.exact(cut) == small_runs.exact(whole)
  saved = {int(folder.name) for folder in (cut / "checkpoints").iterdir()}
  rows = [row for row in read_metrics(cut) if BEST in row and row["step"] in saved]
  ranks = {row["step"]: row[BEST] for row in rows}
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


@contextlib.contextmanager
def signal_at(wanted):
  """One process gets SIGTERM at this moment; every one waits there, so that all hear of it."""
  _, _, receiver = MOMENTS.get(wanted, (0, 0, 0))

  def pause(*moment):
    if " ".join(map(str, moment)) == wanted:
      if jax.process_index() == receiver % jax.process_count():
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

  with (
    mock.patch.object(preemption.Watchdog, "completed", completed_and_pause),
    mock.patch.object(train, "_evaluate", pause_and_evaluate),
    mock.patch.object(Checkpoints, "close", pause_and_close),
  ):
    yield


def main(argv):
  """The program's main, with the signal."""
  with signal_at(os.environ["MOMENT"]):
    small_runs.main(argv)


if __name__ == "__main__":
  flags.define_flags(lambda: Config)
  app.run(main, flags_parser=flags.parse_flags)
