"""What a run is: its arrays, the objects a config stands for, and one update."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import optax
from absl import logging

from bigalign import config as configs
from bigalign import gradcache, sharding, stages, tree
from bigalign.checkpoint import Checkpoints
from bigalign.data.loader import training
from bigalign.data.loader.pairs import stored_sides
from bigalign.losses import Loss, make_loss
from bigalign.losses.engine import pairwise
from bigalign.losses.per_sample import tables
from bigalign.model import DualEncoder, make_model
from bigalign.optim import Schedule, make_optimizer
from bigalign.towers.features import Features

Arrays = dict[str, Any]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("step", "trainable", "frozen", "ema", "opt", "loss"),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class State:
  """All that a run is, beside samples_seen, which is a 64-bit integer on the host.

  step: [] int32, updates done. trainable, frozen: parameters by path. ema: averages of
  `trainable`, empty without. opt: optax's state of `trainable`. loss: what the loss remembers.
  """

  step: Any
  trainable: Arrays
  frozen: Arrays
  ema: Arrays
  opt: Any
  loss: Any


@dataclasses.dataclass(frozen=True)
class Program:
  """What a config says, as objects: what init_state and train_step need besides arrays."""

  model: DualEncoder
  loss: Loss
  optimizer: optax.GradientTransformation
  rate: Schedule
  spec: Mapping[str, tuple[tuple[int, ...], Any]]  # name: (shape, dtype) of a global batch
  sources: int  # how many the data mixes
  sizes: Mapping[str, int]  # number of ids, {"image": n, "text": m}, and "embed", their width
  frozen: str
  ema: float
  seed: int
  total_steps: int
  microbatches: int
  gradient_dtype: str
  logits: pairwise.Engine


def init_params(program: Program, key: jax.Array) -> Arrays:
  """All parameters by path, float32: "model/…" and "loss/…"."""
  one = {name: jnp.zeros((1, *shape[1:]), dtype) for name, (shape, dtype) in program.spec.items()}
  variables = program.model.init(key, one["image"], one["text"], one["text_mask"])
  scalars, _ = program.loss.init(program.sizes)
  return {**tree.flatten(variables["params"], "model/"), **tree.flatten(scalars, "loss/")}


def compute_dtype(model: DualEncoder, path: str) -> Any:
  """The dtype in which a parameter is used: its tower's, float32 elsewhere."""
  part = path.split("/")[1]
  return getattr(getattr(model, part, None), "dtype", jnp.float32)


def init_state(program: Program, key: jax.Array, loaded: Arrays | None = None) -> State:
  """A state of zero updates; under jit with `state_shardings` its arrays are born in place.

  loaded: parameters that are there already, in the place of random ones.
  """
  params = {**init_params(program, key), **(loaded or {})}
  frozen, trainable = tree.partition(params, program.frozen, "config.frozen")
  # What does not learn needs no more digits than it is used with.
  frozen = {path: x.astype(compute_dtype(program.model, path)) for path, x in frozen.items()}
  _, remembered = program.loss.init(program.sizes)
  return State(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    frozen=frozen,
    ema={path: x.copy() for path, x in trainable.items()} if program.ema else {},
    opt=program.optimizer.init(trainable),
    loss=remembered,
  )


def born(program: Program, placed: State, loaded: Arrays | None = None) -> State:
  """The state of zero updates, each array born where it lies.

  The arrays of `loaded` become the state's own; nothing random is made in their place.
  """
  init = jax.jit(
    functools.partial(init_state, program), out_shardings=placed, donate_argnames="loaded"
  )
  return init(jax.random.key(program.seed), loaded=loaded or {})


def layout(
  program: Program, mesh: jax.sharding.Mesh, rules: Sequence[Any] = sharding.RULES
) -> tuple[State, State]:
  """The shapes of a state and the shardings of its arrays; touches no device."""
  shapes = jax.eval_shape(functools.partial(init_state, program), jax.random.key(program.seed))
  return shapes, state_shardings(shapes, mesh, rules)


