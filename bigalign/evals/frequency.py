"""How accuracy depends on how often the captions of the training data name a class.

"No zero-shot without exponential data", https://arxiv.org/abs/2404.04125, finds accuracy linear in
the logarithm of the frequency. Here a class counts as often as captions name it; the paper also
asks that the image shows it.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from bigalign import tree
from bigalign.data.files.lines import read_text


def read_counts(file: pathlib.Path, names: Sequence[str], what: str) -> np.ndarray:
  """[K] int64, the number of samples that name each class.

  Args:
    file: .json of {name: number}, as `bigalign balance --lemmas` writes it.
    names: of K classes.
    what: the option that names the file, for errors.

  Raises:
    ValueError: for another file, and for classes that it does not have; they are counted and named.
  """
  try:
    given = json.loads(read_text(file))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{what}: {file} is not JSON: {error}") from error
  if not isinstance(given, dict):
    raise ValueError(f"{what}: {file} must hold an object {{class name: number}}")
  missing = [name for name in names if name not in given]
  if missing:
    raise ValueError(
      f"{what}: {file} has no number of {len(missing)} of {len(names)} classes"
      f" ({tree.shown(missing)}); make it with: bigalign balance SHARDS --lemmas --entries"
      " FILE_OF_CLASS_NAMES --out NAME"
    )
  counts = [given[name] for name in names]
  if wrong := [x for x in counts if not isinstance(x, int) or isinstance(x, bool) or x < 0]:
    raise ValueError(f"{what}: {file} holds {wrong[0]!r}; expected whole numbers from 0")
  return np.array(counts, np.int64)


def measure(counts: np.ndarray, recalls: np.ndarray, name: str) -> dict[str, float]:
  """Correlation and slope of accuracy against log10 of the frequency, and the mean by decade.

  >>> found = measure(np.array([1, 10, 100, 0]), np.array([0.1, 0.2, 0.3, 0.9]), "x")
  >>> round(found["frequency_pearson_r"], 6), round(found["frequency_slope"], 6)
  (1.0, 0.1)

  Args:
    counts: [K].
    recalls: [K], the accuracy on the images of each class; NaN for a class without images.
    name: of the evaluator, for the log.

  Returns:
    {metric: value}. frequency_pearson_r and frequency_slope (accuracy per factor of ten) are over
    the classes that captions name, if there are three with different frequencies.
    frequency_classes is their number, frequency_unnamed that of the classes with images that no
    caption names. frequency_1e2-mean_top1 is the mean over classes named 100 to 999 times, and
    frequency_0-mean_top1 that over classes that no caption names.
  """
  there = ~np.isnan(recalls)
  used = there & (counts > 0)
  logs, accuracy = np.log10(np.maximum(counts, 1))[used], recalls[used]
  values: dict[str, float] = {}
  if len(logs) >= 3 and np.ptp(logs) > 0:
    x, y = logs - logs.mean(), accuracy - accuracy.mean()
    values["frequency_slope"] = float((x * y).sum() / (x * x).sum())
    if np.ptp(accuracy) > 0:
      values["frequency_pearson_r"] = float(
        (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
      )
  else:
    logging.warning(
      "evaluation %r: captions name %d classes; a slope needs three, of different frequency",
      *(name, len(logs)),
    )
  values |= {"frequency_classes": int(used.sum())}
  values |= {"frequency_unnamed": int((there & (counts == 0)).sum())}
  # Of whole numbers, so that a power of ten is in its own decade.
  decades = np.array([len(str(count)) if count else 0 for count in counts.tolist()])
  for digits in sorted({*decades[there].tolist()}):
    label = f"1e{digits - 1}" if digits else "0"
    values[f"frequency_{label}-mean_top1"] = float(recalls[there & (decades == digits)].mean())
  return values
