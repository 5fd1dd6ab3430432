"""One update of a state on a global batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from bigalign import gradcache, reading, sharding, tree
from bigalign.data.fields import text_pairs
from bigalign.data.image import naflex
from bigalign.data.samples.rejects import REASONS
from bigalign.losses import PROVIDES, Context, Loss, diagnostics, selection, table_mask
from bigalign.losses import summary as loss_summary
from bigalign.model import unit, without_remat
from bigalign.private_apis import without_shape_checks
from bigalign.program import Program, compute_dtype, of_lengths
from bigalign.run import flops
from bigalign.stages import Stage
from bigalign.state import Arrays, State

SECOND = ("text_second", "text_second_mask")  # fields for losses that read two texts
OTHERS = ("text_others", "text_others_mask")  # fields for losses that read several
PAIRS = text_pairs.NAMES  # fields for the loss of pairs of texts


class StepChecks(NamedTuple):
  """Values that the host checks or adds up for every step, whether it is logged or not.

  finite: {"loss" | "grad_norm" | "state": [] bool}; the step was applied if all are true.
  rejected: {reason: [] int32}, samples rejected and replaced.
  repaired_captions: [] int32, captions that were not valid UTF-8.
  tally: [sources, 2] int32: rows of each source, and samples rejected for them.
  """

  finite: dict[str, Any]
  rejected: dict[str, Any]
  repaired_captions: Any
  tally: Any


def train_step(
  state: State, batch: Mapping[str, jax.Array], position: jax.Array, *, program: Program
) -> tuple[State, dict[str, jax.Array], StepChecks]:
  """One update on a global batch.

  If the loss, the gradient norm or the loss state is not finite, parameters, averages, optimizer
  state and loss state keep their old values; only `step` and the per-sample tables change.

  Args:
    state: before the update.
    batch: {name: [B, …]} as training.train_batches makes it, sharded over the batch axes.
    position: [2] float32, samples and epochs seen before this step, of `data_position`.
    program: of the run.

  Returns:
    The next state; scalars for the log: those of the loss, "grad_norm", "param_norm", "lr"; and the
    checks of the step.
  """
  # --- of the batch, the part that is trained on
  context, dropout_key = _context(program, state, position)
  whole = batch
  if program.selection.share:
    batch = _selected(program, state, batch, context, dropout_key)

  # --- loss and gradient of this batch, even if it is embedded in microbatches
  known = _for_loss(program, batch)

  def objective(trainable: Arrays, feats: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
    with jax.named_scope("loss"):  # a part of `bigalign plan`
      return program.loss.apply(_loss_params(trainable, state), state.loss, feats, known, context)

  (value, (loss_state, metrics)), grads = gradcache.value_and_grad(
    functools.partial(features, program, state),
    objective,
    state.trainable,
    _inputs(program, batch, context.key),
    dropout_key,
    microbatches=program.microbatches,
    communicated=functools.partial(_cast_for_reduction, program),
    sums=reading.sums(program.loss),
    late=reading.late(program.loss),
  )

  # --- update
  grad_norm = optax.tree.norm(grads)
  updates, opt = program.optimizer.update(grads, state.opt, state.trainable)
  trainable = constrain(program.loss, optax.apply_updates(state.trainable, updates), state)
  # optax.incremental_update adds in the opposite order, which changes the last bits of a run.
  mean_decay = ema_decay(program, state.step)
  ema = {
    path: mean_decay * old + (1 - mean_decay) * trainable[path] for path, old in state.ema.items()
  }
  decay = program.twin.decay
  twin = {path: decay * old + (1 - decay) * trainable[path] for path, old in state.twin.items()}

  # --- skip it if anything is not finite
  are_finite = jnp.isfinite(jnp.stack([value, metrics["loss"], grad_norm]))
  finite = {"loss": are_finite[0] & are_finite[1], "grad_norm": are_finite[2]}
  # A reduction, because XLA for CPUs copies cheap operations on scalars into the update of each
  # parameter.
  all_finite = are_finite.all()
  states = [metrics.pop(name) for name in [*metrics] if name.endswith("finite_state")]
  if states:
    finite["state"] = jnp.stack(states).all()
    all_finite &= finite["state"]

  def keep(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(all_finite, a, b), new, old)

  def keep_small(is_table: bool, new: jax.Array, old: jax.Array) -> jax.Array:
    # A table is updated in place: selecting between two would need memory for both. After a step
    # that is not finite the run stops and resumes from a checkpoint, so this table is never read.
    return new if is_table else keep(new, old)

  next_state = State(
    step=state.step + 1,
    trainable=keep(trainable, state.trainable),
    frozen=state.frozen,
    ema=keep(ema, state.ema),
    opt=keep(opt, state.opt),
    loss=jax.tree.map(keep_small, table_mask(program.loss, state.loss), loss_state, state.loss),
    twin=keep(twin, state.twin),
  )

  # --- what is reported
  rejects = whole["rejects"].sum(0)
  rows_and_rejects = jnp.stack([jnp.ones_like(whole["source"]), whole["rejects"].sum(1)], 1)
  checks = StepChecks(
    finite=finite,
    rejected={reason: rejects[i] for i, reason in enumerate(REASONS)},
    repaired_captions=whole["repaired"].sum(),
    tally=jnp.zeros((program.sources, 2), jnp.int32).at[whole["source"]].add(rows_and_rejects),
  )
  scalars = {
    **metrics,
    "grad_norm": grad_norm,
    "param_norm": optax.tree.norm(trainable),
    "lr": program.rate(state.step),
  }
  return next_state, scalars, checks


def ema_decay(program: Program, step: jax.Array) -> Any:
  """The decay of the running averages in the update after `step` updates."""
  if not program.ema_warmup:
    return program.ema
  # As in TensorFlow's and diffusers' averages: the random first parameters are forgotten.
  return jnp.minimum(program.ema, (1.0 + step) / (10.0 + step))


def _selected(
  program: Program,
  state: State,
  batch: Mapping[str, jax.Array],
  context: Context,
  dropout_key: jax.Array,
) -> dict[str, jax.Array]:
  """The pairs of a batch that JEST chooses: config.selection."""
  chosen = program.selection
  feats = _features_of(program, state, batch, context, dropout_key)
  known, scalars = _for_loss(program, batch), _loss_params(state.trainable, state)
  own: dict[str, Any] = next((x for x in scalars.values() if "t" in x), {})
  scale = jnp.exp(own["t"]) if chosen.scale is None else chosen.scale
  learner = selection.Model(feats["zimg"], feats["ztxt"], scale, own.get("b", 0.0))
  reference = selection.Model(
    *(known["teacher_img"], known["teacher_txt"]), chosen.reference_scale, chosen.reference_bias
  )
  index = selection.jest(
    learner,
    reference,
    count=chosen.size(len(batch["label"])),
    chunks=chosen.chunks,
    kind=chosen.scores,
    key=jax.random.fold_in(context.key, 0),
    engine=context.engine,
  )
  # In the order of the batch, so that a share of 1 changes nothing.
  index = jnp.sort(index)
  return {name: selection.part(x, index) for name, x in batch.items()}


def jitted(program: Program, shardings: State, mesh: jax.sharding.Mesh) -> Any:
  """train_step as a run uses it: compiled for a mesh, the state updated in place."""
  replicated = sharding.replicated_sharding(mesh)
  return jax.jit(
    functools.partial(train_step, program=program),
    donate_argnums=0,
    out_shardings=(shardings, replicated, replicated),
  )


def diagnose(
  state: State, batch: Mapping[str, jax.Array], position: jax.Array, *, program: Program
) -> dict[str, jax.Array]:
  """losses.diagnostics.diagnose of a global batch; arguments as of train_step."""
  context, dropout_key = _context(program, state, position)
  feats = _features_of(program, state, batch, context, dropout_key)
  scalars = _loss_params(state.trainable, state)
  known = _for_loss(program, batch)
  return diagnostics.diagnose(program.loss, scalars, state.loss, feats, known, context)


def _features_of(
  program: Program,
  state: State,
  batch: Mapping[str, jax.Array],
  context: Context,
  dropout_key: jax.Array,
) -> dict[str, jax.Array]:
  """The features of a whole batch, of which no gradient is taken."""
  return gradcache.embed_batch(
    functools.partial(features, program, state),
    state.trainable,
    _inputs(program, batch, context.key),
    dropout_key,
    microbatches=program.microbatches,
    sums=reading.sums(program.loss),
  )


def _context(program: Program, state: State, position: jax.Array) -> tuple[Context, jax.Array]:
  """The loss's context of this step, and the key of the towers' dropout."""
  key = jax.random.fold_in(jax.random.key(program.seed), state.step)
  dropout_key, draws = jax.random.split(key)
  progress = state.step / program.total_steps
  seen = (position[0], position[1])
  context = Context(state.step, progress, *seen, draws, program.logits, program.sizes)
  return context, dropout_key


def _loss_params(trainable: Arrays, state: State) -> Any:
  """The learned scalars of the loss, trained or frozen."""
  return tree.unflatten(tree.subtree({**trainable, **state.frozen}, "loss/"))


def _for_loss(program: Program, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The batch as losses read it: the vectors of each teacher have unit norm, in float32."""
  ends = np.cumsum(program.sizes["teachers"])[:-1]

  def of_teachers(x: jax.Array) -> jax.Array:
    return jnp.concatenate([unit(part) for part in jnp.split(x, ends, axis=-1)], -1)

  known = {name: of_teachers(x) if name.startswith("teacher_") else x for name, x in batch.items()}
  first = {"teacher_txt": known["teacher_txts"][:, 0]} if "teacher_txts" in known else {}
  # As they are stored, for a regression to vectors that are not normalised.
  stored = {f"{name}_stored": x for name, x in batch.items() if name.startswith("teacher_")}
  return {**known, **first, **stored}


