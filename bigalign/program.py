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

from bigalign import gradcache, reading, sharding, stages, tree
from bigalign.config import Config, Twin
from bigalign.data.fields import teachers
from bigalign.data.image import naflex
from bigalign.data.loader import extra_fields
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.training import batch_spec
from bigalign.losses import Loss, check_needs, diagnostics, make_loss, reads
from bigalign.losses.engine import pairwise
from bigalign.losses.logit_head import of_losses
from bigalign.losses.per_sample import tables
from bigalign.losses.selection import Selection
from bigalign.model import DualEncoder, Teacher, provided, read_as
from bigalign.optim import Schedule, joined_rate, make_optimizer, make_rate
from bigalign.options import Component
from bigalign.private_apis import without_shape_checks
from bigalign.state import Arrays, State
from bigalign.towers.features import Features
from bigalign.towers.naflex import NaflexOptions
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
    images: the same of the images that the model takes, where batches have texts alone; else {}.
    added: {option of config.data: the fields of the batch that it adds for losses to read}.
    diagnosed: the fields of the batch that diagnostics of the loss read.
    negatives: whether images have hard negatives among their texts.
    sources: how many sources the data mixes.
    sizes: the number of ids, {"image": n, "text": m}, "embed", the width E, "teachers", the
      widths of the teachers whose vectors a batch holds, and of the towers, 0 if they have none,
      "vocabulary" and "patch".
    params: {path: shape} of all parameters.
    draw: key -> all parameters, as `init_params` draws them; jitted, so that the model is traced
      once for `params` and for the first state.
    frozen: regular expression of the parameters that are not trained.
    fixed: the paths that no stage of the run trains.
    ema: decay of the running average of the parameters; 0: none.
    ema_warmup: whether the decay rises to it from 0.1.
    twin: which parameters are averaged for heads, and how.
    teacher: the frozen tower that heads read, without parameters; None: there is none.
    selection: which part of a batch is trained on.
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
  images: Mapping[str, tuple[tuple[int, ...], Any]]
  added: Mapping[str, frozenset[str]]
  diagnosed: frozenset[str]
  negatives: bool
  sources: int
  sizes: Mapping[str, Any]
  params: Mapping[str, Any]
  draw: Callable[[jax.Array], Arrays] = dataclasses.field(compare=False)
  frozen: str
  fixed: frozenset[str]
  ema: float
  ema_warmup: bool
  twin: Twin
  teacher: Teacher | None
  selection: Selection
  seed: int
  total_steps: int
  microbatches: int
  gradient_dtype: str
  logits: pairwise.Engine

  @property
  def batch_size(self) -> int:
    """Of the global batches of `spec`."""
    return int(self.spec["label"][0][0])


def make_program(config: Config, *, dataset_size: int = 0) -> Program:
  """A config's objects; of a config with stages, those of the last one, which is the config itself.

  Reads no data and allocates no parameters.

  Args:
    config: of the run.
    dataset_size: samples of an epoch, for durations in epochs and per-sample state.
  """
  return make_programs(config, dataset_size=dataset_size)[-1]


