"""What happens to the state of a run between two stages.

Nothing, if the stages train the same parameters with the same losses. Otherwise parameters keep
their bytes, whether they become frozen or trainable; moments, averages and tables of losses are
kept as far as both stages have them. What is new begins as in a new run: moments at zero, averages
at the parameters, scalars and layers of a loss at their initial values.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from bigalign import tree
from bigalign.program import Program, first_state
from bigalign.state import Arrays, State, by_path


def differ(shapes: State, after: State) -> bool:
  """Whether two stages have different states; arguments are their shapes."""
  one, other = (dict(by_path(x)) for x in (shapes, after))
  return one != other


def crossed(state: State, program: Program, shapes: State, shardings: State) -> State:
  """The state with which a stage begins.

  Args:
    state: at the end of the stage before it; its arrays are donated.
    program: of the stage that begins.
    shapes: of its state.
    shardings: of its state.
  """
  every = {**state.trainable, **state.frozen}
  kept = {
    "params": {path: x for path, x in every.items() if path in program.params},
    "ema": {path: x for path, x in state.ema.items() if path in shapes.ema},
    "twin": {path: x for path, x in state.twin.items() if path in shapes.twin},
    "opt": _in_both(_with_arrays(state.opt), _with_arrays(shapes.opt)),
    "loss": _in_both(by_path(state.loss), by_path(shapes.loss)),
  }
  new = [path for path in program.params if path not in every]
  _log(state, shapes, new, [path for path in every if path not in program.params])
  begin = jax.jit(
    functools.partial(_begin, program, new), out_shardings=shardings, donate_argnums=0
  )
  begun: State = begin(kept, state.step)
  return begun


def _begin(program: Program, new: list[str], kept: Mapping[str, Arrays], step: Any) -> State:
  drawn = {}
  if new:  # the compiler leaves out what is not new
    drawn = program.draw(jax.random.key(program.seed))
  params = {path: kept["params"].get(path, drawn.get(path)) for path in program.params}
  fresh = first_state(program, params)
  return State(
    step=step,
    trainable=fresh.trainable,
    frozen=fresh.frozen,
    ema={**fresh.ema, **kept["ema"]},
    twin={**fresh.twin, **kept["twin"]},
    opt=_replaced(fresh.opt, [*_with_arrays(fresh.opt)], kept["opt"]),
    loss=_replaced(fresh.loss, [*by_path(fresh.loss)], kept["loss"]),
  )


def _with_arrays(chain: Any) -> Arrays:
  """The arrays of the state of an optimizer, by their place among the parts that have any.

  Weight decay and multipliers have none, so a stage may do without them.
  """
  parts = [part for part in map(by_path, chain) if part]
  return {f"{i}/{path}": x for i, part in enumerate(parts) for path, x in part.items()}


def _in_both(before: Arrays, after: Arrays) -> Arrays:
  """The arrays that a later state has too, with the same shape and dtype."""
  return {
    path: x
    for path, x in before.items()
    if path in after and (x.shape, x.dtype) == (after[path].shape, after[path].dtype)
  }


def _replaced(structure: Any, paths: list[str], arrays: Arrays) -> Any:
  """A tree whose leaves, in the order of `paths`, are replaced by the arrays of that name."""
  leaves, treedef = jax.tree.flatten(structure)
  return jax.tree.unflatten(treedef, [arrays.get(p, x) for p, x in zip(paths, leaves, strict=True)])


def _log(state: State, shapes: State, new: list[str], dropped: list[str]) -> None:
  """Logs what changes between two stages."""
  trained = [path for path in shapes.trainable if path in state.frozen]
  held = [path for path in shapes.frozen if path in state.trainable]
  for what, paths in (
    ("Initialised", new),
    ("Dropped", dropped),
    ("Trained from here on, with new moments", trained),
    ("Frozen from here on", held),
  ):
    if paths:
      logging.info("%s: %d arrays, %s", what, len(paths), tree.shown(paths, sep=", ", width=200))
