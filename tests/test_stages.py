"""Runs in stages: where they end, what they may change, their steps, their resumption, their plans."""

from __future__ import annotations

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests_support import load

from bigalign import chips, config, inputs, plan, plan_step, plan_table, pods, sharding, stages
from bigalign import state as states
from bigalign import train as program
from bigalign.data import pipeline
from bigalign.metrics import WALL_CLOCK, read_metrics
from bigalign.step import seen, train_step
from bigalign.towers.vit import vit

needs_libtpu = pytest.mark.skipif(
  not pods.installed(), reason="libtpu is not installed: the extra plan"
)
FIRST = dict(
  until=3, batch_size=32, data=dict(image_size=16, tokenizer=dict(length=12)),
  model=dict(image=dict(patch_dropout=0.5)),
)


@pytest.fixture
def tiny():
  """configs/tiny.py made smaller still, in two stages: 3 steps of 32 pairs, 3 of 16."""
  c = load("tiny")
  c.total_steps, c.batch_size, c.log_every, c.checkpoint_every = 6, 16, 2, 0
  c.evals = {}
  c.model.image.update(width=32, depth=1, dropout=0.1)
  c.model.text.update(width=32, depth=1)
  c.writer = dict(tensorboard=False)
  return {**c.to_dict(), "stages": [FIRST]}


def exact(workdir):
  """The rows of metrics.jsonl without what a clock says."""
  return [{k: v for k, v in row.items() if not WALL_CLOCK(k)} for row in read_metrics(workdir)]


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def by_hand(c, workdir):
  """Six steps of two programs, each jitted, on batches that are read one by one."""
  mesh = sharding.make_mesh()
  source, reading = inputs.open_data(**c["data"])
  own = {k: x for k, x in c.items() if k != "stages"}
  last = states.make_program(**c, dataset_size=len(source))
  small = {**reading, "image_size": 16, "tokenizer": {**reading["tokenizer"], "length": 12}}
  _, placed = states.layout(last, mesh)
  state = states.born(last, placed)
  made = states.make_program(
    **{**own, "batch_size": 32, "data": {**c["data"], **{k: small[k] for k in (
      "image_size", "tokenizer")}}, "model": {**c["model"], "image": {
        **c["model"]["image"], "patch_dropout": 0.5}}}, dataset_size=len(source),
  )
  tower = made.model.image_tower.clone(grid=(4, 4))
  first = types.SimpleNamespace(model=made.model.clone(image_tower=tower))
  first = states.dataclasses.replace(last, model=first.model, spec=made.spec)
  at, losses = 0, []
  for step in range(6):
    one, how, size = (first, small, 32) if step < 3 else (last, reading, 16)
    rows = np.arange(size)
    batches = pipeline.train_batches(
      source, batch_size=size, rows=rows, seed=c["seed"], start=at, stop=at + size, lane_rows=32,
      **how,
    )
    update = jax.jit(functools.partial(train_step, program=one),
                     out_shardings=(placed, sharding.replicated(mesh)))
    with jax.set_mesh(mesh):
      batch = sharding.global_batch(mesh, next(batches), rows, size)
      state, metrics = update(state, batch, seen(at, len(source)))
    batches.close()
    losses.append(float(metrics["loss"]))
    at += size
  return state, losses


def test_two_stages_are_two_programs_to_the_last_digit(tiny, tmp_path):
  """Another resolution, token length, patch dropout and batch; the border is logged besides."""
  tiny["log_every"] = 1
  state = program.train(tmp_path, **tiny)
  wanted, losses = by_hand(tiny, tmp_path)
  assert_same_bits(wanted, state)
  rows = [row for row in read_metrics(tmp_path) if "train/loss" in row]
  assert [row["train/loss"] for row in rows] == losses
  assert [row["train/stage"] for row in rows] == [0, 0, 0, 1, 1, 1]
  assert [row["train/samples_seen"] for row in rows] == [32, 64, 96, 112, 128, 144]
  first, *_, last = (row["perf/flops_per_step"] for row in rows)
  assert 0 < first != last > 0