def state_shardings(state: State, mesh: jax.sharding.Mesh, rules: Sequence[Any]) -> State:
  """Where each array of a state (or its shape) lies."""
  shapes = {**state.trainable, **state.frozen}
  placed = sharding.shardings(shapes, mesh, rules)
  whole = sharding.replicated_sharding(mesh)
  return State(
    step=whole,
    trainable={path: placed[path] for path in state.trainable},
    frozen={path: placed[path] for path in state.frozen},
    ema={path: placed[path] for path in state.ema},
    opt=sharding.shardings_like(state.opt, placed, shapes),
    loss=jax.tree.map(lambda x: tables.placed(x, mesh), state.loss),
  )


def make_program(
  *,
  seed: int,
  total_steps: int | str,
  batch_size: int,
  data: Mapping[str, Any],
  model: Mapping[str, Any],
  loss: Mapping[str, Any],
  optimizer: Mapping[str, Any],
  frozen: str = "",
  ema: float = 0.0,
  microbatches: int = 1,
  gradient_dtype: str = "float32",
  logits: Mapping[str, Any] | None = None,
  dataset_size: int = 0,
  captions_per_image: int = training.CAPTIONS_PER_IMAGE,
  **elsewhere: Any,
) -> Program:
  """A config's objects; reads no data and touches no device. See `train` for the arguments.

  Of a config with stages, those of the last one, which is the config itself; `of_stage` makes the
  others of it.
  """
  course = stages.split(
    {
      **elsewhere,
      "total_steps": total_steps,
      "batch_size": batch_size,
      "data": data,
      "model": model,
    },
    dataset_size=dataset_size,
  )
  configs.known("config.gradient_dtype", gradient_dtype, ("float32", "bfloat16"))
  total = course[-1].end
  if total < 1:
    raise ValueError(f"config.total_steps={total_steps!r} is no step at all")
  built = configs.call(make_model, model, "config.model")
  tower = built.image_tower
  if len(course) > 1 and getattr(tower, "grid", ()) is None:
    # What is finer than a stage can learn would stay random until the last one.
    side = max(1, min(stage.config["data"]["image_size"] for stage in course) // tower.patch)
    built = built.clone(image_tower=tower.clone(drawn=(side, side)))
  spec = _spec(built, batch_size, data)
  terms = make_loss(loss)
  sizes = {
    "image": dataset_size,
    "text": dataset_size * captions_per_image,
    "embed": model["embed_dim"],
  }
  engine = configs.call(pairwise.Engine, logits or {}, "config.logits")
  program = Program(
    built,
    terms,
    optax.identity(),
    lambda step: step,
    spec,
    max(1, len(data.get("mixture", ()))),
    sizes,
    frozen,
    ema,
    seed,
    total,
    microbatches,
    gradient_dtype,
    engine,
  )
  shapes = jax.eval_shape(functools.partial(init_params, program), jax.random.key(seed))
  _, trainable = tree.partition(shapes, frozen, "config.frozen")
  if not trainable:
    raise ValueError(f"config.frozen={frozen!r} leaves no parameter to learn")
  made, rate = configs.call(
    make_optimizer,
    optimizer,
    "config.optimizer",
    params=trainable,
    total_steps=total,
    to_steps=functools.partial(stages.steps, stages=course, dataset_size=dataset_size),
  )
  return dataclasses.replace(program, optimizer=made, rate=rate)


def _spec(model: DualEncoder, batch_size: int, data: Mapping[str, Any]) -> dict[str, Any]:
  """{name: (shape, dtype)} of the global batches that a config's data makes for a model."""
  stores = data.get("stores") or {}
  second = stores.get("second") if "text" in stored_sides(stores) else data.get("second_captions")
  spec: dict[str, Any] = training.batch_spec(
    batch_size=batch_size,
    image_size=data["image_size"],
    tokenizer=data["tokenizer"],
    second_text=bool(second),
  )
  for side, tower in (("image", model.image_tower), ("text", model.text_tower)):
    if isinstance(tower, Features):
      names = {side, "text_second"} & spec.keys() if side == "text" else {side}
      spec |= dict.fromkeys(names, ((batch_size, *tower.row), jnp.float32))
  return spec


def of_stage(program: Program, stage: stages.Stage, mesh: jax.sharding.Mesh) -> Program:
  """A stage's program: its model and batches, with the parameters, optimizer and loss of `program`.

  Learned positions stay those of the grid of program's images, and are resampled to that of others.

  Raises:
    ValueError, TypeError: naming the stage, if a batch does not divide over the mesh or into its
      microbatches, or an option of the model cannot be.
  """
  with stages.named(stage):
    microbatches = stage.config.get("microbatches", 1)
    sharding.host_rows(mesh, stage.batch_size)
    gradcache.check(mesh, stage.batch_size, microbatches)
    if stage.where == "config":
      return program
    model = configs.call(make_model, stage.config["model"], "config.model")
    spec = _spec(model, stage.batch_size, stage.config["data"])
  tower = model.image_tower
  if getattr(tower, "grid", ()) is None:
    rows, cols = (size // tower.patch for size in program.spec["image"][0][1:3])
    model = model.clone(image_tower=tower.clone(grid=(rows, cols)))
  return dataclasses.replace(program, model=model, spec=spec, microbatches=microbatches)


def make_embed(model: DualEncoder) -> dict[str, Callable[..., jax.Array]]:
  """embed_image(params, image), embed_text(params, ids, mask), jitted, for parameters by path."""

  def apply(method: str, params: Arrays, *args: jax.Array) -> Any:
    variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    return model.apply(variables, *args, method=method)

  def compiled(method: str) -> Callable[..., jax.Array]:
    jitted = jax.jit(functools.partial(apply, method))
    return lambda *args: sharding.block_on_cpu(jitted(*args))

  return {method: compiled(method) for method in ("embed_image", "embed_text")}


def describe(state: State, workdir: pathlib.Path) -> None:
  """Lists the parameters in workdir/parameters.txt and logs their number, and which are frozen."""
  if jax.process_index() == 0:
    parameters = {**state.trainable, **state.frozen}
    overview = clu.parameter_overview.get_parameter_overview(parameters, include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    logging.info(
      "%d parameters, %d of them trainable; list in %s",
      sum(x.size for x in parameters.values()),
      sum(x.size for x in state.trainable.values()),
      workdir / "parameters.txt",
    )
    every, still = (
      collections.Counter("/".join(path.split("/")[:2]) for path in x)
      for x in (parameters, state.frozen)
    )
    for part, count in still.items():
      logging.info("Frozen: %d of the %d arrays of %s", count, every[part], part)


def parts(state: State) -> dict[str, Arrays]:
  """A state as {part: {path: array}}, as checkpoints hold it; the frozen half is kept apart."""

  def by_path(structure: Any) -> Arrays:
    leaves, _ = jax.tree_util.tree_flatten_with_path(structure)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): x for keys, x in leaves}

  return {
    "trainable": state.trainable,
    "ema": state.ema,
    "opt": by_path(state.opt),
    "loss": by_path(state.loss),
    "clock": {"step": state.step},
  }


def _wanted(abstract: Any, placed: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
  )


def restore_params(
  checkpoints: Checkpoints, step: int, abstract: State, placed: State, ema: bool = False
) -> Arrays:
  """All parameters of a checkpoint by path, their averages if `ema`, and nothing else of it."""
  wanted = _wanted(abstract, placed)
  learned = {"ema": wanted.ema} if ema else {"trainable": wanted.trainable}
  (found,) = checkpoints.restore(step, learned).values()
  return {**found, **checkpoints.restore_frozen(wanted.frozen)}


def restore(checkpoints: Checkpoints, step: int, abstract: State, placed: State) -> State:
  """The state of a checkpoint, on this mesh, whatever mesh wrote it."""
  wanted = _wanted(abstract, placed)
  found = checkpoints.restore(step, parts(wanted))

  def back(structure: Any, arrays: Arrays) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(structure)
    paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    return jax.tree_util.tree_unflatten(treedef, [arrays[path] for path in paths])

  return State(
    step=found["clock"]["step"],
    trainable=back(wanted.trainable, found["trainable"]),
    frozen=checkpoints.restore_frozen(wanted.frozen),
    ema=back(wanted.ema, found["ema"]),
    opt=back(wanted.opt, found["opt"]),
    loss=back(wanted.loss, found["loss"]),
  )
