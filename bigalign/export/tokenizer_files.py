"""Our tokenizers as tokenizer.json, which gives the same ids without us."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from bigalign.data.text import tokenizers as ours

# Capitals, digits, punctuation, other scripts, spaces, nothing, too much: what is compared.
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
_OWN = {"<pad>": 0, "<unk>": 1, "</s>": 2}


def files(tokenizer: ours.Tokenizer, *, pads_unseen: bool, mask: bool) -> dict[str, Any]:
  """{name: JSON} of the files from which transformers makes this tokenizer.

  Args:
    pads_unseen: nothing reads what is behind the end of a text, so any token may pad.
    mask: the model wants a mask that hides padding.

  Raises:
    ValueError: for a tokenizer that they cannot describe, with its config key.
  """
  where = f"config.data.tokenizer {tokenizer.spec['name']!r}"
  writer: Callable[[Any], tokenizers.Tokenizer] | None = _WRITERS.get(type(tokenizer))
  if writer is None:
    raise ValueError(f"{where} cannot be a tokenizer.json")
  made = writer(tokenizer)
  ids, real = tokenizer.encode_batch([""])
  end = made.id_to_token(int(ids[real][-1]))
  pad = made.id_to_token(tokenizer.pad)
  # A padding token is special wherever it occurs in a text: CLIP's "!" must not be one.
  if pad not in _specials(made):
    if not pads_unseen:
      raise ValueError(
        f"{where}: pads with {pad!r}, which is no special token but occurs in texts, and the model"
        " attends to it"
      )
    pad = end
  made.add_special_tokens(sorted({pad, end}))
  made.no_padding()
  made.no_truncation()
  _compare(tokenizer, made, where)
  about = dict(
    tokenizer_class="PreTrainedTokenizerFast",
    model_max_length=tokenizer.length,
    pad_token=pad,
    eos_token=end,
    padding_side="right",
    clean_up_tokenization_spaces=False,
    model_input_names=["input_ids", "attention_mask"] if mask else ["input_ids"],
  )
  return {"tokenizer.json": json.loads(made.to_str()), "tokenizer_config.json": about}


def _specials(made: tokenizers.Tokenizer) -> set[str]:
  """The tokens that no text is made of."""
  added = {x.content for x in made.get_added_tokens_decoder().values() if x.special}
  named = {x for x in made.get_vocab() if x[:1] + x[-1:] in ("<>", "[]") and len(x) > 2}
  return added | named


def _compare(tokenizer: ours.Tokenizer, made: tokenizers.Tokenizer, where: str) -> None:
  """Raises ValueError for a text that the two cut into other ids."""
  made = tokenizers.Tokenizer.from_str(made.to_str())
  made.enable_truncation(tokenizer.length)
  ids, mask = tokenizer.encode_batch(SAMPLES)
  for text, row, real in zip(SAMPLES, ids, mask):
    theirs = made.encode(text).ids
    if not np.array_equal(row[real], theirs):
      raise ValueError(
        f"{where}: {text[:40]!r} is {row[real].tolist()[:12]}, as a tokenizer.json {theirs[:12]}"
      )


def _cleaning(spec: dict[str, Any]) -> list[normalizers.Normalizer]:
  """What canonicalize or lower do to a text."""
  if spec["canonicalize"]:
    marks = "".join(f"\\{x}" for x in string.punctuation)
    return [
      normalizers.Replace("_", " "),
      normalizers.Replace(Regex(f"[{marks}]"), ""),
      normalizers.Lowercase(),
      *_SPACES,
    ]
  return [normalizers.Lowercase()] if spec["lower"] else []


def _ends(model: tokenizers.Tokenizer, eos: int) -> tokenizers.Tokenizer:
  end = model.id_to_token(eos)
  model.post_processor = processors.TemplateProcessing(
    single=f"$A {end}", special_tokens=[(end, eos)]
  )
  return model


def _small(model: Any, spec: dict[str, Any], pieces: Any) -> tokenizers.Tokenizer:
  """With the ids 0, 1 and 2 of our own tokenizers."""
  made = tokenizers.Tokenizer(model)
  if spec["lower"]:
    made.normalizer = normalizers.Lowercase()
  made.pre_tokenizer = pieces
  return _ends(made, _OWN["</s>"])


def _byte(tokenizer: ours.Byte) -> tokenizers.Tokenizer:
  # Printable bytes stand for themselves, the others in their order from 256 on.
  characters = sorted(pre_tokenizers.ByteLevel.alphabet())
  shown = {ord(x) for x in characters}
  others = [x for x in range(256) if x not in shown]
  vocab = {x: 3 + (ord(x) if ord(x) < 256 else others[ord(x) - 256]) for x in characters}
  return _small(
    models.BPE(vocab=_OWN | vocab, merges=[], unk_token="<unk>"),
    tokenizer.spec,
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  )


def _words(tokenizer: ours.Words) -> tokenizers.Tokenizer:
  if tokenizer.spec["drop_unknown"]:
    raise ValueError(
      "config.data.tokenizer.drop_unknown=True: a tokenizer.json has an id for every word"
    )
  return _small(
    models.WordLevel(vocab=_OWN | tokenizer.ids, unk_token="<unk>"),
    tokenizer.spec,
    pre_tokenizers.Split(Regex(r"[\p{L}\p{N}]+"), behavior="removed", invert=True),
  )


def _rust(tokenizer: ours.Rust) -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_str(tokenizer.model.to_str())


def _clip(tokenizer: ours.Clip) -> tokenizers.Tokenizer:
  """Without the repair of badly decoded text and of HTML entities, for which there is no rule."""
  made = _rust(tokenizer)
  quotes = (("[\u02bc\u2018\u2019\u201a\u201b]", "'"), ("[\u201c\u201d\u201e\u201f]", '"'))
  made.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      *(normalizers.Replace(Regex(x), y) for x, y in quotes),
      *_SPACES,
      *_cleaning(tokenizer.spec),
    ]
  )
  return made


def _sentencepiece(tokenizer: ours.SentencePiece) -> tokenizers.Tokenizer:
  proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  proto.ParseFromString(tokenizer.model.serialized_model_proto())
  trained, rules = proto.trainer_spec, proto.normalizer_spec
  if trained.model_type != trained.UNIGRAM:
    raise ValueError(
      f"config.data.tokenizer.path={tokenizer.spec['path']!r}: only SentencePiece models of the"
      " kind unigram become a tokenizer.json"
    )
  made = tokenizers.Tokenizer(
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
  made.normalizer = normalizers.Sequence(steps)
  made.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme="always" if rules.add_dummy_prefix else "never", split=False
  )
  return _ends(made, tokenizer.eos or 0)


_WRITERS: dict[type, Callable[[Any], tokenizers.Tokenizer]] = {
  ours.Byte: _byte,
  ours.Words: _words,
  ours.SentencePiece: _sentencepiece,
  ours.Clip: _clip,
  ours.WordPiece: _rust,
  ours.HuggingFace: _rust,
}
