"""A config as objects: model, loss, optimizer, and the shapes of its batches and its state."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigalign import gradcache, sharding, stages, tree
from bigalign.config import Config
from bigalign.data.fields import teachers
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.training import batch_spec
from bigalign.losses import Loss, make_loss
from bigalign.losses.engine import pairwise
from bigalign.losses.per_sample import tables
from bigalign.model import DualEncoder
from bigalign.optim import Schedule, make_optimizer
from bigalign.private_apis import without_shape_checks
from bigalign.state import Arrays, State
from bigalign.towers.features import Features
from bigalign.towers.padding import used_lengths


@dataclasses.dataclass(frozen=True)
class Program:
  """What train_step needs besides arrays.

  Args:
    model: the dual encoder.
    loss: the weighted sum of the losses.
    optimizer: the optax chain.
    rate: step -> learning rate.
    spec: {name: (shape, dtype)} of a global batch; stored vectors and their mask may be wider or
      narrower in the data.
    sources: how many sources the data mixes.
    sizes: the number of ids, {"image": n, "text": m}, "embed", the width E, and "teachers", the
      widths of the teachers whose vectors a batch holds.
    params: {path: shape} of all parameters.
    frozen: regular expression of the parameters that are not trained.
    ema: decay of the running average of the parameters; 0: none.
    seed: of dropout and of the draws of the loss.
    total_steps: updates in all.
    microbatches: parts in which a batch is embedded.
    gradient_dtype: dtype in which devices communicate gradients.
    logits: how the logit matrix is formed.
  """

  model: DualEncoder
  loss: Loss
  optimizer: optax.GradientTransformation
  rate: Schedule
  spec: Mapping[str, tuple[tuple[int, ...], Any]]
  sources: int
  sizes: Mapping[str, Any]
  params: Mapping[str, Any]
  frozen: str
  ema: float
  seed: int
  total_steps: int
  microbatches: int
  gradient_dtype: str
  logits: pairwise.Engine


def make_program(config: Config, *, dataset_size: int = 0) -> Program:
  """A config's objects; reads no data and allocates no parameters.

  Of a config with stages, those of the last stage, which is the config itself; `stage_program`
  derives the others.

  Args:
    config: of the run.
    dataset_size: samples of an epoch, for durations in epochs and per-sample state.
  """
  run_stages = stages.split(config, dataset_size=dataset_size)
  total_steps = run_stages[-1].end
  if total_steps < 1:
    raise ValueError(f"config.total_steps={config.total_steps!r} gives no step")
  model = config.model.build()
  tower = model.image_tower
  if len(run_stages) > 1 and getattr(tower, "grid", ()) is None:
    # Learned positions start on the smallest stage's grid and are resampled. Otherwise the fine
    # detail of the larger grid would stay random until a stage uses it.
    smallest = min(stage.config.data.image_size for stage in run_stages)
    side = max(1, smallest // tower.options.patch)
    model = model.clone(image_tower=tower.clone(drawn=(side, side)))
  program = Program(
    model=model,
    loss=make_loss(config.loss),
    optimizer=optax.identity(),  # replaced below, like `rate`: the optimizer needs `params`
    rate=lambda step: step,
    spec=_spec(model, config.batch_size, config.data),
    sources=max(1, len(config.data.mixture)),
    sizes={
      "image": dataset_size,
      "text": dataset_size * config.data.captions_per_image,
      "embed": config.model.embed_dim,
      "teachers": teachers.widths(config.data.teachers),
    },
    params={},
    frozen=config.frozen,
    ema=config.ema,
    seed=config.seed,
    total_steps=total_steps,
    microbatches=config.microbatches,
    gradient_dtype=config.gradient_dtype,
    logits=config.logits,
  )
  params = jax.eval_shape(functools.partial(init_params, program), jax.random.key(config.seed))
  _, trainable = tree.partition(params, config.frozen, "config.frozen")
  if not trainable:
    raise ValueError(f"config.frozen={config.frozen!r} leaves no parameter to train")
  optimizer, rate = make_optimizer(
    params=trainable,
    total_steps=total_steps,
    to_steps=functools.partial(stages.steps, stages=run_stages, dataset_size=dataset_size),
    name=config.optimizer.name,
    **config.optimizer.options,
  )
  return dataclasses.replace(program, params=params, optimizer=optimizer, rate=rate)


def stage_program(program: Program, stage: stages.Stage, mesh: jax.sharding.Mesh) -> Program:
  """A stage's program: its model and batches, with parameters, optimizer and loss of `program`.

  Learned positions keep the grid of the program's images, and are resampled to other grids.

  Raises:
    ValueError, TypeError: naming the stage, if a batch does not divide over the mesh or into its
      microbatches, or for options of the model that exclude each other.
  """
  with stages.named(stage):
    sharding.host_rows(mesh, stage.batch_size)
    gradcache.check_microbatches(mesh, stage.batch_size, stage.config.microbatches)
    if stage.where == "config":
      return program
    model = stage.config.model.build()
    spec = _spec(model, stage.batch_size, stage.config.data)
  tower = model.image_tower
  if getattr(tower, "grid", ()) is None:
    rows, cols = (size // tower.options.patch for size in program.spec["image"][0][1:3])
    model = model.clone(image_tower=tower.clone(grid=(rows, cols)))
  return dataclasses.replace(
    program, model=model, spec=spec, microbatches=stage.config.microbatches
  )


def _spec(model: DualEncoder, batch_size: int, data: DataOptions) -> dict[str, Any]:
  """{name: (shape, dtype)} of the global batches that a config's data makes for a model."""
  spec: dict[str, Any] = dict(batch_spec(data, batch_size=batch_size))
  for side, tower in (("image", model.image_tower), ("text", model.text_tower)):
    if isinstance(tower, Features):
      for name in stored_fields(side) & spec.keys():
        # A text has an axis of ids, an image three of pixels.
        leading = spec[name][0][:-1] if side == "text" else (batch_size,)
        spec[name] = ((*leading, *tower.options.row_shape), jnp.float32)
  return spec


