"""Trains a dual encoder: python -m bigalign.train --config=configs/tiny.py --workdir=runs/tiny."""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import clu.profiler
import jax
from absl import app, flags, logging

from bigalign import config as configs
from bigalign import sharding
from bigalign import stages as courses
from bigalign import state as states
from bigalign.batches import check_stages, staged_batches
from bigalign.checkpoint import Checkpoints, revision
from bigalign.data.samples.rejects import Watch
from bigalign.data.sources.mixture import epochs, names
from bigalign.evals import make_evaluators
from bigalign.frozen.towers import check_stores
from bigalign.inputs import fingerprint, held, open_data
from bigalign.losses import check_ids, check_needs, remembers
from bigalign.model import provided
from bigalign.run import preemption
from bigalign.run import runtime as machine
from bigalign.run.flags import define_flags, parse_flags, profile_span
from bigalign.run.metrics import MetricWriter, Progress
from bigalign.run.provenance import (
  check_config,
  check_data,
  check_hosts_agree,
  digest,
  read_config,
  write_config,
)
from bigalign.run.timing import StartupTimer, StepTimer
from bigalign.run.workdir import Workdir
from bigalign.state import State
from bigalign.step import build_stages, diagnose, seen, stop_if_not_finite, summary
from bigalign.weights import init as beginnings


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
  stages: Sequence[Mapping[str, Any]] = (),
  eval_every: int | str = 0,
  diagnose_every: int | str = 0,
  evals: Mapping[str, Mapping[str, Any]] | None = None,
  frozen: str = "",
  ema: float = 0.0,
  microbatches: int = 1,
  gradient_dtype: str = "float32",
  logits: Mapping[str, Any] | None = None,
  mesh: Mapping[str, int] | None = None,
  topology: str = "",
  rules: Sequence[Any] = sharding.RULES,
  keep: Mapping[str, Any] | None = None,
  writer: Mapping[str, Any] | None = None,
  profile: Sequence[int] = (),
  patience: float = 1800.0,
  runtime: Mapping[str, Any] | None = None,
  allow_config_change: bool = False,
) -> State:
  """THE loop: step, log, evaluate, save. Continues from the newest checkpoint in workdir.

  Args:
    workdir: folder of the run, here or gs://…: workdirs.py.
    seed: of the initialisation, the order of the data, augmentation and dropout.
    total_steps: updates in all, or a duration: "1e9 samples", "3 epochs".
    batch_size: global: over all devices and hosts.
    log_every: steps; the only times, but for the first, at which the loop waits for the device.
    checkpoint_every: steps, or a duration; 0: only at the end, where one is always written.
    data: options of open_data.
    model: options of make_model, and where the towers begin: weights/start.py.
    loss: {name: options, weight among them}.
    optimizer: options of make_optimizer.
    stages: what the run does differently before it comes to what stands here: stages.py.
    eval_every: steps, or a duration; 0: only at the start and the end.
    diagnose_every: steps, or a duration, between looks at what the loss does: hardest negatives,
      saturation, shares of the gradient, temperatures; each costs about half a step. 0: none.
    evals: {name: options, type among them}.
    frozen: regular expression of the parameters that do not learn.
    ema: decay of the running average of the parameters, which is evaluated too; 0 for none.
    microbatches: parts in which a batch is embedded; loss and gradient stay those of the whole.
    gradient_dtype: of what the devices send of the gradients of kernels and of the token table,
      "float32" or "bfloat16".
    logits: how the loss's B x B logits are formed: options of losses.pairwise.Engine.
    mesh: sizes of the axes data, fsdp, tensor.
    topology: what `bigalign plan` compiles it for; the loop takes the devices that are there.
    rules: (regular expression, axes) pairs for the parameters' places.
    keep: which checkpoints stay: options of Checkpoints.
    writer: options of MetricWriter.
    profile: (first, last): what is between these steps is traced into workdir/profile.
    patience: seconds without a step after which several processes end, naming the one that hangs.
    runtime: options of runtime.setup, which the caller has made use of; here they are recorded.
    allow_config_change: continue although the config in workdir says something else.

  Returns:
    The last state; survival.Preempted is raised, behind a checkpoint, if a notice of the end came.
  """
  config = dict(locals())
  del config["workdir"], config["allow_config_change"]
  startup_timer = StartupTimer()
  home = Workdir(workdir)
  home.download()
  workdir = home.local
  given = configs.plain(model)
  config["model"] = beginnings.options(given, read_config(workdir))
  source, reading = configs.call(open_data, data, "config.data")
  course = courses.split(config, dataset_size=len(source))
  program = states.make_program(
    **config, dataset_size=len(source), captions_per_image=reading["captions_per_image"]
  )
  check_needs(program.loss, provided(program.spec), ema=ema > 0)
  check_stages(course, source, program.model.text_tower)
  total = program.total_steps
  duration = functools.partial(
    configs.steps, batch_size=batch_size, dataset_size=len(source), total_steps=total
  )
  if log_every < 1:
    raise ValueError(f"config.log_every={log_every}: at least 1")
  if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1] <= total):
    raise ValueError(f"config.profile={profile}: two steps (first, last) of the {total}, or ()")
  save_every = duration(checkpoint_every, "config.checkpoint_every")
  eval_every = duration(eval_every, "config.eval_every")
  diagnose_every = duration(diagnose_every, "config.diagnose_every")
  meta = {
    "config": configs.plain(config),
    "model": given,
    "revision": revision(),
    "versions": machine.versions(),
    "hardware": machine.describe(),
    "dataset_size": len(source),
    "data": fingerprint(source, reading),
    "tokenizer": digest(data["tokenizer"]),
  }
  check_hosts_agree(meta)

  grid = configs.call(sharding.make_mesh, mesh or {}, "config.mesh")
  programs = [states.of_stage(program, stage, grid) for stage in course]
  rows = [sharding.host_rows(grid, stage.batch_size) for stage in course]
  abstract, placed = states.layout(program, grid, rules)
  for stage in course:
    with courses.named(stage):
      told = summary(programs[stage.number], abstract)
    logging.info("The loss of %s: %s", stage.where, told)
  remembered = remembers(program.loss, program.sizes)
  embed = states.make_embed(program.model)
  evaluators = make_evaluators(evals or {}, mesh=grid, data=data, **embed)

  check_config(workdir, meta, allow_config_change)
  checkpoints = configs.call(Checkpoints, keep or {}, "config.keep", workdir=home.root)
  start = checkpoints.latest()
  check_hosts_agree({"newest checkpoint": start})
  rejected: collections.Counter[str] = collections.Counter()
  if start is None:
    loaded = beginnings.load(
      given, loss, {**abstract.trainable, **abstract.frozen}, {**placed.trainable, **placed.frozen}
    )
    state = states.born(program, placed, loaded)
    checkpoints.save_frozen(state.frozen)
    samples_seen, lane_rows = 0, course[0].batch_size
    states.describe(state, workdir)
  else:
    before = checkpoints.meta(start)
    check_data(before, meta, workdir, allow_config_change)
    state = states.restore(checkpoints, start, abstract, placed)
    samples_seen, lane_rows = before["samples_seen"], before["lane_rows"]
    rejected.update(before["rejected"])
    logging.info("Continue from step %d, %d samples seen", start, samples_seen)
  stored = held(source, reading)
  if stored:
    check_stores(stored.sides, config, program, state)
  write_config(workdir, meta)
  watch = configs.call(Watch, data.get("rejects") or {}, "config.data.rejects", names=names(source))
  step = start or 0
  # A run that continues behind the first step traces nothing.
  trace_from, trace_to = profile if profile and step <= profile[0] else (-1, -1)
  batches = staged_batches(
    course,
    source,
    reading,
    rows=rows,
    step=step,
    start=samples_seen,
    seed=seed,
    lane_rows=lane_rows,
    rejected_log=str(workdir / f"rejected-{jax.process_index():05}.jsonl"),
  )
  looks = [jax.jit(functools.partial(diagnose, program=program)) for program in programs]
  built: dict[int, tuple[Any, int]] = {}  # of each stage that is left, the compiled step
  window: list[dict[str, jax.Array]] = []  # what must be seen of every step, since the last fetch

  with (
    jax.set_mesh(grid),
    contextlib.closing(batches),
    checkpoints,
    configs.call(
      MetricWriter, writer or {}, "config.writer", workdir=workdir, resume_step=start
    ) as board,
    Progress(total, start=step) as progress,
    preemption.PreemptionListener() as listener,
    preemption.Watchdog(patience, step) as watchdog,
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

    def save(found: Mapping[str, float]) -> None:
      now = dict(step=step, samples_seen=samples_seen, rejected=dict(rejected), lane_rows=lane_rows)
      with timer.paused():
        home.upload(jax.process_index())  # the rows before the checkpoint that follows them
        checkpoints.save(step, states.parts(state), {**meta, **now}, found)

    if start is None:
      checkpoints.check_best(evaluate())
    preempted = listener.should_stop_at_start(step)
    timer = StepTimer(step)
    while step < total and not preempted:
      if step == trace_from:
        clu.profiler.start(str(workdir / "profile"))
      with timer.waiting_for_data():
        stage, host_batch = next(batches)
      if remembered:
        check_ids(host_batch, program.sizes)
      batch = sharding.global_batch(grid, host_batch, rows[stage.number], stage.batch_size)
      place = seen(samples_seen, len(source))
      if not built:
        with timer.paused():
          left = course[stage.number :]
          built = build_stages(left, programs, placed, grid, state, batch, place)
      compiled, work = built[stage.number]
      state, metrics = compiled(state, batch, place)
      step += 1
      watchdog.completed(step)
      startup_timer.first_step(metrics)
      samples_seen += stage.batch_size
      seldom = [k for k in metrics if k.startswith(("finite_", "rejected_", "repaired_", "tally"))]
      window.append({name: metrics.pop(name) for name in seldom})
      progress.advance(step)
      if step == trace_to:
        jax.block_until_ready(metrics)
        clu.profiler.stop()

      last, preempted = step == total, listener.should_stop(step)
      logs = step == stage.end or step % log_every == 0
      saves = last or preempted or (save_every and step % save_every == 0)
      if logs or saves:
        with timer.waiting_for_device():  # the loop's only wait
          scalars, since = jax.device_get((metrics, window))
        window = []
        for one in since:
          counted = watch.add(one["tally"])
          rejected.update({f"rejects_of_{name}": n for name, n in counted.items()})
          rejected.update(
            {k: int(n) for k, n in one.items() if k.startswith(("rejected_", "repaired_"))}
          )
      if logs:
        row = {f"train/{name}": x for name, x in [*scalars.items(), *rejected.items()]}
        row |= {"train/samples_seen": samples_seen, "train/epoch": samples_seen / len(source)}
        passes = epochs(source, samples_seen, batch_size=lane_rows)
        row |= {f"train/epoch_{name}": x for name, x in passes.items()}
        row |= {"train/stage": stage.number} if stages else {}
        row |= timer.read(step, stage.batch_size, work) | startup_timer.take_metrics()
        board.write(step, row)
        progress.log(step, row)
      if logs or saves:
        stop_if_not_finite(since, step)
        watch.check()
      if preempted and not last:  # before all else: the machine may have seconds left
        save({})
      if diagnose_every and step % diagnose_every == 0:
        with timer.paused():
          findings = jax.device_get(sharding.block_on_cpu(looks[stage.number](state, batch, place)))
          board.write(step, {f"train/{name}": x for name, x in findings.items()})
      found: dict[str, float] = {}
      if last or (eval_every and step % eval_every == 0):
        with timer.paused():
          found = evaluate()
      if saves and (last or not preempted):
        save(found)
  home.upload(jax.process_index())
  if step < total:
    raise preemption.Preempted(step)
  return state


def main(argv: Sequence[str]) -> None:
  """What runs once absl has read the flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown words {argv[1:]}; options are written --config.key=value")
  values = flags.FLAGS
  config = configs.plain(values.config)
  config |= {"profile": profile_span(values.profile)} if values.profile else {}
  configs.call(machine.setup, config.get("runtime", {}), "config.runtime")
  machine.connect(values.coordinator, values.num_processes, values.process_id)
  name = pathlib.Path(getattr(values["config"], "config_filename")).stem  # noqa: B009
  workdir = values.workdir or f"runs/{name}"
  logging.info("%s in %s on %s", name, workdir, machine.describe())
  try:
    configs.call(
      train, config, "config", workdir=workdir, allow_config_change=values.allow_config_change
    )
  except Exception as error:
    preemption.exit_on_error(error)


def run() -> None:
  """The program `bigalign train`."""
  define_flags()
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run()
