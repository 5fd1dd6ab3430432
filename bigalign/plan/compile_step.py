"""Compiles the train step of a config for a TPU slice: does it fit, and what it communicates.

Everything is computed from shapes: only the config is read, and no array is allocated.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigalign import checks, inputs, sharding, stages, tree
from bigalign.config import Config, resolve_config
from bigalign.data.image import naflex
from bigalign.losses import has_tables
from bigalign.options import plain
from bigalign.plan import chips, hlo_collectives, hlo_memory, loss_costs, parts, topologies
from bigalign.private_apis import is_out_of_memory, memory_of_error
from bigalign.program import Program, check_loss, check_stages, layout, make_programs, stored_fields
from bigalign.projectors import READ_TOKENS
from bigalign.run import flops, runtime
from bigalign.state import State
from bigalign.step import jitted


class Step(NamedTuple):
  """A traced train step, with the shapes and shardings of its arguments."""

  traced: Any
  program: Program
  mesh: jax.sharding.Mesh
  state: State
  batch: dict[str, Any]
  stage: stages.Stage


def trace(values: Any, topology: str, *, samples: int = 0, stage: int = -1) -> Step:
  """Traces the step of a config for a topology; arguments and errors as of `measure`."""
  config = resolve_config(values, files_needed=False)
  checks.choose(chips.CHIPS, chips.kind(topology), "--topology")
  mesh = config.mesh.make(devices=topologies.devices(topology))
  return trace_on(mesh, config, samples=samples, stage=stage)


def trace_on(mesh: jax.sharding.Mesh, config: Config, *, samples: int = 0, stage: int = -1) -> Step:
  """Traces the step of a config for a mesh; arguments and errors as of `measure`."""
  run_stages = stages.split(config, dataset_size=samples)
  inputs.check_stored(run_stages)
  chosen = run_stages[stage]
  programs = make_programs(config, dataset_size=samples)
  own = programs[stage]
  if not samples and has_tables(own.loss):
    raise ValueError(
      f"config.loss={[*own.loss.terms]} has state for every sample; give the number of samples:"
      " --samples=400000000"
    )
  check_loss(own, programs)
  check_stages([chosen], mesh)
  shapes, shardings = layout(own, mesh, config.rules)
  state = jax.tree.map(_sharded, shapes, shardings)
  rows, replicated = sharding.batch_sharding(mesh), sharding.replicated_sharding(mesh)
  batch = {name: _sharded(x, rows) for name, x in shapes_of_batch(chosen.config, own).items()}
  progress = _sharded(jax.ShapeDtypeStruct((2,), jnp.float32), replicated)
  with jax.set_mesh(mesh), stages.named(chosen):
    traced = jitted(own, shardings, mesh).trace(state, batch, progress)
  return Step(traced, own, mesh, state, batch, chosen)


def measure(values: Any, topology: str, *, samples: int = 0, stage: int = -1) -> dict[str, Any]:
  """What the step of a config needs on each device of a topology.

  Args:
    values: a config as `bigalign train` takes it, in plain values.
    topology: a TPU slice, or several of them: "v5e:16x16", "v5e:16x16*2".
    samples: of the dataset, for durations in epochs and losses that remember samples.
    stage: which of the config's stages; the last is the config itself.

  Returns:
    {name: number}, and "fits". If it does not fit, "required_bytes_per_chip" and
    "available_bytes_per_chip", if the compiler reports them. If it fits, "peak_bytes_per_chip",
    "memory_bytes_per_chip" by kind, memory traffic and collectives, and these and the products by
    part of the step, "parts".

  Raises:
    ValueError: for a mesh that does not fit the topology, a batch that does not divide over it, or
      an unknown topology; the message names what would work.
  """
  step = trace(values, topology, samples=samples, stage=stage)
  compiler_options = runtime.libtpu_options(chips.kind(topology))
  with jax.set_mesh(step.mesh):
    lowered = step.traced.lower()
    figures: dict[str, Any] = {
      "topology": topology,
      **sizes(step),
      "not_checked": _not_checked(step.program, step.stage.config),
      "program_lines": lowered.as_text().count("\n"),
    }
    begin = time.perf_counter()
    try:
      compiled = topologies.compile_without_cache(lowered, compiler_options)
    except jax.errors.JaxRuntimeError as error:
      if not is_out_of_memory(error):
        raise
      return {**figures, "fits": False, **_required(error), **held(step)}
    figures["compile_seconds"] = time.perf_counter() - begin
  text = topologies.program_text(lowered, compiled, compiler_options)
  return {
    **figures,
    "fits": True,
    **held(step, compiled.memory_analysis()),
    **moved(text),
    "parts": parts.split(step.traced.jaxpr, text, step.mesh.size),
    **_loss(step.stage.config, step),
  }


def sizes(step: Step) -> dict[str, Any]:
  """What a step computes, before it is compiled: its devices, batch, parameters, products."""
  program, mesh, config = step.program, step.mesh, step.stage.config
  towers = {side: getattr(program.model, f"{side}_tower") for side in ("image", "text")}
  return {
    "device_kind": mesh.devices.flat[0].device_kind,
    "peak_flops_per_second": flops.peak(mesh.devices.flat[0]),
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "stage": step.stage.number,
    "image_size": config.data.image_size,
    "text_length": config.data.text_length,
    "batch_size": program.batch_size,
    "batch_per_chip": program.batch_size / mesh.size,
    "microbatches": program.microbatches,
    "remat": {side: getattr(tower.options, "remat", "none") for side, tower in towers.items()},
    "first_step": step.stage.begin,
    "total_steps": step.stage.end - step.stage.begin,
    "parameters": sum(x.size for x in {**step.state.trainable, **step.state.frozen}.values()),
    "trainable": sum(x.size for x in step.state.trainable.values()),
    "flops_per_chip": flops.of_jaxpr(step.traced.jaxpr) / mesh.size,
  }


def _sharded(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _tower_inputs(side: str, spec: Mapping[str, Any]) -> list[Any]:
  """What the tower of a side reads of a batch."""
  if side == "image":
    return [naflex.of_fields(spec)]
  return [spec["text"], spec["text_mask"]]


def shapes_of_batch(config: Config, program: Program) -> dict[str, Any]:
  """Shapes of a global batch; stored vectors are as wide as the towers' outputs."""
  spec = {name: jax.ShapeDtypeStruct(*x) for name, x in program.spec.items()}
  stored = config.data.stores.sides
  if not stored:
    return spec
  variables = {"params": tree.unflatten(tree.subtree(program.params, "model/"))}
  for side in stored:
    tokens = isinstance(getattr(program.model, f"{side}_projector"), READ_TOKENS)
    method = f"{'with_tokens' if tokens else 'pooled'}_{side}"
    row = jax.eval_shape(
      lambda v, *x, method=method: program.model.apply(v, *x, method=method),
      variables,
      *_tower_inputs(side, spec),
    )
    for name in stored_fields(side) & spec.keys():
      given = program.spec[name][0]
      leading = given[:-1] if name == "text_others" else given[:1]
      spec[name] = jax.ShapeDtypeStruct((*leading, *row.shape[1:]), jnp.float16)
  if "text" in stored:
    masks = {name: spec[name] for name in spec if re.fullmatch(r"text(_\w+)?_mask", name)}
    spec |= {k: jax.ShapeDtypeStruct((*x.shape[:-1], 1), jnp.bool_) for k, x in masks.items()}
  return spec


