"""The arrays of a run: parameters, averages, optimizer and loss state, and their checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Container
from typing import Any

import clu.parameter_overview
import jax
from absl import logging

from bigalign.checkpoint import Checkpoints

Arrays = dict[str, Any]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("step", "trainable", "frozen", "ema", "opt", "loss", "twin"),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class State:
  """All arrays of a run. samples_seen is separate: a 64-bit integer on the host.

  Args:
    step: [] int32, updates done.
    trainable: {path: array} of the parameters that are trained.
    frozen: {path: array} of the others.
    ema: {path: array} running averages of `trainable`; empty without averages.
    opt: optax's state of `trainable`.
    loss: the state of the loss, such as per-sample tables.
    twin: {path: array} averages of some of `trainable` that heads read (config.twin).
  """

  step: Any
  trainable: Arrays
  frozen: Arrays
  ema: Arrays
  opt: Any
  loss: Any
  twin: Arrays = dataclasses.field(default_factory=dict)


def parts(state: State, fixed: Container[str]) -> dict[str, Arrays]:
  """A state as {part: {path: array}}, as checkpoints hold it.

  Args:
    state: of the run.
    fixed: the paths that no stage trains (Program.fixed), which are saved apart, once per run.
  """
  return {
    "trainable": state.trainable,
    "frozen": {path: x for path, x in state.frozen.items() if path not in fixed},
    "ema": state.ema,
    "opt": by_path(state.opt),
    "loss": by_path(state.loss),
    "clock": {"step": state.step},  # the name is part of the checkpoint format
    **({"twin": state.twin} if state.twin else {}),  # older checkpoints have no such part
  }


def restore_params(
  checkpoints: Checkpoints,
  step: int,
  shapes: State,
  shardings: State,
  fixed: Container[str],
  ema: bool = False,
) -> Arrays:
  """All parameters of a checkpoint by path, and nothing else of it.

  Args:
    checkpoints: of the run.
    step: which checkpoint.
    shapes: the shapes of the state.
    shardings: the shardings of its arrays, on the mesh that is used now.
    fixed: as of `parts`.
    ema: the running averages instead of the trained parameters.
  """
  wanted = _with_shardings(shapes, shardings)
  in_checkpoint = parts(wanted, fixed)
  names = ("ema" if ema else "trainable", "frozen")
  learned, held = checkpoints.restore(step, {x: in_checkpoint[x] for x in names}).values()
  return {**learned, **_frozen(checkpoints, wanted, held)}


def restore(
  checkpoints: Checkpoints, step: int, shapes: State, shardings: State, fixed: Container[str]
) -> State:
  """The state of a checkpoint on this mesh, whatever mesh wrote it.

  The arguments are those of restore_params.
  """
  wanted = _with_shardings(shapes, shardings)
  arrays = checkpoints.restore(step, parts(wanted, fixed))
  return State(
    step=arrays["clock"]["step"],
    trainable=_like(wanted.trainable, arrays["trainable"]),
    frozen=_like(wanted.frozen, _frozen(checkpoints, wanted, arrays["frozen"])),
    ema=_like(wanted.ema, arrays["ema"]),
    opt=_like(wanted.opt, arrays["opt"]),
    loss=_like(wanted.loss, arrays["loss"]),
    twin=_like(wanted.twin, arrays.get("twin", {})),
  )


def _frozen(checkpoints: Checkpoints, wanted: State, held: Arrays) -> Arrays:
  """The frozen parameters: those of the checkpoint, and those that are saved once per run."""
  fixed = {path: x for path, x in wanted.frozen.items() if path not in held}
  return {**held, **checkpoints.restore_frozen(fixed)}


def describe(state: State, workdir: pathlib.Path) -> None:
  """Writes workdir/parameters.txt, a list of the parameters; logs how many are frozen."""
  if jax.process_index() != 0:
    return
  parameters = {**state.trainable, **state.frozen}
  overview = clu.parameter_overview.get_parameter_overview(parameters, include_stats=False)
  (workdir / "parameters.txt").write_text(overview + "\n")
  logging.info(
    "%d parameters, %d of them trainable; list in %s",
    sum(x.size for x in parameters.values()),
    sum(x.size for x in state.trainable.values()),
    workdir / "parameters.txt",
  )
  total, frozen = (
    collections.Counter("/".join(path.split("/")[:2]) for path in x)
    for x in (parameters, state.frozen)
  )
  for part, count in frozen.items():
    logging.info("Frozen: %d of the %d arrays of %s", count, total[part], part)


def by_path(structure: Any) -> Arrays:
  """The leaves of a tree by their keys, joined by slashes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(structure)
  return {jax.tree_util.keystr(keys, simple=True, separator="/"): x for keys, x in leaves}


def _like(structure: Any, arrays: Arrays) -> Any:
  """Arrays by path in the structure that they were taken from."""
  treedef = jax.tree.structure(structure)
  return jax.tree.unflatten(treedef, [arrays[path] for path in by_path(structure)])


def _with_shardings(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
