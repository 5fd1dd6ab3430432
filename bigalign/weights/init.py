"""Where a run starts: what config.model says of a checkpoint, as options and as arrays.

  dict(init="$CLIP")                                    both towers, their projectors, the scale
  dict(image=dict(init="$DINOV2"), text=dict(init="$MINILM"), embed_dim=384)    projectors are new
  dict(open_clip="ViT-B-16")                            the sizes alone

Beside `init` stand options of the model, in the place of the checkpoint's, and two regular
expressions: `fresh`, paths that keep their random start; `drop`, keys of the file to leave out.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import NamedSharding

from bigalign import tree
from bigalign.data.files.patterns import expand_variables
from bigalign.options import plain
from bigalign.weights import Checkpoint, describe, open_clip, transfer

SIDES = ("image", "text")
_WORDS = ("init", "fresh", "drop")
_OWN = {"image": ("image", "pixels"), "text": ("text",)}  # what a tower of a checkpoint brings
_SIZE = ("width", "depth", "heads", "mlp_ratio")  # what a variant stands for
_SCALAR = re.compile(r"loss/(\w+)/([tb])")  # log of the logit scale, and bias


class Start(NamedTuple):
  """A checkpoint that a part of the model comes from.

  where: its place in the config. side: "image" or "text"; "" for all of the model.
  """

  where: str
  side: str
  checkpoint: Checkpoint
  fresh: str
  drop: str


def options(given: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """config.model with what its checkpoints say of themselves, for make_model. Reads no tensor.

  Args:
    given: config.model as written.
    record: config.json of the run that goes on. The same words mean what they meant when it began,
      whatever became of the files.

  Raises:
    FileNotFoundError, KeyError: for a path that is not there, a variable that is not set.
    ValueError: for a checkpoint without that tower, or with other statistics of pixels.
  """
  if record and record["model"] == given:
    return dict(record["config"]["model"])
  model = _beside_init(given) | {s: _beside_init(given[s]) for s in SIDES if _is_tower(given, s)}
  starts = _starts(given)
  if "open_clip" in model:
    if starts:
      raise ValueError(f"config.model.open_clip and {starts[0].where}.init: both say the sizes")
    name = _expanded(model.pop("open_clip"), "config.model.open_clip")
    model = _over(open_clip.model(name), model)
  for start in starts:
    theirs = start.checkpoint.model
    if start.side:
      theirs = {k: v for k, v in theirs.items() if k in _OWN[start.side]}
    pixels = theirs.get("pixels")
    if pixels and given.get("pixels", pixels) != pixels:
      raise ValueError(
        f"config.model.pixels={given['pixels']!r}: {start.checkpoint.path} was trained with"
        f" {pixels!r}; leave pixels out"
      )
    model = _over(theirs, model)
  return plain(model)


def options_from_sizes(given: Mapping[str, Any]) -> dict[str, Any]:
  """`options`; if checkpoint files are missing on this machine, the sizes written next to `init`.

  Raises:
    ValueError: if files are missing and the sizes are not written.
  """
  try:
    return options(given)
  except (FileNotFoundError, KeyError) as error:
    model = {
      k: {o: x for o, x in v.items() if o not in _WORDS} if isinstance(v, Mapping) else v
      for k, v in given.items()
      if k not in _WORDS
    }
    if any("name" not in model.get(side, {}) for side in SIDES):
      raise ValueError(
        "config.model.init names a checkpoint that is not on this machine, and the config does not"
        " give the sizes of the model; write them next to `init`, name= among them, or copy the"
        f" checkpoint's config.json here (no weights are read): {error}"
      ) from error
    return model


def load(
  values: Mapping[str, Any],
  shapes: Mapping[str, Any],
  shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
  """{path: array} of what comes from checkpoints, each where it lies.

  Args:
    values: the config as written: what its `model` says of checkpoints, and its `loss`. A t_init
      or b_init that the loss gives is taken, not the checkpoint's.
    shapes: {path: shape and dtype} of all parameters, "model/…" and "loss/…".

  Raises:
    ValueError: before a tensor is read, with all that is missing or has no place or another shape.
  """
  plans = [(start, _plan(start, shapes)) for start in _starts(values["model"])]
  loaded: dict[str, jax.Array] = {}
  for start, plan in plans:
    _report(start, plan)
    places = {path: shardings[f"model/{path}"] for path in plan.shapes}
    loaded |= {f"model/{path}": x for path, x in plan.arrays(places)}
    if not start.side:
      loaded |= _scalars(start.checkpoint, values["loss"], shapes, shardings)
  if plans:
    logging.info("New, drawn with config.seed: %s", ", ".join(_new(shapes, loaded)) or "nothing")
  return loaded


def _is_tower(given: Mapping[str, Any], side: str) -> bool:
  return isinstance(given.get(side), Mapping)


def _beside_init(given: Mapping[str, Any]) -> dict[str, Any]:
  """The options of the model; without an init, `fresh` and `drop` are some that nobody knows."""
  return {k: v for k, v in given.items() if "init" not in given or k not in _WORDS}


def _over(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
  """Ours in the place of theirs; of a tower, option by option."""
  model = {**theirs, **ours}
  for side in SIDES:
    if side in theirs and _is_tower(ours, side):
      size = _SIZE if "variant" in ours[side] else ()
      kept = {k: v for k, v in theirs[side].items() if k not in size}
      model[side] = {**kept, **ours[side]}
  return model


def _starts(given: Mapping[str, Any]) -> list[Start]:
  towers = {side: given[side] for side in SIDES if _is_tower(given, side)}
  alone = [side for side, tower in towers.items() if "init" in tower]
  if "init" not in given:
    return [_start(towers[side], side, towers) for side in alone]
  if alone:
    raise ValueError(f"config.model.init brings both towers; config.model.{alone[0]}.init, one")
  return [_start(given, "", towers)]


def _start(given: Mapping[str, Any], side: str, towers: Mapping[str, Any]) -> Start:
  where = "config.model" + f".{side}" * bool(side)
  path = pathlib.Path(_expanded(given["init"], f"{where}.init")).expanduser()
  if not path.exists():
    raise FileNotFoundError(f"{where}.init={given['init']!r}: no such file or folder: {path}")
  sides = (side,) if side else SIDES
  checkpoint = describe(path, **{x: _beside_init(towers[x]) for x in sides if x in towers})
  lacking = [x for x in sides if x not in checkpoint.model]
  if lacking:
    raise ValueError(
      f"{where}.init: {path} holds no {lacking[0]} tower"
      + ("" if side else "; name it as init of its own tower, and say what the other one is")
    )
  return Start(where, side, checkpoint, given.get("fresh", ""), given.get("drop", ""))


def _expanded(text: Any, what: str) -> str:
  if not isinstance(text, str):
    raise TypeError(f"{what}={text!r} is of type {type(text).__name__}; it must be str")
  return expand_variables(text, what=what)


def _plan(start: Start, shapes: Mapping[str, Any]) -> transfer.Plan:
  part = f"model/{start.side}_tower/" if start.side else "model/"
  ours = {path: x for path, x in shapes.items() if path.startswith(part)}
  fresh, _ = tree.partition(ours, start.fresh, f"{start.where}.fresh")
  exactly = "|".join(f"^{re.escape(path)}$" for path in tree.subtree(fresh, "model/"))
  return transfer.plan(
    start.checkpoint.tensors,
    start.checkpoint.layout,
    tree.subtree(ours, "model/"),
    fresh=exactly,
    drop=start.drop,
  )


def _scalars(
  checkpoint: Checkpoint,
  loss: Mapping[str, Any],
  shapes: Mapping[str, Any],
  shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
  """The logit scale and bias, for each loss that learns one and writes no first value."""
  known = {row.ours for row in checkpoint.layout.rows}
  found = {}
  for path in shapes:
    scalar = _SCALAR.fullmatch(path)
    if scalar and scalar[2] in known and f"{scalar[2]}_init" not in loss[scalar[1]]:
      place = {scalar[2]: shardings[path]}
      found[path] = checkpoint.load({scalar[2]: shapes[path]}, shardings=place)[scalar[2]]
  return found


def _report(start: Start, plan: transfer.Plan) -> None:
  logging.info(
    "%s.init: %d of the %d tensors of %s (%s) make %d arrays",
    start.where,
    len(plan.keys),
    len(plan.tensors),
    plan.tensors.path,
    start.checkpoint.kind,
    len(plan.shapes),
  )
  for path, (theirs, ours, method) in plan.resized.items():
    logging.info("model/%s: %d positions made of %d, %s", path, ours, theirs, method)


def _new(shapes: Mapping[str, Any], loaded: Mapping[str, Any]) -> list[str]:
  """What is not loaded: a part of the model as a whole, or path by path where some of it is."""

  def part(path: str) -> str:
    return "/".join(path.split("/")[:2])

  parts = {part(path) for path in loaded}
  left = (path for path in shapes if path not in loaded)
  return list(dict.fromkeys(path if part(path) in parts else part(path) for path in left))
