"""Trains a dual encoder: python -m bigalign.train --config=configs/tiny.py --workdir=runs/tiny."""

from __future__ import annotations

import functools
import pathlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import clu.parameter_overview
import clu.profiler
import jax
import numpy as np
from absl import app, flags, logging

from bigalign import config as configs
from bigalign import flops, runtime, sharding
from bigalign import state as states
from bigalign.checkpoint import Checkpoints, revision
from bigalign.data import pipeline
from bigalign.data.sources import Source, open_source
from bigalign.data.tokenizers import make_tokenizer
from bigalign.evals import make_evaluators
from bigalign.identity import claim, same_data, same_on_all_hosts
from bigalign.losses import check_needs
from bigalign.metrics import MetricWriter, Progress
from bigalign.model import DualEncoder
from bigalign.state import State
from bigalign.throughput import Clock


def train(
  workdir: str | pathlib.Path,
  *,
  seed: int,
  total_steps: int | str,
  batch_size: int,
  log_every: int,
  checkpoint_every: int | str,
  data: Mapping[str, Any],
  model: Mapping[str, Any],
  loss: Mapping[str, Any],
  optimizer: Mapping[str, Any],
  eval_every: int | str = 0,
  evals: Mapping[str, Mapping[str, Any]] | None = None,
  frozen: str = "",
  ema: float = 0.0,
  mesh: Mapping[str, int] | None = None,
  rules: Sequence[Any] = sharding.RULES,
  keep: Mapping[str, Any] | None = None,
  writer: Mapping[str, Any] | None = None,
  profile: Sequence[int] = (),
  allow_config_change: bool = False,
) -> State:
  """THE loop: step, log, evaluate, save. Continues from the newest checkpoint in workdir.

  Args:
    workdir: folder of the run.
    seed: of the initialisation, the order of the data, augmentation and dropout.
    total_steps: updates in all, or a duration: "1e9 samples", "3 epochs".
    batch_size: global: over all devices and hosts.
    log_every: steps; the only times at which the loop waits for the device.
    checkpoint_every: steps, or a duration; one is always written at the end.
    data: options of open_data.
    model: options of make_model.
    loss: {name: options, weight among them}.
    optimizer: options of make_optimizer.
    eval_every: steps, or a duration; 0: only at the start and the end.
    evals: {name: options, type among them}.
    frozen: regular expression of the parameters that do not learn.
    ema: decay of the running average of the parameters, which is evaluated too; 0 for none.
    mesh: sizes of the axes data, fsdp, tensor.
    rules: (regular expression, axes) pairs for the parameters' places.
    keep: which checkpoints stay: options of Checkpoints.
    writer: options of MetricWriter.
    profile: (first, last) step to trace into workdir/profile.
    allow_config_change: continue although the config in workdir says something else.

  Returns:
    The last state.
  """
  config = dict(locals())
  del config["workdir"], config["allow_config_change"]
  if "://" in str(workdir):
    raise ValueError(f"--workdir={workdir}: a run's folder must be a local path or a mount")
  workdir = pathlib.Path(workdir).absolute()
  source, reading = configs.call(open_data, data, "config.data")
  program = states.make_program(**config, dataset_size=len(source))
  check_needs(program.loss, {*program.spec, "raw_img", "tokens_img"})
  check_tokenizer(program.model, data["tokenizer"])
  total = program.total_steps
  duration = functools.partial(
    configs.steps, batch_size=batch_size, dataset_size=len(source), total_steps=total
  )
  save_every = duration(checkpoint_every, "config.checkpoint_every")
  eval_every = duration(eval_every, "config.eval_every")
  meta = {
    "config": configs.plain(config), "revision": revision(), "versions": runtime.versions(),
    "data": source.fingerprint, "dataset_size": len(source), "hardware": runtime.describe(),
  }
  same_on_all_hosts(meta)

  grid = configs.call(sharding.make_mesh, mesh or {}, "config.mesh")
  rows = sharding.host_rows(grid, batch_size)
  abstract, placed = states.layout(program, grid, rules)
  embed = states.make_embed(program.model)
  evaluators = make_evaluators(evals or {}, mesh=grid, data=data, **embed)

  claim(workdir, meta, allow_config_change)
  checkpoints = configs.call(Checkpoints, keep or {}, "config.keep", workdir=workdir)
  start = checkpoints.latest()
  same_on_all_hosts({"newest checkpoint": start})
  if start is None:
    state = states.born(program, placed)
    checkpoints.save_frozen(state.frozen)
    samples_seen = 0
    describe(state, workdir)
  else:
    before = checkpoints.meta(start)
    same_data(before, meta, workdir, allow_config_change)
    state = states.restore(checkpoints, start, abstract, placed)
    samples_seen = before["samples_seen"]
    logging.info("Continue from step %d, %d samples seen", start, samples_seen)
  step = start or 0

  batches = pipeline.train_batches(
    source, batch_size=batch_size, rows=rows, seed=seed, start=samples_seen,
    stop=samples_seen + (total - step) * batch_size, **reading,
  )
  step_fn = jax.jit(
    functools.partial(states.train_step, program=program), donate_argnums=0,
    out_shardings=(placed, sharding.replicated(grid)),
  )
  compiled, work = None, 0
  applied: list[jax.Array] = []  # whether each step since the last log was finite

  with (
    jax.set_mesh(grid),
    configs.call(
      MetricWriter, writer or {}, "config.writer", workdir=workdir, resume_step=start
    ) as board,
    Progress(total, start=step) as progress,
  ):

    def evaluate() -> dict[str, float]:
      found: dict[str, float] = {}
      for prefix, learned in (("", state.trainable), ("ema/", state.ema)):
        for run in evaluators.values() if learned else ():
          found |= {prefix + k: x for k, x in run({**learned, **state.frozen}).items()}
      if found:
        board.write(step, found)
        progress.log(step, found)
      return found

    if start is None:
      evaluate()
    clock = Clock(step, batch_size)
    while step < total:
      if profile and step == profile[0]:
        clu.profiler.start(str(workdir / "profile"))
      with clock.waiting():
        host_batch = next(batches)
      batch = sharding.global_batch(grid, host_batch, rows, batch_size)
      seen = states.words(samples_seen)
      if compiled is None:
        with clock.paused():
          traced = step_fn.trace(state, batch, seen)
          work = flops.of_jaxpr(traced.jaxpr)
          begin = time.perf_counter()
          compiled = traced.lower().compile()
          logging.info("Compiled the step in %.1f s: %.3g FLOPs", time.perf_counter() - begin, work)
      state, metrics = compiled(state, batch, seen)
      step += 1
      samples_seen += batch_size
      applied.append(metrics.pop("finite"))
      progress.advance(step)
      if profile and step == profile[1]:
        jax.block_until_ready(metrics)
        clu.profiler.stop()

      if step % log_every == 0 or step == total:
        scalars, finite = jax.device_get((metrics, applied))  # the loop's only wait
        row = {f"train/{name}": x for name, x in scalars.items()}
        row |= {"train/samples_seen": samples_seen, "train/epoch": samples_seen / len(source)}
        row |= clock.read(step, work)
        board.write(step, row)
        progress.log(step, row)
        stop_if_not_finite(finite, step, scalars)
        applied = []
      found: dict[str, float] = {}
      if step == total or (eval_every and step % eval_every == 0):
        with clock.paused():
          found = evaluate()
      if step == total or step % save_every == 0:
        with clock.paused():
          checkpoints.save(
            step, states.parts(state), {**meta, "samples_seen": samples_seen, "step": step}, found
          )
  batches.close()
  checkpoints.close()
  return state


