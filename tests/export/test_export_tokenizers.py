"""Our tokenizers as the files of transformers."""

from __future__ import annotations

import json

import pytest
import tokenizers

from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.export import tokenizer_files

TEXTS = [
  "Hello, World_3! it's fine",
  "naïve CAFÉ — “quoted” 10°C",
  "中文 and العربية",
  "a",
  " ",
  "\n\n a b",
  "e\u0301 combined",
  "emoji 👍🏽 ok",
  "x" * 300,
  "one two " * 100,
]


@pytest.mark.parametrize(
  "options",
  [
    dict(name="clip", path="clip_bpe_simple_vocab_16e6.txt.gz", length=20),
    dict(name="clip", path="clip_bpe_simple_vocab_16e6.txt.gz", length=20, canonicalize=True),
    dict(name="wordpiece", path="bert_base_uncased_vocab.txt", length=20),
    dict(name="sentencepiece", path="maxtext_default_32768.spm.model", length=20),
    dict(name="sentencepiece", path="maxtext_default_32768.spm.model", length=20, lower=True),
    dict(
      name="sentencepiece", path="maxtext_default_32768.spm.model", length=20, canonicalize=True
    ),
  ],
  ids=lambda x: x["name"],
)
def test_real_tokenizers_as_files(options, data_root):
  same_ids({**options, "path": str(data_root / "tokenizers" / options["path"])})


@pytest.mark.parametrize(
  "options",
  [
    dict(name="byte", length=40),
    dict(name="byte", length=40, lower=True),
    dict(name="words", length=12, vocabulary="glyphs"),
  ],
  ids=lambda x: x["name"],
)
def test_own_tokenizers_as_files(options):
  same_ids(options)


def same_ids(options):
  """tokenizer.json gives what ours gives, and its configuration pads and cuts alike."""
  tokenizer = make_tokenizer(**options)
  found = tokenizer_files.files(tokenizer, padding_has_no_effect=True, mask=False)
  made = tokenizers.Tokenizer.from_str(json.dumps(found["tokenizer.json"]))
  made.enable_truncation(found["tokenizer_config.json"]["model_max_length"])
  for text, row, real in zip(TEXTS, *tokenizer.encode_batch(TEXTS)):
    assert made.encode(text).ids == row[real].tolist(), text


def test_tokenizers_that_no_file_describes(tmp_path, data_root):
  (tmp_path / "words.txt").write_text("cat dog")
  words = make_tokenizer(
    "words", length=4, vocabulary=str(tmp_path / "words.txt"), drop_unknown=True
  )
  with pytest.raises(ValueError, match="drop_unknown"):
    tokenizer_files.files(words, padding_has_no_effect=True, mask=False)
  clip = make_tokenizer(
    "clip", length=8, path=str(data_root / "tokenizers/clip_bpe_simple_vocab_16e6.txt.gz")
  )
  with pytest.raises(ValueError, match="pads with '!'"):
    tokenizer_files.files(clip, padding_has_no_effect=False, mask=False)
