"""The padding of texts that a tower does not read, so that it can be cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

# (ids [N, L], mask [N, L]) -> [N], the leading positions that decide the embedding of each text.
UsedLengths: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]


def real_lengths(mask: np.ndarray) -> np.ndarray:
  """Returns the positions of each text up to its last token that is not padding.

  >>> real_lengths(np.array([[True, True, False], [False, False, False]])).tolist()
  [2, 3]

  Args:
    mask: [N, L] bool, False for padding.

  Returns:
    [N]; L for a text without tokens, where attention has nothing but padding to read.
  """
  lengths: np.ndarray = mask.shape[1] - np.argmax(mask[:, ::-1], 1)
  return lengths


def all_positions(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns L for each text, [N]: the answer for a tower that reads padding."""
  return np.full(len(ids), ids.shape[1])


def used_lengths(options: Any) -> UsedLengths:
  """Returns the method `used_lengths` of a text tower's options, else `all_positions`."""
  lengths: UsedLengths = getattr(options, "used_lengths", all_positions)
  return lengths


def cut(used: np.ndarray | int, length: int) -> int:
  """Returns the length to which a batch of texts can be cut.

  It is the longest text's, rounded up to 8, 16, 24, 32, 48, 64, 96, 128 ...: each length compiles
  the tower once more, so there are few.

  >>> [cut(np.array([5, n]), 77) for n in (3, 9, 33, 65, 77)]
  [8, 16, 48, 77, 77]

  Args:
    used: [N], positions that decide the embeddings of the batch, as of UsedLengths; or the most.
    length: L, of the batch.
  """
  longest = int(np.max(used, initial=1))
  step = max(8, 1 << max(longest - 1, 2).bit_length() - 2)
  return min(length, -(-longest // step) * step)