def stored_fields(side: str) -> set[str]:
  """The fields of a batch that hold vectors if those of a side come from a store."""
  return {"image"} if side == "image" else {"text", "text_second", "text_others"}


def init_params(program: Program, key: jax.Array) -> Arrays:
  """All parameters by path, float32: "model/…" and "loss/…"."""
  one = {name: jnp.zeros((1, *shape[1:]), dtype) for name, (shape, dtype) in program.spec.items()}
  variables = program.model.init(key, one["image"], one["text"], one["text_mask"])
  scalars, _ = program.loss.init(program.sizes)
  return {**tree.flatten(variables["params"], "model/"), **tree.flatten(scalars, "loss/")}


def compute_dtype(model: DualEncoder, path: str) -> Any:
  """The dtype in which a parameter is used: its tower's, float32 elsewhere."""
  part = getattr(model, path.split("/")[1], None)
  options = getattr(part, "options", part)
  return jnp.dtype(getattr(options, "dtype", jnp.float32))


def init_state(program: Program, key: jax.Array, loaded: Arrays | None = None) -> State:
  """The state before the first update.

  Args:
    program: of the run.
    key: of the random parameters.
    loaded: {path: array}: parameters that are used instead of random ones.
  """
  return _first_state(program, {**init_params(program, key), **(loaded or {})})


def _first_state(program: Program, params: Arrays) -> State:
  """The state before the first update, with all parameters by path."""
  frozen, trainable = tree.partition(params, program.frozen, "config.frozen")
  # Frozen parameters are stored in their compute dtype.
  frozen = {path: x.astype(compute_dtype(program.model, path)) for path, x in frozen.items()}
  _, loss_state = program.loss.init(program.sizes)
  return State(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    frozen=frozen,
    ema={path: x.copy() for path, x in trainable.items()} if program.ema else {},
    opt=program.optimizer.init(trainable),
    loss=loss_state,
  )


def init_on_mesh(program: Program, shardings: State, loaded: Arrays | None = None) -> State:
  """The state before the first update, each array created on its devices.

  The arrays of `loaded` become the state's own; no random array is made for them.
  """
  options: dict[str, Any] = {}
  if jax.default_backend() == "cpu" and not jax.config.values["jax_disable_most_optimizations"]:
    # Code that runs once: making it fast takes 40 % of its compilation. Level 0 changes bits.
    options = {"xla_backend_optimization_level": 1}
  init = jax.jit(
    functools.partial(init_state, program),
    out_shardings=shardings,
    donate_argnames="loaded",
    compiler_options=options,
  )
  state: State = init(jax.random.key(program.seed), loaded=loaded or {})
  return state


def layout(
  program: Program, mesh: jax.sharding.Mesh, rules: Sequence[Any] | None = None
) -> tuple[State, State]:
  """The shapes of a state and the shardings of its arrays; allocates no parameters."""
  shapes = jax.eval_shape(functools.partial(_first_state, program), program.params)
  return shapes, state_shardings(shapes, mesh, rules)


def state_shardings(
  state: State, mesh: jax.sharding.Mesh, rules: Sequence[Any] | None = None
) -> State:
  """The sharding of each array of a state (or of its shapes); rules: as config.rules."""
  shapes = {**state.trainable, **state.frozen}
  shardings = sharding.shardings(shapes, mesh, rules)
  return State(
    step=sharding.replicated_sharding(mesh),
    trainable={path: shardings[path] for path in state.trainable},
    frozen={path: shardings[path] for path in state.frozen},
    ema={path: shardings[path] for path in state.ema},
    opt=sharding.shardings_like(state.opt, shardings, shapes),
    loss=jax.tree.map(lambda x: tables.state_sharding(x, mesh), state.loss),
  )


def make_embed(model: DualEncoder) -> dict[str, Any]:
  """embed_image(params, image), embed_text(params, ids, mask), jitted, for parameters by path.

  And text_lengths(ids, mask): how many positions of each text embed_text reads, see UsedLengths.
  """

  def apply(method: str, params: Arrays, *args: jax.Array) -> Any:
    variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    is_stored = any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(args))
    # Stored vectors may have a width that the projector does not take.
    with contextlib.nullcontext() if is_stored else without_shape_checks():
      return model.apply(variables, *args, method=method)

  def compiled(method: str) -> Callable[..., jax.Array]:
    jitted = jax.jit(functools.partial(apply, method))
    return lambda *args: sharding.block_on_cpu(jitted(*args))

  embed = {method: compiled(method) for method in ("embed_image", "embed_text")}
  return {**embed, "text_lengths": used_lengths(getattr(model.text_tower, "options", None))}
