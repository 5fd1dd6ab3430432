"""Tokenizers: text → [L] int32 ids and a mask.

A tokenizer pickles as its spec, and each worker builds it again.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bigalign import tree
from bigalign.data.files import lines
from bigalign.data.files.patterns import expand_variables
from bigalign.data.text import clip_text, stated

_LONGEST_ERROR = 300  # characters of an error of a library, which may repeat the file


class Tokenizer:
  """Base class; subclasses set `vocab_size`, `pad` and `eos`, and implement `_encode`.

  Attributes:
    spec: JSON; make_tokenizer(**spec) builds the same tokenizer.
    length: ids of a text.
    vocab_size: number of ids.
    pad: the id of padding.
    eos: the id that ends every text, also one that was cut to `length`; None if `_encode` cuts.
    prompt: text before every text.
    truncation_side: where a text that is too long is cut, "left" or "right".
    from_files: {name: value} of what the files next to `path` can change, as JSON can hold it. The
      options and the file at `path` determine everything else.
  """

  vocab_size: int
  pad: int
  eos: int | None
  prompt: str = ""
  truncation_side: str = "right"

  def __init__(self, **spec: Any):
    self.spec: dict[str, Any] = spec
    self.from_files: dict[str, Any] = {}
    self.length: int = spec["length"]
    if self.length < 2:
      raise ValueError(f"tokenizer length={self.length}; at least 2: one token and its end")

  @property
  def name(self) -> str:
    """Its name in TOKENIZERS."""
    return str(self.spec["name"])

  def token_id(self, token: str) -> int | None:
    """The id of a token of the vocabulary; None if it has no such token."""
    return None

  @property
  def file(self) -> pathlib.Path | None:
    """The file in the option `path`; None without one."""
    path = self.spec.get("path")
    return None if path is None else _file(path, option="path")

  @property
  def vocabulary_file(self) -> tuple[str, pathlib.Path] | None:
    """(the option that names it, the file of the vocabulary); None without a file."""
    return None if self.file is None else ("path", self.file)

  @property
  def last_id(self) -> int:
    """The last id of a text."""
    ids, mask = self.encode_batch(["text"])
    return int(ids[mask][-1]) if mask.any() else -1

  @property
  def first_id(self) -> int:
    """The first id of a text."""
    ids, mask = self.encode_batch(["text"])
    return int(ids[mask][0]) if mask.any() else -1

  @property
  def adds_end(self) -> bool:
    """Whether the same token ends every text, also an empty one."""
    ids, mask = self.encode_batch([""])
    return bool(mask.any()) and int(ids[mask][-1]) == self.last_id

  @property
  def adds_start(self) -> bool:
    """Whether the same token precedes every text, also an empty one."""
    ids, mask = self.encode_batch(["", "text"])
    start, first = ids[0][mask[0]], ids[1][mask[1]]
    return len(start) > self.adds_end and bool(start[0] == first[0])

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    """The ids of each text, without padding."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids that a model wrote, without special tokens; not always the text encoded."""
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids [N, L] int32 of N texts, and their mask [N, L] bool.

    The mask is True for all tokens except padding, so also for `eos`.
    """
    ids = np.full((len(texts), self.length), self.pad, np.int32)
    mask = np.zeros((len(texts), self.length), bool)
    for row, tokens in enumerate(self._encode(texts) if len(texts) else ()):
      n = min(len(tokens), self.length)
      ids[row, :n] = tokens[:n]
      mask[row, :n] = True
      if len(tokens) > self.length and self.eos is not None:
        ids[row, -1] = self.eos
    return ids, mask

  def _chosen(self, given: int | None, name: str, statements: stated.Statements) -> int | None:
    """The id that the config gives, else that of a stated token; None without either."""
    return self.token_id(statements[name].value) if given is None and name in statements else given

  def __reduce__(self) -> tuple[Any, ...]:
    return _from_spec, (self.spec,)


class Byte(Tokenizer):
  """UTF-8 bytes + 3; 0 is padding, 1 is unused, 2 ends a text. Needs no file.

  Args:
    length: of a text in ids, L.
    lower: whether texts are lowercased.
  """

  vocab_size, pad, eos = 259, 0, 2

  def __init__(self, *, length: int, lower: bool = False):
    super().__init__(name="byte", length=length, lower=lower)
    self._lower = lower

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", "replace")

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    lowered = (text.lower() if self._lower else text for text in texts)
    return [
      [byte + 3 for byte in text.encode("utf-8", "replace")[: self.length]] + [2]
      for text in lowered
    ]


class Words(Tokenizer):
  """Words, which are sequences of letters and digits; 0 is padding, 1 an unknown word, 2 the end.

  Args:
    length: ids of a text.
    vocabulary: a file of words separated by white space, or "glyphs": the words of the embedded
      dataset.
    lower: whether text is lower-cased.
    drop_unknown: whether unknown words are left out. For a vocabulary of only class names: other
      words of a prompt were never trained, so their embeddings are noise.
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
      # Imported late: drawing needs FreeType, but other tokenizers do not.
      words = importlib.import_module("bigalign.data.sources.glyphs").vocabulary()
    else:
      words = _text(vocabulary, option="vocabulary").split()
    self.ids = {word: i + 3 for i, word in enumerate(dict.fromkeys(words))}
    self.vocab_size = len(self.ids) + 3

  @property
  def vocabulary_file(self) -> tuple[str, pathlib.Path] | None:
    name = self.spec["vocabulary"]
    return None if name == "glyphs" else ("vocabulary", _file(name, option="vocabulary"))

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    encoded = ([self.ids.get(word, 1) for word in self._split(text)] for text in texts)
    return [[i for i in ids if i != 1 or not self._drop_unknown] + [2] for ids in encoded]

  def decode(self, ids: Sequence[int]) -> str:
    words = dict(enumerate(self.ids, 3)) | {1: "?"}
    return " ".join(words[i] for i in ids if i in words)

  def _split(self, text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower() if self._lower else text)


