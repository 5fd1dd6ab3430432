"""The pixel statistics of a checkpoint, by our names."""

from __future__ import annotations

import pathlib
from typing import Any

from bigalign.model import PIXELS
from bigalign.weights.files import read_json
from bigalign.weights.views import image_processor


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
    names = ("mean", "std")
    where = str(folder / "open_clip_config.json")
    config: Any = read_json(pathlib.Path(where)).get("preprocess_cfg")
  else:
    names = ("image_mean", "image_std")
    where, config = image_processor(folder)
  if not isinstance(config, dict) or not set(names) <= config.keys():
    return None
  theirs = tuple(_three(config[name]) for name in names)
  for name, statistics in PIXELS.items():
    if theirs == tuple(_three(x) for x in statistics):
      return name
  raise ValueError(
    f"{where}: {names[0]}, {names[1]}: {[str(config[name])[:80] for name in names]}; known:"
    f" {PIXELS}"
  )


def _three(values: Any) -> tuple[float, ...]:
  """The values of three channels to four digits, because some files round them."""
  numbers = isinstance(values, list | tuple) and all(type(x) in (int, float) for x in values)
  return tuple(round(x, 4) for x in values) if numbers else ()
