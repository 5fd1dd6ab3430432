"""A learnt token in each text that names the kind of its source: config.data.prefix_tokens.

  data.mixture = (dict(name="web", ...), dict(name="imagenet", ...))
  data.prefix_tokens = dict(of=dict(web="caption", imagenet="class"), evaluation="caption")

The tokens are more rows of the token table, after those of the tokenizer, so their vectors are
learnt and drawn as all others. A token stands after the start token, or in front without one; a
text has one position less for words. Prefix conditioning, https://arxiv.org/abs/2206.01125: labels
and captions differ in style, and the prefix takes this difference.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.text.tokenizers import Tokenizer, make_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTokens:
  """Which learnt token the texts of each source have.

  Args:
    of: {name of a source of the mixture: name of its token}. Tokens are numbered in this order, so
      another kind is added at the end.
    evaluation: the name of the token of texts that come from no source: in evaluation, `bigalign
      embed` and the Python API. Prefix conditioning takes that of captions, also for class names.
  """

  of: Mapping[str, str]
  evaluation: str

  def __post_init__(self) -> None:
    if self.evaluation not in self.names:
      raise ValueError(
        f"config.data.prefix_tokens.evaluation={self.evaluation!r} is the token of no source, so it"
        f" would not be learnt; it is one of {tree.shown(self.names)}"
      )

  @property
  def names(self) -> tuple[str, ...]:
    """The tokens in the order of their ids."""
    return tuple(dict.fromkeys(self.of.values()))

  def numbers(self, sources: Sequence[str]) -> np.ndarray:
    """[sources] int64, the number of the token of each source of a mixture.

    Raises:
      ValueError: for a source without a token, and for a token of no source.
    """
    if {*sources} != {*self.of}:
      different = sorted({*sources} ^ {*self.of})
      raise ValueError(
        f"config.data.prefix_tokens.of names {tree.shown([*self.of])}, but the sources of"
        f" config.data.mixture are {tree.shown(sources)}; they differ in {tree.shown(different)}"
      )
    return np.array([self.names.index(self.of[name]) for name in sources])


class WithPrefix(Tokenizer):
  """A tokenizer whose texts have a token of `PrefixTokens`.

  Args:
    tokenizer: of the words.
    tokens: the tokens, of ids from its vocab_size on.
  """

  def __init__(self, tokenizer: Tokenizer, tokens: PrefixTokens):
    super().__init__(**tokenizer.spec)
    self._tokenizer, self._tokens = tokenizer, tokens
    self._words = make_tokenizer(**{**tokenizer.spec, "length": tokenizer.length - 1})
    self._place = int(tokenizer.adds_start)
    self._evaluation = tokens.names.index(tokens.evaluation)
    self.vocab_size = tokenizer.vocab_size + len(tokens.names)
    self.pad, self.eos, self.prompt = tokenizer.pad, tokenizer.eos, tokenizer.prompt
    self.truncation_side, self.from_files = tokenizer.truncation_side, tokenizer.from_files

  def encode_batch(
    self, texts: Sequence[str], which: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """As of Tokenizer; which: [N], the numbers of the tokens, None: that of evaluation."""
    ids, mask = self._words.encode_batch(texts)
    numbers = np.full(len(texts), self._evaluation) if which is None else which
    tokens = (self._tokenizer.vocab_size + numbers).astype(ids.dtype)
    return np.insert(ids, self._place, tokens, 1), np.insert(mask, self._place, True, 1)

  def decode(self, ids: Sequence[int]) -> str:
    """As of Tokenizer."""
    return self._tokenizer.decode([i for i in ids if i < self._tokenizer.vocab_size])

  def token_id(self, token: str) -> int | None:
    """As of Tokenizer; of the words."""
    return self._tokenizer.token_id(token)

  @property
  def vocabulary_file(self) -> tuple[str, pathlib.Path] | None:
    """As of Tokenizer."""
    return self._tokenizer.vocabulary_file

  def __reduce__(self) -> tuple[Any, ...]:
    return WithPrefix, (self._tokenizer, self._tokens)
