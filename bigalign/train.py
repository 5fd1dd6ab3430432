"""Trains a dual encoder: bigalign train --config=configs/tiny.py --workdir=runs/tiny.

`train` is `setup`, which turns a config into everything that a run needs, and `loop`, which updates
the state: data, step, log, diagnose, evaluate, save.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from bigalign import durations, reading, sharding
from bigalign.border import crossed, differ
from bigalign.checkpoint import Checkpoints, revision
from bigalign.config import (
  Config,
  originals,
  recorded_config,
  resolve_and_compare,
  start,
  tokenizer_digest,
  tokenizer_files,
  with_tokenizer_digest,
  written_model,
  written_teacher,
)
from bigalign.data.loader.workers import own_shared_memory
from bigalign.data.order.schedule import epochs
from bigalign.data.samples.rejects import Watch
from bigalign.data.sources.mixture import names
from bigalign.evals import Evaluator, make_evaluators
from bigalign.frozen.towers import check_stores
from bigalign.inputs import (
  Inputs,
  check_stages,
  open_data,
  staged_batches,
  with_stage_weights,
)
from bigalign.losses import check_ids, has_tables
from bigalign.losses.advice import (
  BoundWatch,
  bias_of_large_batches,
  defaults_of_large_data,
  unread_averages,
)
from bigalign.options import plain
from bigalign.program import (
  Program,
  at_start,
  check_loss,
  init_on_mesh,
  layout,
  make_embed,
  make_programs,
)
from bigalign.program import check_stages as check_batches
from bigalign.run import copies, disk, preemption, runtime
from bigalign.run.flags import config_name, define_flags, parse_flags, profile_span
from bigalign.run.metrics import DIAGNOSE, EVALUATE, MetricWriter, TrainingProgress
from bigalign.run.provenance import (
  check_config,
  check_data,
  check_hosts_agree,
  read_config,
  write_config,
)
from bigalign.run.timing import Profile, StartupTimer, StepTimer
from bigalign.run.workdir import Workdir
from bigalign.stages import Stage, at, mean_batch_size, named, split
from bigalign.state import Arrays, State, describe, parts, restore
from bigalign.step import (
  CompiledStep,
  StepChecks,
  build_stages,
  data_position,
  diagnose,
  shape_of,
  stop_if_not_finite,
  summary,
  warn_of_bounds,
)
from bigalign.weights.init import load


def train(
  config: Any, workdir: str | os.PathLike[str], *, allow_config_change: bool = False
) -> State:
  """Trains a model; continues from the newest checkpoint in workdir.

  Args:
    config: a ConfigDict or a mapping of plain values: see bigalign.config.Config.
    workdir: folder of the run, local or gs://…: see run/workdir.py.
    allow_config_change: continue although the config of the run in workdir differs.

  Returns:
    The last state.

  Raises:
    TypeError, ValueError: for a config that is wrong, or differs from that of the run in workdir.
    FileNotFoundError, KeyError: for missing data, pretrained files or environment variables.
    FloatingPointError: for a loss or a gradient that is not finite.
    WorkdirInUse: if another run writes into workdir.
    WorkdirLost: if workdir is deleted, moved or taken over while the run writes there.
    Preempted: if the run was asked to stop; a checkpoint of the last step exists, unless no step
      was done. The same call continues the run; it also makes up for the diagnosis and the
      evaluation that were due at that step.
  """
  folder = Workdir(workdir)
  with folder.locked():
    try:
      return loop(setup(config, folder, allow_config_change=allow_config_change))
    except Exception as error:
      if disk.is_full(error):
        disk.remove_partial(folder.local)
      raise


class Run(NamedTuple):
  """What `setup` gives to `loop`.

  `state`, `step` and `samples_seen` are the values at the start: the loop has its own, and the
  arrays of `state` are donated to the first step. `rejected` and `reject_watch` are updated in
  place.

  config: the resolved options. workdir: the run's folder. meta: the run record, config.json.
  inputs: the opened source. stages, programs, rows, shapes, shardings: per stage, its config, its
  program, {batch size: the rows of the global batch that this host owns}, and those of its state.
  evaluators: by name.
  resumed_from: the restored step, None for a new run. lane_rows: of the data order, fixed at the
  first start. rejected: {metric: count} so far. save_every, eval_every, diagnose_every: in steps.
  due: which of DIAGNOSE and EVALUATE the restored step still lacks, because its run was asked to
  stop. listener: knows when the run is asked to stop.
  """

  config: Config
  workdir: Workdir
  meta: dict[str, Any]
  mesh: jax.sharding.Mesh
  inputs: Inputs
  stages: list[Stage]
  programs: list[Program]
  rows: list[dict[int, np.ndarray]]
  shapes: Sequence[State]
  shardings: Sequence[State]
  checkpoints: Checkpoints
  evaluators: dict[str, Evaluator]
  reject_watch: Watch
  startup_timer: StartupTimer
  state: State
  step: int
  resumed_from: int | None
  samples_seen: int
  lane_rows: int
  rejected: collections.Counter[str]
  save_every: int
  eval_every: int
  diagnose_every: int
  due: Sequence[str]
  listener: preemption.PreemptionListener

  @property
  def total_steps(self) -> int:
    """Updates in all."""
    return self.stages[-1].end


def setup(config: Any, folder: Workdir, *, allow_config_change: bool = False) -> Run:
  """Everything that a run needs; arguments and errors as of `train`."""
  # ------------------------------------------------------------------ options, data, program
  startup_timer = StartupTimer()
  folder.download()
  values = plain(config)
  record = _record(folder)
  options, differences = resolve_and_compare(values, record)
  inputs = open_data(options.data)
  dataset_size = len(inputs.source)
  stages = split(options, dataset_size=dataset_size)
  programs = make_programs(options, dataset_size=dataset_size)
  program = programs[-1]
  for stage, one in zip(stages, programs):
    with named(stage):
      check_loss(one, programs)
  inputs = with_stage_weights(inputs, stages)
  check_stages(stages, inputs, program.model.text_tower)
  _check_profile(options.profile, program.total_steps)
  to_steps = functools.partial(
    durations.steps,
    batch_size=mean_batch_size(options),
    dataset_size=dataset_size,
    total_steps=program.total_steps,
  )
  save_every = to_steps(options.checkpoint_every, "config.checkpoint_every")
  eval_every = to_steps(options.eval_every, "config.eval_every")
  diagnose_every = to_steps(options.diagnose_every, "config.diagnose_every")

  # ------------------------------------------------------------------ mesh and shapes
  mesh = options.mesh.make()
  check_batches(stages, mesh)
  rows = [{n: sharding.host_rows(mesh, n) for n in stage.batch_sizes} for stage in stages]
  shapes, shardings = zip(*(layout(one, mesh, options.rules) for one in programs))
  for stage in stages:
    with named(stage):
      text = summary(programs[stage.number], shapes[stage.number])
    logging.info("%s%s", "" if len(stages) == 1 else f"{stage.where}: ", text)
  if options.ema:
    how = f"min({options.ema}, (1 + n) / (10 + n)) after n updates" if options.ema_warmup else ""
    logging.info("Running averages: decay %s", how or f"{options.ema} from the first update on")
  every_head = [head for one in programs for head in reading.heads(one.loss).values()]
  for text in (
    *defaults_of_large_data(options.loss, dataset_size),
    *unread_averages(every_head, shapes[-1].twin),
  ):
    logging.warning("%s", text)
  largest = max(size for stage in stages for size in stage.batch_sizes)
  for text in bias_of_large_batches(options.loss, largest):
    logging.info("%s", text)
  listener = preemption.PreemptionListener()
  embed = make_embed(program.model, options.loss)
  embed |= {name: listener.interruptible(embed[name]) for name in ("embed_image", "embed_text")}
  evaluators = make_evaluators(options.evals, mesh=mesh, data=options.data, **embed)

  # ------------------------------------------------------------------ the run in the workdir
  meta = {
    "config": plain(options),
    "model": written_model(values),
    **({"teacher": teacher} if (teacher := written_teacher(values)) else {}),
    "revision": revision(),
    "versions": runtime.versions(),
    "hardware": runtime.describe(),
    "dataset_size": dataset_size,
    "data": inputs.fingerprint,
    "tokenizer": tokenizer_digest(options),
    "tokenizer_files": tokenizer_files(options),
  }
  check_hosts_agree(meta)
  copied = copies.read(originals(options))
  meta["copies"], meta["differences"] = copied.record, [*differences]
  if record:
    record = {**record, "config": plain(recorded_config(record))}
  check_config(folder.local, record, meta, allow_config_change)
  own_shared_memory(str(folder.root))  # between two exchanges, so that all hosts have ended before
  checkpoints = options.keep.make(workdir=folder.root)
  resumed_from = checkpoints.latest()
  check_hosts_agree({"newest checkpoint": resumed_from})
  kept = record["config"]["keep"] if record else meta["config"]["keep"]
  keep_changed = kept != meta["config"]["keep"]
  if keep_changed and not allow_config_change:
    checkpoints.check_deletions(kept)

  # ------------------------------------------------------------------ state: new or restored
  rejected: collections.Counter[str] = collections.Counter()
  due: Sequence[str] = ()
  if resumed_from is None:
    loaded = load(
      values,
      {**shapes[0].trainable, **shapes[0].frozen},
      {**shardings[0].trainable, **shardings[0].frozen},
    )
    state = init_on_mesh(at_start(programs), shardings[0], loaded)
    warn_of_bounds(programs[0].loss, state, loaded)
    checkpoints.save_frozen({k: x for k, x in state.frozen.items() if k in program.fixed})
    samples_seen, lane_rows = 0, stages[0].batch_size
    describe(state, folder.local)
  else:
    saved = with_tokenizer_digest(checkpoints.meta(resumed_from))
    check_data(saved, meta, folder.local, allow_config_change)
    number = at(stages, resumed_from).number
    state = restore(checkpoints, resumed_from, shapes[number], shardings[number], program.fixed)
    samples_seen, lane_rows = saved["samples_seen"], saved["lane_rows"]
    rejected.update(saved["rejected"])
    due = saved.get("due", ())  # older checkpoints hold no such list
    if keep_changed and not checkpoints.knows_best():
      with jax.set_mesh(mesh):
        checkpoints.check_best(_scores(evaluators, state, resumed_from))
    logging.info("Resuming from step %d, %d samples seen", resumed_from, samples_seen)
  if inputs.stores:
    check_stores(inputs.stores.sides, options, program, state)
  if jax.process_index() == 0:
    copies.write(copied, folder.local)
  write_config(folder.local, meta)
  return Run(
    config=options,
    workdir=folder,
    meta=meta,
    mesh=mesh,
    inputs=inputs,
    stages=stages,
    programs=programs,
    rows=rows,
    shapes=shapes,
    shardings=shardings,
    checkpoints=checkpoints,
    evaluators=evaluators,
    reject_watch=options.data.rejects.make(names(inputs.source)),
    startup_timer=startup_timer,
    state=state,
    step=resumed_from or 0,
    resumed_from=resumed_from,
    samples_seen=samples_seen,
    lane_rows=lane_rows,
    rejected=rejected,
    save_every=save_every,
    eval_every=eval_every,
    diagnose_every=diagnose_every,
    due=due,
    listener=listener,
  )


def _record(folder: Workdir) -> dict[str, Any] | None:
  """config.json of the run to continue; None if no start has come as far as a checkpoint.

  Otherwise a start that failed would keep its folder from the corrected config.
  """
  if not (folder.local / "config.json").exists():
    return None
  with contextlib.closing(Checkpoints(folder.root, read_only=True)) as checkpoints:
    begun = checkpoints.latest() is not None
  return read_config(folder.local) if begun else None


def loop(run: Run) -> State:
  """Updates the state up to the last step; returns and raises as `train`."""
  config, state, step, samples_seen = run.config, run.state, run.step, run.samples_seen
  program, dataset_size, total_steps = run.programs[-1], len(run.inputs.source), run.total_steps
  has_sample_state = [has_tables(one.loss) for one in run.programs]
  current = at(run.stages, step).number  # the stage to which `state` belongs
  diagnose_fns = [jax.jit(functools.partial(diagnose, program=p)) for p in run.programs]
  # Of each stage that is left, by `shape_of` a batch.
  compiled: dict[int, dict[tuple[int, ...], CompiledStep]] = {}
  samples_of_row = flops_of_row = 0  # since the last log
  steps_of_row = 0
  checks: list[StepChecks] = []  # of the steps since the last fetch
  bounds = BoundWatch(config.loss, total_steps)
  due = run.due
  repeated = _last_batch_size(run) if DIAGNOSE in due else 0  # the last batch is read once more
  batches = staged_batches(
    run.stages,
    run.inputs,
    rows=run.rows,
    step=step - bool(repeated),
    start=samples_seen - repeated,
    seed=config.seed,
    lane_rows=run.lane_rows,
    rejected_log=str(run.workdir.local / f"rejected-{jax.process_index():05}.jsonl"),
  )

  with (
    jax.set_mesh(run.mesh),
    run.listener,  # outside of everything that is written: until then, no signal ends the process
    _uploading_at_the_end(run.workdir),
    contextlib.closing(batches),
    run.checkpoints,
    config.writer.make(
      workdir=run.workdir.local, resume_step=run.resumed_from, repeats=due
    ) as writer,
    TrainingProgress(total_steps, start=step, evaluate_every=run.eval_every) as progress,
    preemption.Watchdog(config.patience, step) as watchdog,
    Profile(config.profile, run.workdir.local / "profile", step) as profile,
  ):

    def next_batch() -> tuple[Stage, int, dict[str, jax.Array]]:
      stage, size, host_batch = next(batches)
      if has_sample_state[stage.number]:
        check_ids(host_batch, program.sizes)
      rows = run.rows[stage.number][size]
      return stage, size, sharding.global_batch(run.mesh, host_batch, rows, size)

    def diagnose_and_write(stage: Stage, batch: Mapping[str, jax.Array]) -> None:
      position = data_position(samples_seen, dataset_size)
      findings = diagnose_fns[stage.number](state, batch, position)
      findings = jax.device_get(sharding.block_on_cpu(findings))
      writer.write(step, {f"train/{name}": x for name, x in findings.items()})

    def evaluate() -> dict[str, float]:
      return _evaluate(run.evaluators, state, step, writer, progress)

    def save(scores: Mapping[str, float], due: Sequence[str] = ()) -> None:
      progress_so_far = dict(
        step=step,
        samples_seen=samples_seen,
        rejected=dict(run.rejected),
        lane_rows=run.lane_rows,
        due=[*due],
      )
      with timer.paused(state.step):
        run.workdir.check()
        run.workdir.upload(jax.process_index())  # metrics before the checkpoint that follows them
        saved = parts(state, program.fixed)
        run.checkpoints.save(step, saved, {**run.meta, **progress_so_far}, scores)

    # ---------------------------------------------------------------- before the first update
    preempted = run.listener.should_stop(step)
    if not preempted:
      try:
        if repeated:
          stage, _, batch = next_batch()
          diagnose_and_write(stage, batch)
        if run.resumed_from is None:
          run.checkpoints.check_best(evaluate())
        elif EVALUATE in due:
          run.checkpoints.add_scores(step, evaluate())
        due = ()
      except preemption.EvaluationStopped:
        preempted = True
    timer = StepTimer(step)

    while step < total_steps and not preempted:
      # -------------------------------------------------------------- data
      if step == profile.begin:
        with timer.paused(state.step):
          profile.start()
      with timer.waiting_for_data():
        stage, size, batch = next_batch()
      position = data_position(samples_seen, dataset_size)

      # -------------------------------------------------------------- step
      if current != stage.number:
        current = stage.number
        if differ(run.shapes[current - 1], run.shapes[current]):
          logging.info("Stage %d begins at step %d", current, step)
          with timer.paused(state.step):
            where = (run.programs[current], run.shapes[current], run.shardings[current])
            state = sharding.block_on_cpu(crossed(state, *where))
      if not compiled:
        with timer.paused(state.step):
          compiled = build_stages(
            run.stages[stage.number :],
            run.programs,
            run.shapes,
            run.shardings,
            run.mesh,
            state,
            batch,
            position,
          )
      one = compiled[stage.number][shape_of(batch)]
      state, metrics, step_checks = one.call(state, batch, position)
      step += 1
      samples_seen += size
      samples_of_row, flops_of_row = samples_of_row + size, flops_of_row + one.flops
      steps_of_row += 1
      checks.append(step_checks)
      watchdog.completed(step)
      run.startup_timer.first_step(metrics)
      progress.reach(step)
      if step == profile.end:
        with timer.paused(metrics):
          profile.stop()

      # -------------------------------------------------------------- log
      last, preempted = step == total_steps, run.listener.should_stop(step)
      logs = step == stage.end or step % config.log_every == 0
      saves = last or preempted or (run.save_every and step % run.save_every == 0)
      due = _due(run, step)
      if logs or saves or due:
        with timer.waiting_for_device():  # other steps do not wait
          scalars, fetched = jax.device_get((metrics, checks))
        checks = []
        _count_rejects(run, fetched)
      if logs:
        row = {f"train/{name}": x for name, x in [*scalars.items(), *run.rejected.items()]}
        row |= _data_metrics(run, stage, samples_seen)
        if stage.schedule:  # the loss depends on the size of the batch
          row |= {"train/batch_size": size, "train/patches": batch["image"].shape[1]}
        row |= timer.read(step, samples_of_row / steps_of_row, flops_of_row / steps_of_row)
        samples_of_row = flops_of_row = steps_of_row = 0
        row |= run.startup_timer.take_metrics()
        run.workdir.check(fresh=False)
        writer.write(step, row)
        progress.log(step, row)
        for text in bounds.see(step, run.programs[current].loss, _loss_scalars(state), scalars):
          logging.warning("%s", text)
      if logs or saves or due:
        stop_if_not_finite(fetched, step)
        run.reject_watch.check()

      # -------------------------------------------------------------- diagnose, evaluate, save
      if preempted:  # first of all, because the machine may stop in seconds
        save({}, due)
        break
      if DIAGNOSE in due:
        with timer.paused(metrics):
          diagnose_and_write(stage, batch)
      scores: dict[str, float] = {}
      if EVALUATE in due:
        try:
          with timer.paused(metrics):
            scores = evaluate()
        except preemption.EvaluationStopped:
          preempted, due = True, (EVALUATE,)
          save({}, due)
          break
      due = ()
      if saves:
        save(scores)

  if step < total_steps or due:
    raise preemption.Preempted(step, interrupted=run.listener.interrupted)
  return state


def _loss_scalars(state: State) -> Arrays:
  """{path: number} of the scalars of the loss, learned or frozen."""
  arrays = {**state.trainable, **state.frozen}
  found = {path: x for path, x in arrays.items() if path.startswith("loss/") and not x.ndim}
  fetched: Arrays = jax.device_get(found)
  return fetched


@contextlib.contextmanager
def _uploading_at_the_end(workdir: Workdir) -> Iterator[None]:
  """A context that ends with an upload of the small files, unless there is an error."""
  yield
  workdir.check()
  workdir.upload(jax.process_index())


def _due(run: Run, step: int) -> tuple[str, ...]:
  """Which of DIAGNOSE and EVALUATE follow the update that makes it `step` updates."""
  diagnoses = run.diagnose_every and step % run.diagnose_every == 0
  evaluates = step == run.total_steps or (run.eval_every and step % run.eval_every == 0)
  return (
    *((DIAGNOSE,) if diagnoses else ()),
    *((EVALUATE,) if evaluates and run.evaluators else ()),
  )


def _last_batch_size(run: Run) -> int:
  """Samples of the batch of the last update before the start; 0 if there is none."""
  last = run.step - 1
  sizes = [x.batch_size_at(last) for x in run.stages if x.begin < run.step <= x.end]
  return sizes[0] if sizes and sizes[0] <= run.samples_seen else 0


def _evaluate(
  evaluators: Mapping[str, Evaluator],
  state: State,
  step: int,
  writer: MetricWriter,
  progress: TrainingProgress,
) -> dict[str, float]:
  """{metric: value} of the parameters, and "ema/…" of their averages; written and shown."""
  with progress.evaluating():
    scores = _scores(evaluators, state, step)
  if scores:
    writer.write(step, scores)
    progress.log(step, scores)
  return scores


def _scores(evaluators: Mapping[str, Evaluator], state: State, step: int) -> dict[str, float]:
  """{metric: value} of the parameters, and "ema/…" of their averages."""

  def of(learned: Arrays) -> dict[str, float]:
    scores: dict[str, float] = {}
    params = {**learned, **state.frozen}  # one object, so that evaluators can share embeddings
    for evaluator in evaluators.values():
      scores |= evaluator(params)
    return scores

  scores = of(state.trainable)
  if not state.ema:
    return scores
  averages = of(state.ema) if step else scores  # they start as equal to the parameters
  return scores | {f"ema/{name}": value for name, value in averages.items()}


def _count_rejects(run: Run, checks: Sequence[StepChecks]) -> None:
  """Adds the rejected samples of some steps to the counts of the run."""
  for one in checks:
    per_source = run.reject_watch.add(one.tally)
    run.rejected.update({f"rejects_of_{name}": n for name, n in per_source.items()})
    run.rejected.update({f"rejected_{reason}": int(n) for reason, n in one.rejected.items()})
    run.rejected.update({"repaired_captions": int(one.repaired_captions)})


def _data_metrics(run: Run, stage: Stage, samples_seen: int) -> dict[str, float]:
  """The position in the data: samples and epochs, of each source of a mixture too; the stage."""
  row: dict[str, float] = {
    "train/samples_seen": samples_seen,
    "train/epoch": samples_seen / len(run.inputs.source),
  }
  passes = epochs(run.inputs.source, samples_seen, batch_size=run.lane_rows)
  row |= {f"train/epoch_{name}": x for name, x in passes.items()}
  return row | ({"train/stage": stage.number} if len(run.stages) > 1 else {})


def _check_profile(profile: Sequence[int], total_steps: int) -> None:
  """Raises ValueError unless config.profile is () or a span of updates of the run."""
  if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1] <= total_steps):
    raise ValueError(
      f"config.profile={profile} must be () or (begin, end) with 0 <= begin < end <= {total_steps}"
    )


def main(argv: Sequence[str]) -> None:
  """The program, once absl has read the flags."""
  values = flags.FLAGS
  config = start(argv, values)
  config |= {"profile": profile_span(values.profile)} if values.profile else {}
  workdir = values.workdir or f"runs/{config_name()}"
  logging.info("%s in %s on %s", config_name(), workdir, runtime.describe())
  try:
    train(config, workdir, allow_config_change=values.allow_config_change)
  except Exception as error:
    if disk.is_full(error):
      folder = Workdir(workdir)
      in_bucket = "" if folder.root is folder.local else str(folder.root / "checkpoints")
      disk.exit_if_full(error, folder.local, checkpoints=in_bucket)
    preemption.exit_on_error(error)


def run() -> None:
  """The program `bigalign train`."""
  define_flags(lambda: Config)
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run()
