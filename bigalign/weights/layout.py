"""What a checkpoint is, in our words: the model's options and the table of its names."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from bigalign import checks, options
from bigalign.weights.table import Row

# Names of activations in Hugging Face's configs.
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "silu": "silu",
}
_LARGEST = 2**24  # of any size in a config
_MAY_BE_ZERO = re.compile(r"token_id$|eos_id$|_tokens$|type_vocab_size$")


@dataclasses.dataclass(frozen=True)
class Layout:
  """A checkpoint in our words.

  model: as config.model: "image", "text", "embed_dim" … as far as the checkpoint has them.
  rows: the table, with our paths "image_tower/…", "text_tower/…", "image_projector/…",
    "text_projector/…", "t" (log of the logit scale), "b" (logit bias).
  unused: regular expression of keys that hold nothing we need.
  zeros: {key: shape} of tensors that no forward pass uses; written as zeros.
  data: what inputs were made for: image_size, length.
  """

  model: Mapping[str, Any]
  rows: tuple[Row, ...]
  unused: str = ""
  zeros: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Shapes = Mapping[str, Any]  # {key: something with a shape}: what a file holds


def join(*layouts: Layout, **model: Any) -> Layout:
  """One checkpoint of several parts, and what only the whole knows of the model."""
  return Layout(
    model={k: v for x in layouts for k, v in x.model.items()} | model,
    rows=tuple(row for x in layouts for row in x.rows),
    unused="|".join(x.unused for x in layouts if x.unused),
    zeros={k: v for x in layouts for k, v in x.zeros.items()},
    data={k: v for x in layouts for k, v in x.data.items()},
  )


def call(function: Callable[..., Any], given: Any, where: str, *fixed: Any) -> Any:
  """function(*fixed, **given): a config of another project, whose signature is the schema.

  Raises:
    ValueError: for a value that cannot be, with the config's file and key.
  """
  if not isinstance(given, Mapping):
    raise ValueError(f"{where}: must be an object, not {str(given)[:80]!r}")
  make = functools.partial(function, *fixed)
  known = inspect.signature(make).parameters
  for key, value in given.items():
    least = 0 if _MAY_BE_ZERO.search(key) else 1
    if key in known and type(value) is int and not least <= value <= _LARGEST:
      raise ValueError(f"{where}: {key}: {value}; it must be from {least} to {_LARGEST}")
    if key in known and isinstance(value, float) and not 0 <= value <= _LARGEST:
      raise ValueError(f"{where}: {key}: {value}; it must be from 0 to {_LARGEST}")
  try:
    return options.call(make, given, where)
  except (TypeError, ValueError) as error:
    text = str(error)
    raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error


def option(given: Any, name: str, key: str, default: Any) -> Any:
  """given[key], where `given` is the object `name` of a config, or None."""
  if given is None:
    return default
  if not isinstance(given, Mapping):
    raise ValueError(f"{name}: must be an object, not {str(given)[:80]!r}")
  return given.get(key, default)


def activation(name: str) -> str:
  """Our name of an activation in a Hugging Face config."""
  return checks.choose(ACTIVATIONS, name, "hidden_act")


def sizes(width: int, depth: int, heads: int, hidden: int) -> dict[str, Any]:
  """A transformer's size, as the towers take it."""
  for name, value in (("width", width), ("layers", depth), ("heads", heads), ("hidden", hidden)):
    if value < 1:
      raise ValueError(f"{name}: {value}")
  if width % heads:
    raise ValueError(f"num_attention_heads: a width of {width} is no multiple of {heads}")
  return dict(width=width, depth=depth, heads=heads, mlp_ratio=hidden / width)
