"""Text → [L] int32 ids and a mask. Built inside each worker: a tokenizer pickles as its spec."""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.data.sources import expand_variables


class Tokenizer:
  """Subclasses give `vocab_size`, `pad`, `eos` and `_encode`, the ids without padding."""
  vocab_size: int
  pad: int
  eos: int | None

  def __init__(self, spec: dict[str, Any]):
    self.spec = spec
    self.length = spec["length"]
    if self.length < 2:
      raise ValueError(f"tokenizer length is {self.length}; at least 2 (one token and its end)")

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """N texts → ids [N, L] int32, mask [N, L] bool; True is a real token, the end included."""
    ids = np.full((len(texts), self.length), self.pad, np.int32)
    mask = np.zeros((len(texts), self.length), bool)
    for row, tokens in enumerate(self._encode(texts) if texts else ()):
      n = min(len(tokens), self.length)
      ids[row, :n] = tokens[:n]
      mask[row, :n] = True
      if self.eos is not None and len(tokens) > self.length:
        ids[row, -1] = self.eos  # a text that was cut still ends
    return ids, mask

  def __reduce__(self):
    return _from_spec, (self.spec,)


class Byte(Tokenizer):
  """UTF-8 bytes + 3; 0 is padding, 1 is free, 2 ends a text. Needs no file."""
  vocab_size, pad, eos = 259, 0, 2

  def __init__(self, *, length: int, lower: bool = False):
    super().__init__(dict(name="byte", length=length, lower=lower))
    self._lower = lower

  def _encode(self, texts):
    texts = (text.lower() if self._lower else text for text in texts)
    # Only as many bytes as can be used, and one more that tells that the text was cut.
    return [[byte + 3 for byte in text.encode("utf-8", "replace")[:self.length]] + [2]
            for text in texts]


class Words(Tokenizer):
  """Runs of letters and digits; 0 is padding, 1 an unknown word, 2 ends a text.

  vocabulary  a file with one word per line, or "glyphs": the words of the embedded dataset
  """
  pad, eos = 0, 2

  def __init__(self, *, length: int, vocabulary: str, lower: bool = True):
    super().__init__(dict(name="words", length=length, vocabulary=vocabulary, lower=lower))
    self._lower = lower
    if vocabulary == "glyphs":
      words = importlib.import_module("bigalign.data.glyphs").vocabulary()
    else:
      words = _file(vocabulary, option="vocabulary").read_text("utf-8").split()
    self._ids = {word: i + 3 for i, word in enumerate(dict.fromkeys(words))}
    self.vocab_size = len(self._ids) + 3

  def _encode(self, texts):
    return [[self._ids.get(word, 1) for word in self._split(text)] + [2] for text in texts]

  def _split(self, text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower() if self._lower else text)


def _file(path: str, *, option: str) -> pathlib.Path:
  file = pathlib.Path(expand_variables(path, what=f"tokenizer {option}")).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"tokenizer {option}={path!r}: no such file ({file})")
  return file


TOKENIZERS = dict(byte=Byte, words=Words)


def make_tokenizer(name: str, *, length: int, **options) -> Tokenizer:
  """The tokenizer of that name; its `spec`, splatted here again, builds the same one."""
  if name not in TOKENIZERS:
    raise ValueError(f"Unknown tokenizer {name!r}; known: {sorted(TOKENIZERS)}")
  return TOKENIZERS[name](length=length, **options)


def _from_spec(spec: dict[str, Any]) -> Tokenizer:
  return make_tokenizer(**spec)
