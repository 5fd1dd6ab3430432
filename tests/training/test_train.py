"""The loop: exact resume, frozen parameters, steps that are not finite, workdirs, configs."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import small_runs
from helpers.shipped import ROOT, load
from helpers.small_shards import samples, write_tar

from bigalign import sharding, train
from bigalign.checkpoint import Checkpoints
from bigalign.config import resolve_config
from bigalign.data.loader.options import resolve_data
from bigalign.inputs import open_data
from bigalign.program import init_on_mesh, layout, make_embed, make_program
from bigalign.run import flops
from bigalign.run.metrics import is_wall_clock, read_metrics
from bigalign.state import parts
from bigalign.step import data_position, train_step, useful_flops


def small_config():
  """configs/tiny.py made smaller still: seconds for 8 steps."""
  c = load("tiny")
  c.total_steps, c.batch_size, c.log_every, c.checkpoint_every = 8, 16, 1, 4
  c.evals = {}
  c.model.image.update(width=32, depth=1)
  c.model.text.update(width=32, depth=1)
  c.writer = dict(tensorboard=False)
  return c


@pytest.fixture
def tiny():
  return small_config()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of a run of `tiny` that nothing disturbed, and its last state."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return workdir, run(workdir, small_config())


def run(workdir, c, **changes):
  allow = changes.pop("allow_config_change", False)
  return train.train({**c.to_dict(), **changes}, workdir, allow_config_change=allow)


def exact(workdir):
  """The rows of metrics.jsonl without what a clock says."""
  return [{k: v for k, v in row.items() if not is_wall_clock(k)} for row in read_metrics(workdir)]


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


TINY_DATA, TINY_MODEL = load("tiny").data.to_dict(), load("tiny").model.to_dict()

KILLED = """
import sys, json, os, signal
sys.path.insert(0, {root!r})
import jax
from bigalign import train, checkpoint
{trap}
if __name__ == "__main__":
  train.train(json.loads({config!r}), {workdir!r})
"""


def killed_run(workdir, config, trap):
  """Trains in a process of its own that `trap` (source code) ends by kill -9."""
  code = KILLED.format(root=str(ROOT), workdir=str(workdir), config=json.dumps(config), trap=trap)
  script = pathlib.Path(workdir).parent / "killed.py"
  script.write_text(code)
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, timeout=300)
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]


@pytest.mark.slow
def test_resume_after_kill_is_bitwise(tiny, whole, tmp_path):
  """8 steps == 4 steps, kill -9, 4 steps: parameters, averages, optimizer and metrics."""
  # Killed at step 7, three steps after the last checkpoint, whose writing is waited for.
  trap = """
step, data_position = 0, train.data_position
def counting(*args):
  global step
  step += 1
  if step == 8:
    import time, pathlib
    while not (pathlib.Path({workdir!r}) / "checkpoints/4/commit_success.txt").exists():
      time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
  return data_position(*args)
train.data_position = counting
""".replace("{workdir!r}", repr(str(tmp_path / "cut")))
  killed_run(tmp_path / "cut", tiny.to_dict(), trap)
  assert read_metrics(tmp_path / "cut")[-1]["step"] >= 4
  undisturbed, state = whole
  assert_same_bits(state, run(tmp_path / "cut", tiny))
  assert exact(undisturbed) == exact(tmp_path / "cut")


@pytest.mark.slow
def test_resume_of_what_pods_run_is_bitwise(tiny, tmp_path):
  """bfloat16, scan, remat, dropout, patch dropout, workers, fsdp, evaluation, sparse logs."""
  tower = dict(scan=True, remat="dots", dropout=0.1, dtype="bfloat16", depth=2)
  tiny.model.image.update(patch_dropout=0.5, **tower)
  tiny.model.text.update(tower)
  tiny.log_every, tiny.data.workers, tiny.eval_every = 3, 2, 4
  tiny.mesh = dict(data=2, fsdp=2, tensor=2)
  tiny.evals = small_runs.evals(tmp_path)
  whole = run(tmp_path / "whole", tiny)
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "8")
  resumed = run(tmp_path / "cut", tiny)
  assert_same_bits(whole, resumed)
  assert exact(tmp_path / "whole") == exact(tmp_path / "cut")


@pytest.mark.slow
def test_kill_while_a_checkpoint_is_written(tiny, whole, tmp_path):
  """The half-written checkpoint is never taken; the one before it is."""
  trap = """
save = checkpoint.Checkpoints.save
def dying(self, step, *args):
  save(self, step, *args)
  if step == 4:
    self._manager.wait_until_finished()
  if step == 8:
    os.kill(os.getpid(), signal.SIGKILL)  # the arrays are on their way, nothing is committed
