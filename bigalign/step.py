"""One update of a state on a global batch."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from bigalign import gradcache, losses, sharding, tree
from bigalign.data.samples.rejects import REASONS
from bigalign.losses import PROVIDES, Context, Loss, diagnostics
from bigalign.losses.per_sample import tables
from bigalign.model import without_remat
from bigalign.run import flops
from bigalign.stages import Stage
from bigalign.state import Arrays, Program, State, compute_dtype

SECOND = ("text_second", "text_second_mask")  # fields of the batch, for losses that read two texts


def train_step(
  state: State, batch: Mapping[str, jax.Array], seen: jax.Array, *, program: Program
) -> tuple[State, dict[str, jax.Array]]:
  """One update on a global batch.

  A step whose loss or gradient is not finite leaves the state as it was, but for `step` and for
  what the loss remembers of each sample.

  Args:
    batch: as pipeline.train_batches makes it, [B, …] over the batch axes.
    seen: [2] float32, samples and epochs seen before this step, of `seen`.

  Returns:
    The next state, and scalars: the loss's, "grad_norm", "param_norm", "lr"; and what must be seen
    of every step: "finite_loss", "finite_grad_norm", of losses that remember samples "finite_state"
    (bool), "rejected_<reason>", "repaired_captions" and "tally" [sources, 2] (int32): rows, and
    samples rejected for them, of each source.
  """
  context, drops = _context(program, state, seen)

  def objective(trainable: Arrays, feats: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
    scalars = tree.unflatten(tree.subtree({**trainable, **state.frozen}, "loss/"))
    return program.loss.apply(scalars, state.loss, feats, batch, context)

  (value, (remembered, logs)), grads = gradcache.value_and_grad(
    functools.partial(features, program, state),
    objective,
    state.trainable,
    _inputs(program, batch),
    drops,
    microbatches=program.microbatches,
  )
  grad_norm = optax.tree.norm(grads)
  updates, opt = program.optimizer.update(grads, state.opt, state.trainable)
  trainable = constrain(program.loss, optax.apply_updates(state.trainable, updates), state)
  ema = {
    path: program.ema * old + (1 - program.ema) * trainable[path] for path, old in state.ema.items()
  }
  finite = {
    "finite_loss": jnp.isfinite(value) & jnp.isfinite(logs["loss"]),
    "finite_grad_norm": jnp.isfinite(grad_norm),
  }
  states = [logs.pop(name) for name in [*logs] if name.endswith("finite_state")]
  if states:
    finite["finite_state"] = jnp.stack(states).all()
  sound = jnp.stack([*finite.values()]).all()

  def keep(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)

  def keep_small(new: jax.Array, old: jax.Array) -> jax.Array:
    # A table is written in place: a choice between two would need both. After an unsound step the
    # run stops and goes on from a checkpoint, so what stands in it is never read.
    return new if tables.is_table(new) else keep(new, old)

  rejects = batch["rejects"].sum(0)
  metrics = {
    **logs,
    "grad_norm": grad_norm,
    "param_norm": optax.tree.norm(trainable),
    "lr": program.rate(state.step),
    **finite,
    **{f"rejected_{reason}": rejects[i] for i, reason in enumerate(REASONS)},
    "repaired_captions": batch["repaired"].sum(),
    "tally": jnp.zeros((program.sources, 2), jnp.int32)
    .at[batch["source"]]
    .add(jnp.stack([jnp.ones_like(batch["source"]), batch["rejects"].sum(1)], 1)),
  }
  return State(
    step=state.step + 1,
    trainable=keep(trainable, state.trainable),
    frozen=state.frozen,
    ema=keep(ema, state.ema),
    opt=keep(opt, state.opt),
    loss=jax.tree.map(keep_small, remembered, state.loss),
  ), metrics


def jitted(program: Program, placed: State, mesh: jax.sharding.Mesh) -> Any:
  """train_step as it is run: compiled for a mesh, with the state updated in place."""
  return jax.jit(
    functools.partial(train_step, program=program),
    donate_argnums=0,
    out_shardings=(placed, sharding.replicated_sharding(mesh)),
  )


def diagnose(
  state: State, batch: Mapping[str, jax.Array], seen: jax.Array, *, program: Program
) -> dict[str, jax.Array]:
  """losses.diagnostics.diagnose of a global batch; arguments as of train_step."""
  context, drops = _context(program, state, seen)
  scalars = tree.unflatten(tree.subtree({**state.trainable, **state.frozen}, "loss/"))
  feats = gradcache.embedded(
    functools.partial(features, program, state),
    state.trainable,
    _inputs(program, batch),
    drops,
    microbatches=program.microbatches,
  )
  return diagnostics.diagnose(program.loss, scalars, state.loss, feats, batch, context)


def _context(program: Program, state: State, seen: jax.Array) -> tuple[Context, jax.Array]:
  """The loss's context of this step, and the key of the towers' dropout."""
  key = jax.random.fold_in(jax.random.key(program.seed), state.step)
  drops, draws = jax.random.split(key)
  progress = state.step / program.total_steps
  return Context(state.step, progress, seen[0], seen[1], draws, program.logits), drops


def _inputs(program: Program, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  second = SECOND if "second_text" in program.loss.needs else ()
  return {name: batch[name] for name in ("image", "text", "text_mask", *second)}


def features(
  program: Program, state: State, trainable: Arrays, part: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
  """What the loss reads of the model, for some rows of the batch; nothing else is kept."""
  dropout, patch_dropout = jax.random.split(key)
  inputs = (part["image"], part["text"], part["text_mask"])

  def apply(params: Arrays, **options: Any) -> dict[str, jax.Array]:
    every = {**_sent(program, params), **state.frozen}
    variables = {"params": tree.unflatten(tree.subtree(every, "model/"))}
    found: Any = program.model.apply(variables, *inputs, **options)
    return found

  second = tuple(part[name] for name in SECOND if name in part)
  found = apply(
    trainable,
    train=True,
    second=second or None,
    rngs={"dropout": dropout, "patch_dropout": patch_dropout},
  )
  wanted = {"zimg", "ztxt", *(name for need in program.loss.needs for name in PROVIDES[need])}
  if "tokens" in program.loss.needs:
    wanted |= {"mask_txt"}
  found = {name: x for name, x in found.items() if name in wanted}
  if "ema_teacher" in program.loss.needs:
    teacher = apply(state.ema)
    found |= {
      f"teacher_{side}": jax.lax.stop_gradient(teacher[f"z{side}"]) for side in ("img", "txt")
    }
  return found


def _sent(program: Program, params: Arrays) -> Arrays:
  """Kernels and tables of bfloat16 towers cast before they are used, if their gradients shall be
  bfloat16.

  The towers cast them to the same numbers; but a gradient is added up over the devices in the dtype
  in which the product with a kernel leaves it, and is float32 before this cast.
  """
  if program.gradient_dtype == "float32":
    return params

  def sent(path: str) -> bool:
    cast = compute_dtype(program.model, path) == jnp.bfloat16
    return cast and path.endswith(("/kernel", "/embedding"))

  return {path: x.astype(jnp.bfloat16) if sent(path) else x for path, x in params.items()}


def summary(program: Program, abstract: State) -> str:
  """losses.summary of a run whose state has these shapes."""
  batch: Any = {name: jax.ShapeDtypeStruct(*shape) for name, shape in program.spec.items()}
  feats = jax.eval_shape(
    functools.partial(features, program),
    abstract,
    abstract.trainable,
    _inputs(program, batch),
    jax.random.key(0),
  )
  return losses.summary(program.loss, program.sizes, feats, batch)


def constrain(loss: Loss, trainable: Arrays, before: State) -> Arrays:
  """The updated parameters with the loss's bounds applied to its own."""

  def scalars(learned: Arrays) -> Any:
    return tree.unflatten(tree.subtree({**learned, **before.frozen}, "loss/"))

  bounded = tree.flatten(loss.constrain(scalars(trainable), scalars(before.trainable)), "loss/")
  return {path: bounded.get(path, x) for path, x in trainable.items()}


