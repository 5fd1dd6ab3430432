"""Text → [L] int32 ids and a mask. Built inside each worker: a tokenizer pickles as its spec."""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from bigalign.data.files.patterns import expand_variables
from bigalign.data.text import clip_text


class Tokenizer:
  """Subclasses set `vocab_size`, `pad`, `eos`, and give the ids of texts without padding.

  spec    JSON; make_tokenizer(**spec) builds the same tokenizer
  eos     ends every text, also one that was cut to `length`; None where there is no such token
  """

  vocab_size: int
  pad: int
  eos: int | None

  def __init__(self, **spec):
    self.spec: dict[str, Any] = spec
    self.length: int = spec["length"]
    if self.length < 2:
      raise ValueError(f"tokenizer length={self.length}; at least 2: one token and its end")

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """N texts → ids [N, L] int32, mask [N, L] bool; True is a real token, the end included."""
    ids = np.full((len(texts), self.length), self.pad, np.int32)
    mask = np.zeros((len(texts), self.length), bool)
    for row, tokens in enumerate(self._encode(texts) if len(texts) else ()):
      n = min(len(tokens), self.length)
      ids[row, :n] = tokens[:n]
      mask[row, :n] = True
      if len(tokens) > self.length and self.eos is not None:
        ids[row, -1] = self.eos
    return ids, mask

  def __reduce__(self):
    return _from_spec, (self.spec,)


class Byte(Tokenizer):
  """UTF-8 bytes + 3; 0 is padding, 1 is unused, 2 ends a text. Needs no file."""

  vocab_size, pad, eos = 259, 0, 2

  def __init__(self, *, length: int, lower: bool = False):
    super().__init__(name="byte", length=length, lower=lower)
    self._lower = lower

  def _encode(self, texts):
    texts = (text.lower() if self._lower else text for text in texts)
    return [
      [byte + 3 for byte in text.encode("utf-8", "replace")[: self.length]] + [2] for text in texts
    ]


class Words(Tokenizer):
  """Runs of letters and digits; 0 is padding, 1 an unknown word, 2 ends a text.

  vocabulary    a file of words between white space, or "glyphs": those of the embedded dataset
  drop_unknown  unknown words are left out. For a vocabulary of class names alone: the words of a
                prompt around a name were never trained, so their embeddings are noise
  """

  pad, eos = 0, 2

  def __init__(
    self, *, length: int, vocabulary: str, lower: bool = True, drop_unknown: bool = False
  ):
    super().__init__(
      name="words", length=length, vocabulary=vocabulary, lower=lower, drop_unknown=drop_unknown
    )
    self._lower, self._drop_unknown = lower, drop_unknown
    if vocabulary == "glyphs":
      words = importlib.import_module("bigalign.data.sources.glyphs").vocabulary()
    else:
      words = _file(vocabulary, option="vocabulary").read_text("utf-8").split()
    self.ids = {word: i + 3 for i, word in enumerate(dict.fromkeys(words))}
    self.vocab_size = len(self.ids) + 3

  def _encode(self, texts):
    every = ([self.ids.get(word, 1) for word in self._split(text)] for text in texts)
    return [[i for i in ids if i != 1 or not self._drop_unknown] + [2] for ids in every]

  def _split(self, text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower() if self._lower else text)


class SentencePiece(Tokenizer):
  """A SentencePiece model; SigLIP's use of it: no start token, an end even when cut ("sticky").

  pad, eos      ids; by default the model's own. SigLIP (c4_en) pads with the end, so that is what
                a model without a padding id gets; SigLIP 2 (Gemma) pads with 0
  canonicalize  lower case, punctuation out, as SigLIP's prompts
  """

  def __init__(
    self,
    *,
    length: int,
    path: str,
    lower: bool = False,
    canonicalize: bool = False,
    pad: int | None = None,
    eos: int | None = None,
  ):
    super().__init__(
      name="sentencepiece",
      length=length,
      path=path,
      lower=lower,
      canonicalize=canonicalize,
      pad=pad,
      eos=eos,
    )
    file = _file(path, option="path")
    try:
      self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
      raise ValueError(f"tokenizer path={path!r}: not a SentencePiece model: {error}") from error
    self.vocab_size = self.model.get_piece_size()
    self.eos = _token_id(eos, self.model.eos_id(), option="eos", path=path)
    self.pad = _token_id(
      pad, self.model.pad_id() if self.model.pad_id() >= 0 else self.eos, option="pad", path=path
    )
    self._lower, self._canonicalize = lower, canonicalize

  def _encode(self, texts):
    if self._canonicalize:
      texts = [clip_text.canonicalize(text) for text in texts]
    elif self._lower:
      texts = [text.lower() for text in texts]
    return [[*tokens, self.eos] for tokens in self.model.encode(list(texts))]


