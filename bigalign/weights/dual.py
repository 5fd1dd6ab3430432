"""Hugging Face's VisionTextDualEncoderModel, and sentence-transformers folders."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from bigalign.weights.clip import projections
from bigalign.weights.files import read_json
from bigalign.weights.layout import Layout, Shapes, call, join


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
  """VisionTextDualEncoderModel: any two towers by their poolers, and two linear maps."""
  parts = []
  for name, config in (("vision", vision_config), ("text", text_config)):
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind not in layouts:
      raise ValueError(f"{name}_config: model_type: unknown {kind!r}; known: {sorted(layouts)}")
    part = call(layouts[kind], config, f"{where}: {name}_config", shapes, where, f"{name}_model.")
    if ("image" if name == "vision" else "text") not in part.model:
      raise ValueError(f"{name}_config: model_type: {kind!r} is no {name} tower")
    parts.append(part)
  return join(
    *parts,
    Layout({}, projections()),
    embed_dim=projection_dim,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
  )


def sentence(folder: pathlib.Path, layout: Layout) -> Layout:
  """A text encoder with the pooling and the norm that its modules.json asks for."""
  options = dict(layout.model["text"])
  for place, kind, path in _modules(folder):
    if kind == "Pooling":
      options["pool"] = _pooling(folder / path / "config.json")
    elif kind == "Normalize":
      options["unit"] = True
    elif kind != "Transformer":
      raise ValueError(
        f"{folder / 'modules.json'}: module {place} is {kind!r}; known: Transformer, Pooling,"
        " Normalize"
      )
  data = {}
  file = folder / transformer(folder) / "sentence_bert_config.json"
  if file.is_file():
    length = read_json(file).get("max_seq_length")
    if length is not None and (type(length) is not int or not 1 < length <= options["length"]):
      raise ValueError(
        f"{file}: max_seq_length: {str(length)[:80]} for a table of {options['length']} positions"
      )
    data = {"length": length or options["length"]}
  return join(layout, Layout({"text": options}, (), data=data))


def transformer(folder: pathlib.Path) -> str:
  """The folder of the encoder, "" in all but the oldest sentence-transformers."""
  return next((path for _, kind, path in _modules(folder) if kind == "Transformer"), "")


def _modules(folder: pathlib.Path) -> list[tuple[int, str, str]]:
  """(place, kind, folder) of each module."""
  file = folder / "modules.json"
  modules = read_json(file, list)
  found = []
  for place, module in enumerate(modules):
    kind, path = (
      (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
    )
    if not isinstance(kind, str) or not isinstance(path, str):
      raise ValueError(f"{file}: module {place}: must have a type and a path")
    if path and (pathlib.PurePath(path).name != path or path == ".."):
      raise ValueError(f"{file}: module {place}: path: {path!r} is no folder beside the file")
    found.append((place, kind.rsplit(".", 1)[-1], path))
  return found


def _pooling(file: pathlib.Path) -> str:
  """Our name of the one pooling that is on; newer files say "pooling_mode" in one word."""
  names = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
  given = read_json(file)
  chosen = [
    key.removeprefix("pooling_mode_")
    for key, on in given.items()
    if key.startswith("pooling_mode_") and on is True
  ]
  if isinstance(given.get("pooling_mode"), str):
    chosen = [given["pooling_mode"]]
  if len(chosen) != 1 or chosen[0] not in names:
    raise ValueError(f"{file}: pooling_mode: {chosen}; one of {sorted(names)} can be read")
  return names[chosen[0]]
