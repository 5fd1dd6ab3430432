"""The pixel statistics of a checkpoint, by our names."""

from __future__ import annotations

from typing import Any

from bigalign.model import PIXELS
from bigalign.weights.views import Preprocessing


def stated(given: Preprocessing | None) -> str | None:
  """The name in PIXELS of the statistics in the files next to the weights; None without such.

  Models of a family can differ in their statistics: DINO is a Hugging Face ViT with ImageNet's.

  Raises:
    ValueError: for statistics without a name in PIXELS.
  """
  if given is None:
    return None
  where, kind, config, _ = given
  names = ("mean", "std") if kind == "open_clip" else ("image_mean", "image_std")
  if not set(names) <= config.keys():
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
