"""What a start does not do twice: tracing the model, compiling, evaluating equal parameters."""

from __future__ import annotations

import functools

import jax
import pytest
from helpers import small_runs
from helpers.shipped import load

from bigalign import program, sharding, train
from bigalign.config import resolve_config
from bigalign.run.metrics import read_metrics
from bigalign.state import State

ONE = {"data": 8, "fsdp": 1, "tensor": 1}


def test_the_shapes_of_a_state_need_no_second_trace_of_the_model(monkeypatch):
  config = load("tiny").to_dict() | {"frozen": "image_tower", "loss": {"sogclr": {}}}
  made = program.make_program(resolve_config(config), dataset_size=100)
  traced = jax.eval_shape(functools.partial(program.init_state, made), jax.random.key(0))
  monkeypatch.setattr(program.DualEncoder, "init", None)
  shapes, _ = program.layout(made, sharding.make_mesh())
  assert shapes == traced


def test_the_first_state_is_drawn_by_the_trace_that_gave_the_shapes(monkeypatch):
  made = program.make_programs(resolve_config(load("tiny").to_dict()), dataset_size=100)
  key = jax.random.key(0)
  drawn = jax.make_jaxpr(functools.partial(program.init_params, made[0]))(key)
  monkeypatch.setattr(program.DualEncoder, "__call__", None)
  first = jax.make_jaxpr(functools.partial(program.init_state, program.at_start(made)))(key)
  (inside,) = [eqn.params["jaxpr"] for eqn in first.eqns if eqn.params.get("name") == "init_params"]
  assert str(inside) == str(drawn)


@pytest.mark.parametrize("step, average, evaluations", [(0, 1.0, 1), (5, 3.0, 2), (5, None, 1)])
def test_averages_are_evaluated_once_they_differ_from_the_parameters(step, average, evaluations):
  averages = {} if average is None else {"a": average}
  state = State(step=step, trainable={"a": 1.0}, frozen={"b": 2.0}, ema=averages, opt=(), loss=())
  seen = []

  def evaluate(params):
    seen.append(params)
    return {"val/sum": params["a"] + params["b"]}

  scores = train._scores({"val": evaluate}, state, step)
  assert scores == {"val/sum": 3.0} | ({"ema/val/sum": average + 2.0} if averages else {})
  assert len(seen) == evaluations


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path, caplog):
  """Each of its programs comes from the compilation cache, from initialisation to evaluation.

  The log of a run names defaults that are those of large data, and a temperature at its bound.
  """
  c = small_runs.config(ONE, total_steps=2, evals=small_runs.evals(tmp_path)).to_dict()
  c["loss"] = dict(clip=dict(t_init=100.0), sogclr={})
  c["optimizer"]["lr"] = 1e-5
  caplog.set_level("WARNING", logger="absl")
  for name in ("first", "second"):
    jax.clear_caches()
    train.train(c, tmp_path / name)
  (row,) = [row for row in read_metrics(tmp_path / "second") if "perf/programs" in row]
  assert row["perf/programs_from_cache"] == row["perf/programs"] > 4
  assert caplog.text.count("config.loss.sogclr: tau=0.01, the default, is a release's") == 2
  at_bound = "config.loss.clip: the logit scale has been at its upper bound of 100 since step 1"
  assert caplog.text.count(at_bound) == 2
