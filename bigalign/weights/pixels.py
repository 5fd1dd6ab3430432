"""The pixel statistics of a checkpoint, by our names."""

from __future__ import annotations

import pathlib
from typing import Any

from bigalign.model import PIXELS
from bigalign.weights.files import read_json


def stated(folder: pathlib.Path, kind: str) -> str | None:
  """The name in PIXELS of the statistics in the files next to the weights; None without such.

  Models of a family can differ in their statistics: DINO is a Hugging Face ViT with ImageNet's.

  Args:
    folder: of the weights.
    kind: the checkpoint's name in LAYOUTS.

  Raises:
    ValueError: for statistics without a name in PIXELS.
  """
  if kind == "open_clip":
    file, names = folder / "open_clip_config.json", ("mean", "std")
    config: Any = read_json(file).get("preprocess_cfg")
  else:
    file, names = folder / "preprocessor_config.json", ("image_mean", "image_std")
    config = read_json(file) if file.is_file() else None
  if not isinstance(config, dict) or not set(names) <= config.keys():
    return None
  theirs = tuple(_three(config[name]) for name in names)
  for name, statistics in PIXELS.items():
    if theirs == tuple(_three(x) for x in statistics):
      return name
  raise ValueError(
    f"{file}: {names[0]}, {names[1]}: {[str(config[name])[:80] for name in names]}; known: {PIXELS}"
  )


def _three(values: Any) -> tuple[float, ...]:
  """The values of three channels to four digits, because some files round them."""
  numbers = isinstance(values, list | tuple) and all(type(x) in (int, float) for x in values)
  return tuple(round(x, 4) for x in values) if numbers else ()