checkpoint.Checkpoints.save = dying
"""
  killed_run(tmp_path / "cut", tiny.to_dict(), trap)
  left = sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir())
  assert "8" not in left, left
  assert any(name.startswith("8.") for name in left), f"nothing was being written: {left}"
  undisturbed, state = whole
  assert_same_bits(state, run(tmp_path / "cut", tiny))
  assert exact(undisturbed) == exact(tmp_path / "cut")


@pytest.mark.slow
def test_diagnoses_have_the_position_of_their_state(tiny, tmp_path, monkeypatch):
  """Of the state after an update, so what depends on steps or on samples is as far."""

  def found(state, batch, position, *, program):
    return {"at_step": state.step, "at_samples": position[0]}

  monkeypatch.setattr(train, "diagnose", found)
  run(tmp_path, tiny, total_steps=2, diagnose_every=1)
  rows = [row for row in read_metrics(tmp_path) if "train/at_step" in row]
  assert [(row["train/at_step"], row["train/at_samples"]) for row in rows] == [(1, 16), (2, 32)]


@pytest.mark.slow
def test_frozen_parameters(tiny, tmp_path):
  """No optimizer state, no gradient, unchanged to the bit, stored once, restored and resumed."""
  tiny.frozen, tiny.total_steps, tiny.checkpoint_every = "image_tower", 4, 2
  first = run(tmp_path, tiny)
  born = init_on_mesh(*_program(tiny, first))
  assert first.frozen and all("image_tower" in path for path in first.frozen)
  assert not any("image_tower" in path for path in (*first.trainable, *first.ema))
  assert_same_bits(born.frozen, first.frozen)
  moments = parts(first, ())["opt"]
  assert not any("image_tower" in path for path in moments)
  assert sum("text_tower" in path for path in moments) == 2 * sum(
    "text_tower" in path for path in first.trainable
  )
  stored = [path for path in tmp_path.rglob("_METADATA") if "image_tower" in path.read_text()]
  assert stored == [tmp_path / "frozen" / "_METADATA"]
  again = run(tmp_path, tiny)  # nothing is left to do: what is restored is what was
  assert_same_bits(first, again)
  rows = exact(tmp_path)
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  assert_same_bits(first, run(tmp_path, tiny))
  assert exact(tmp_path) == rows


def _program(c, state):
  made = make_program(resolve_config(c), dataset_size=1000)
  return made, jax.tree.map(lambda x: x.sharding, state)


def _abstract(program):
  """A program's train_step with the shapes of its arguments."""
  shapes, _ = layout(program, sharding.make_mesh())
  batch = {k: jax.ShapeDtypeStruct(*s) for k, s in program.spec.items()}
  return functools.partial(train_step, program=program), shapes, batch, data_position(0, 1)


@pytest.mark.slow
def test_the_frozen_half_costs_no_backward_pass(tiny):
  """FLOPs of a step with a frozen image tower: at least its backward pass less."""
  counts = {}
  for frozen in ("", "image_tower"):
    config = resolve_config({**tiny.to_dict(), "frozen": frozen})
    made = make_program(config, dataset_size=1000)
    step, shapes, batch, position = _abstract(made)
    counts[frozen] = flops.count(step, shapes, batch, position)
  image = flops.count(
    lambda p, x: make_embed(made.model)["embed_image"](p, x),
    {**shapes.trainable, **shapes.frozen},
    batch["image"],
  )
  # The first layer has no gradient with respect to the image even when it learns.
  assert counts[""] - counts["image_tower"] > 1.7 * image


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_what_is_done_twice_is_no_useful_flops(tiny, scan):
  useful, done = [], []
  for remat, microbatches in (("none", 1), ("dots", 1), ("full", 1), ("full", 2)):
    tiny.model.image.update(remat=remat, scan=scan)
    tiny.model.text.update(remat=remat, scan=scan)
    config = {**tiny.to_dict(), "microbatches": microbatches}
    made = make_program(resolve_config(config), dataset_size=1000)
    step, *args = _abstract(made)
    jaxpr = jax.make_jaxpr(step)(*args)
    useful.append(useful_flops(made, jaxpr, *args))
    done.append(flops.of_jaxpr(jaxpr))
  assert {*useful} == {done[0]} and done == sorted({*done})


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_not_applied(tiny, tmp_path):
  """The state stays, the run stops at the next log and names the step."""
  tiny.log_every = 4
  tiny.checkpoint_every = 8
  tiny.optimizer.lr = 1e30
  tiny.optimizer.clip_norm = None
  with pytest.raises(FloatingPointError, match=r"step [23]: (loss|grad_norm).* not finite"):
    run(tmp_path, tiny)
  assert read_metrics(tmp_path)[-1]["step"] == 4