def _not_checked(program: Program, config: Config) -> str:
  """Why it could not be checked that the tokenizer fits the text tower; "" if it was checked."""
  try:
    inputs.check_tokenizer(program.model.text_tower, config.data)
  except (OSError, KeyError, ImportError) as error:
    return f"config.data.tokenizer against config.model.text: {error}"
  return ""


def _required(error: Exception) -> dict[str, Any]:
  """The memory that the compiler needs and has, from its error; None if it does not say."""
  required, available = memory_of_error(error) or (None, None)
  return {
    "required_bytes_per_chip": required,
    "available_bytes_per_chip": available,
    "compiler": str(error).splitlines()[0],
  }


def held(step: Step, memory: Any = None) -> dict[str, Any]:
  """Bytes of one device by kind; with `memory`, also those of the compiled program."""

  def size(arrays: Any) -> int:
    return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays)
    )

  state = step.state
  kinds = {
    "parameters": size((state.trainable, state.frozen)),
    "optimizer": size(state.opt),
    "averages": size((state.ema, state.twin)),
    "loss_state": size(state.loss),
    "batch": size(step.batch),
  }
  if memory is None:
    return {"memory_bytes_per_chip": kinds}
  # Not memory.peak_memory_in_bytes, which also counts the chip's small on-chip memory.
  kinds["layout"] = memory.argument_size_in_bytes - sum(kinds.values())
  kinds["activations"] = memory.temp_size_in_bytes
  kinds["results"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
  kinds["code"] = memory.generated_code_size_in_bytes
  return {"peak_bytes_per_chip": sum(kinds.values()), "memory_bytes_per_chip": kinds}


def moved(text: str) -> dict[str, Any]:
  """Memory traffic and communication of a compiled program, from its HLO."""
  return {
    "memory_traffic_bytes_per_chip": hlo_memory.traffic(text),
    "collectives": parts.shown(hlo_collectives.collectives(text)),
  }


def _loss(config: Config, step: Step) -> dict[str, Any]:
  """Temporaries of each loss compiled alone: how much of the step's they can explain.

  A head has no loss without the towers that it reads.
  """
  engine, sizes = step.program.logits, step.program.sizes
  alone = [
    loss_costs.measure(
      name,
      engine.way,
      step.mesh,
      batch=step.program.batch_size,
      width=sizes["embed"],
      samples=sizes["image"],
      dtype=engine.dtype,
      options={k: v for k, v in plain(term.options).items() if k != "weight"},
      teachers=sizes.get("teachers", ()),
    )
    for name, term in config.loss.items()
    if name in step.program.loss.terms and step.program.loss.terms[name][1].head is None
  ]
  return {"loss_alone_bytes_per_chip": max((x["temporary_bytes"] for x in alone), default=0)}
