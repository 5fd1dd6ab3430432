"""Chance levels of metrics: the expected score of a random order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_RETRIEVAL = re.compile(r"(.*)(image_to_text|text_to_image)_R@(\d+)")
_SIZES = ("num_samples", "num_captions")
_TOP = re.compile(r"(.*?-)(?:\d+_shots-)?top(\d+)")
_WINOGROUND = re.compile(r".*-compositional-.*(text|image|group)")
# Two images that each prefer one of two captions; of the 24 orders of four similarities, in 4 both
# images prefer their caption and both captions their image.
_OF_WINOGROUND = dict(text=1 / 4, image=1 / 4, group=1 / 6)


def chance(metrics: Mapping[str, float]) -> dict[str, float]:
  """Returns the chance level of those metrics for which it is known.

  >>> chance({"val/x-zeroshot-val-top1": 0.7, "val/x-zeroshot-val-num_classes": 10})
  {'val/x-zeroshot-val-top1': 0.1}

  Args:
    metrics: {metric: value} of evaluators, with the sizes that they report: num_samples and
      num_captions, num_classes, or the chance of top1 itself.

  Returns:
    {metric: value by chance}.
  """
  levels = {}
  for name in metrics:
    retrieval, top = _RETRIEVAL.fullmatch(name), _TOP.fullmatch(name)
    sizes = [f"{retrieval[1]}{size}" for size in _SIZES] if retrieval else []
    if retrieval and all(size in metrics for size in sizes):
      direction, k = retrieval[2], int(retrieval[3])
      images, texts = (metrics[size] for size in sizes)
      own, among = (texts / images, texts) if direction == "image_to_text" else (1, images)
      # k draws without replacement miss all positives of an image with the mean number of captions.
      misses = (max(0.0, 1 - own / (among - i)) for i in range(min(k, math.ceil(among))))
      levels[name] = 1 - math.prod(misses)
    elif top and f"{top[1]}num_classes" in metrics:
      levels[name] = min(1.0, int(top[2]) / metrics[f"{top[1]}num_classes"])
    elif top and top[2] == "1" and f"{top[1]}chance" in metrics:
      levels[name] = metrics[f"{top[1]}chance"]
    elif winoground := _WINOGROUND.fullmatch(name):
      levels[name] = _OF_WINOGROUND[winoground[1]]
    elif name.endswith("accuracy") and f"{name.removesuffix('accuracy')}chance" in metrics:
      levels[name] = metrics[f"{name.removesuffix('accuracy')}chance"]
  return levels
