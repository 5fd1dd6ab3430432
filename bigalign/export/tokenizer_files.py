"""Writes our tokenizers as tokenizer.json, which gives the same ids in other libraries."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from bigalign.data.text.tokenizers import (
  Byte,
  Clip,
  HuggingFace,
  Rust,
  SentencePiece,
  Tokenizer,
  WordPiece,
  Words,
)

# Texts for the comparison: capitals, digits, punctuation, other scripts, spaces, empty, too long.
SAMPLES = (
  "a photo of a cat",
  "Two DOGS on the beach, one of them running!",
  "it's 7 o'clock_somewhere",
  "café in München",
  "犬と猫",
  "  spaces   and\ttabs ",
  "",
  "déjà-vu & co. (1984) 🎉",
  "a very long caption " * 40,
)
_SPACES = (normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip())
_SPECIAL = {"<pad>": 0, "<unk>": 1, "</s>": 2}  # of the byte and word tokenizers


def files(tokenizer: Tokenizer, *, padding_has_no_effect: bool, mask: bool) -> dict[str, Any]:
  """{name: JSON} of the files from which transformers makes this tokenizer.

  Args:
    tokenizer: ours.
    padding_has_no_effect: whether padding cannot change an embedding, so that any token may pad.
    mask: whether the model needs a mask that hides padding.

  Raises:
    ValueError: for a tokenizer that the files cannot describe, with its key in the config.
  """
  where = f"config.data.tokenizer {tokenizer.spec['name']!r}"
  writer: Callable[[Any], tokenizers.Tokenizer] | None = _WRITERS.get(type(tokenizer))
  if writer is None:
    raise ValueError(f"{where} cannot be written as a tokenizer.json")
  if tokenizer.prompt:
    raise ValueError(f"{where}.prompt={tokenizer.prompt!r}: a tokenizer.json has no prompt")
  theirs = writer(tokenizer)
  ids, real = tokenizer.encode_batch([""])
  end = theirs.id_to_token(int(ids[real][-1]))
  pad = theirs.id_to_token(tokenizer.pad)
  # A padding token is special wherever it occurs in a text: CLIP's "!" must not be one.
  if pad not in _special_tokens(theirs):
    if not padding_has_no_effect:
      raise ValueError(
        f"{where}: pads with {pad!r}, which is not a special token but occurs in texts, and the"
        " model attends to it"
      )
    pad = end
  theirs.add_special_tokens(sorted({pad, end}))
  theirs.no_padding()
  theirs.no_truncation()
  _compare(tokenizer, theirs, where)
  about = dict(
    tokenizer_class="PreTrainedTokenizerFast",
    model_max_length=tokenizer.length,
    pad_token=pad,
    eos_token=end,
    padding_side="right",
    truncation_side=tokenizer.truncation_side,
    clean_up_tokenization_spaces=False,
    model_input_names=["input_ids", "attention_mask"] if mask else ["input_ids"],
  )
  return {"tokenizer.json": json.loads(theirs.to_str()), "tokenizer_config.json": about}


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> set[str]:
  """The tokens that do not occur in texts."""
  added = {x.content for x in tokenizer.get_added_tokens_decoder().values() if x.special}
  named = {x for x in tokenizer.get_vocab() if x[:1] + x[-1:] in ("<>", "[]") and len(x) > 2}
  return added | named


def _compare(ours: Tokenizer, theirs: tokenizers.Tokenizer, where: str) -> None:
  """Raises ValueError for a text that the two tokenize differently."""
  theirs = tokenizers.Tokenizer.from_str(theirs.to_str())
  theirs.enable_truncation(ours.length, direction=ours.truncation_side)
  ids, mask = ours.encode_batch(SAMPLES)
  for text, row, real in zip(SAMPLES, ids, mask):
    their_ids = theirs.encode(text).ids
    if not np.array_equal(row[real], their_ids):
      raise ValueError(
        f"{where}: {text[:40]!r} is {row[real].tolist()[:12]}, but {their_ids[:12]} in the"
        " tokenizer.json"
      )


def _cleaning(spec: dict[str, Any]) -> list[normalizers.Normalizer]:
  """The normalizers that do what the options canonicalize and lower do."""
  if spec["canonicalize"]:
    marks = "".join(f"\\{x}" for x in string.punctuation)
    return [
      normalizers.Replace("_", " "),
      normalizers.Replace(Regex(f"[{marks}]"), ""),
      normalizers.Lowercase(),
      *_SPACES,
    ]
  return [normalizers.Lowercase()] if spec["lower"] else []


def _with_end(model: tokenizers.Tokenizer, eos: int) -> tokenizers.Tokenizer:
  """The tokenizer with an end token after every text."""
  end = model.id_to_token(eos)
  model.post_processor = processors.TemplateProcessing(
    single=f"$A {end}", special_tokens=[(end, eos)]
  )
  return model


def _small(model: Any, spec: dict[str, Any], pieces: Any) -> tokenizers.Tokenizer:
  """A tokenizer from a model and a pre-tokenizer, with the special tokens of our own."""
  tokenizer = tokenizers.Tokenizer(model)
  if spec["lower"]:
    tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pieces
  return _with_end(tokenizer, _SPECIAL["</s>"])


def _byte(tokenizer: Byte) -> tokenizers.Tokenizer:
  """A BPE without merges: one token per byte."""
  # ByteLevel maps printable bytes to themselves, the others in order to characters from 256 on.
  characters = sorted(pre_tokenizers.ByteLevel.alphabet())
  shown = {ord(x) for x in characters}
  others = [x for x in range(256) if x not in shown]
  vocab = {x: 3 + (ord(x) if ord(x) < 256 else others[ord(x) - 256]) for x in characters}
  return _small(
    models.BPE(vocab=_SPECIAL | vocab, merges=[], unk_token="<unk>"),
    tokenizer.spec,
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  )


def _words(tokenizer: Words) -> tokenizers.Tokenizer:
  """Lower-case or cased words; other characters separate them."""
  if tokenizer.spec["drop_unknown"]:
    raise ValueError(
      "config.data.tokenizer.drop_unknown=True: a tokenizer.json cannot drop unknown words"
    )
  return _small(
    models.WordLevel(vocab=_SPECIAL | tokenizer.ids, unk_token="<unk>"),
    tokenizer.spec,
    pre_tokenizers.Split(Regex(r"[\p{L}\p{N}]+"), behavior="removed", invert=True),
  )


def _rust(tokenizer: Rust) -> tokenizers.Tokenizer:
  """Tokenizers that are those of the library already."""
  return tokenizers.Tokenizer.from_str(tokenizer.model.to_str())


def _clip(tokenizer: Clip) -> tokenizers.Tokenizer:
  """Without the repair of badly decoded text and HTML entities: the format has no rule for it."""
  theirs = _rust(tokenizer)
  quotes = (("[\u02bc\u2018\u2019\u201a\u201b]", "'"), ("[\u201c\u201d\u201e\u201f]", '"'))
  theirs.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      *(normalizers.Replace(Regex(x), y) for x, y in quotes),
      *_SPACES,
      *_cleaning(tokenizer.spec),
    ]
  )
  return theirs


def _sentencepiece(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
  """A Unigram model with the rules of its SentencePiece model."""
  proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  proto.ParseFromString(tokenizer.model.serialized_model_proto())
  trained, rules = proto.trainer_spec, proto.normalizer_spec
  if trained.model_type != trained.UNIGRAM:
    raise ValueError(
      f"config.data.tokenizer.path={tokenizer.spec['path']!r}: only SentencePiece models of the"
      " kind unigram can be written as a tokenizer.json"
    )
  theirs = tokenizers.Tokenizer(
    models.Unigram(
      [(x.piece, x.score) for x in proto.pieces],
      unk_id=trained.unk_id,
      byte_fallback=trained.byte_fallback,
    )
  )
  steps = _cleaning(tokenizer.spec)
  if rules.precompiled_charsmap:
    steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
  if rules.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
  theirs.normalizer = normalizers.Sequence(steps)
  theirs.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme="always" if rules.add_dummy_prefix else "never", split=False
  )
  return _with_end(theirs, tokenizer.eos or 0)


_WRITERS: dict[type, Callable[[Any], tokenizers.Tokenizer]] = {
  Byte: _byte,
  Words: _words,
  SentencePiece: _sentencepiece,
  Clip: _clip,
  WordPiece: _rust,
  HuggingFace: _rust,
}