class SentencePiece(Tokenizer):
  """A SentencePiece model as SigLIP uses it: no start token; the end also on cut texts ("sticky").

  Args:
    length: ids of a text.
    path: of the model.
    lower: whether text is lower-cased.
    canonicalize: lower-case, and remove punctuation, as for SigLIP's prompts.
    pad: the id of padding; by default the pad_token of the files next to the model or of the
      pretrained checkpoint (config.model.init), else that of the model, or `eos` if it has none.
      SigLIP pads with `</s>`, 1, SigLIP 2 (Gemma) with 0.
    eos: the id of the end; by default the eos_token of the files next to the model, else that of
      the model.

  Raises:
    ValueError: if the file is not a SentencePiece model.
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
    self._lower, self._canonicalize = lower, canonicalize
    statements = stated.near(file.parent)
    end = _token_id(
      self._chosen(eos, "eos_token", statements), self.model.eos_id(), option="eos", path=path
    )
    self.eos = self._end = end
    own = self.model.pad_id() if self.model.pad_id() >= 0 else end
    self.pad = _token_id(self._chosen(pad, "pad_token", statements), own, option="pad", path=path)
    self.from_files = dict(pad=self.pad, eos=self.eos)
    stated.warn(self, statements)

  def token_id(self, token: str) -> int | None:
    i = int(self.model.piece_to_id(token))
    return i if self.model.id_to_piece(i) == token else None

  def decode(self, ids: Sequence[int]) -> str:
    special = {self.pad, self.eos}
    return str(self.model.decode([int(i) for i in ids if i not in special]))

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    if self._canonicalize:
      texts = [clip_text.canonicalize(text) for text in texts]
    elif self._lower:
      texts = [text.lower() for text in texts]
    return [[*tokens, self._end] for tokens in self.model.encode(list(texts))]


class Rust(Tokenizer):
  """A tokenizer of the library `tokenizers`, which adds special tokens and cuts the text itself.

  Attributes:
    decoder: makes a text of pieces; None: that of the file.
  """

  decoder: decoders.Decoder | None = None

  def _set(self, model: tokenizers.Tokenizer, *, pad: int, side: str = "right") -> None:
    self.model = model
    model.enable_truncation(self.length, direction=side)
    model.no_padding()
    self.pad, self.eos, self.truncation_side = pad, None, side
    ids = model.get_vocab(with_added_tokens=True).values()
    if not ids:
      raise ValueError(f"tokenizer path={self.spec['path']!r}: the vocabulary is empty")
    self.vocab_size = max(ids) + 1

  def _changeable(
    self, added: Mapping[str, int], normalizer: normalizers.Normalizer | None = None
  ) -> dict[str, Any]:
    """The attribute from_files.

    Args:
      added: {token: id} of the tokens that the files add.
      normalizer: of the texts; by default that of the model.
    """
    normalizer = self.model.normalizer if normalizer is None else normalizer
    bert = _bert_settings(normalizer)
    names = dict(lower="lowercase", accents="strip_accents", chinese="handle_chinese_chars")
    return dict(
      pad=self.pad,
      truncation_side=self.truncation_side,
      added_tokens=f"{len(added)} {tree.shown(f'{token}={i}' for token, i in added.items())}",
      **{name: bert[key] for name, key in names.items() if key in bert},
    )

  def token_id(self, token: str) -> int | None:
    found: int | None = self.model.token_to_id(token)
    return found

  def decode(self, ids: Sequence[int]) -> str:
    special = {self.pad, *self.model.encode("").ids}
    kept = [int(i) for i in ids if i not in special]
    if self.decoder is None:
      return str(self.model.decode(kept)).strip()
    pieces = (self.model.id_to_token(i) for i in kept)
    return str(self.decoder.decode([piece for piece in pieces if piece is not None])).strip()

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    try:
      return [encoding.ids for encoding in self.model.encode_batch_fast(list(texts))]
    except BaseException as error:
      if type(error).__name__ != "PanicException":  # of Rust; it is not an Exception
        raise
      raise ValueError(f"the library tokenizers cannot encode a text: {error}") from error


class WordPiece(Rust):
  """BERT's WordPiece: [CLS] text [SEP].

  Args:
    length: ids of a text.
    path: of a vocab.txt with one piece per line.
    lower: whether text is lower-cased.

  Raises:
    ValueError: if the vocabulary has no special tokens, or cannot be read.
  """

  decoder = decoders.WordPiece()

  def __init__(self, *, length: int, path: str, lower: bool = True):
    super().__init__(name="wordpiece", length=length, path=path, lower=lower)
    vocabulary = _pieces(_text(path, option="path"))
    special = {piece: vocabulary.get(piece, -1) for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")}
    if -1 in special.values():
      raise ValueError(
        f"tokenizer path={path!r}: not a WordPiece vocabulary, it lacks "
        f"{[piece for piece, i in special.items() if i < 0]}"
      )
    model = tokenizers.Tokenizer(
      models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    statements = stated.near(_file(path, option="path").parent)
    model.normalizer = _bert_normalizer(statements, lower=lower)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.TemplateProcessing(
      single="[CLS] $A [SEP]", special_tokens=[(s, special[s]) for s in ("[CLS]", "[SEP]")]
    )
    added = _add_tokens(model, statements)
    self.model = model
    pad = self._chosen(None, "pad_token", statements)
    side = _truncation_side(statements, None)
    self._set(model, pad=special["[PAD]"] if pad is None else pad, side=side)
    self.from_files = self._changeable(added)
    stated.warn(self, statements)


class HuggingFace(Rust):
  """Any tokenizer.json of Hugging Face, completed by the files next to it (see `stated`).

  Args:
    length: ids of a text.
    path: of the file.
    pad: the id of padding; by default the stated pad_token, else that of the file; needed if there
      is none.
    prompt: text before every text; by default the default prompt of a sentence-transformers folder.

  Raises:
    ValueError: if the file is not a tokenizer.json, or the id of padding is unknown.
  """

  def __init__(self, *, length: int, path: str, pad: int | None = None, prompt: str | None = None):
    super().__init__(name="hf", length=length, path=path, pad=pad, prompt=prompt)
    file = _file(path, option="path")
    statements = stated.near(file.parent)
    try:
      model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every fault
      text = tree.cut(str(error), _LONGEST_ERROR)
      raise ValueError(f"tokenizer path={path!r}: not a tokenizer.json: {text}") from error
    self.model = model
    added = _add_tokens(model, statements)
    if kind := _bert_settings(model.normalizer):
      # transformers rebuilds it from tokenizer_config.json.
      model.normalizer = _bert_normalizer(
        statements,
        lower=stated.value(statements, "lower", kind["lowercase"]),
        accents=kind["strip_accents"],
        chinese=kind["handle_chinese_chars"],
        clean=kind["clean_text"],
      )
    bert = model.normalizer
    lowered = bool(stated.value(statements, "text_lower", False))
    if lowered:
      model.normalizer = _lowered(model.normalizer)
    named = [model.token_to_id(token) for token in ("[PAD]", "<pad>", "<|pad|>")]
    default = (model.padding or {}).get("pad_id", next((i for i in named if i is not None), -1))
    chosen = self._chosen(pad, "pad_token", statements)
    side = _truncation_side(statements, model.truncation)
    self._set(model, pad=_token_id(chosen, default, option="pad", path=path), side=side)
    self.prompt = stated.value(statements, "prompt", "") if prompt is None else prompt
    self.from_files = dict(self._changeable(added, bert), prompt=self.prompt, text_lower=lowered)
    try:
      stated.warn(self, statements)
    except Exception as error:  # it encodes texts, so that faults of the file show here
      text = tree.cut(str(error), _LONGEST_ERROR)
      raise ValueError(f"tokenizer path={path!r}: it cannot encode a text: {text}") from error

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    return super()._encode([self.prompt + text for text in texts] if self.prompt else texts)


class Clip(Rust):
  """CLIP's BPE: 49406 text 49407, padded with 0 as in open_clip (Hugging Face: pad=49407).

  Args:
    length: ids of a text.
    path: of bpe_simple_vocab_16e6.txt.gz; by default that of an installed open_clip_torch.
    lower: whether text is lower-cased; False is open_clip's "whitespace" cleaning.
    canonicalize: also remove punctuation: open_clip's "canonicalize".
    pad: the id of padding.

  Raises:
    FileNotFoundError: if there is no vocabulary.
    ValueError: if the file is another one.
  """

  # Bytes, then the ends of words.
  decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])

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
    if path is not None:
      stated.warn(self, stated.near(file.parent))

  @property
  def vocabulary_file(self) -> tuple[str, pathlib.Path] | None:
    return "path", self.file or clip_text.installed_vocabulary()

  def _encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    texts = [clip_text.clean(text) for text in texts]
    if self._canonicalize:
      texts = [clip_text.canonicalize(text) for text in texts]
    elif self._lower:
      texts = [text.lower() for text in texts]
    return super()._encode(texts)


TOKENIZERS: dict[str, type[Tokenizer]] = dict(
  byte=Byte,
  words=Words,
  sentencepiece=SentencePiece,
  wordpiece=WordPiece,
  hf=HuggingFace,
  clip=Clip,
)


def make_tokenizer(name: str, *, length: int, **options: Any) -> Tokenizer:
  """Returns a tokenizer.

  Args:
    name: one of TOKENIZERS.
    length: ids of a text.
    **options: of its class. Paths may contain environment variables, such as $BIGALIGN_DATA.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in TOKENIZERS:
    raise ValueError(f"Unknown tokenizer {name!r}; known: {sorted(TOKENIZERS)}")
  return TOKENIZERS[name](length=length, **options)


