"""Whether a model of ours is one of a family of theirs: options compared, arrays fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree, weights
from bigalign.data.loader.options import DataOptions
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.model import DualEncoder, make_model
from bigalign.options import call
from bigalign.towers.base import TransformerOptions
from bigalign.towers.bert import BertOptions
from bigalign.towers.features import Features
from bigalign.towers.vit import VitOptions
from bigalign.weights import transfer
from bigalign.weights.layout import ACTIVATIONS, Layout

Arrays = dict[str, np.ndarray]

# Names of ours in Hugging Face's configs.
HF_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
# What changes no value after training, or is told by which arrays there are.
_SILENT = {
  "parent",
  "name",
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


class Subject(NamedTuple):
  """What is exported.

  model: as trained. arrays: its parameters by path, "image_tower/…", and the scalars "t" (log of
  the logit scale) and "b" (logit bias) if the loss has one. data: as config.data.
  """

  model: DualEncoder
  arrays: Arrays
  data: DataOptions
  tokenizer: Tokenizer

  @property
  def vectors(self) -> tuple[int, ...] | None:
    """Shape of a text, where texts are vectors of a store: (D,), or (1 + T, D)."""
    tower = self.model.text_tower
    return tower.options.row_shape if isinstance(tower, Features) else None

  @property
  def end(self) -> int:
    """The id with which the tokenizer ends every text."""
    ids, mask = self.tokenizer.encode_batch([""])
    return int(ids[mask][-1])


class Family(NamedTuple):
  """A kind of checkpoint that holds two towers.

  kind: its name in weights.LAYOUTS. towers: the classes of ours that it can hold. config: theirs,
  of a subject. keys: {key: shape} of what tells variants of the kind apart when it is read.
  masks: padding is hidden from attention where the tokenizer's files say so.
  """

  name: str
  kind: str
  towers: tuple[type, type]
  config: Callable[[Subject], dict[str, Any]]
  keys: Callable[[Subject], Mapping[str, Any]] = lambda subject: {}
  masks: bool = False


class Fitted(NamedTuple):
  """A subject in the words of a family."""

  family: Family
  config: dict[str, Any]
  layout: Layout
  arrays: Arrays

  def tensors(self) -> Arrays:
    """Theirs."""
    return dict(transfer.write(self.layout, self.arrays))


def pads_unseen(subject: Subject) -> bool:
  """No token that is read sees the padding behind the end of a text."""
  text = subject.model.text_tower.options
  return getattr(text, "causal", False) and _reads_end(text, subject)


def hides_padding(subject: Subject) -> bool:
  """The text tower's attention leaves padding out; BERT's always does."""
  text = subject.model.text_tower.options
  return isinstance(text, BertOptions) or bool(text.mask_padding)


def fit(family: Family, subject: Subject) -> Fitted | list[str]:
  """The subject as one of the family, or the reasons why it is none, each with its config key."""
  model = subject.model
  sides = ("image", "text")
  strange = [
    f"config.model.{side}.name: no {type(getattr(model, f'{side}_tower')).__name__} in it"
    for side, kind in zip(sides, family.towers)
    if type(getattr(model, f"{side}_tower")) is not kind
  ]
  if strange:
    return strange
  try:
    config = family.config(subject)
    layout = weights.LAYOUTS[family.kind](family.keys(subject), family.name, "", **config)
    theirs = _model(layout, model)
  except ValueError as error:  # what the reader of their config would say
    return [str(error)]
  wrong = [
    f"config.model.{side}{part}.{name}={a!r}, there {b!r}"
    for side in sides
    for part in ("", "_projector")
    for name, (a, b) in differences(
      getattr(model, f"{side}{part or '_tower'}"),
      getattr(theirs, f"{side}{part or '_tower'}"),
      subject,
      family.masks,
    ).items()
  ]
  if "b" in subject.arrays and not any(row.ours == "b" for row in layout.rows):
    wrong.append("config.loss: its logit bias has no place there")
  if wrong:
    return wrong
  fitted = _fitted(subject, theirs, layout)
  return fitted if isinstance(fitted, list) else Fitted(family, config, layout, fitted)


def _model(layout: Layout, ours: DualEncoder) -> DualEncoder:
  """Their model in our words, its layers stacked where ours are."""
  options: dict[str, Any] = {k: v for k, v in layout.model.items() if k != "pixels"}
  for side in ("image", "text"):
    scan = getattr(ours, f"{side}_tower").options.scan
    options[side] = {**options[side], "scan": scan, "dtype": "float32"}
  return call(make_model, options, "config.model")


def _options(module: Any) -> dict[str, Any]:
  """{option: value} of those that decide the values that a tower or projector computes."""
  options = getattr(module, "options", module)
  found = {x.name: getattr(options, x.name) for x in dataclasses.fields(options)}
  if isinstance(options, TransformerOptions):
    found = {k: v for k, v in found.items() if k not in ("variant", "mlp_ratio")}
    found |= options.sizes._asdict()
  if isinstance(options, VitOptions):
    found["class_token"] = options.has_class_token
  if found.get("positions") != "rope":
    found.pop("rope_theta", None)
  return {"name": type(module).__name__.lower()} | {
    k: v for k, v in found.items() if k not in _SILENT
  }


def differences(
  ours: Any, theirs: Any, subject: Subject, masks: bool = False
) -> dict[str, tuple[Any, Any]]:
  """{option: (ours, theirs)} where a module of theirs computes something else; masks: as Family."""
  a, b = _options(ours), _options(theirs)
  if a["name"] != b["name"]:
    return {"name": (a["name"], b["name"])}
  if "pool" in a and "causal" in a:
    if _reads_end(ours.options, subject) and _reads_end(theirs.options, subject):
      a |= {"pool": "end", "eos": None}
      b |= {"pool": "end", "eos": None}
      if a["causal"]:  # what comes behind the end is not seen anyway
        a["mask_padding"] = b["mask_padding"]
    if masks:
      a["mask_padding"] = b["mask_padding"]
  if a.get("skip_padding") is False:  # training gives the mask, which says what is padding
    a["pad"] = b["pad"]
  found = {k: (a.get(k), b.get(k)) for k in (*a, *(b.keys() - a)) if a.get(k) != b.get(k)}
  # A bias that we lack is zeros there.
  zeros = {"biases": lambda x, y: set(x) <= set(y), "bias": lambda x, y: y}
  zeros["mlp_bias"] = zeros["bias"]
  return {k: (x, y) for k, (x, y) in found.items() if not (k in zeros and zeros[k](x, y))}


def _reads_end(text: Any, subject: Subject) -> bool:
  """The text tower reads the token that ends every text."""
  if text.pool == "argmax":
    return subject.end == subject.tokenizer.vocab_size - 1
  return text.pool == "eos" and text.eos in (None, subject.end)


def _fitted(subject: Subject, theirs: DualEncoder, layout: Layout) -> Arrays | list[str]:
  """Our arrays with those that only they have: zeros for sums, ones for products."""
  size = subject.data.image_size
  one = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  ids = jax.ShapeDtypeStruct((1, subject.tokenizer.length), jnp.int32)
  made = jax.eval_shape(theirs.init, jax.random.key(0), one, ids)["params"]
  shapes = tree.flatten(made) | {
    str(row.ours): jax.ShapeDtypeStruct((), jnp.float32)
    for row in layout.rows
    if row.ours in ("t", "b")
  }
  arrays = dict(subject.arrays)
  if "image_tower/embedding/bias" in arrays.keys() - shapes.keys():
    shift = arrays.pop("image_tower/embedding/bias")
    arrays["image_tower/positions"] = arrays["image_tower/positions"] + shift
  for path in shapes.keys() - arrays.keys():
    if path.endswith(("/scale1", "/scale2")):
      arrays[path] = np.ones(shapes[path].shape, np.float32)
    elif path.endswith(("/bias", "/class_position")) or path == "b":
      arrays[path] = np.zeros(shapes[path].shape, np.float32)
  wrong = [f"{path}: a parameter without a place there" for path in arrays.keys() - shapes.keys()]
  wrong += [
    f"{path}: {list(arrays[path].shape) if path in arrays else 'nothing'} here,"
    f" {list(x.shape)} there"
    for path, x in shapes.items()
    if path not in arrays or arrays[path].shape != tuple(x.shape)
  ]
  return sorted(wrong) or arrays