def open_data(
  *,
  source: str,
  image_size: int,
  tokenizer: Mapping[str, Any],
  augment: Mapping[str, Any] | None = None,
  resize: str = "squash",
  captions: Sequence[str] | None = None,
  shuffle: bool = True,
  workers: int = 0,
) -> tuple[Source, dict[str, Any]]:
  """What config.data says: the source, and how training reads it.

  Args:
    source: "glyphs", shards ("DIR/{00000..00099}.tar"), "tfds:NAME:SPLIT"; lists joined by "::".
    image_size: pixels per side.
    tokenizer: name, length and options of make_tokenizer.
    augment: options of transforms.train_image.
    resize: of evaluation, which does not augment: "squash", or "shortest" edge and centre crop.
    captions: fields to take captions from, the first that a record has; the source's own if None.
    shuffle: another order in each epoch; without, that of the source.
    workers: processes that read and decode; they have no influence on the batches.
  """
  del resize  # the evaluators'
  opened = open_source(source, captions=captions)
  if not len(opened):
    raise ValueError(f"config.data.source={source!r} holds no sample")
  return opened, dict(
    image_size=image_size, tokenizer=tokenizer, augment=augment, shuffle=shuffle, workers=workers
  )


def check_tokenizer(model: DualEncoder, options: Mapping[str, Any]) -> None:
  """Raises ValueError if the text tower has no row for some token, or no place for the last one.

  On the device an index past the end is no error: it reads the last row.
  """
  tokenizer = make_tokenizer(**options)
  for ours, theirs in (("length", tokenizer.length), ("vocab_size", tokenizer.vocab_size)):
    room = getattr(model.text_tower, ours, theirs)
    if room < theirs:
      raise ValueError(
        f"config.model.text.{ours}={room} is too small for config.data.tokenizer"
        f" {options['name']!r}, which needs {theirs}"
      )


