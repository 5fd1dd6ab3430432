"""Random permutations and generators that are functions of a seed and a position.

There is no state: any epoch is computed in constant memory. Words used in this package:

  position: place in the endless stream of training samples; row r of a global batch is position
    samples_seen + r.
  index: place of a sample in its source, 0 <= index < size.
  epoch: position // size; each index occurs exactly once per epoch.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import overload

import numpy as np

_ROUNDS = 8
# Hashes for different purposes differ even if seed and position agree. The numbers decide the
# order of the samples: append only.
_ORDER, _SUBSTITUTE, _DRAWS, BLOCK, WINDOW, SOURCE, CAPTION, LENGTH, REPLAY = range(1, 10)
TEXT_PAIRS = 10
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
  """The finalizer of splitmix64, a bijection of uint64; the products must wrap."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  mixed: np.ndarray = x ^ (x >> np.uint64(31))
  return mixed


def hash_words(*words: int | np.ndarray) -> np.ndarray:
  """Hashes a sequence of 64-bit words, vectorised.

  Args:
    *words: integers, or integer arrays of shapes that broadcast.

  Returns:
    uint64 of the common shape, with at least one dimension.
  """
  state = np.full(1, 0x9E3779B97F4A7C15, np.uint64)
  for word in words:
    if not isinstance(word, np.ndarray):
      word = np.full(1, int(word) & _MASK, np.uint64)
    state = _mix(
      (state ^ word.astype(np.uint64)) * np.uint64(0xD1342543DE82EF95)
      + np.uint64(0x9E3779B97F4A7C15)
    )
  return state


def permute(x: np.ndarray, *, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
  """Maps numbers below `size` to numbers below `size`, one to one for every value of `key`.

  A Feistel network permutes a rectangle Z_a x Z_b with a * b >= size, so that few points fall
  outside of Z_size. Those are permuted again until they fall inside (cycle walking).

  Args:
    x: [N] uint64, each below `size`.
    size: the number of elements, or one for each entry of x, [N].
    key: [N] uint64; entries of x with equal keys and sizes go through the same permutation.

  Returns:
    [N] uint64, each below `size`.
  """
  sizes, which = np.unique(np.asarray(size, np.int64), return_inverse=True)
  sides = np.array([math.isqrt(int(n) - 1) + 1 for n in sizes])
  a_of = np.broadcast_to(sides.astype(np.uint64)[which], x.shape)
  b_of = np.broadcast_to((-(-sizes // sides)).astype(np.uint64)[which], x.shape)
  limit = np.broadcast_to(sizes.astype(np.uint64)[which], x.shape)
  out = x.copy()
  todo = np.arange(len(x))
  while len(todo):
    a, b = a_of[todo], b_of[todo]
    left: np.ndarray = out[todo] // b
    right: np.ndarray = out[todo] % b
    for r in range(0, _ROUNDS, 2):
      round_key = key[todo] + np.uint64(r)
      left = (left + _mix(_mix(round_key) ^ right) % a) % a
      right = (right + _mix(_mix(round_key + np.uint64(1)) ^ left) % b) % b
    out[todo] = left * b + right
    todo = todo[out[todo] >= limit[todo]]
  return out


@overload
def sample_index(position: int, *, size: int, seed: int, shuffle: bool = True) -> int: ...
@overload
def sample_index(
  position: np.ndarray, *, size: int, seed: int, shuffle: bool = True
) -> np.ndarray: ...
def sample_index(
  position: int | np.ndarray, *, size: int, seed: int, shuffle: bool = True
) -> int | np.ndarray:
  """Returns the index at each position: a global shuffle without replacement, new in every epoch.

  Args:
    position: an integer, or an integer array of any shape.
    size: samples in the source, up to 2**62.
    seed: of the shuffle.
    shuffle: False gives position % size.

  Returns:
    An int, or an int64 array of the shape of `position`.

  Raises:
    ValueError: for a size below 1 or a position below 0.
  """
  if size < 1:
    raise ValueError(f"An order needs at least one sample; size is {size}.")
  positions = np.asarray(position, np.int64)
  if positions.size and positions.min() < 0:
    raise ValueError(f"Positions start at 0; found {positions.min()}.")
  flat = positions.ravel().astype(np.uint64)
  index: np.ndarray = flat % np.uint64(size)
  if shuffle:
    index = permute(index, size=size, key=hash_words(_ORDER, seed, flat // np.uint64(size)))
  index = index.astype(np.int64).reshape(positions.shape)
  return index if isinstance(position, np.ndarray) else int(index)


def substitute(position: int, attempt: int, size: int, seed: int) -> int:
  """Returns the index that replaces a rejected sample at this position.

  The attempts of a position follow a permutation of the source, so no index repeats before every
  sample was tried.

  Args:
    position: of the rejected sample.
    attempt: counts from 1.
    size: samples in the source.
    seed: of the run.
  """
  key = hash_words(_SUBSTITUTE, seed, position)
  first = np.full(1, (attempt - 1) % size, np.uint64)
  return int(permute(first, size=size, key=key)[0])


def philox(seed: int, position: int, name: str = "") -> np.random.Generator:
  """Returns the generator of a position's random draws.

  Args:
    seed: of the run.
    position: of the sample.
    name: of the field that draws, such as "view/local", so that a field does not change what
      another one draws; "" for the first caption, the view of the image and the second caption.
  """
  key = np.array([_draws_key(seed, name), position], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))


@functools.cache
def _draws_key(seed: int, name: str) -> int:
  key = int(hash_words(_DRAWS, seed)[0])
  if not name:
    return key
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return int(hash_words(key, int.from_bytes(digest, "little"))[0])
