"""Layouts of Hugging Face's VisionTextDualEncoderModel and of sentence-transformers folders."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bigalign import tree
from bigalign.data.text import stated
from bigalign.weights import table
from bigalign.weights.clip import projections
from bigalign.weights.files import Tensors, is_name, open_tensors, read_json
from bigalign.weights.layout import Layout, Shapes, call, join

_ENCODERS = ("Transformer", "CLIPModel")  # modules that hold a folder of transformers
# Keys of a Dense module, and of a Pooling module besides pooling_mode….
_DENSE = (
  *("in_features", "out_features", "bias", "activation_function"),
  *("module_input_name", "module_output_name"),
)
_SENTENCE = "sentence_embedding"  # the output of Pooling
_WIDEST = 2**24
_POOLING = ("word_embedding_dimension", "embedding_dimension", "include_prompt")


def vision_text(
  layouts: Mapping[str, Callable[..., Layout]],
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  vision_config: Any = None,
  text_config: Any = None,
  projection_dim: int = 512,
  **_: Any,
) -> Layout:
  """The layout of VisionTextDualEncoderModel: any two towers, each with a linear projection.

  Args:
    layouts: {model_type: layout} of the towers.
    shapes: what the file holds.
    where: the config's file, for errors.
    prefix: unused.
    vision_config: config of the image tower.
    text_config: config of the text tower.
    projection_dim: width of the shared space.

  Raises:
    ValueError: for an unknown tower, or one of the other side.
  """
  parts = []
  for name, config in (("vision", vision_config), ("text", text_config)):
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind not in layouts:
      raise ValueError(f"{name}_config: model_type: unknown {kind!r}; known: {sorted(layouts)}")
    part = call(layouts[kind], config, f"{where}: {name}_config", shapes, where, f"{name}_model.")
    if ("image" if name == "vision" else "text") not in part.model:
      raise ValueError(f"{name}_config: model_type: {kind!r} is not a {name} tower")
    parts.append(part)
  return join(
    *parts,
    Layout({}, projections()),
    embed_dim=projection_dim,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
  )


def sentence(folder: pathlib.Path, tensors: Tensors, layout: Layout) -> tuple[Tensors, Layout]:
  """A text encoder with the modules of a sentence-transformers folder: pooling, norm, projector.

  Args:
    folder: of the modules.
    tensors: of the encoder.
    layout: of the encoder.

  Returns:
    The tensors and the layout, with those of Dense modules, which are a projector, and the length
    of texts.

  Raises:
    ValueError: for a module or a setting that our towers and projectors do not have.
  """
  options = dict(layout.model["text"])
  dense: list[pathlib.Path] = []
  for number, kind, path in _modules(folder):
    if kind == "Pooling" and not dense:
      prompted = "prompt" in stated.near(folder / transformer(folder))
      options["pool"] = _pooling(folder / path / "config.json", prompted=prompted)
    elif kind == "Normalize":
      if not dense:  # after a projector, the model itself makes embeddings of unit norm
        options["unit"] = True
    elif kind == "Dense" and "image" not in layout.model:
      dense.append(folder / path)
    elif kind not in _ENCODERS or dense:
      raise ValueError(
        f"{folder / 'modules.json'}: module {number} is {kind!r}; known: CLIPModel, or Transformer,"
        " Pooling, Normalize and Dense, in this order"
      )
  if dense:
    tensors, projector = _projector(dense, tensors)
    layout = join(layout, projector)
  data = {}
  file = folder / transformer(folder) / "sentence_bert_config.json"
  if file.is_file():
    length = read_json(file).get("max_seq_length")
    if length is not None and (type(length) is not int or not 1 < length <= options["length"]):
      raise ValueError(
        f"{file}: max_seq_length: {str(length)[:80]}, but the table has {options['length']}"
        " positions"
      )
    data = {"length": length or options["length"]}
  return tensors, join(layout, Layout({"text": options}, (), data=data))


def _projector(modules: Sequence[pathlib.Path], tensors: Tensors) -> tuple[Tensors, Layout]:
  """The tensors with those of the Dense modules, and the layout of these: a projector of texts.

  Raises:
    ValueError: for other layers than those of the projectors "linear" and "mlp".
  """
  layers = [_dense(module / "config.json") for module in modules]
  functions = [layer.function for layer in layers]
  options: dict[str, Any]
  if functions == ["Identity"]:
    names, options = ["out"], dict(name="linear", bias=layers[0].bias)
  elif functions == ["GELU", "Identity"]:
    names, options = ["fc1", "fc2"], dict(name="mlp", hidden=layers[0].width)
    options |= dict(bias=layers[0].bias, out_bias=layers[1].bias)
  else:
    raise ValueError(
      f"{modules[0] / 'config.json'}: activation_function: {tree.shown(functions, sep=', ')};"
      " known: Identity of one Dense module, or GELU and Identity of two"
    )
  rows = []
  for module, name, layer in zip(modules, names, layers):
    found = open_tensors(module)
    prefix = f"{module.name}."
    tensors = tensors.joined({prefix + key: found[key] for key in found})
    rows += table.dense(f"text_projector/{name}", f"{prefix}linear", bias=layer.bias)
  return tensors, Layout({"text_projector": options, "embed_dim": layers[-1].width}, tuple(rows))


def transformer(folder: pathlib.Path) -> str:
  """The subfolder of the encoder: "" in all but the oldest sentence-transformers."""
  return next((path for _, kind, path in _modules(folder) if kind in _ENCODERS), "")


def _modules(folder: pathlib.Path) -> list[tuple[int, str, str]]:
  """(number, kind, subfolder) of each module."""
  file = folder / "modules.json"
  modules = []
  for number, module in enumerate(read_json(file, list)):
    kind, path = (
      (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
    )
    if not isinstance(kind, str) or not isinstance(path, str):
      raise ValueError(f"{file}: module {number}: must have a type and a path")
    if path and not is_name(path):
      shown = tree.cut(repr(path), 300)
      raise ValueError(f"{file}: module {number}: path: {shown} is not a folder next to the file")
    modules.append((number, kind.rsplit(".", 1)[-1], path))
  return modules


def _pooling(file: pathlib.Path, *, prompted: bool) -> str:
  """Our name of the pooling that is on; newer files have a single "pooling_mode".

  Args:
    file: config.json of the module.
    prompted: whether a default prompt precedes each text.

  Raises:
    ValueError: for a pooling that our towers do not have, or an unknown key.
  """
  names = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
  given = read_json(file)
  unknown = [x for x in given if x not in _POOLING and not x.startswith("pooling_mode")]
  if unknown:
    raise ValueError(f"{file}: {tree.shown(unknown)}: unknown keys ({len(unknown)})")
  if prompted and given.get("include_prompt") is False:
    raise ValueError(f"{file}: include_prompt: false; here the prompt's tokens are pooled too")
  chosen = [
    key.removeprefix("pooling_mode_")
    for key, on in given.items()
    if key.startswith("pooling_mode_") and on is True
  ]
  if isinstance(given.get("pooling_mode"), str):
    chosen = [given["pooling_mode"]]
  if len(chosen) != 1 or chosen[0] not in names:
    raise ValueError(f"{file}: pooling_mode: {chosen}; exactly one of {sorted(names)} is needed")
  return names[chosen[0]]


class _Dense(NamedTuple):
  """A Dense module: its width, whether it has a bias, and the class of its activation."""

  width: int
  bias: bool
  function: str


def _dense(file: pathlib.Path) -> _Dense:
  """The settings of a Dense module.

  Args:
    file: config.json of the module.

  Raises:
    ValueError: for an unknown key or an impossible value.
  """
  given = read_json(file)
  unknown = [key for key in given if key not in _DENSE]
  if unknown:
    raise ValueError(f"{file}: {tree.shown(unknown)}: unknown keys ({len(unknown)})")
  width, bias = given.get("out_features"), given.get("bias", True)
  if type(width) is not int or not 1 <= width <= _WIDEST or type(bias) is not bool:
    shown = tree.cut(repr(given), 300)
    raise ValueError(f"{file}: {shown}: out_features must be a number and bias true or false")
  for key in _DENSE[-2:]:
    if given.get(key, _SENTENCE) not in (_SENTENCE, None):
      raise ValueError(f"{file}: {key}: {str(given[key])[:80]!r}; known: {_SENTENCE!r}")
  function = str(given.get("activation_function", "torch.nn.modules.activation.Tanh"))
  return _Dense(width, bias, function[:200].rsplit(".", 1)[-1])
