"""Which checkpoints are kept: the last, every n-th and the best, by a metric that can be NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import small_runs

from bigalign import train
from bigalign.checkpoint import Checkpoints, Keep


def _save(workdir, metrics, **keep):
  """Saves {step: metrics} and returns the steps that are kept."""
  with Checkpoints(workdir, **keep) as checkpoints:
    for step, scores in metrics.items():
      checkpoints.save(step, {"trainable": {"a": np.arange(3)}}, {}, scores)
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("mode,best", [("max", 2), ("min", 4)])
def test_a_metric_that_is_nan_is_never_the_best(mode, best, tmp_path):
  values = {1: math.nan, 2: 0.9, 3: math.nan, 4: 0.2, 5: 0.5, 6: math.nan}
  metrics = {step: {"r": value} for step, value in values.items()}
  assert _save(tmp_path, metrics, last=1, best="r", mode=mode) == [best, 6]
  with Checkpoints(tmp_path, best="r", mode=mode, read_only=True) as reader:
    assert reader.find("best") == best


def test_the_newest_of_equal_ones_is_the_best_and_none_without_a_number():
  equal = {1: {"r": 0.5}, 2: {"r": 0.5}, 3: {"r": 0.4}, 4: None}
  assert Keep(best="r").best_step(equal) == 2
  assert Keep(best="r", mode="min").best_step({1: {"r": 0.4}, **equal}) == 3
  assert Keep(best="r").best_step({1: {"r": math.nan}, 2: None, 3: {}}) is None
  assert Keep(best="r").steps({i: {"r": math.nan} for i in range(5)}) == {3, 4}
  assert Keep(best="r").best_step({1: {"r": math.inf}, 2: {"r": 7}}) == 1


def test_a_metric_of_another_name_deletes_nothing(tmp_path):
  before = {step: {"r": value} for step, value in {1: 0.1, 2: 0.9, 3: 0.2}.items()}
  assert _save(tmp_path, before, last=1, best="r") == [2, 3]
  assert _save(tmp_path, {4: {"r": 0.3}, 5: {}, 6: {}}, last=1, best="q") == [2, 3, 4, 6]
  # Once there is a value, it decides.
  assert _save(tmp_path, {7: {"q": 0.3}, 8: {"q": 0.1}}, last=1, best="q") == [7, 8]


def test_a_change_of_keep_that_deletes_lasting_checkpoints_is_refused(tmp_path):
  old = dict(last=1, every=2, best="r", mode="max")
  metrics = {step: {"r": (step - 4) ** 2, "q": step} for step in (1, 2, 3, 4, 5, 6)}
  assert _save(tmp_path, metrics, **old) == [1, 2, 4, 6]
  for new, lost in (
    (dict(last=1, every=4, best="r"), [2]),
    (dict(last=4, every=4, best="r"), []),
    (dict(last=1, every=2, best="r", mode="min"), [1]),
    (dict(last=1, every=2, best="q"), [1]),
    (dict(last=1), [1, 2, 4]),
    (dict(last=3, every=1, best="r"), []),
  ):
    checkpoints = Checkpoints(tmp_path, read_only=True, **new)
    if lost:
      listed = ", ".join(f"{tmp_path}/checkpoints/{step}" for step in lost)
      with pytest.raises(ValueError, match=f"would delete {listed}. Copy them and pass"):
        checkpoints.check_deletions(old)
    else:
      checkpoints.check_deletions(old)


def test_metrics_that_come_after_the_checkpoint_count(tmp_path):
  keep = dict(last=1, best="r")
  assert _save(tmp_path, {1: {"r": 0.5}, 2: {}}, **keep) == [1, 2]
  with Checkpoints(tmp_path, **keep) as checkpoints:
    checkpoints.add_scores(2, {"r": 0.7, "q": math.nan})
    assert checkpoints.find("best") == 2
  assert _save(tmp_path, {3: {"r": 0.6}}, **keep) == [2, 3]


def test_keeping_none_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"config.keep.last=0: at least 1"):
    Checkpoints(tmp_path, last=0)


@pytest.mark.slow
def test_a_resumed_run_checks_what_it_keeps(tmp_path):
  """A metric without a value is an error before the first update, and stays one."""
  best = "val/image_to_text_R@1"
  evals = small_runs.evals(tmp_path / "shards")
  keep = {"last": 1, "every": 1, "best": best, "mode": "max"}
  changes = dict(checkpoint_every=1, eval_every=1, evals=evals, ema=0.0)
  mesh = {"data": 8, "fsdp": 1, "tensor": 1}

  def run(steps, keep, **options):
    c = small_runs.config(mesh, total_steps=steps, keep=keep, **changes)
    train.train(c, tmp_path, **options)

  with pytest.raises(ValueError, match=r"config.keep.best: no metric 'val/R'"):
    run(2, {**keep, "best": "val/R"})
  run(3, keep)  # of three checkpoints, the best and the last are two
  kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  for _ in range(2):
    with pytest.raises(ValueError, match=r"config.keep.best: no metric 'val/R'.* Known: .*R@1"):
      run(4, {**keep, "best": "val/R"}, allow_config_change=True)
  with pytest.raises(ValueError, match=r"config.keep was .* and is now .* would delete"):
    run(3, {"last": 1, "best": best, "mode": "max"})
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == kept