class Rust(Tokenizer):
  """A tokenizer of the Rust library, which adds the special tokens and cuts between them."""

  def _set(self, model: tokenizers.Tokenizer, *, pad: int) -> None:
    self.model = model
    model.enable_truncation(self.length)
    model.no_padding()
    self.pad, self.eos = pad, None
    self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1

  def _encode(self, texts):
    return [encoding.ids for encoding in self.model.encode_batch_fast(list(texts))]


class WordPiece(Rust):
  """BERT's [CLS] words [SEP] from a vocab.txt with one piece per line."""

  def __init__(self, *, length: int, path: str, lower: bool = True):
    super().__init__(name="wordpiece", length=length, path=path, lower=lower)
    lines = _file(path, option="path").read_text("utf-8").splitlines()
    vocabulary = {piece.rstrip(): i for i, piece in enumerate(lines)}
    special = {piece: vocabulary.get(piece, -1) for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")}
    if -1 in special.values():
      raise ValueError(
        f"tokenizer path={path!r}: no WordPiece vocabulary, it lacks "
        f"{[piece for piece, i in special.items() if i < 0]}"
      )
    model = tokenizers.Tokenizer(
      models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    model.normalizer = normalizers.BertNormalizer(lowercase=lower)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.TemplateProcessing(
      single="[CLS] $A [SEP]", special_tokens=[(s, special[s]) for s in ("[CLS]", "[SEP]")]
    )
    self._set(model, pad=special["[PAD]"])


class HuggingFace(Rust):
  """Any tokenizer.json; `pad` is needed where the file names no padding token."""

  def __init__(self, *, length: int, path: str, pad: int | None = None):
    super().__init__(name="hf", length=length, path=path, pad=pad)
    file = _file(path, option="path")
    try:
      model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception, for every fault
      raise ValueError(f"tokenizer path={path!r}: not a tokenizer.json: {error}") from error
    named = [model.token_to_id(token) for token in ("[PAD]", "<pad>", "<|pad|>")]
    found = (model.padding or {}).get("pad_id", next((i for i in named if i is not None), -1))
    self._set(model, pad=_token_id(pad, found, option="pad", path=path))


class Clip(Rust):
  """CLIP's BPE: 49406 text 49407, padded with 0 as open_clip does (Hugging Face: pad=49407).

  path          bpe_simple_vocab_16e6.txt.gz; by default that of an installed open_clip_torch
  lower         off: open_clip's "whitespace" cleaning
  canonicalize  also punctuation out: open_clip's "canonicalize"
  """

  def __init__(
    self,
    *,
    length: int = 77,
    path: str | None = None,
    lower: bool = True,
    canonicalize: bool = False,
    pad: int = 0,
  ):
    super().__init__(
      name="clip", length=length, path=path, lower=lower, canonicalize=canonicalize, pad=pad
    )
    file = clip_text.installed_vocabulary() if path is None else _file(path, option="path")
    self._set(clip_text.bpe(file), pad=pad)
    self._lower, self._canonicalize = lower, canonicalize

  def _encode(self, texts):
    texts = [clip_text.clean(text) for text in texts]
    if self._canonicalize:
      texts = [clip_text.canonicalize(text) for text in texts]
    elif self._lower:
      texts = [text.lower() for text in texts]
    return super()._encode(texts)


TOKENIZERS = dict(
  byte=Byte,
  words=Words,
  sentencepiece=SentencePiece,
  wordpiece=WordPiece,
  hf=HuggingFace,
  clip=Clip,
)


def make_tokenizer(name: str, *, length: int, **options) -> Tokenizer:
  """The tokenizer of that name, for texts of `length` ids. Paths may hold $BIGALIGN_DATA."""
  if name not in TOKENIZERS:
    raise ValueError(f"Unknown tokenizer {name!r}; known: {sorted(TOKENIZERS)}")
  return TOKENIZERS[name](length=length, **options)


def _from_spec(spec: dict[str, Any]) -> Tokenizer:
  return make_tokenizer(**spec)


def _file(path: str, *, option: str) -> pathlib.Path:
  file = pathlib.Path(expand_variables(path, what=f"tokenizer {option}")).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"tokenizer {option}={path!r}: no such file: {file}")
  return file


def _token_id(asked: int | None, found: int, *, option: str, path: str) -> int:
  if asked is None and found < 0:
    raise ValueError(f"tokenizer path={path!r} names no {option} token; set {option}=ID")
  return found if asked is None else asked
