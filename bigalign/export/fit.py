"""Fits a trained model to a family of another library: compares options, completes arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree, weights
from bigalign.export.base import (
  Arrays,
  Contents,
  Reasons,
  TrainedModel,
  projector_name,
  requirement,
  tower_name,
)
from bigalign.model import DualEncoder, make_model
from bigalign.towers import TOWERS
from bigalign.towers.base import TransformerOptions
from bigalign.towers.vit import VitOptions
from bigalign.weights import transfer
from bigalign.weights.layout import Layout

# Options that do not change the outputs after training, or that follow from the arrays.
_IGNORED = {
  "parent",
  "name",
  "variant",
  "mlp_ratio",
  "dropout",
  "patch_dropout",
  "scan",
  "remat",
  "dtype",
  "attention",
  "patch_bias",
  "class_position",
  "layer_scale",
  "dim",
}


class Family(NamedTuple):
  """A class of models of another library that holds two towers.

  Args:
    name: its name, for people.
    kind: its name in weights.LAYOUTS.
    towers: names of the image tower and the text tower that it can hold.
    config: returns its config for a trained model.
    keys: {key: shape} of the tensors by which the reader identifies a variant.
    masks: whether the files of the tokenizer can ask for a mask that hides padding.
    heads: names of the losses whose heads it holds.
  """

  name: str
  kind: str
  towers: tuple[str, str]
  config: Callable[[TrainedModel], dict[str, Any]]
  keys: Callable[[TrainedModel], Mapping[str, Any]] = lambda trained: {}
  masks: bool = False
  heads: tuple[str, ...] = ()


class Fitted(NamedTuple):
  """A trained model as a model of a family.

  Args:
    family: the family.
    config: its config.
    layout: its layout, from the config.
    arrays: our parameters, completed.
  """

  family: Family
  config: dict[str, Any]
  layout: Layout
  arrays: Arrays

  def tensors(self) -> Arrays:
    """{key: tensor} of the checkpoint."""
    return dict(transfer.write(self.layout, self.arrays))


def first_fit(
  families: Sequence[Family],
  weights_file: str,
  files: Callable[[Fitted, TrainedModel], dict[str, Any]],
  trained: TrainedModel,
) -> Contents | Reasons:
  """The contents for the first family that can hold the model, or why none can.

  Args:
    families: the families of a format, in order of preference.
    weights_file: name of the file of weights.
    files: returns {name: content} of the other files; a ValueError is a reason against the family.
    trained: the model.
  """
  reasons: Reasons = {}
  for family in families:
    fitted = fit(family, trained)
    if isinstance(fitted, list):
      reasons[family.name] = fitted
      continue
    try:
      tensors = {weights_file: fitted.tensors}
      return Contents(family.name, tensors, files(fitted, trained), family.heads)
    except ValueError as error:
      reasons[family.name] = [str(error)]
  return reasons


def fit(family: Family, trained: TrainedModel) -> Fitted | list[str]:
  """The model as one of a family, or the reasons against it, each with the key of the config."""
  model = trained.model
  other_towers = [
    requirement(f"config.model.{side}.name", tower_name(options), name)
    for side, options, name in zip(("image", "text"), (trained.image, trained.text), family.towers)
    if type(options) is not TOWERS[name]
  ]
  if other_towers:
    return other_towers
  try:
    config = family.config(trained)
    layout = weights.LAYOUTS[family.kind](family.keys(trained), family.name, "", **config)
    theirs = _their_model(layout, trained)
  except ValueError as error:  # the reader of their config refuses it
    return [str(error)]
  wrong = [
    requirement(f"config.model.{side}{part}.{name}", a, b)
    for side in ("image", "text")
    for part in ("", "_projector")
    for name, (a, b) in differences(
      getattr(model, f"{side}{part or '_tower'}"),
      getattr(theirs, f"{side}{part or '_tower'}"),
      trained,
      family.masks,
    ).items()
  ]
  if "b" in trained.arrays and not any(row.ours == "b" for row in layout.rows):
    wrong.append("config.loss: the format has no place for its logit bias")
  if wrong:
    return wrong
  arrays = _completed(trained, theirs, layout)
  if isinstance(arrays, list):
    return arrays
  inside = {k: x for k, x in trained.heads.items() if k.split("/")[1] in family.heads}
  return Fitted(family, config, layout, arrays | inside)


def _their_model(layout: Layout, trained: TrainedModel) -> DualEncoder:
  """The model of a layout, in float32, with stacked layers where ours are stacked."""
  values = {k: v for k, v in layout.model.items() if k != "pixels"}
  for side, options in (("image", trained.image), ("text", trained.text)):
    values[side] = {**values[side], "scan": options.scan, "dtype": "float32"}
  return make_model(**values)


def _effective(module: Any) -> dict[str, Any]:
  """{option: value} of the options that determine the outputs of a tower or projector."""
  options = getattr(module, "options", module)
  effective = {x.name: getattr(options, x.name) for x in dataclasses.fields(options)}
  if isinstance(options, TransformerOptions):
    effective |= options.sizes._asdict()
  if isinstance(options, VitOptions):
    effective["class_token"] = options.has_class_token
  if effective.get("pool") == "queries":
    effective["query_width"] = options.token_width
  if effective.get("positions") != "rope":
    effective.pop("rope_theta", None)
  name = projector_name(module) if options is module else tower_name(options)
  return {"name": name} | {k: v for k, v in effective.items() if k not in _IGNORED}


def differences(
  ours: Any, theirs: Any, trained: TrainedModel, masks: bool = False
) -> dict[str, tuple[Any, Any]]:
  """Compares the options of two towers or projectors.

  Args:
    ours: our tower or projector.
    theirs: the one that the other library's config describes.
    trained: the model, whose tokenizer decides which token is the last.
    masks: whether the files of the tokenizer can ask for a mask.

  Returns:
    {option: (our value, their value)} where the outputs would differ.
  """
  a, b = _effective(ours), _effective(theirs)
  if a["name"] != b["name"]:
    return {"name": (a["name"], b["name"])}
  if "pool" in a and "causal" in a:
    if trained.reads_end(ours.options) and trained.reads_end(theirs.options):
      a |= {"pool": "end", "eos": None}
      b |= {"pool": "end", "eos": None}
      if a["causal"]:  # the last token does not see the padding after it
        a["mask_padding"] = b["mask_padding"]
    if masks:
      a["mask_padding"] = b["mask_padding"]
  if a.get("skip_padding") is False:  # the mask of training, not `pad`, determines the padding
    a["pad"] = b["pad"]
  unequal = {k: (a.get(k), b.get(k)) for k in (*a, *(b.keys() - a)) if a.get(k) != b.get(k)}
  # A bias that only they have is zero.
  harmless = {"biases": lambda x, y: set(x) <= set(y), "bias": lambda x, y: y}
  harmless["mlp_bias"] = harmless["bias"]
  return {k: (x, y) for k, (x, y) in unequal.items() if not (k in harmless and harmless[k](x, y))}


def _completed(trained: TrainedModel, theirs: DualEncoder, layout: Layout) -> Arrays | list[str]:
  """Our arrays and those that only they have, neutral: zeros for sums, ones for products."""
  size = trained.data.image_size
  one = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  ids = jax.ShapeDtypeStruct((1, trained.tokenizer.length), jnp.int32)
  params = jax.eval_shape(theirs.init, jax.random.key(0), one, ids)["params"]
  shapes = tree.flatten(params) | {
    str(row.ours): jax.ShapeDtypeStruct((), jnp.float32)
    for row in layout.rows
    if row.ours in ("t", "b")
  }
  arrays = dict(trained.arrays)
  if "image_tower/embedding/bias" in arrays.keys() - shapes.keys():
    shift = arrays.pop("image_tower/embedding/bias")
    arrays["image_tower/positions"] = arrays["image_tower/positions"] + shift
  for path in shapes.keys() - arrays.keys():
    if path.endswith(("/scale1", "/scale2")):
      arrays[path] = np.ones(shapes[path].shape, np.float32)
    elif path.endswith(("/bias", "/class_position")) or path == "b":
      arrays[path] = np.zeros(shapes[path].shape, np.float32)
  wrong = [
    f"{path}: the format has no place for this parameter" for path in arrays.keys() - shapes.keys()
  ]
  wrong += [
    f"{path}: the format needs {list(x.shape)}"
    f" (yours: {list(arrays[path].shape) if path in arrays else 'missing'})"
    for path, x in shapes.items()
    if path not in arrays or arrays[path].shape != tuple(x.shape)
  ]
  return sorted(wrong) or arrays
