"""Hundreds of damaged files of tokenizers: they are refused by name, or every text has valid ids.

Run as a program, this file tries some of them: PATH NAME FIRST END FOLDER.
"""

from __future__ import annotations

import gzip
import itertools
import json
import pathlib
import pickle

import numpy as np
import pytest
import tokenizers as rust
from helpers import mutations
from helpers.small_tokenizers import write_pieces

from bigalign.data.samples.rejects import rejection
from bigalign.data.text import clip_text
from bigalign.data.text.tokenizers import make_tokenizer

TEXTS = ["a photo of a cat.", "Ünd ZWEI Hunde! \u732b 3.5 <x>", "", "a" * 3_000, "\ufffd\0 x"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##t", "c", "##a", "photo", "of", ".", "ü", "猫"]
MEBIBYTE = 1 << 20


def wordpiece(folder: pathlib.Path) -> None:
  """A vocab.txt."""
  (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"##{x}" for x in "bdefghiop"), ""]))


def clip(folder: pathlib.Path, *, packed: bool = True) -> None:
  """A list of CLIP's size: pairs of the characters for bytes, plain or packed."""
  pairs = itertools.product(clip_text._byte_characters(), repeat=2)
  merges = [" ".join(pair) for pair in itertools.islice(pairs, 49408 - 512 - 2)]
  text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, ""]).encode()
  name = "merges.txt.gz" if packed else "merges.txt"
  (folder / name).write_bytes(gzip.compress(text, mtime=0) if packed else text)


def pieces(folder: pathlib.Path) -> None:
  """A SentencePiece model."""
  write_pieces(folder / "spiece", ["a dog and a cat", "two dogs, one cat!", "zwei Hunde"], 50)


def bert_json(folder: pathlib.Path) -> None:
  """A tokenizer.json of BERT with the files that complete it."""
  model = rust.Tokenizer(
    rust.models.WordPiece({x: i for i, x in enumerate(WORDS)}, unk_token="[UNK]")
  )
  model.normalizer = rust.normalizers.BertNormalizer(lowercase=True)
  model.pre_tokenizer = rust.pre_tokenizers.BertPreTokenizer()
  model.post_processor = rust.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  model.enable_padding(pad_id=0, pad_token="[PAD]")
  model.enable_truncation(9)
  model.add_special_tokens(["<x>"])
  model.save(str(folder / "tokenizer.json"))
  settings = dict(
    tokenizer_class="BertTokenizer",
    do_lower_case=True,
    strip_accents=None,
    pad_token={"content": "[PAD]"},
    sep_token="[SEP]",
    truncation_side="right",
    model_max_length=9,
    added_tokens_decoder={"13": dict(content="<x>", special=True)},
    additional_special_tokens=["<x>"],
  )
  completing = dict(
    tokenizer_config=settings,
    special_tokens_map=dict(pad_token="[PAD]", cls_token={"content": "[CLS]"}),
    added_tokens={"<x>": 13},
    modules=[dict(type="a.Transformer", path="")],
    sentence_bert_config=dict(max_seq_length=9, do_lower_case=False),
    config_sentence_transformers=dict(prompts=dict(q="a "), default_prompt_name="q"),
  )
  for name, content in completing.items():
    (folder / f"{name}.json").write_text(json.dumps(content))


def bpe_json(folder: pathlib.Path) -> None:
  """A byte-level BPE tokenizer.json."""
  alphabet = sorted(rust.pre_tokenizers.ByteLevel.alphabet())
  merges = [("a", "n"), ("an", "d"), ("Ġ", "a")]
  texts = ["<pad>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
  model = rust.Tokenizer(rust.models.BPE({x: i for i, x in enumerate(texts)}, merges))
  model.normalizer = rust.normalizers.Sequence(
    [rust.normalizers.NFC(), rust.normalizers.Replace(rust.Regex(r"\s+"), " ")]
  )
  model.pre_tokenizer = rust.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.post_processor = rust.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  model.decoder = rust.decoders.ByteLevel()
  model.save(str(folder / "tokenizer.json"))


def unigram_json(folder: pathlib.Path) -> None:
  """A Unigram tokenizer.json, as SentencePiece models are converted."""
  scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.5)]
  scores += [(x, -3.0) for x in "abcdefghijklmnop"]
  model = rust.Tokenizer(rust.models.Unigram(scores, 2, True))
  model.pre_tokenizer = rust.pre_tokenizers.Metaspace()
  model.post_processor = rust.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  model.save(str(folder / "tokenizer.json"))


# (name of the tokenizer, its file, function that writes its folder)
KINDS = [
  ("wordpiece", "vocab.txt", wordpiece),
  ("clip", "merges.txt.gz", clip),
  ("sentencepiece", "spiece.model", pieces),
  ("hf", "tokenizer.json", bert_json),
  ("wordpiece", "vocab.txt", lambda folder: (bert_json(folder), wordpiece(folder))),
  ("clip", "merges.txt", lambda folder: clip(folder, packed=False)),
  ("sentencepiece", "spiece.model", lambda folder: (bert_json(folder), pieces(folder))),
  ("hf", "tokenizer.json", bpe_json),
  ("hf", "tokenizer.json", bert_json),
  ("hf", "tokenizer.json", unigram_json),
]


def tokenizers(folder: pathlib.Path) -> mutations.Trial:
  """Makes a tokenizer of a folder in which one file is damaged, and encodes texts."""
  own = folder / "damaged"
  wholes = []
  for _, _, write in KINDS:
    write(mutations.fresh(own))
    wholes.append({file.name: file.read_bytes() for file in sorted(own.iterdir())})

  def read(kind: int, files: dict[str, bytes]) -> str:
    mutations.fresh(own)
    for file, data in files.items():
      (own / file).write_bytes(data)
    name, file, _ = KINDS[kind]
    try:
      made = make_tokenizer(name, path=str(own / file), length=9)
    except (ValueError, OSError) as error:
      text = str(error)
      assert str(own) in text and len(text) < 3_000 and len(text.splitlines()) < 9, text
      return "refused"
    made = pickle.loads(pickle.dumps(made))  # as in a worker
    found = "read"
    for text in TEXTS:
      try:
        ids, mask = made.encode_batch([text])
      except Exception as error:  # the sample of this text is rejected
        rejection(error)
        found = "rejected"
        continue
      assert ids.shape == mask.shape == (1, 9)
      assert ids.min() >= 0 and ids.max() < max(made.vocab_size, made.pad + 1), (text, ids)
    return found

  assert [read(kind, files) for kind, files in enumerate(wholes)] == ["read"] * len(KINDS)

  def trial(n: int) -> str:
    random = np.random.default_rng([5, n])
    kind = n % len(KINDS)
    files = dict(wholes[kind])
    # Half of the time the file that the option names, else any file of its folder.
    file = KINDS[kind][1] if random.random() < 0.5 else sorted(files)[random.integers(len(files))]
    files[file] = mutations.mutated_file(file, files[file], random)
    return read(kind, files)

  return trial


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_damaged_tokenizers_are_refused_or_give_valid_ids():
  tally = mutations.tally(__file__, "tokenizers", 500)
  tally.check(500, seconds=10, memory=256 * MEBIBYTE)
  assert tally.outcomes["read"] > 50 and tally.outcomes["refused"] > 50


if __name__ == "__main__":
  mutations.serve(dict(tokenizers=tokenizers))