def stop_if_not_finite(since: Sequence[Mapping[str, Any]], step: int) -> None:
  """Raises FloatingPointError naming the first step of these, the last being `step`, that was not
  applied, and what was not finite in it."""
  for i, one in enumerate(since):
    bad = [name.removeprefix("finite_") for name, ok in one.items() if "finite_" in name and not ok]
    if bad:
      raise FloatingPointError(
        f"step {step - len(since) + i + 1}: {' and '.join(bad)} not finite; the step was not"
        " applied, and the last checkpoint is sound. Lower config.optimizer.lr, lengthen its"
        " warmup, or set its clip_norm."
        + (" The state is what the loss remembers of samples." if "state" in bad else "")
      )


def seen(samples: int, dataset_size: int) -> np.ndarray:
  """[2] float32: samples and epochs seen, for train_step; divided here, where 64 bits are exact."""
  return np.asarray([samples, samples / dataset_size], np.float32)


def useful_work(program: Program, jaxpr: Any, *args: Any) -> int:
  """FLOPs of one train_step(*args), whose jaxpr is known, but for what the towers do twice: under
  remat, and in microbatches."""
  plain = dataclasses.replace(program, model=without_remat(program.model), microbatches=1)
  if plain == program:
    return flops.of_jaxpr(jaxpr)
  return flops.count(functools.partial(train_step, program=plain), *args)


def build(step_fn: Any, program: Program, *args: Any) -> tuple[Any, int]:
  """The compiled step_fn(*args), a jitted train_step of this program, and its useful FLOPs."""
  traced = step_fn.trace(*args)
  work = useful_work(program, traced.jaxpr, *args)
  begin = time.perf_counter()
  compiled = traced.lower().compile()
  logging.info("Compiled the step in %.1f s: %.3g FLOPs", time.perf_counter() - begin, work)
  return compiled, work


def build_stages(
  course: Sequence[Stage],
  programs: Sequence[Program],
  placed: State,
  mesh: jax.sharding.Mesh,
  state: State,
  batch: Mapping[str, jax.Array],
  place: np.ndarray,
) -> dict[int, tuple[Any, int]]:
  """{number: (compiled train_step, its useful FLOPs)} of each stage of `course`.

  Shapes stand for the batches, so that what is to come costs no memory, but for its code.

  Args:
    course: the stages that are left; `batch` is one of the first of them.
    programs: of all stages of the run, by number.
    place: of `seen`.
  """
  built, here = {}, programs[course[0].number].spec
  for stage in course:
    program, shapes = programs[stage.number], {}
    for name, x in batch.items():
      # What comes from a store is as wide as it is there, whatever the spec says.
      as_here = x.shape == here[name][0]
      shape = program.spec[name][0] if as_here else (stage.batch_size, *x.shape[1:])
      shapes[name] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
    step_fn = jitted(program, placed, mesh)
    try:
      built[stage.number] = build(step_fn, program, state, shapes, place)
    except jax.errors.JaxRuntimeError as error:
      error.add_note(f"This is the step of {stage.where}; `bigalign plan` tells what it needs.")
      raise
  return built