def describe(state: State, workdir: pathlib.Path) -> None:
  """Lists the parameters in workdir/parameters.txt and logs their number."""
  if jax.process_index() == 0:
    parameters = {**state.trainable, **state.frozen}
    overview = clu.parameter_overview.get_parameter_overview(parameters, include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    logging.info(
      "%d parameters, %d of them trainable; list in %s", sum(x.size for x in parameters.values()),
      sum(x.size for x in state.trainable.values()), workdir / "parameters.txt",
    )


def stop_if_not_finite(good: Sequence[bool], step: int, metrics: Mapping[str, Any]) -> None:
  """Raises FloatingPointError naming the first step of this window that was not applied."""
  bad = [step - len(good) + i + 1 for i, ok in enumerate(good) if not ok]
  if bad:
    named = {k: float(x) for k, x in metrics.items() if not np.isfinite(x)}
    raise FloatingPointError(
      f"step {bad[0]}: the loss or the norm of the gradient is not finite; {len(bad)} of the last"
      f" {len(good)} steps were not applied. Metrics at step {step}: {named or 'finite again'}."
      " Lower config.optimizer.lr, lengthen its warmup, or set config.optimizer.clip_norm; the"
      " last checkpoint is sound."
    )


def main(argv: Sequence[str]) -> None:
  """What runs once absl has read the flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown words {argv[1:]}; options are written --config.key=value")
  values = flags.FLAGS
  config = configs.plain(values.config)
  configs.call(runtime.setup, config.pop("runtime", {}), "config.runtime")
  runtime.connect(values.coordinator, values.num_processes, values.process_id)
  name = pathlib.Path(getattr(values["config"], "config_filename")).stem  # noqa: B009
  workdir = values.workdir or f"runs/{name}"
  logging.info("%s in %s on %s", name, workdir, runtime.describe())
  configs.call(
    train, config, "config", workdir=workdir, allow_config_change=values.allow_config_change
  )


def run() -> None:
  """The program `bigalign train`."""
  with warnings.catch_warnings():
    # One load_module() inside of config_flags, which nobody here can mend.
    warnings.filterwarnings("ignore", message=".*load_module.*", category=DeprecationWarning)
    from ml_collections import config_flags

  config_flags.DEFINE_config_file("config", None, "The experiment: a file in configs/.")
  flags.DEFINE_string("workdir", None, "Folder of the run; runs/<name of the config> if not given.")
  flags.DEFINE_bool("allow_config_change", False, "Continue a run with a config that differs.")
  flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.")
  flags.DEFINE_integer("num_processes", None, "How many processes.")
  flags.DEFINE_integer("process_id", None, "Which one this is.")
  flags.mark_flag_as_required("config")
  app.run(main)


if __name__ == "__main__":
  run()
