"""One run on any mesh and any number of processes: equal batches in order, equal losses.

Run as a program, this file is `bigalign train` and after it, in the same process, `_print_batches`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
from absl import app
from helpers import small_runs
from helpers.shipped import load

from bigalign import sharding, train
from bigalign.config import Config
from bigalign.data.loader.options import resolve_data
from bigalign.inputs import open_data
from bigalign.run.flags import define_flags, parse_flags
from bigalign.run.metrics import read_metrics

SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(s) == 8]
ONE = {"data": 8, "fsdp": 1, "tensor": 1}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
OFTEN = [(1, 8, 1), (2, 2, 2)]  # every shape before a release


def _mesh(shape):
  return dict(zip(sharding.AXES, shape))


def _train(workdir, mesh, **changes):
  train.train(small_runs.config(mesh, **changes), workdir)
  return small_runs.losses(workdir)


def _assert_close(found, wanted):
  assert list(found) == list(wanted)
  np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=0, atol=1e-5)


def _equal_losses(tmp_path, shapes, steps):
  changes = dict(total_steps=steps, checkpoint_every=0)
  wanted = _train(tmp_path / "one", ONE, **changes)
  assert len(set(wanted.values())) == steps
  for shape in shapes:
    _assert_close(_train(tmp_path / str(shape), _mesh(shape), **changes), wanted)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(tmp_path):
  """A mesh of one axis, and one with all three."""
  _equal_losses(tmp_path, OFTEN, steps=10)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_forty_steps_on_every_mesh(tmp_path):
  _equal_losses(tmp_path, [s for s in SHAPES if s != (8, 1, 1)], steps=40)


# What four processes show together: tables by id range over the devices of all, whose temperatures'
# quantiles are read; and evaluation in 42 small batches, as calls that wait for each other on more
# devices than there are threads once came to a deadlock.
TOGETHER = {
  "total_steps": 20,
  "checkpoint_every": 5,
  "diagnose_every": 10,
  "keep": {"last": 9},
  "ema": 0.0,
  "loss": {"siglip": {"weight": 1.0}, "isogclr": {"tau_init": 0.07}},
}


def _upto(step, workdir, copy):
  """A copy of a run as it was when it had saved `step`."""
  shutil.copytree(workdir, copy)
  for folder in (copy / "checkpoints").iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)
  rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
  (copy / "metrics.jsonl").write_text("".join(x for x in rows if json.loads(x)["step"] <= step))
  return copy


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_processes(tmp_path):
  """They learn, remember and read what one does, although one of them dies on the way.

  That a resumed run of several processes has the bits of an undisturbed one: test_signals.py, and
  test_twenty_random_kills before a release.
  """
  together = {**TOGETHER, "evals": small_runs.evals(tmp_path, count=336, batch_size=8)}
  config = small_runs.write(tmp_path / "config.py", small_runs.config(MIXED, **together))
  words = [f"--config={config}", "--workdir", tmp_path / "four"]
  alone, four = (tmp_path / name for name in ("alone", "four"))
  _train(alone, ONE, **together)
  saved = _kill_one(tmp_path, words, four)
  with small_runs.Run(tmp_path / "end", 4, *words, program=__file__) as run:
    run.ends()
    _assert_batches_of_one([run.read(i) for i in range(4)])
    assert f"Resuming from step {saved}" in run.read()
  _assert_close(small_runs.losses(four), small_runs.losses(alone))
  _assert_same_findings(four, alone)
  _go_on_with_others(tmp_path, alone, four)


def _go_on_with_others(tmp_path, alone, four):
  """From four processes to one, and from one to two: exactly the next samples."""
  plain = {**TOGETHER, "diagnose_every": 0}
  one = _train(_upto(10, four, tmp_path / "one"), _mesh((4, 1, 2)), **plain)
  _assert_close(one, small_runs.losses(four))
  two = _upto(10, alone, tmp_path / "two")
  config = small_runs.write(tmp_path / "two.py", small_runs.config(_mesh((1, 4, 2)), **plain))
  with small_runs.Run(tmp_path / "1", 2, f"--config={config}", "--workdir", two) as run:
    run.ends()
  _assert_close(small_runs.losses(two), small_runs.losses(alone))


def _kill_one(tmp_path, words, workdir):
  """kill -9 of one of four, which ends the others; returns the step of the last checkpoint."""
  with small_runs.Run(tmp_path / "killed", 4, *words, program=__file__, step_seconds=0.3) as run:
    first = workdir / "checkpoints/5/commit_success.txt"
    run.wait_for(lambda: small_runs.last_step(workdir) >= 7 and first.exists())
    run.tell(1, signal.SIGKILL)
    codes = run.codes()
    # The others are told by the collective that fails, or by JAX's service.
    assert codes[1] == -9 and all(code in (143, -6) for code in codes[:1] + codes[2:]), codes
  said = re.search(r"processes \[([0-9, ]+)\] do not answer", run.read(0) + run.read(2))
  assert said and "1" in said[1].split(", "), run.read(0)
  written = (workdir / "checkpoints").glob("*/commit_success.txt")
  saved = max(int(marker.parent.name) for marker in written)
  assert saved < 20
  return saved


def _assert_same_findings(found, wanted):
  """Evaluation at the start and the end; the quantiles of the temperatures in the tables."""
  found, wanted = (
    {
      (row["step"], k): x
      for row in read_metrics(run)
      for k, x in row.items()
      if "val/" in k or "e/image/p" in k
    }
    for run in (found, wanted)
  )
  assert found.keys() == wanted.keys()
  assert {step for step, _ in found} == {0, 10, 20} and sum("/p" in k for _, k in found) == 6
  for name, value in wanted.items():
    # A rank may move by a place or two: losses agree to 1e-6, not to the bit.
    tolerance = 1e-5 if "e/image/p" in name[1] else 2e-3
    np.testing.assert_allclose(
      found[name],
      value,
      rtol=tolerance,
      atol=0 if tolerance < 1e-4 else tolerance,
      err_msg=str(name),
    )


def _batches(mesh, steps=3):
  """[(sha256 of the global batch, whether each shard here holds its rows of it)] by step."""
  c = load("tiny")
  c.data.workers = 0
  inputs, size = open_data(resolve_data(c.data.to_dict())), 16
  options = dict(batch_size=size, seed=c.seed, stop=steps * size, rejected_log="")
  rows = sharding.host_rows(mesh, size)
  own = inputs.batches(rows=rows, **options)
  every = inputs.batches(rows=np.arange(size), **options)
  found = []
  for mine, whole in zip(own, every, strict=True):
    placed = sharding.global_batch(mesh, mine, rows, size)
    right = all(
      np.array_equal(shard.data, whole[name][shard.index])
      for name, x in placed.items()
      for shard in x.addressable_shards
    )
    digest = hashlib.sha256(b"".join(whole[name].tobytes() for name in sorted(whole))).hexdigest()
    found.append((digest, right))
  own.close()
  every.close()
  return found


def _print_batches():
  """[mesh shape, what this process holds] a line."""
  for shape in SHAPES:
    print(json.dumps([shape, _batches(sharding.make_mesh(**_mesh(shape)))]), flush=True)


def _assert_batches_of_one(printed):
  wanted = [[digest, True] for digest, _ in _batches(sharding.make_mesh())]
  assert len({digest for digest, _ in wanted}) == 3
  for text in printed:
    # Between the lines the collectives' library says that it is connected.
    lines = [json.loads(line) for line in text.splitlines() if line[:2] == "[["]
    found = {tuple(shape): held for shape, held in lines}
    assert sorted(found) == sorted(SHAPES)
    assert all(held == wanted for held in found.values()), found


def _main(argv):
  small_runs.main(argv)
  _print_batches()


if __name__ == "__main__":
  define_flags(lambda: Config)
  app.run(_main, flags_parser=parse_flags)
