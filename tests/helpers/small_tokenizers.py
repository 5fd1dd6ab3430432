"""Tokenizers of a few words, made in a moment."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import sentencepiece


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