def _bert_settings(normalizer: normalizers.Normalizer | None) -> dict[str, Any]:
  """The settings of BERT's normalizer; {} for any other one, and for none."""
  state: dict[str, Any] = json.loads(normalizer.__getstate__()) if normalizer else {}
  return state if state.get("type") == "BertNormalizer" else {}


def _bert_normalizer(
  statements: stated.Statements,
  *,
  lower: bool,
  accents: bool | None = None,
  chinese: bool = True,
  clean: bool = True,
) -> normalizers.Normalizer:
  """BERT's normalizer as the files state it, else with the given values.

  Args:
    statements: as of stated.near.
    lower: whether text is lower-cased. The caller decides between its options and the files.
    accents: whether accents are stripped; None: if text is lower-cased.
    chinese: whether Chinese characters are separated.
    clean: whether control characters are removed.
  """
  return normalizers.BertNormalizer(
    clean_text=clean,
    handle_chinese_chars=stated.value(statements, "chinese", chinese),
    strip_accents=stated.value(statements, "accents", accents),
    lowercase=lower,
  )


def _lowered(normalizer: normalizers.Normalizer | None) -> normalizers.Normalizer:
  """The normalizer after lower-casing."""
  steps = [normalizers.Lowercase(), *([normalizer] if normalizer else [])]
  return normalizers.Sequence(steps)


