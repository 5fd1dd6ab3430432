"""Hard negatives made of a caption by a rule: a text that is almost the caption, but wrong.

NegCLIP swaps words of the same part of speech: https://arxiv.org/abs/2210.01936. The rules here
know no grammar, so they work in every language that separates words by blanks.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

_WORD = re.compile(r"\w+")
_SHORT = 3  # letters: shorter words are mostly articles and prepositions


def swap(text: str, rng: np.random.Generator) -> str | None:
  """Exchanges two different words; None if there are not two.

  Words of up to 3 letters, mostly articles and prepositions, stay if there are two longer ones.

  >>> swap("a dog chases a cat", np.random.default_rng(0))
  'a dog cat a chases'
  """
  words = [*_WORD.finditer(text)]
  long = [word for word in words if len(word[0]) > _SHORT]
  candidates = long if len({word[0].lower() for word in long}) > 1 else words
  if len({word[0].lower() for word in candidates}) < 2:
    return None
  one = candidates[int(rng.integers(len(candidates)))]
  others = [word for word in candidates if word[0].lower() != one[0].lower()]
  a, b = sorted((one, others[int(rng.integers(len(others)))]), key=lambda word: word.start())
  return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]


def shuffle(text: str, rng: np.random.Generator) -> str | None:
  """Puts all words into another order; None if there is no other one."""
  words = text.split()
  if len(set(words)) < 2:
    return None
  while True:
    order = rng.permutation(len(words))
    mixed = [words[i] for i in order]
    if mixed != words:
      return " ".join(mixed)


RULES: dict[str, Callable[[str, np.random.Generator], str | None]] = dict(
  swap=swap, shuffle=shuffle
)
