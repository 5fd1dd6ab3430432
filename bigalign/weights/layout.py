"""The layout of a checkpoint: our model's options and the table of its keys."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from bigalign import checks, options, tree
from bigalign.weights import config_keys
from bigalign.weights.table import Row

# {name in Hugging Face's configs: ours}
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "silu": "silu",
}
_LARGEST = 2**24  # the largest size that a config may give
_MAY_BE_ZERO = re.compile(r"token_id$|eos_id$|_tokens$|type_vocab_size$")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the parameters of a checkpoint map to ours.

  Args:
    model: options as in config.model, "image", "text", "embed_dim" …, as far as the checkpoint has
      them.
    rows: the table, with our paths "image_tower/…", "text_tower/…", "image_projector/…",
      "text_projector/…", "t" (log of the logit scale) and "b" (logit bias).
    unused: regular expression of the keys that we do not need.
    zeros: {key: shape} of tensors that no forward pass uses; they are written as zeros.
    data: the inputs that the checkpoint was trained with: image_size, length.
  """

  model: Mapping[str, Any]
  rows: tuple[Row, ...]
  unused: str = ""
  zeros: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Shapes = Mapping[str, Any]  # {key of a file: object with a shape}


def join(*layouts: Layout, **model: Any) -> Layout:
  """The layout of a checkpoint from the layouts of its parts; `model` adds or replaces options."""
  return Layout(
    model={k: v for x in layouts for k, v in x.model.items()} | model,
    rows=tuple(row for x in layouts for row in x.rows),
    unused="|".join(x.unused for x in layouts if x.unused),
    zeros={k: v for x in layouts for k, v in x.zeros.items()},
    data={k: v for x in layouts for k, v in x.data.items()},
  )


def call(function: Callable[..., Layout], given: Any, where: str, *fixed: Any) -> Layout:
  """function(*fixed, **given), where `given` is a config of another project.

  The keyword parameters of the function, their types and defaults are the schema of the config.

  Args:
    function: returns the layout.
    given: the config, a JSON object.
    where: its file and place, for errors.
    *fixed: the first arguments of the function, which are not in the config.

  Raises:
    ValueError: for an impossible value, with the config's file and key.
  """
  if not isinstance(given, Mapping):
    raise ValueError(f"{where}: must be an object, not {str(given)[:80]!r}")
  parameters = tuple(inspect.signature(function).parameters)
  known = parameters[len(fixed) :]
  if "config" not in known:  # a function with **config passes it on to another call
    config_keys.check(given, known, where)
  for key, value in given.items():
    least = 0 if _MAY_BE_ZERO.search(key) else 1
    if key in known and type(value) is int and not least <= value <= _LARGEST:
      raise ValueError(f"{where}: {key}: {value}; it must be from {least} to {_LARGEST}")
    if key in known and isinstance(value, float) and not 0 <= value <= _LARGEST:
      raise ValueError(f"{where}: {key}: {value}; it must be from 0 to {_LARGEST}")
  try:
    layout: Layout = options.resolve(function, given, where, parameters[: len(fixed)]).make(*fixed)
    return layout
  except (TypeError, ValueError) as error:
    text = str(error)
    raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error


def option(given: Any, name: str, key: str, default: Any) -> Any:
  """given[key] or the default, where `given` is the object `name` of a config, or None.

  Raises:
    ValueError: if it is not an object, or has other keys.
  """
  if given is None:
    return default
  if not isinstance(given, Mapping):
    raise ValueError(f"{name}: must be an object, not {str(given)[:80]!r}")
  others = [x for x in given if x != key]
  if others:
    raise ValueError(f"{name}: {tree.shown(map(str, others))} are not supported; known: {key!r}")
  return given.get(key, default)


def activation(name: str) -> str:
  """Our name of an activation in a Hugging Face config."""
  return str(checks.choose(ACTIVATIONS, name, "hidden_act"))


def sizes(width: int, depth: int, heads: int, hidden: int) -> dict[str, Any]:
  """The options of a tower for its sizes; `hidden` is the number of hidden units of the MLP.

  Raises:
    ValueError: for sizes that no transformer can have.
  """
  for name, value in (("width", width), ("layers", depth), ("heads", heads), ("hidden", hidden)):
    if value < 1:
      raise ValueError(f"{name}: {value}")
  if width % heads:
    raise ValueError(f"num_attention_heads: the width {width} is not a multiple of {heads}")
  return dict(width=width, depth=depth, heads=heads, mlp_ratio=hidden / width)