def make_programs(config: Config, *, dataset_size: int = 0) -> list[Program]:
  """The objects of each stage of a config; arguments as of `make_program`.

  Stages that differ in their data or their schedule alone have equal programs. Learned positions
  keep the grid of the config's images, and are resampled to the grid of a stage.

  Raises:
    ValueError, TypeError: naming the stage, for options that exclude each other.
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
  loss = make_loss(config.loss)
  sizes = {
    "image": dataset_size,
    "text": dataset_size * config.data.captions_per_image,
    "teachers": teachers.widths(config.data.teachers),
    **sizes_of_towers(config),
  }
  program = Program(
    model=model,
    loss=loss,
    optimizer=optax.identity(),  # replaced below, like `rate` and `draw`: it needs `params`
    rate=lambda step: step,
    spec=_spec(model, *_longest(config)),
    images=_images(model, config),
    added=extra_fields.added(config.data),
    diagnosed=_diagnosed(config, loss, sizes),
    negatives=bool(config.data.texts and config.data.texts.negatives.count),
    sources=max(1, len(config.data.mixture)),
    sizes=sizes,
    params={},
    draw=lambda key: {},
    frozen=_frozen(config),
    fixed=frozenset(),
    ema=config.ema,
    ema_warmup=config.ema_warmup,
    twin=config.twin,
    teacher=_teacher(model, config),
    selection=config.selection,
    seed=config.seed,
    total_steps=total_steps,
    microbatches=config.microbatches,
    gradient_dtype=config.gradient_dtype,
    logits=config.logits,
  )
  if config.selection.share:
    sides = [{*teacher.folders} for teacher in config.data.teachers.values()]
    if len(sides) != 1 or not {"image", "text"} <= sides[0]:
      raise ValueError(
        "config.selection compares the model with one teacher of images and texts; set"
        " config.data.teachers=dict(reference=dict(image=STORE, text=STORE))"
      )
  if config.data.naflex and "tokens" in program.loss.needs:
    raise ValueError(
      f"config.loss={[*config.loss]} reads the tokens of images without a mask, and with"
      " config.data.naflex some are padding; leave one of the two out"
    )
  program = _with_draw(program)
  program = dataclasses.replace(program, params=_shapes(program))
  programs = [_of_stage(program, config, stage) for stage in run_stages]
  chosen = config.selection
  if chosen.share and chosen.scale is None and not all(_learns_a_scale(one) for one in programs):
    raise ValueError(
      "config.selection compares the logits of the model with those of the teacher, but no loss of"
      f" config.loss={[*config.loss]} learns their scale; set config.selection.scale, the inverse"
      " of the temperature of the loss, or use a loss that learns it, such as clip or siglip"
    )
  paths = [path for one in programs for path in one.params]
  if config.twin.decay and not any(config.twin.holds(path) for path in paths):
    raise ValueError(
      f"config.twin.paths={config.twin.paths!r} matches no parameter, so there would be no average;"
      f" the parameters begin with {sorted({'/'.join(path.split('/')[:2]) for path in paths})}"
    )
  if config.teacher and not any(
    head.teacher for one in programs for head in reading.heads(one.loss).values()
  ):
    raise ValueError(
      "config.teacher is read by no loss; set config.loss.token_distill=dict(teacher='frozen'), or"
      " leave it out"
    )
  return _with_optimizers(programs, run_stages, dataset_size)


def _with_draw(program: Program) -> Program:
  """The program with the `draw` of its model, its loss and its batches."""
  return dataclasses.replace(program, draw=jax.jit(functools.partial(init_params, program)))


def _shapes(program: Program) -> Arrays:
  """The shapes of the parameters that `draw` returns."""
  shapes: Arrays = jax.eval_shape(program.draw, jax.random.key(program.seed))
  return shapes


def _learns_a_scale(program: Program) -> bool:
  """Whether a loss has a logit scale among its parameters, which JEST's scores need."""
  scalars = tree.unflatten(tree.subtree(program.params, "loss/"))
  return any("t" in own for own in scalars.values())