@pytest.mark.slow
def test_workdir_of_another_config_shows_the_difference(tiny, whole, tmp_path):
  cut = shutil.copytree(whole[0], tmp_path / "run")
  with pytest.raises(ValueError, match=r"config.optimizer/lr: was 0.001, now 0.5"):
    run(cut, tiny, optimizer={**tiny.optimizer.to_dict(), "lr": 0.5})
  run(cut, tiny, log_every=7)  # harmless


@pytest.mark.slow
def test_checkpoint_of_another_model_names_the_first_path(tiny, whole, tmp_path):
  cut = shutil.copytree(whole[0], tmp_path / "run")
  wider = {**tiny.model.to_dict(), "embed_dim": 16}
  with pytest.raises(ValueError, match=r"model/image_projector/out/kernel: stored .*64.* has .*16"):
    run(cut, tiny, model=wider, allow_config_change=True)
  assert_same_bits(whole[1], run(cut, tiny))  # and the run is what it was


def test_keep_last_every_and_best(tmp_path):
  """Two newest, multiples of 6, and the best by a metric survive."""
  checkpoints = Checkpoints(tmp_path, last=2, every=6, best="rank", mode="min")
  for step in range(2, 18, 2):
    checkpoints.save(
      step,
      {"trainable": {"a/b": np.arange(step)}},
      {"samples_seen": step},
      {"rank": abs(step - 8.0)},
    )
  checkpoints.close()
  assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == {6, 8, 12, 14, 16}
  reader = Checkpoints(tmp_path, best="rank", mode="min", read_only=True)
  assert (reader.find("best"), reader.find("latest"), reader.find(12)) == (8, 16, 12)
  assert reader.meta(12)["samples_seen"] == 12
  with pytest.raises(FileNotFoundError, match=r"no checkpoint 7 .* there are \[6, 8, 12, 14, 16\]"):
    reader.find(7)


@pytest.mark.parametrize(
  "change,error,message",
  [
    (dict(total_stepz=3), TypeError, "Did you mean 'total_steps'"),
    (dict(batch_size=12), ValueError, "config.batch_size=12 does not divide over 8"),
    (dict(mesh=dict(data=3)), ValueError, "must multiply to 8"),
    (dict(data=dict(source="glyphs", image_size=32)), TypeError, "option 'tokenizer' is missing"),
    (dict(data=dict(sauce="glyphs")), TypeError, "Did you mean 'source'"),
    (
      dict(data=dict(TINY_DATA, tokenizer=dict(name="bite", length=8))),
      ValueError,
      "config.data.tokenizer.name: unknown 'bite'. Did you mean 'byte'",
    ),
    (
      dict(data=dict(TINY_DATA, tokenizer=dict(name="byte", lenght=8))),
      TypeError,
      "config.data.tokenizer: unknown option 'lenght'. Did you mean 'length'",
    ),
    (
      dict(data=dict(TINY_DATA, augment=dict(flipp=0.5))),
      TypeError,
      "config.data.augment: unknown option 'flipp'. Did you mean 'flip'",
    ),
    (dict(optimizer=dict(lr=1.0, warmpu=3)), TypeError, "Did you mean 'warmup'"),
    (dict(optimizer=dict(lr="1e-3")), TypeError, "config.optimizer.lr='1e-3' is of type str"),
    (
      dict(loss=dict(siglip=1.0)),
      TypeError,
      r"config.loss.siglip=1.0 is of type float; it must be a dict of options: \['weight'",
    ),
    (dict(frozen="."), ValueError, "leaves no parameter to train"),
    (dict(frozen="kernel"), ValueError, "decay .* among what config.frozen leaves to learn"),
    (
      dict(model=dict(TINY_MODEL, image=dict(TINY_MODEL["image"], dtype="bf16"))),
      ValueError,
      "config.model.image.dtype: unknown 'bf16'; known: .*'bfloat16'",
    ),
    (
      dict(model=dict(TINY_MODEL, text=dict(TINY_MODEL["text"], dtype="half"))),
      ValueError,
      "config.model.text.dtype: unknown 'half'; known: .*'float16'",
    ),
    (dict(profile=(2, 9)), ValueError, r"config.profile=\(2, 9\) must be .* 0 <= begin < end <= 8"),
    (dict(log_every=0), ValueError, "config.log_every=0: at least 1"),
    (dict(frozen="image_towr"), ValueError, "config.frozen: 'image_towr' matches no path"),
    (dict(rules=[("attn", ())]), ValueError, "config.rules: no rule matches"),
    (dict(total_steps="3 weeks"), ValueError, "config.total_steps: '3 weeks' is not a duration"),
    (dict(total_steps="2%"), ValueError, "config.total_steps: '2%' is a share of all steps"),
    (
      dict(batch_size=1),
      ValueError,
      "config.batch_size=1: a contrastive loss needs at least 2 pairs",
    ),
    (dict(optimizer=dict(name="adamm", lr=1.0)), ValueError, "Did you mean 'adamw'"),
    (dict(optimizer=dict(lr=1.0, b3=1.0)), TypeError, "config.optimizer: unknown option 'b3'"),
  ],
)
def test_mistakes_in_a_config_are_named(tiny, tmp_path, change, error, message):
  with pytest.raises(error, match=message):
    run(tmp_path, tiny, **change)