def _inputs(
  program: Program, batch: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
  """What `features` reads of a batch, and the random numbers of heads."""
  second = SECOND if "second_text" in program.loss.needs else ()
  others = [name for name in OTHERS if name in batch and "texts" in program.loss.needs]
  pairs = PAIRS if "text_pairs" in program.loss.needs else ()
  texts = {name: batch[name] for name in ("text", "text_mask", *second, *others, *pairs)}
  own = {name: batch[name] for name in reading.fields(program.loss)}
  draws = reading.draws(program.loss, key, batch, program.sizes)
  return {**naflex.only_images(batch), **texts, **own, **draws}


def features(
  program: Program, state: State, trainable: Arrays, part: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
  """The features of the model that the loss reads, for some rows of the batch.

  Args:
    program: of the run.
    state: whose frozen parameters and averages are used.
    trainable: the trained parameters, an argument of their own because they are differentiated.
    part: fields of the batch, [b, …].
    key: of dropout.
  """
  dropout, patch_dropout = jax.random.split(key)
  inputs = (naflex.of_fields(part), part["text"], part["text_mask"])

  def apply(params: Arrays, **options: Any) -> dict[str, jax.Array]:
    variables = {**_cast_for_reduction(program, params), **state.frozen}
    with without_shape_checks():
      feats: dict[str, jax.Array] = program.model.apply(  # type: ignore[assignment]
        {"params": tree.unflatten(tree.subtree(variables, "model/"))}, *inputs, **options
      )
    return feats

  second, others, pairs = (
    tuple(part[x] for x in names if x in part) for names in (SECOND, OTHERS, PAIRS)
  )
  feats = apply(
    trainable,
    train=True,
    second=second or None,
    others=others if "texts" in program.loss.needs else None,
    pairs=pairs or None,
    rngs={"dropout": dropout, "patch_dropout": patch_dropout},
  )
  wanted = {"zimg", "ztxt", *(name for need in program.loss.needs for name in PROVIDES[need])}
  if "tokens" in program.loss.needs:
    wanted |= {"mask_txt"}
  own: dict[str, jax.Array] = {}
  if reading.heads(program.loss):
    params = {**_cast_for_reduction(program, trainable), **state.frozen}
    averaged = {**params, **(state.twin or state.ema)}
    with jax.named_scope("heads"):  # a part of `bigalign plan`
      given = (program.loss, program.model, params, averaged, feats, part, program.sizes)
      own = reading.apply(*given, state.loss, program.teacher)
  feats = {**{name: x for name, x in feats.items() if name in wanted}, **own}
  if "ema_teacher" in program.loss.needs:
    teacher = apply(state.ema)
    feats |= {
      f"teacher_{side}": jax.lax.stop_gradient(teacher[f"z{side}"]) for side in ("img", "txt")
    }
  return feats


def _cast_for_reduction(program: Program, params: Arrays) -> Arrays:
  """Kernels and tables of bfloat16 towers in bfloat16, if config.gradient_dtype says so.

  The towers cast them to the same numbers anyway. But devices add up a gradient in the dtype of the
  array that it belongs to: bfloat16 after this cast, float32 without it.
  """
  if program.gradient_dtype == "float32":
    return params

  def is_cast(path: str) -> bool:
    in_bfloat16 = compute_dtype(program.model, path) == jnp.bfloat16
    return in_bfloat16 and path.endswith(("/kernel", "/embedding"))

  return {path: x.astype(jnp.bfloat16) if is_cast(path) else x for path, x in params.items()}


def summary(program: Program, shapes: State) -> str:
  """A description of the loss for the log (losses.summary), from the shapes of a state."""
  batch: Any = {name: jax.ShapeDtypeStruct(*shape) for name, shape in program.spec.items()}
  if program.loss.needs or reading.heads(program.loss):
    feats = jax.eval_shape(
      functools.partial(features, program),
      shapes,
      shapes.trainable,
      _inputs(program, batch, jax.random.key(0)),
      jax.random.key(0),
    )
  else:  # known without tracing the towers, which takes up to a second
    z = jax.ShapeDtypeStruct((len(batch["text"]), program.sizes["embed"]), jnp.float32)
    feats = {"zimg": z, "ztxt": z}
  known = jax.eval_shape(functools.partial(_for_loss, program), batch)
  return loss_summary(program.loss, program.sizes, feats, known)


def constrain(loss: Loss, trainable: Arrays, before: State) -> Arrays:
  """The updated parameters, with the loss's bounds applied to its own."""
  bounded = tree.flatten(
    loss.constrain(_loss_params(trainable, before), _loss_params(before.trainable, before)),
    "loss/",
  )
  return {path: bounded.get(path, x) for path, x in trainable.items()}


def warn_of_bounds(loss: Loss, state: State, loaded: Iterable[str]) -> None:
  """Logs which logit scales of checkpoints the first update moves into the bounds of the loss.

  Args:
    loss: of the run.
    state: before the first update.
    loaded: the paths that were loaded from checkpoints.
  """
  scalars = {
    path: x if x.ndim else np.asarray(x)
    for path, x in {**state.trainable, **state.frozen}.items()
    if path.startswith("loss/")
  }
  params = tree.unflatten(tree.subtree(scalars, "loss/"))
  bounded = tree.flatten(loss.constrain(params, params), "loss/")
  for path in sorted(set(loaded) & scalars.keys() & state.trainable.keys()):
    if path.endswith("/t"):  # the log of the scale
      theirs, ours = math.exp(scalars[path]), math.exp(bounded[path])
      if not math.isclose(theirs, ours, rel_tol=1e-3):
        where = f"config.{path.removesuffix('/t').replace('/', '.')}"
        logging.warning(
          "%s: the checkpoint has a logit scale of %.5g, which is outside of the bounds of this"
          " loss; the first update sets it to %.5g. To keep it, set t_max; to begin with another"
          " value, set t_init",
          *(where, theirs, ours),
        )


def stop_if_not_finite(checks: Sequence[StepChecks], step: int) -> None:
  """Raises FloatingPointError for the first step that was skipped, with what was not finite in it.

  Args:
    checks: of consecutive steps, on the host.
    step: the number of the last of them.
  """
  for i, one in enumerate(checks):
    bad = [name for name, is_finite in one.finite.items() if not is_finite]
    if bad:
      raise FloatingPointError(
        f"step {step - len(checks) + i + 1}: {' and '.join(bad)} not finite; the step was not"
        " applied, and the last checkpoint is sound. Lower config.optimizer.lr, lengthen its"
        " warmup, or set its clip_norm."
        + (" The state is the per-sample state of the loss." if "state" in bad else "")
      )


def data_position(samples_seen: int, dataset_size: int) -> np.ndarray:
  """[2] float32: samples and epochs seen. Divided on the host, where 64 bits are exact."""
  return np.asarray([samples_seen, samples_seen / dataset_size], np.float32)


class CompiledStep(NamedTuple):
  """A compiled train_step, and the useful floating point operations of one call."""

  call: Any
  flops: int


def useful_flops(program: Program, jaxpr: Any, *args: Any) -> int:
  """FLOPs of one train_step(*args), without what towers compute twice under remat or microbatches.

  Args:
    program: of the run.
    jaxpr: of the step, as traced.
    args: shapes or arrays of the step's arguments.
  """
  once = dataclasses.replace(program, model=without_remat(program.model), microbatches=1)
  if once == program:
    return flops.of_jaxpr(jaxpr)
  return flops.count(functools.partial(train_step, program=once), *args)


def build(step_fn: Any, program: Program, *args: Any) -> CompiledStep:
  """Compiles step_fn(*args), a jitted train_step of this program."""
  traced = step_fn.trace(*args)
  work = useful_flops(program, traced.jaxpr, *args)
  begin = time.perf_counter()
  compiled = traced.lower().compile()
  logging.info("Compiled the step in %.1f s: %.3g FLOPs", time.perf_counter() - begin, work)
  return CompiledStep(compiled, work)


def build_stages(
  stages: Sequence[Stage],
  programs: Sequence[Program],
  state_shapes: Sequence[State],
  shardings: Sequence[State],
  mesh: jax.sharding.Mesh,
  state: State,
  batch: Mapping[str, jax.Array],
  position: np.ndarray,
) -> dict[int, dict[tuple[int, ...], CompiledStep]]:
  """The compiled steps of each stage, by its number and by `shape_of` a batch.

  Later stages are compiled from the shapes of their batches and states, so nothing is allocated for
  them. Stages with equal programs share a step.

  Args:
    stages: the stages that are left; `batch` belongs to the first of them.
    programs: of all stages of the run, by number.
    state_shapes: of the state, likewise.
    shardings: of the state, likewise.
    mesh: the mesh.
    state: of the run.
    batch: a global batch.
    position: of `data_position`.
  """
  steps: dict[int, dict[tuple[int, ...], CompiledStep]] = {}
  own_programs = of_lengths(programs[stages[0].number], stages[0])
  spec = next(
    (p.spec for p in own_programs if "image" in batch and p.spec["image"][0] == shape_of(batch)),
    own_programs[0].spec,
  )
  for stage in stages:
    equal = next((n for n in steps if programs[n] == programs[stage.number]), None)
    if equal is not None:
      steps[stage.number] = steps[equal]
      continue
    own = shardings[stage.number]
    given = state
    if stage != stages[0]:
      given = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state_shapes[stage.number],
        own,
      )
    steps[stage.number] = {}
    for program in of_lengths(programs[stage.number], stage):
      shapes = {}
      for name, (shape, dtype) in program.spec.items():
        x = batch.get(name)
        if x is not None:
          # Stored vectors have the width and the dtype of the store, whatever the spec says.
          is_as_in_spec = x.shape == spec[name][0]
          shape = shape if is_as_in_spec else (program.batch_size, *x.shape[1:])
          dtype = x.dtype
        shapes[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=batch["label"].sharding)
      try:
        one = build(jitted(program, own, mesh), program, given, shapes, position)
      except jax.errors.JaxRuntimeError as error:
        error.add_note(
          f"This is the step of {stage.where}; `bigalign plan` computes the memory that it needs."
        )
        raise
      steps[stage.number][shape_of(shapes)] = one
  return steps


def shape_of(batch: Mapping[str, Any]) -> tuple[int, ...]:
  """The shape in which the batches of a stage differ: of the images, or of texts alone."""
  shape: tuple[int, ...] = batch["image" if "image" in batch else "text"].shape
  return shape
