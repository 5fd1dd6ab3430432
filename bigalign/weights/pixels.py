"""Pixel statistics that a checkpoint says of itself, by our names."""

from __future__ import annotations

import pathlib
from typing import Any

from bigalign.model import PIXELS
from bigalign.weights.files import read_json


def stated(folder: pathlib.Path, kind: str) -> str | None:
  """The name in PIXELS of what the files beside the weights say; None where they say nothing.

  A family's own statistics do not hold for each of its models: DINO is a ViT of Hugging Face with
  ImageNet's.

  Raises:
    ValueError: for statistics that have no name here.
  """
  if kind == "open_clip":
    file, names = folder / "open_clip_config.json", ("mean", "std")
    said: Any = read_json(file).get("preprocess_cfg")
  else:
    file, names = folder / "preprocessor_config.json", ("image_mean", "image_std")
    said = read_json(file) if file.is_file() else None
  if not isinstance(said, dict) or not set(names) <= said.keys():
    return None
  found = tuple(_three(said[name]) for name in names)
  for name, statistics in PIXELS.items():
    if found == tuple(_three(x) for x in statistics):
      return name
  raise ValueError(
    f"{file}: {names[0]}, {names[1]}: {[str(said[name])[:80] for name in names]}; known: {PIXELS}"
  )


def _three(values: Any) -> tuple[float, ...]:
  """To four digits: some files were rounded."""
  numbers = isinstance(values, list | tuple) and all(type(x) in (int, float) for x in values)
  return tuple(round(x, 4) for x in values) if numbers else ()
