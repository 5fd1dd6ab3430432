"""CLIP's text: the cleaning of open_clip, and its byte-pair vocabulary as a Rust tokenizer.

If ftfy is installed, it repairs badly decoded text, as in open_clip. Without it, only quotes,
ligatures, full-width forms and line ends are normalised; for text that was decoded correctly the
result is the same.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import io
import pathlib
import string
import unicodedata
import zlib

import tokenizers
from tokenizers import models, pre_tokenizers, processors

from bigalign.data.files import lines
from bigalign.data.files.regular import open_regular

_HAS_FTFY = importlib.util.find_spec("ftfy") is not None  # it is imported by the first caption
_START, _END = "<start_of_text>", "<end_of_text>"
SIZE = 49408  # of CLIP's vocabulary
_LARGEST = 1 << 26  # bytes of the list of merges, also decompressed; CLIP's has 3 MB
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PLAIN = str.maketrans(
  {
    **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
    # Latin ligatures and full-width forms; NFKC would also flatten what ftfy keeps, like "²".
    **{
      chr(c): unicodedata.normalize("NFKC", chr(c))
      for c in [*range(0xFB00, 0xFB07), *range(0xFF01, 0xFF5F), 0x3000]
    },
  }
)


def clean(text: str) -> str:
  """Returns repaired text, with HTML entities unescaped twice and white space collapsed."""
  if _HAS_FTFY:
    import ftfy

    text = ftfy.fix_text(text)
  else:
    text = unicodedata.normalize("NFC", text.translate(_PLAIN))
  return " ".join(html.unescape(html.unescape(text)).split())


def canonicalize(text: str) -> str:
  """Returns lower-case text without punctuation, as SigLIP's prompts; "_" becomes a space."""
  text = text.replace("_", " ").translate(_PUNCTUATION).lower()
  return " ".join(text.split())


def installed_vocabulary() -> pathlib.Path:
  """Returns the path of the vocabulary in open_clip_torch, without importing it, which needs torch.

  Raises:
    FileNotFoundError: if open_clip_torch is not installed.
  """
  spec = importlib.util.find_spec("open_clip")
  if spec is not None and spec.origin is not None:
    file = pathlib.Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    if file.is_file():
      return file
  raise FileNotFoundError(
    "tokenizer 'clip' needs path=.../bpe_simple_vocab_16e6.txt.gz, or open_clip_torch installed "
    "(which holds this file)"
  )


def bpe(file: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns CLIP's tokenizer.

  Args:
    file: the list of merges, one per line after a heading; gzip or plain text.

  Raises:
    ValueError: if the file is another one.
  """
  characters = _byte_characters()
  count = SIZE - 2 - 2 * len(characters)
  listed = [line.split(" ") for line in lines.split(_merges(file))[1 : count + 1]]
  merges = [(line[0], line[1]) for line in listed if len(line) == 2]
  pieces = [
    *characters,
    *(character + "</w>" for character in characters),
    *("".join(merge) for merge in merges),
    _START,
    _END,
  ]
  ids = {piece: i for i, piece in enumerate(pieces)}
  if len(ids) != SIZE:
    raise ValueError(
      f"{file}: not CLIP's list of merges, bpe_simple_vocab_16e6.txt.gz: its first {count} lines"
      f" after the heading have {len(merges)} merges, with {len(ids)} different pieces of {SIZE}"
    )
  try:
    bpe_model = models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>", unk_token=_END)
  except Exception as error:  # the library raises bare Exception for every fault
    raise ValueError(
      f"{file}: not CLIP's list of merges, bpe_simple_vocab_16e6.txt.gz: {error}"
    ) from error
  model = tokenizers.Tokenizer(bpe_model)
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"),
        behavior="removed",
        invert=True,
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  model.post_processor = processors.TemplateProcessing(
    single=f"{_START} $A {_END}", special_tokens=[(s, ids[s]) for s in (_START, _END)]
  )
  return model


def _merges(file: pathlib.Path) -> str:
  """The text of a list of merges, gzip or plain."""
  with open_regular(file) as opened:
    data = opened.read(_LARGEST + 1)
  if data.startswith(b"\x1f\x8b"):
    try:
      with gzip.GzipFile(fileobj=io.BytesIO(data)) as compressed:
        data = compressed.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f"{file}: not a complete gzip file: {error}") from error
  if len(data) > _LARGEST:
    raise ValueError(f"{file}: not CLIP's list of merges: more than {_LARGEST} bytes")
  return lines.decode(data, name=str(file))


def _byte_characters() -> list[str]:
  """The characters that represent bytes, in the order of their ids (GPT-2's table)."""
  shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = 256 - len(shown)
  return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(hidden)]
