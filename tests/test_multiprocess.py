"""One run on any mesh and any number of processes: equal batches in order, equal losses.

Run as a program, this file is one process of test_two_processes_hold_the_batches_of_one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tests_support import ROOT, load

from bigalign import runtime, sharding
from bigalign import train as program
from bigalign.data import pipeline
from bigalign.data.sources import open_source
from bigalign.metrics import read_metrics

SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(s) == 8]
ONE = {"data": 8, "fsdp": 1, "tensor": 1}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
SMALL = {
  "model.image.depth": 1, "model.text.depth": 1, "model.image.width": 32, "model.text.width": 32,
  "total_steps": 10,
}


def _mesh(shape):
  return dict(zip(sharding.AXES, shape))


def _config(mesh, **changes):
  """configs/tiny.py, logged at each step, its eight heads split by any tensor axis of eight."""
  c = load("tiny")
  c.update_from_flattened_dict(
    {"log_every": 1, "evals": {}, "writer": {"tensorboard": False}, "mesh": mesh, **changes}
  )
  return c


def _train(workdir, mesh, **changes):
  program.train(workdir, **_config(mesh, **changes).to_dict())
  return _losses(workdir)


def _losses(workdir):
  """{step: loss}"""
  return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


def _launch(*words, timeout=400):
  """Two processes of four devices each."""
  found = subprocess.run(
    [ROOT / "launch/local.sh", "-n", "2", "-d", "4", "--", *words],
    capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert found.returncode == 0, found.stderr[-4000:]
  return found.stdout


def _launch_training(workdir, mesh, *flags, config=ROOT / "configs/tiny.py"):
  """`bigalign train` of the very config that _train gets."""
  options = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
  _launch(
    sys.executable, "-m", "bigalign.train", f"--config={config}", f"--workdir={workdir}",
    "--config.log_every=1", *options, *flags,
  )
  return _losses(workdir)


def _assert_close(found, wanted):
  assert list(found) == list(wanted)
  np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=0, atol=1e-5)


def _upto(step, workdir, copy):
  """A copy of a run as it was when it had saved `step`."""
  shutil.copytree(workdir, copy)
  for folder in (copy / "checkpoints").iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)
  return copy


def test_losses_do_not_depend_on_the_mesh(tmp_path):
  """One mesh with all three axes; the slow test takes every mesh."""
  wanted = _train(tmp_path / "one", ONE, **SMALL)
  assert len(set(wanted.values())) == 10
  _assert_close(_train(tmp_path / "mixed", MIXED, **SMALL), wanted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(workdir, losses) of 40 steps of configs/tiny.py on one process, data parallel."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return workdir, _train(workdir, ONE, evals=load("tiny").evals)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (8, 1, 1)], ids=str)
def test_forty_steps_on_every_mesh(shape, whole, tmp_path):
  _, wanted = whole
  assert len(wanted) == 40
  _assert_close(_train(tmp_path, _mesh(shape)), wanted)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """(workdir, losses) of the same on two processes, whose evaluation is of 42 small batches: calls
  that wait for each other on more devices than there are threads once came to a deadlock."""
  workdir = tmp_path_factory.mktemp("two") / "run"
  return workdir, _launch_training(workdir, MIXED, "--config.evals.val.batch_size=64")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(whole, two):
  _assert_close(two[1], whole[1])
  found, wanted = (
    {k: x for row in read_metrics(run[0]) for k, x in row.items() if "val/" in k}
    for run in (two, whole)
  )
  assert found.keys() == wanted.keys() and found
  for name, value in wanted.items():
    # A rank may move by a place or two: losses agree to 1e-6, not to the bit.
    np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_two_processes_remember_what_one_remembers(tmp_path):
  """Tables by id range over the devices of both; the temperatures' quantiles are read from them."""
  changes = {**SMALL, "diagnose_every": 5, "checkpoint_every": 0}
  changes["loss"] = {"isogclr": {"tau_init": 0.07}}
  runs, config = [tmp_path / "two", tmp_path / "one"], tmp_path / "config.py"
  config.write_text(
    "from ml_collections import ConfigDict\n\ndef get_config():\n"
    f"  return ConfigDict({_config(MIXED, **changes).to_dict()!r})\n"
  )
  _assert_close(
    _launch_training(runs[0], MIXED, config=config), _train(runs[1], MIXED, **changes)
  )
  found, wanted = (
    {(row["step"], k): x for row in read_metrics(run) for k, x in row.items() if "e/image/p" in k}
    for run in runs
  )
  assert {step for step, _ in found} == {5, 10} and len(found) == 6
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=str(name))


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(whole, tmp_path):
  workdir = _upto(20, whole[0], tmp_path / "run")
  flag = "--config.evals.val.batch_size=512"
  _assert_close(_launch_training(workdir, _mesh((1, 4, 2)), flag), whole[1])


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(two, tmp_path):
  workdir = _upto(20, two[0], tmp_path / "run")
  _assert_close(_train(workdir, _mesh((4, 1, 2)), evals=load("tiny").evals), two[1])


def _batches(mesh, steps=3):
  """[(sha256 of the global batch, whether each shard here holds its rows of it)] by step."""
  c = _config({})
  source, size = open_source(c.data.source), c.batch_size
  options = dict(
    batch_size=size, seed=c.seed, image_size=c.data.image_size, stop=steps * size,
    tokenizer=c.data.tokenizer.to_dict(), augment=c.data.augment.to_dict(), workers=0,
  )
  rows = sharding.host_rows(mesh, size)
  own = pipeline.train_batches(source, rows=rows, **options)
  every = pipeline.train_batches(source, rows=np.arange(size), **options)
  found = []
  for mine, whole in zip(own, every, strict=True):
    placed = sharding.global_batch(mesh, mine, rows, size)
    right = all(
      np.array_equal(shard.data, whole[name][shard.index])
      for name, x in placed.items() for shard in x.addressable_shards
    )
    digest = hashlib.sha256(b"".join(whole[name].tobytes() for name in sorted(whole))).hexdigest()
    found.append((digest, right))
  own.close()
  every.close()
  return found


@pytest.mark.slow
def test_two_processes_hold_the_batches_of_one():
  wanted = [[digest, True] for digest, _ in _batches(sharding.make_mesh())]
  assert len({digest for digest, _ in wanted}) == 3
  # Between the lines the collectives' library says that it is connected.
  lines = [line for line in _launch(sys.executable, __file__).splitlines() if line[:2] == "[["]
  found = {tuple(shape): every for shape, *every in map(json.loads, lines)}
  assert sorted(found) == sorted(SHAPES)
  for shape, every in found.items():
    assert every == [wanted, wanted], shape


def _main():
  """Prints, in process 0, [mesh shape, what process 0 holds, what process 1 holds] a line."""
  runtime.connect()
  from jax.experimental import multihost_utils

  for shape in SHAPES:
    mine = _batches(sharding.make_mesh(**_mesh(shape)))
    words = np.frombuffer(json.dumps(mine).encode().ljust(1024), np.uint8)
    every = multihost_utils.process_allgather(words)
    if jax.process_index() == 0:
      print(json.dumps([shape, *(json.loads(bytes(x)) for x in every)]), flush=True)


if __name__ == "__main__":
  _main()
