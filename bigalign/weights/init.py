"""Initialises a run from pretrained checkpoints that config.model names: options and arrays.

  dict(init="$CLIP")                                    both towers, their projectors, the scale
  dict(image=dict(init="$DINOV2"), text=dict(init="$MINILM"), embed_dim=384)    projectors are new
  dict(init="$CLIP", text=dict(init="$XLM_R"))          CLIP's image side, another text tower
  dict(init="runs/x", step=5000, ema=True)              a run of ours, also one that is training
  dict(open_clip="ViT-B-16")                            the sizes alone

config.teacher=dict(init="$CLIP") takes the image side of a checkpoint as a model of its own.

Options next to `init` replace those of the checkpoint. Three more are regular expressions: `parts`
selects the paths that are taken, `fresh` paths that keep their random initial values, `drop` keys
of the file to leave out.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import NamedSharding

from bigalign import tree
from bigalign.data.files.patterns import expand_variables
from bigalign.data.image.reading import ImageReading
from bigalign.options import plain
from bigalign.run.provenance import check_hosts_agree
from bigalign.weights import Checkpoint, describe, open_clip, runs, tokenizer, transfer, views

SIDES = ("image", "text")
_VIEW: dict[str, Any] = {
  "image_size": None,
  **{x: getattr(ImageReading, x) for x in ("resize", "resize_edge", "interpolation")},
}
_WORDS = ("init", "step", "ema", "parts", "fresh", "drop")
_OWN = {"image": ("image", "pixels"), "text": ("text",)}  # options that come with a single tower
_SIZE = ("width", "depth", "heads", "mlp_ratio")  # the options that a variant sets
_TEACHER = "config.teacher"
_OF_TEACHER = ("image", "image_projector", "embed_dim", "pixels", "image_size")
_NO_SIZES = (
  "config.{}.init names a checkpoint that is not on this machine, and the config does not give the"
  " sizes of {}; write them next to `init`, name= among them, or copy the checkpoint's config.json"
  " here (no weights are read): {}"
)
_SCALAR = re.compile(r"loss/(\w+)/([tb])")  # log of the logit scale, and bias


class Pretrained(NamedTuple):
  """A checkpoint that initialises a part of the model.

  Args:
    where: its place in the config.
    side: "image" or "text"; "" for the whole model.
    init: its path as the config names it, with its variables.
    checkpoint: the checkpoint.
    parts: regular expression of the paths that are taken; "": all.
    fresh: regular expression of paths that keep their random initial values.
    drop: regular expression of keys that may be left out.
    but: sides that it does not give, because their towers have an `init` of their own.
  """

  where: str
  side: str
  init: str
  checkpoint: Checkpoint
  parts: str
  fresh: str
  drop: str
  but: tuple[str, ...] = ()

  def gives(self, side: str) -> bool:
    """Whether it gives the tower of a side, "image" or "text", its view or tokenizer."""
    return self.side in ("", side) and side not in self.but

  @property
  def is_run(self) -> bool:
    """Whether it is a run of ours."""
    return self.checkpoint.kind == runs.KIND


class Completed(NamedTuple):
  """Options with what the checkpoints of a run state.

  Args:
    model: config.model with all options of the towers.
    data: config.data with image_size, resize, resize_edge, interpolation and tokenizer.
    differences: how `data` differs from what the checkpoints state, a text each. Those of a run
      that resumes are those with which it began.
  """

  model: dict[str, Any]
  data: dict[str, Any]
  differences: tuple[str, ...] = ()


def completed(
  model: Mapping[str, Any],
  data: Mapping[str, Any],
  record: Mapping[str, Any] | None = None,
  *,
  files_needed: bool = True,
) -> Completed:
  """config.model and config.data with what the checkpoints state. Reads no tensor.

  Args:
    model: config.model as written.
    data: config.data as written.
    record: config.json of the run that resumes. If its model was written in the same way, its
      options hold, images and ids stay as they were, and the checkpoints are not needed any more.
    files_needed: False: if files of a checkpoint are missing here, use the sizes next to `init`.

  Returns:
    The options. Those of `data` are completed as far as it does not give them itself, also if a
    store holds the vectors of the tower, since the run is evaluated from images and texts; warnings
    show the differences.

  Raises:
    FileNotFoundError: for a path that does not exist.
    KeyError: for an environment variable that is not set.
    ValueError: for a checkpoint without the tower, or with other pixel statistics; if files are
      missing that are not needed, and the sizes are not written.
  """
  if record and record["model"] == model:
    was, differences = record["config"], tuple(record.get("differences", ()))
    for line in differences:
      logging.warning("%s", line)
    return Completed(dict(was["model"]), _as_recorded(model, data, was["data"]), differences)
  try:
    parts = _pretrained_parts(model)
    full = _options(model, parts)
  except (FileNotFoundError, KeyError) as error:
    if files_needed:
      raise
    return Completed(_written_sizes(model, error), dict(data))
  full_data, found = dict(data), []
  for part in parts:
    if part.gives("image"):
      full_data = with_view(full_data, part.checkpoint.view)
      found += _view_differences(full_data, part.checkpoint.view)
    if part.gives("text"):
      given = data.get("tokenizer")
      if given is None or isinstance(given, Mapping):
        chosen, lines = _tokenizer(part, given)
        full_data |= {} if chosen is None else {"tokenizer": chosen}
        found += lines
  return Completed(full, full_data, tuple(found))


def completed_teacher(
  given: Mapping[str, Any],
  record: Mapping[str, Any] | None = None,
  *,
  files_needed: bool = True,
) -> dict[str, Any]:
  """config.teacher with what its checkpoint states; arguments and errors as of `completed`."""
  if record and record.get("teacher") == given:
    teacher: dict[str, Any] = dict(record["config"]["teacher"])
    return teacher
  try:
    options = _options(given, _teacher_parts(given), _TEACHER)
  except (FileNotFoundError, KeyError) as error:
    if files_needed:
      raise
    if "name" not in given.get("image", {}):
      raise ValueError(_NO_SIZES.format("teacher", "the teacher", error)) from error
    return {k: v for k, v in given.items() if k not in _WORDS}
  return {k: v for k, v in options.items() if k in _OF_TEACHER}


def _teacher_parts(given: Mapping[str, Any]) -> list[Pretrained]:
  """The checkpoint that config.teacher names, without its texts."""
  towers = {"image": given["image"]} if _is_tower(given, "image") else {}
  return [_pretrained(given, "", towers, but=("text",), root=_TEACHER)] if "init" in given else []


def _tokenizer(
  part: Pretrained, given: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, list[str]]:
  """The options of the tokenizer with those of the checkpoint, and how they differ, logged."""
  if not part.is_run:
    return tokenizer.completed_and_compared(part.checkpoint, given, part.init)
  chosen, lines = runs.tokenizer(part.checkpoint, given)
  for line in lines:
    logging.warning("%s", line)
  return chosen, lines


def options(given: Mapping[str, Any]) -> dict[str, Any]:
  """config.model with the options of its checkpoints filled in, for make_model.

  Args:
    given: config.model as written.
  """
  return _options(given, _pretrained_parts(given))


def _options(
  given: Mapping[str, Any], parts: Sequence[Pretrained], root: str = "config.model"
) -> dict[str, Any]:
  """config.model, or what has its form at `root`, with the options of its checkpoints."""
  model = _own_options(given) | {s: _own_options(given[s]) for s in SIDES if _is_tower(given, s)}
  if "open_clip" in model:
    if parts:
      raise ValueError(f"config.model.open_clip and {parts[0].where}.init: both give the sizes")
    name = _expanded(model.pop("open_clip"), "config.model.open_clip")
    model = _merged(open_clip.model(name), model)
  for part in parts:
    theirs = part.checkpoint.model
    if part.side:
      theirs = {k: v for k, v in theirs.items() if k in _OWN[part.side]}
    theirs = {k: v for k, v in theirs.items() if not k.startswith(part.but)} if part.but else theirs
    pixels = theirs.get("pixels")
    if pixels and given.get("pixels", pixels) != pixels:
      raise ValueError(
        f"{root}.pixels={given['pixels']!r}: {part.checkpoint.path} was trained with"
        f" {pixels!r}; leave pixels out"
      )
    model = _merged(theirs, model)
  return dict(plain(model))


def with_view(data: Mapping[str, Any], view: views.View | None) -> dict[str, Any]:
  """config.data with the view of images that the checkpoint of the image tower states.

  Args:
    data: config.data as written.
    view: of the checkpoint.

  Returns:
    `data` with image_size, resize, resize_edge and interpolation, as far as it does not give them
    itself; a warning shows what differs, and the view that is used if no file states one.
  """
  if view is None:
    return dict(data)
  size = view.size if data.get("image_size") is None else data["image_size"]
  # The edge belongs to the stated size, and only "shortest" has one.
  takes_edge = size == view.size and data.get("resize") in (None, "shortest")
  missing = {
    key: value
    for key, value in (("image_size", view.size), *view.options.items())
    if data.get(key) is None and value is not None and (takes_edge or key != "resize_edge")
  }
  if missing:
    logging.info("config.data: %s, of %s", missing, view.where or view.size_where)
  if view.missing and data.get("resize") is None:
    used = {**_VIEW, **{k: v for k, v in data.items() if v is not None}, **missing}
    logging.warning(
      "%s: no such file, so images are seen with resize=%r and interpolation=%r. Copy the"
      " checkpoint's file there, or set config.data.resize",
      view.where,
      used["resize"],
      used["interpolation"],
    )
  for line in _view_differences({**data, **missing}, view):
    logging.warning("%s", line)
  return {**data, **missing}


def _view_differences(data: Mapping[str, Any], view: views.View | None) -> list[str]:
  """How config.data differs from the view; none without the size of images."""
  full = {**_VIEW, **{k: v for k, v in data.items() if v is not None}}
  return [] if view is None or full["image_size"] is None else views.differences(view, full)


def _as_recorded(
  model: Mapping[str, Any], data: Mapping[str, Any], was: Mapping[str, Any]
) -> dict[str, Any]:
  """config.data with what was filled in from the checkpoints when the run began.

  Args:
    model: config.model as written.
    data: config.data as written.
    was: config.data of the record.
  """
  full = dict(data)
  if _is_pretrained(model, "image"):
    full |= {x: was[x] for x in _VIEW if data.get(x) is None and was.get(x) is not None}
    if full.get("resize", _VIEW["resize"]) != was.get("resize") and data.get("resize_edge") is None:
      full.pop("resize_edge", None)  # it belongs to the recorded resize
  given = data.get("tokenizer")
  if _is_pretrained(model, "text") and (given is None or isinstance(given, Mapping)):
    full["tokenizer"] = tokenizer.as_recorded(given, was["tokenizer"])
  return full


def _is_pretrained(model: Mapping[str, Any], side: str) -> bool:
  """Whether a checkpoint gives the tower of a side."""
  return "init" in model or (_is_tower(model, side) and "init" in model[side])


def _written_sizes(given: Mapping[str, Any], error: Exception) -> dict[str, Any]:
  """config.model without its checkpoints, whose files are missing here.

  Raises:
    ValueError: if the sizes are not written.
  """
  model = {
    k: {o: x for o, x in v.items() if o not in _WORDS} if isinstance(v, Mapping) else v
    for k, v in given.items()
    if k not in _WORDS
  }
  if any("name" not in model.get(side, {}) for side in SIDES):
    raise ValueError(_NO_SIZES.format("model", "the model", error)) from error
  return model


def load(
  values: Mapping[str, Any],
  shapes: Mapping[str, Any],
  shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
  """Loads the parameters that come from checkpoints, each with its sharding.

  Args:
    values: the config as written; its `model` and `teacher` name the checkpoints. A t_init or
      b_init in its `loss` takes precedence over the checkpoint's scale or bias.
    shapes: {path: shape and dtype} of all parameters, "model/…", "loss/…", "heads/…", "teacher/…".
    shardings: {path: sharding} of all parameters.

  Returns:
    {path: array}.

  Raises:
    ValueError: before any tensor is read, listing all keys and paths that are missing, unknown, or
      of another shape; for a teacher without a checkpoint.
  """
  plans = [(part, _plan(part, shapes)) for part in _pretrained_parts(values["model"])]
  of_teacher = _plans_of_teacher(values, shapes)
  runs_read = [part for part, _ in [*plans, *of_teacher] if part.is_run]
  steps = {part.where: part.checkpoint.layout.data["step"] for part in runs_read}
  check_hosts_agree({"newest checkpoint of the runs in config.model and config.teacher": steps})
  loaded: dict[str, jax.Array] = {}
  for part, plan in plans:
    of_plan = {path: shardings[f"model/{path}"] for path in plan.shapes}
    loaded |= {f"model/{path}": x for path, x in plan.arrays(of_plan)}
    _log(part, plan)
    if not part.side and part.is_run:
      loaded |= _run_scalars(part.checkpoint, values["loss"], shapes, shardings)
    elif not part.side:
      loaded |= _scalars(part.checkpoint, values["loss"], shapes, shardings)
      loaded |= _layers(part.checkpoint, shapes, shardings)
  for part, plan in of_teacher:
    own = {path: shardings[f"teacher/{path}"] for path in plan.shapes}
    loaded |= {f"teacher/{path}": x for path, x in plan.arrays(own)}
    _log(part, plan)
  if plans:
    random = _not_loaded(shapes, loaded)
    if random:
      logging.info("Initialised at random with config.seed: %s", ", ".join(random))
    else:
      logging.info("No parameters were initialised at random")
  return loaded


def _plans_of_teacher(
  values: Mapping[str, Any], shapes: Mapping[str, Any]
) -> list[tuple[Pretrained, transfer.Plan]]:
  """What fills the parameters of config.teacher: one checkpoint, or none without a teacher.

  Raises:
    ValueError: if there is a teacher, and no checkpoint gives all of its parameters.
  """
  ours = tree.subtree(shapes, "teacher/")
  if not ours:
    return []
  parts = _teacher_parts(values["teacher"])
  if not parts:
    raise ValueError(
      f"{_TEACHER}.init is missing: a teacher has the weights of a checkpoint; set it to a folder,"
      " a file, or the folder of a run"
    )
  (part,) = parts
  if part.fresh or part.parts:
    raise ValueError(
      f"{_TEACHER}: fresh={part.fresh!r} and parts={part.parts!r} would leave parameters of a"
      " frozen teacher at random; leave them out"
    )
  return [(part, _plan(part, {f"model/{path}": x for path, x in ours.items()}))]


def _is_tower(given: Mapping[str, Any], side: str) -> bool:
  """Whether config.model gives options of a tower."""
  return isinstance(given.get(side), Mapping)


def _own_options(given: Mapping[str, Any]) -> dict[str, Any]:
  """The options next to `init`; without it, `fresh` and `drop` stay and are refused as unknown."""
  return {k: v for k, v in given.items() if "init" not in given or k not in _WORDS}


def _merged(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
  """Their options, replaced by ours one by one, also in the towers."""
  model = {**theirs, **ours}
  for side in SIDES:
    if side in theirs and _is_tower(ours, side):
      size = _SIZE if "variant" in ours[side] else ()
      kept = {k: v for k, v in theirs[side].items() if k not in size}
      model[side] = {**kept, **ours[side]}
  return model


def _pretrained_parts(given: Mapping[str, Any]) -> list[Pretrained]:
  """The checkpoints that config.model names.

  That of the whole model gives what is left by a tower with a checkpoint of its own.

  Raises:
    ValueError: if it names one for the whole model and others for both towers.
  """
  towers = {side: given[side] for side in SIDES if _is_tower(given, side)}
  alone = [side for side, tower in towers.items() if "init" in tower]
  own = [_pretrained(towers[side], side, towers) for side in alone]
  if "init" not in given:
    return own
  if len(alone) == len(SIDES):
    raise ValueError(
      "config.model.init gives nothing, since both towers have an init of their own; leave it out"
    )
  return [_pretrained(given, "", towers, but=tuple(alone)), *own]


def _pretrained(
  given: Mapping[str, Any],
  side: str,
  towers: Mapping[str, Any],
  but: tuple[str, ...] = (),
  root: str = "config.model",
) -> Pretrained:
  """The checkpoint that `init` of the model or of a tower names; root: of the model's options.

  Raises:
    FileNotFoundError: if it does not exist.
    ValueError: if it lacks a tower.
  """
  where = root + f".{side}" * bool(side)
  address = _expanded(given["init"], f"{where}.init")
  path = pathlib.Path(address).expanduser()
  if "://" not in address and not path.exists():
    raise FileNotFoundError(f"{where}.init={given['init']!r}: no such file or folder: {path}")
  sides = (side,) if side else tuple(x for x in SIDES if x not in but)
  parts = given.get("parts", "")
  if runs.is_run(address):
    which = {x: given[x] for x in ("step", "ema") if x in given}
    checkpoint = runs.describe(address, parts=parts, **which)
  else:
    for word in ("step", "ema"):
      if given.get(word):
        raise ValueError(f"{where}.{word}={given[word]!r}: {path} is not a run of bigalign")
    checkpoint = describe(path, **{x: _own_options(towers[x]) for x in sides if x in towers})
  lacking = [x for x in sides if x not in checkpoint.model]
  if lacking:
    raise ValueError(
      f"{where}.init: {path} holds no {lacking[0]} tower"
      + ("" if side else "; set it as init of the tower it holds, and give the other tower too")
    )
  fresh, drop = given.get("fresh", ""), given.get("drop", "")
  return Pretrained(where, side, given["init"], checkpoint, parts, fresh, drop, but)


def _expanded(text: Any, what: str) -> str:
  """A text of the config with its environment variables expanded."""
  if not isinstance(text, str):
    raise TypeError(f"{what}={text!r} is of type {type(text).__name__}; it must be str")
  return expand_variables(text, what=what)


def _plan(part: Pretrained, shapes: Mapping[str, Any]) -> transfer.Plan:
  """Which parameters of the model come from which tensors."""
  prefix = f"model/{part.side}_tower/" if part.side else "model/"
  others = tuple(f"model/{side}_" for side in part.but)
  ours = {k: x for k, x in shapes.items() if k.startswith(prefix) and not k.startswith(others)}
  fresh, _ = tree.partition(ours, part.fresh, f"{part.where}.fresh")
  if part.parts:
    fresh |= tree.partition(ours, part.parts, f"{part.where}.parts")[1]
  exactly = "|".join(f"^{re.escape(path)}$" for path in tree.subtree(fresh, "model/"))
  return transfer.plan(
    part.checkpoint.tensors,
    part.checkpoint.layout,
    tree.subtree(ours, "model/"),
    fresh=exactly,
    drop=part.drop,
  )


def _layers(
  checkpoint: Checkpoint,
  shapes: Mapping[str, Any],
  shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
  """The layers of the heads that the checkpoint of another project and the run have both."""
  rows = checkpoint.layout.rows
  paths = [path for row in rows for path in ([row.ours] if isinstance(row.ours, str) else row.ours)]
  heads = {"/".join(path.split("/")[:2]) for path in paths if path.startswith("heads/")}
  own = {k: x for k, x in shapes.items() if "/".join(k.split("/")[:2]) in heads}
  return checkpoint.load(own, shardings={k: shardings[k] for k in own}) if own else {}


def _scalars(
  checkpoint: Checkpoint,
  loss: Mapping[str, Any],
  shapes: Mapping[str, Any],
  shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
  """The logit scale and bias for each loss that learns them and gives no initial value."""
  known = {row.ours for row in checkpoint.layout.rows}
  scalars = {}
  for path in shapes:
    scalar = _SCALAR.fullmatch(path)
    if scalar and scalar[2] in known and f"{scalar[2]}_init" not in loss[scalar[1]]:
      sharding = {scalar[2]: shardings[path]}
      scalars[path] = checkpoint.load({scalar[2]: shapes[path]}, shardings=sharding)[scalar[2]]
  return scalars


def _run_scalars(
  checkpoint: Checkpoint,
  loss: Mapping[str, Any],
  shapes: Mapping[str, Any],
  shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
  """The scalars of losses that the run has too, see runs.scalars, and the layers of its heads."""
  ours = [path for path in shapes if path.startswith("loss/")]
  taken = runs.scalars(checkpoint, loss, ours)
  taken |= {x: x for x in shapes if x.startswith("heads/") and x in checkpoint.tensors}
  return {
    path: jax.device_put(checkpoint.tensors.read(theirs), shardings[path])
    for path, theirs in taken.items()
    if checkpoint.tensors[theirs].shape == shapes[path].shape
  }


def _log(part: Pretrained, plan: transfer.Plan) -> None:
  """Logs which tensors were loaded, ignored and resized."""
  loaded = plan.keys
  ignored = sorted(plan.tensors.keys() - {*loaded})
  if part.is_run:  # those of losses are read apart
    ignored = [key for key in ignored if key.startswith("model/")]
  logging.info(
    "%s.init: loaded %d of %d tensors from %s (%s) into %d arrays%s",
    part.where,
    len(loaded),
    len(plan.tensors),
    plan.tensors.path,
    _kind(part.checkpoint),
    len(plan.shapes),
    f"; ignored: {tree.shown(ignored, sep=', ', width=200)}" if ignored else "",
  )
  for path, (theirs, ours, method) in plan.resized.items():
    logging.info("model/%s: resized from %d to %d positions (%s)", path, theirs, ours, method)


def _kind(checkpoint: Checkpoint) -> str:
  """The kind of a checkpoint; of a run, which one of its checkpoints."""
  if checkpoint.kind != runs.KIND:
    return checkpoint.kind
  about = checkpoint.layout.data
  return f"run at step {about['step']}{', averages' if about['ema'] else ''}"


def _not_loaded(shapes: Mapping[str, Any], loaded: Mapping[str, Any]) -> list[str]:
  """The parameters that are not loaded; a part of the model with none loaded as a whole."""

  def part(path: str) -> str:
    return "/".join(path.split("/")[:2])

  parts = {part(path) for path in loaded}
  missing = (path for path in shapes if path not in loaded)
  return list(dict.fromkeys(path if part(path) in parts else part(path) for path in missing))
