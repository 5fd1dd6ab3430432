"""Tokenizers of a few words, made in a moment."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import sentencepiece
import tokenizers


def write_pieces(stem: pathlib.Path, texts: Sequence[str], vocab_size: int) -> pathlib.Path:
  """Trains a SentencePiece model with <pad> 0, </s> 1 and <unk> 2, as T5's; returns its path.

  Args:
    stem: path without the ending.
    texts: to train on; each counts nine times.
    vocab_size: most pieces.
  """
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*texts] * 9),
    model_prefix=str(stem),
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  stem.with_suffix(".vocab").unlink()
  return stem.with_suffix(".model")


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "A", "Dog", "query", ":")


def bert_json(folder: pathlib.Path, *, lower: bool = True, words=WORDS, **changes) -> str:
  """Writes a WordPiece tokenizer.json; returns its path.

  Args:
    folder: of the file.
    lower: whether text is lower-cased.
    words: the vocabulary, the special tokens in the places of BERT's.
    changes: {method of tokenizers.Tokenizer: its arguments}.
  """
  model = tokenizers.Tokenizer(
    tokenizers.models.WordPiece({x: i for i, x in enumerate(words)}, unk_token="[UNK]")
  )
  model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
  model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  for name, options in changes.items():
    getattr(model, name)(**options)
  folder.mkdir(exist_ok=True)
  model.save(str(folder / "tokenizer.json"))
  return str(folder / "tokenizer.json")