def _of_stage(program: Program, config: Config, stage: stages.Stage) -> Program:
  """The program of a stage from that of its run, without the optimizer."""
  if stage.where == "config":
    return program
  own = stage.config
  with stages.named(stage):
    model, spec = program.model, program.spec
    if own.model != config.model or own.data.image_size != config.data.image_size:
      model = own.model.build()
      tower = model.image_tower
      if getattr(tower, "grid", ()) is None:
        size = {**program.images, **spec}["image"][0][1:3]
        rows, cols = (side // tower.options.patch for side in size)
        model = model.clone(image_tower=tower.clone(grid=(rows, cols)))
    spec = _spec(model, *_longest(own))
    loss = program.loss if own.loss == config.loss else make_loss(own.loss)
    params = program.params
    if loss is not program.loss:
      whole = dataclasses.replace(program, model=model, loss=loss, spec=spec)
      own_params = _shapes(_with_draw(whole))
      towers = ("model/", "teacher/")
      of_model = {path: x for path, x in params.items() if path.startswith(towers)}
      params = of_model | {k: x for k, x in own_params.items() if not k.startswith(towers)}
  program = dataclasses.replace(
    program,
    model=model,
    loss=loss,
    spec=spec,
    images=_images(model, own),
    added=extra_fields.added(own.data),
    diagnosed=_diagnosed(own, loss, program.sizes),
    params=params,
    frozen=_frozen(own),
    microbatches=own.microbatches,
  )
  return _with_draw(program)


def _with_optimizers(
  programs: Sequence[Program], run_stages: Sequence[stages.Stage], dataset_size: int
) -> list[Program]:
  """The programs with the learning rate of the run, and with the optimizer of each stage."""
  trained, frozen = [], []
  for program, stage in zip(programs, run_stages):
    with stages.named(stage):
      tree.partition(program.params, stage.config.frozen, "config.frozen")  # must match a path
      held, trainable = tree.partition(program.params, program.frozen, "config.frozen")
    if not trainable:
      raise ValueError(f"{stage.where}.frozen={program.frozen!r} leaves no parameter to train")
    trained.append(trainable)
    frozen.append(held)
  since: list[dict[str, int]] = []  # of each stage: since which stage a parameter is trained
  for number, trainable in enumerate(trained):
    before = since[-1] if since else {}
    since.append({path: before.get(path, number) for path in trainable})
  has_young = any(age for ages in since for age in ages.values())
  rate = _rate(run_stages, dataset_size)
  every = {path: x for trainable in trained for path, x in trainable.items()}
  fixed = frozenset(frozen[0]).intersection(*frozen)
  made: list[tuple[tuple[Any, ...], Program]] = []
  for number, (program, stage) in enumerate(zip(programs, run_stages)):
    options = stage.config.optimizer.options
    # A decay that is independent of the learning rate is divided by it.
    independent = stage.config.optimizer.option("independent_weight_decay")
    own_lr = {"lr"} if independent else set()
    numbers = {k: x for k, x in options.items() if k not in stages.SCHEDULE.keys() - own_lr}
    ages = since[number] if has_young else None
    key = (numbers, ages, [*trained[number]])
    known = (one.optimizer for theirs, one in made if theirs == key)  # so that programs are equal
    optimizer = next(known, None)
    if optimizer is None:
      with stages.named(stage):
        optimizer, _ = make_optimizer(
          params=trained[number],
          total_steps=program.total_steps,
          to_steps=functools.partial(stages.steps, stages=run_stages, dataset_size=dataset_size),
          rate=rate,
          since=ages,
          every=every,
          name=stage.config.optimizer.name,
          **options,
        )
    program = dataclasses.replace(program, optimizer=optimizer, rate=rate, fixed=fixed)
    made.append((key, program))
  return [program for _, program in made]


def _rate(run_stages: Sequence[stages.Stage], dataset_size: int) -> Schedule:
  """The learning rate of a run: the schedule of the config, and those of stages."""

  def of(stage: stages.Stage, total_steps: int, to_steps: Callable[..., int]) -> Schedule:
    given = stage.config.optimizer.options
    with stages.named(stage):
      return make_rate(
        total_steps=total_steps,
        to_steps=to_steps,
        **{name: given[name] for name in stages.SCHEDULE},
      )

  own = []
  for stage in run_stages:
    if stage.own_schedule:
      alone = stage._replace(begin=0, end=stage.end - stage.begin)
      to_steps = functools.partial(stages.steps, stages=[alone], dataset_size=dataset_size)
      own.append((stage.begin, stage.end, of(stage, alone.end, to_steps)))
  rest = stages.with_run_schedule(run_stages)
  to_steps = functools.partial(stages.steps, stages=rest, dataset_size=dataset_size)
  return joined_rate(of(run_stages[-1], rest[-1].end, to_steps), own)


def sizes_of_towers(config: Config) -> dict[str, int]:
  """What heads read of the options of a model.

  "embed", "vocabulary" and "patch", 0 without one; "causal", whether a token of a text sees those
  before it alone.
  """
  return {
    "embed": config.model.embed_dim,
    "causal": getattr(config.model.text, "causal", False),
    "vocabulary": getattr(config.model.text, "vocab_size", 0),
    "patch": getattr(config.model.image, "patch", 0),
  }


def check_loss(program: Program, programs: Sequence[Program] = ()) -> None:
  """Checks that data and model have what the loss reads, and no more; see losses.check_needs.

  Args:
    program: of a stage.
    programs: of all stages of the run, whose losses may read what this one does not.

  Raises:
    ValueError: naming what is missing, or is read by nothing.
  """
  elsewhere = {name for one in programs for name in reads(one.loss)}
  elsewhere |= {name for one in (program, *programs) for name in one.diagnosed}
  if program.selection.share:
    elsewhere |= {"teacher_img", "teacher_txt"}
  ema = program.ema > 0
  check_needs(
    program.loss,
    provided(program.spec, program.model),
    ema=ema,
    averages=ema or program.twin.decay > 0,
    negatives=program.negatives,
    added={option: read_as(fields) for option, fields in program.added.items()},
    elsewhere=elsewhere,
  )


def check_stages(run_stages: Sequence[stages.Stage], mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError, naming the stage, if a batch does not divide over the mesh or into its
  microbatches."""
  for stage in run_stages:
    with stages.named(stage):
      for size in stage.batch_sizes:
        try:
          sharding.host_rows(mesh, size)
          gradcache.check_microbatches(mesh, size, stage.config.microbatches)
          if stage.config.selection.share:
            part = stage.config.selection.size(size)
            sharding.host_rows(mesh, part)
            gradcache.check_microbatches(mesh, part, stage.config.microbatches)
        except ValueError as error:
          if len(stage.batch_sizes) > 1:
            error.add_note(
              "This batch is one of config.data.naflex; set its `multiple` to a multiple of"
              " mesh.data x mesh.fsdp x microbatches."
            )
          raise


def of_lengths(program: Program, stage: stages.Stage) -> list[Program]:
  """The programs of a stage, one for each length of its images; of squares, the program itself."""
  schedule = stage.schedule
  if not schedule:
    return [program]
  data = stage.config.data
  return [
    dataclasses.replace(program, spec=_spec(program.model, size, data.of_length(length)))
    for length, size in zip(schedule.lengths, schedule.sizes)
  ]


def _longest(config: Config) -> tuple[int, DataOptions]:
  """The batch size and config.data of the batches with the most patches per image.

  Raises:
    ValueError: if model or loss cannot take the patches of config.data.naflex.
  """
  if not config.data.naflex:
    return config.batch_size, config.data
  patch = getattr(config.model.image, "patch", None)
  if not isinstance(config.model.image, NaflexOptions) or patch != config.data.naflex.patch:
    raise ValueError(
      f"config.data.naflex makes patches of {config.data.naflex.patch} pixels; it needs"
      f" config.model.image=dict(name='naflex', patch={config.data.naflex.patch}, ...)"
    )
  schedule = config.data.length_schedule(config.batch_size, config.seed)
  if not schedule:  # images are read from a store
    return config.batch_size, config.data
  length, size = max(zip(schedule.lengths, schedule.sizes))
  return size, config.data.of_length(length)


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


def _images(model: DualEncoder, config: Config) -> dict[str, Any]:
  """Program.images of a config."""
  if config.data.images:
    return {}
  with_images = dataclasses.replace(config.data, images=True)
  return naflex.only_images(_spec(model, config.batch_size, with_images))


def _teacher(model: DualEncoder, config: Config) -> Teacher | None:
  """Program.teacher of a config."""
  if config.teacher is None:
    return None
  patch = getattr(model.image_tower.options, "patch", 0)
  return config.teacher.build(config.data.image_size // patch if patch else 0)


def _diagnosed(config: Config, loss: Loss, sizes: Mapping[str, Any]) -> frozenset[str]:
  """What diagnostics read of a batch: of losses with a temperature per sample, FREQUENCY."""
  if not config.diagnose_every or diagnostics.FREQUENCY not in config.data.columns:
    return frozenset()
  keeps = diagnostics.has_temperatures(loss, sizes)
  return frozenset({diagnostics.FREQUENCY} if keeps else ())


def _frozen(config: Config) -> str:
  """config.frozen and config.teacher; without images, for lack of a gradient, what is theirs."""
  images = "" if config.data.images else "^model/image_"
  teacher = "^teacher/" if config.teacher else ""
  return "|".join(filter(None, (config.frozen, images, teacher)))


def stored_fields(side: str) -> set[str]:
  """The fields of a batch that hold vectors if those of a side come from a store."""
  return {"image"} if side == "image" else {"text", "text_second", "text_others"}


def init_params(program: Program, key: jax.Array) -> Arrays:
  """All parameters by path, float32: "model/…", "loss/…", "heads/…" of losses with layers, and
  "teacher/…" of config.teacher."""
  spec = {**program.images, **program.spec}
  one = {name: jnp.zeros((1, *shape[1:]), dtype) for name, (shape, dtype) in spec.items()}
  inputs = (naflex.of_fields(one), one["text"], one["text_mask"])
  feats, variables = program.model.init_with_output(key, *inputs)
  scalars, _ = program.loss.init(program.sizes)
  params = {**tree.flatten(variables["params"], "model/"), **tree.flatten(scalars, "loss/")}
  teacher = program.teacher
  if teacher is not None:
    patch = program.sizes["patch"]
    patches = one["image"].shape[1] // patch if patch and "image" in one else 0
    drawn = teacher.init(key, one.get("image", one["text"]), patches, method="initialise")
    params |= tree.flatten(drawn["params"], "teacher/")
  own = reading.init(program.loss, key, program.model, params, feats, one, program.sizes, teacher)
  return params | own


def compute_dtype(model: DualEncoder, path: str) -> Any:
  """The dtype in which a parameter is used: its tower's, float32 elsewhere."""
  part = getattr(model, path.split("/")[1], None)
  options = getattr(part, "options", part)
  return jnp.dtype(getattr(options, "dtype", jnp.float32))


def _stored_dtype(program: Program, path: str) -> Any:
  """The dtype in which a parameter that no stage trains is stored: that in which it is used."""
  model: Any = program.teacher if path.startswith("teacher/") else program.model
  return compute_dtype(model, path)


def init_state(program: Program, key: jax.Array, loaded: Arrays | None = None) -> State:
  """The state before the first update.

  Args:
    program: of the run.
    key: of the random parameters.
    loaded: {path: array}: parameters that are used instead of random ones.
  """
  return first_state(program, {**program.draw(key), **(loaded or {})})


def first_state(program: Program, params: Arrays) -> State:
  """The state before the first update of a stage, with all parameters by path."""
  frozen, trainable = tree.partition(params, program.frozen, "config.frozen")
  # Parameters that no stage trains are stored in their compute dtype.
  frozen = {
    path: x.astype(_stored_dtype(program, path)) if path in program.fixed else x
    for path, x in frozen.items()
  }
  _, loss_state = program.loss.init(program.sizes)
  return State(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    frozen=frozen,
    ema={path: x.copy() for path, x in trainable.items()} if program.ema else {},
    opt=program.optimizer.init(trainable),
    loss=loss_state,
    twin={path: x.copy() for path, x in trainable.items() if program.twin.holds(path)},
  )


def at_start(programs: Sequence[Program]) -> Program:
  """The program whose state a run begins with: the first one, with the images of the last one.

  Parameters are drawn as without stages.
  """
  first, last = programs[0], programs[-1]
  if len(programs) == 1:
    return first  # with the parameters that are traced already
  first = dataclasses.replace(first, model=last.model, spec=last.spec, images=last.images)
  return _with_draw(first)


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
  shapes = jax.eval_shape(functools.partial(first_state, program), program.params)
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
    twin={path: shardings[path] for path in state.twin},
  )


def make_embed(model: DualEncoder, losses: Mapping[str, Component] | None = None) -> dict[str, Any]:
  """embed_image, embed_patches and image_output(params, image), and embed_text(params, ids, mask).

  They are jitted, for parameters by path. And text_lengths(ids, mask): how many positions of each
  text embed_text reads, see UsedLengths. With the `losses` of a config also logit_head(params), see
  `logit_head.of_losses`.
  """

  def apply(method: str, params: Arrays, *args: jax.Array) -> Any:
    variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    is_stored = any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(args))
    # Stored vectors may have a width that the projector does not take.
    with contextlib.nullcontext() if is_stored else without_shape_checks():
      return model.apply(variables, *args, method=method)

  def compiled(method: str) -> Callable[..., Any]:
    jitted = jax.jit(functools.partial(apply, method))
    return lambda *args: sharding.block_on_cpu(jitted(*args))

  methods = ("embed_image", "embed_text", "embed_patches", "image_output")
  embed = {method: compiled(method) for method in methods}
  if losses:
    embed["logit_head"] = functools.partial(of_losses, losses=losses)
  return {**embed, "text_lengths": used_lengths(getattr(model.text_tower, "options", None))}
