"""CLIP's byte-pair and BERT's WordPiece tokenizers in plain Python, one rule at a time.

They define the expected ids of the tokenizer tests, so they share no code with bigalign or with the
Rust library that it uses. Sources: Radford et al. 2021, open_clip's cleaning, Devlin et al. 2019.
"""

from __future__ import annotations

import gzip
import html
import itertools
import pathlib
import string
import unicodedata

START, END = 49406, 49407
VOCABULARY = 49408
ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
QUOTES = {"‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"'}
FULL_WIDTH = {chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)} | {"\u3000": " "}
LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl"}


def clean(text):
  """open_clip's cleaning of well decoded text: plain quotes, resolved entities, single spaces."""
  for table in (QUOTES, FULL_WIDTH, LIGATURES):
    text = "".join(table.get(c, c) for c in text)
  text = unicodedata.normalize("NFC", text)
  text = html.unescape(html.unescape(text))
  return " ".join(text.split())


def canonicalize(text):
  """SigLIP's prompts: lower case, no punctuation, "_" is a space."""
  text = text.replace("_", " ")
  return " ".join("".join(c for c in text if c not in string.punctuation).lower().split())


def byte_characters():
  """A printable character for every byte: itself, or one from 256 on for the others."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def clip_words(text):
  """Runs of letters, single digits, runs of other characters, and the endings of contractions."""
  words, i = [], 0

  def kind(c):
    return "space" if c.isspace() else unicodedata.category(c)[0]

  while i < len(text):
    ending = next((e for e in ENDINGS if text[i:].lower().startswith(e)), None)
    if ending:
      end = i + len(ending)
    elif kind(text[i]) in ("space", "N"):
      end = i + 1
    else:
      letters, end = kind(text[i]) == "L", i + 1
      while end < len(text) and (
        kind(text[end]) == "L" if letters else kind(text[end]) not in ("L", "N", "space")
      ):
        end += 1
    words.append(text[i:end])
    i = end
  return [word for word in words if not word.isspace()]


def merge(pieces, pair):
  """All places of a pair joined, from left to right."""
  joined, i = [], 0
  while i < len(pieces):
    step = 2 if tuple(pieces[i : i + 2]) == pair else 1
    joined.append("".join(pieces[i : i + step]))
    i += step
  return joined


def first_pieces(word):
  """A word as its bytes' characters; the last one carries the end of the word."""
  characters = byte_characters()
  pieces = [characters[b] for b in word.encode()]
  return [*pieces[:-1], pieces[-1] + "</w>"]


def read_merges(file):
  """The pairs of a gzipped list, best first, as many as the vocabulary holds."""
  lines = gzip.decompress(pathlib.Path(file).read_bytes()).decode().split("\n")
  return [tuple(line.split()) for line in lines[1 : VOCABULARY - 2 - 512 + 1]]


def clip_ids(text, merges, length):
  """Ids with start and end, cut to `length` and padded with 0."""
  characters = list(byte_characters().values())
  pieces = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
  id_of, rank = {piece: i for i, piece in enumerate(pieces)}, {x: i for i, x in enumerate(merges)}
  ids = []
  for word in clip_words(text):
    parts = first_pieces(word)
    while known := [pair for pair in itertools.pairwise(parts) if pair in rank]:
      parts = merge(parts, min(known, key=rank.get))
    ids += [id_of[part] for part in parts]
  ids = [START, *ids[: length - 2], END]
  return ids + [0] * (length - len(ids))


# --- WordPiece ----------------------------------------------------------------------------------


def is_punctuation(c):
  return (c.isascii() and c.isprintable() and not c.isalnum() and c != " ") or unicodedata.category(
    c
  ).startswith("P")


def is_chinese(c):
  n = ord(c)
  return 0x4E00 <= n <= 0x9FFF or 0x3400 <= n <= 0x4DBF or 0xF900 <= n <= 0xFAFF


def wordpiece_words(text):
  """Lower case without accents; punctuation and Chinese characters are words of their own."""
  text = "".join(" " if c.isspace() else c for c in text)
  text = "".join(c for c in text if not unicodedata.category(c).startswith("C"))
  text = "".join(f" {c} " if is_chinese(c) else c for c in text)
  text = unicodedata.normalize("NFD", text)
  text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
  text = "".join(f" {c} " if is_punctuation(c) else c for c in text)
  return text.split()


def wordpiece_ids(text, vocabulary, length):
  """(ids, mask): the longest known piece first; a word with an unknown part is [UNK]."""
  id_of = {piece: i for i, piece in enumerate(vocabulary)}

  def pieces(word):
    ids, i = [], 0
    while i < len(word):
      ends = range(len(word), i, -1)
      options = (("##" if i else "") + word[i:end] for end in ends)
      piece = next((p for p in options if p in id_of), None)
      if piece is None or len(word) > 100:
        return [id_of["[UNK]"]]
      ids.append(id_of[piece])
      i += len(piece) - (2 if i else 0)
    return ids

  ids = [i for word in wordpiece_words(text) for i in pieces(word)]
  ids = [id_of["[CLS]"], *ids[: length - 2], id_of["[SEP]"]]
  padding = length - len(ids)
  return ids + [id_of["[PAD]"]] * padding, [1] * len(ids) + [0] * padding