def test_a_token_without_a_row_is_an_error(tiny, tmp_path):
  tiny.model.text.vocab_size = 100
  with pytest.raises(ValueError, match=r"model.text.vocab_size=100 is too small .* needs 259"):
    run(tmp_path, tiny)


@pytest.mark.parametrize(
  "flag,message",
  [
    ("--config.total_stepz=3", "Did you mean 'total_steps'?"),
    pytest.param(
      "--config.model.image.register=2",  # the file sets no registers
      "config.model.image: unknown option 'register'. Did you mean 'registers'?",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "--config.total_steps=many",
      "config.total_steps: 'many' is not a duration",
      marks=pytest.mark.slow,
    ),
    pytest.param("--config.batch_size=many", "many", marks=pytest.mark.slow),
  ],
)
def test_misspelt_flag_names_the_nearest_key(flag, message, tmp_path):
  command = [
    sys.executable,
    "-m",
    "bigalign.train",
    f"--config={ROOT}/configs/tiny.py",
    f"--workdir={tmp_path}",
    flag,
  ]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode != 0
  assert message in done.stderr + done.stdout, done.stderr[-2000:]


def test_flags_put_text_where_a_duration_is_a_number():
  given = {
    "total_steps": "3 epochs",
    "checkpoint_every": "10%",
    "eval_every": "200",
    "optimizer.warmup": "64 samples",
  }
  words = [f"--config={ROOT}/configs/quickstart.py"]
  words += [f"--config.{name}={text}" for name, text in given.items()]
  code = """
import sys
from absl import flags
from bigalign.config import Config
from bigalign.run.flags import define_flags, parse_flags
define_flags(lambda: Config)
parse_flags(sys.argv)
print(flags.FLAGS.config.to_json())
"""
  done = subprocess.run(
    [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
  )
  found = json.loads(done.stdout)
  assert (found["total_steps"], found["checkpoint_every"]) == ("3 epochs", "10%")
  assert (found["eval_every"], found["optimizer"]["warmup"]) == (200, "64 samples")
  assert found["batch_size"] == 512


def test_durations():
  from bigalign.durations import steps

  sizes = dict(batch_size=100, dataset_size=1000, total_steps=500)
  asked = (7, "7", "7 steps", "1e3 samples", "3 epochs", "2%", 0)
  assert [steps(x, "here", **sizes) for x in asked] == [7, 7, 7, 10, 30, 10, 0]


@pytest.mark.slow
def test_every_rejected_sample_is_counted(tiny, tmp_path):
  """Also those of the steps between two logs, and over a resume."""
  members = samples(0, 24)
  broken = [
    (n, b"<html>") if n.endswith(".jpg") and i % 4 == 0 else (n, b)
    for i, (n, b) in enumerate(members)
  ]
  tiny.data.source = write_tar(tmp_path / "00000.tar", broken)
  tiny.log_every = 3
  run(tmp_path / "whole", tiny)
  inputs = open_data(resolve_data(tiny.data.to_dict()))
  batches = inputs.batches(batch_size=16, rows=np.arange(16), seed=0, stop=8 * 16, rejected_log="")
  expected = sum(int(batch["rejects"].sum()) for batch in batches)
  counted = read_metrics(tmp_path / "whole")[-1]
  assert sum(x for k, x in counted.items() if k.startswith("train/rejected_")) == expected > 8
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "8")
  run(tmp_path / "cut", tiny)
  assert exact(tmp_path / "whole") == exact(tmp_path / "cut")


@pytest.mark.slow
def test_microbatches_and_ways_change_nothing(tiny, whole, tmp_path):
  """The same losses, in parts and in a ring, to the rounding of float32."""
  tiny.microbatches, tiny.logits = 2, dict(way="ring")
  run(tmp_path, tiny)
  one, parts = (
    [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
    for workdir in (whole[0], tmp_path)
  )
  np.testing.assert_allclose(one, parts, rtol=1e-5)


def test_microbatches_that_do_not_divide_are_refused(tiny, tmp_path):
  tiny.microbatches = 3
  with pytest.raises(ValueError, match=r"config.microbatches=3 .* these do: \[1, 2"):
    run(tmp_path, tiny)