def _truncation_side(statements: stated.Statements, truncation: Any) -> str:
  """The stated side, else that of the tokenizer.json, else "right"."""
  side = stated.value(statements, "truncation_side", (truncation or {}).get("direction", "right"))
  return side if side in ("left", "right") else "right"


def _add_tokens(model: tokenizers.Tokenizer, statements: stated.Statements) -> dict[str, int]:
  """Adds the stated tokens that the vocabulary lacks, as long as they get the stated ids.

  Returns:
    {token: id} of those that were added.
  """
  added = {}
  given = stated.value(statements, "added_tokens", {})
  for token, i in sorted(given.items(), key=lambda item: item[1]):
    if model.token_to_id(token) is None and i == model.get_vocab_size(with_added_tokens=True):
      model.add_tokens([tokenizers.AddedToken(token, normalized=False)])
      added[token] = i
  return added


def _from_spec(spec: dict[str, Any]) -> Tokenizer:
  return make_tokenizer(**spec)


def _file(path: str, *, option: str) -> pathlib.Path:
  """The path with its variables expanded; FileNotFoundError if it does not exist."""
  file = pathlib.Path(expand_variables(path, what=f"tokenizer {option}")).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"tokenizer {option}={path!r}: no such file: {file}")
  return file


def _text(path: str, *, option: str) -> str:
  """The text of a vocabulary; ValueError with the option if it cannot be read."""
  file = _file(path, option=option)
  try:
    return lines.read_text(file)
  except (OSError, ValueError) as error:
    raise ValueError(f"tokenizer {option}={path!r}: {error}") from error


def _pieces(text: str) -> dict[str, int]:
  """{piece: id} of a vocab.txt, whose line number is the id.

  White space after a piece is left out, as BERT's readers do, unless the piece consists of it or
  another line has the piece without it.
  """
  pieces = lines.split(text)
  exact = {"", *pieces}
  return {piece if piece.rstrip() in exact else piece.rstrip(): i for i, piece in enumerate(pieces)}


def _token_id(chosen: int | None, default: int, *, option: str, path: str) -> int:
  """The id that a config chooses, or else that of the file (-1: it has none)."""
  if chosen is None and default < 0:
    token = {"pad": "padding", "eos": "end-of-text"}[option]
    raise ValueError(
      f"tokenizer path={path!r} defines no {token} token. Set config.data.tokenizer.{option} to its"
      " id; for CLIP usually 49407 (<|endoftext|>)."
    )
  return default if chosen is None else chosen
