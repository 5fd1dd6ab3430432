"""The label of a sample: an integer, or the name of a class; -1 if there is none that can be read.

A label is optional, so a label that cannot be read does not reject its sample. It counts as missing
and is logged once for each source. What needs labels refuses samples without one: zero-shot
classification stops with their number.
"""

from __future__ import annotations

import decimal
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.tree import cut

logger = logging.getLogger(__name__)

NONE = -1
_INT32 = range(-(1 << 31), 1 << 31)  # batches hold labels as int32


class Labels:
  """Reads the labels of one source.

  Args:
    classnames: of the source, in the order of the labels; () if it has none.
    what: the field that holds the labels, for the log.

  Example:
    >>> labels = Labels(("cat", "dog"), what="label")
    >>> labels(1, key="a"), labels("dog", key="b"), labels(b"1.0", key="c"), labels(None, key="d")
    (1, 1, 1, -1)
  """

  def __init__(self, classnames: Sequence[str], *, what: str):
    self._what = what
    self.name(classnames)

  def name(self, classnames: Sequence[str]) -> None:
    """Replaces the names of the classes, as for an evaluator that has a list of its own."""
    self._numbers = {name: number for number, name in reversed([*enumerate(classnames)])}
    self._warned = False

  def __call__(self, value: Any, *, key: str) -> int:
    """Returns the label in a value.

    Args:
      value: a number, a text or bytes that hold a number or the name of a class, alone or in a
        sequence of one; None, NaN, a blank text or an empty sequence if the sample has no label.
      key: names the sample in the log.

    Returns:
      The integer, or -1 for none and for anything else, such as several labels, fractions, and
      names that are not class names.
    """
    label = _integer(value, self._numbers)
    if label is not None and label in _INT32:
      return label
    if not self._warned:
      self._warned = True
      names = f"one of the {len(self._numbers)} class names" if self._numbers else "a class name"
      hint = "" if self._numbers else " (the source has none: no classnames.txt)"
      logger.warning(
        "%s: %s=%s is neither a 32-bit integer nor %s%s. Samples with such labels are used as"
        " samples without label; this is logged once",
        *(key, self._what, cut(repr(value), 80), names, hint),
      )
    return NONE


def _integer(value: Any, numbers: dict[str, int]) -> int | None:
  """The integer in a value, -1 if the sample has no label; None if the value is something else."""
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  while isinstance(value, list | tuple) and len(value) <= 1:
    value = value[0] if value else None
  if isinstance(value, bytes):
    value = value.decode("utf-8", "replace")
  if isinstance(value, str):
    text = value.strip().strip("\ufeff").strip()  # U+FEFF is a byte order mark
    if not text:
      return NONE
    try:
      value = int(text)
    except ValueError:
      if text in numbers:
        return numbers[text]
      try:
        value = float(text)
      except ValueError:
        return None
  if value is None:
    return NONE
  if isinstance(value, int):
    return int(value)
  if isinstance(value, float | decimal.Decimal):
    if math.isnan(value):
      return NONE
    return int(value) if math.isfinite(value) and value == int(value) else None
  return None
