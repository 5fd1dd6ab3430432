"""What the files of a checkpoint state about its tokenizer, and how a tokenizer differs from it.

Several files of a folder state what changes ids: tokenizer_config.json, special_tokens_map.json,
added_tokens.json, sentence_bert_config.json, config_sentence_transformers.json. A vocabulary alone
does not: SigLIP pads with `</s>` although its vocabulary has `<pad>`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import multiprocessing
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from bigalign import tree

# What `near` reads of a folder, and of that of a sentence-transformers model.
_FILES = (
  *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  "sentence_bert_config.json",
)
_SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json")
_LARGEST = 100_000_000  # bytes of a JSON file
_UNLIMITED = 1_000_000  # transformers writes int(1e30) for "no limit"
# Short, so that no tokenizer cuts them. Unless a tokenizer ignores case (marks), the ids of the two
# texts differ in at least one pair.
_CASES = (("A", "a"), ("The", "the"), ("DOG", "dog"))
_MARKS = (("a!", "a"), ("dog,", "dog"))
# Classes of transformers whose ids are those of their SentencePiece model.
_PLAIN_PIECES = ("T5", "Siglip", "Siglip2", "Gemma", "Llama", "Albert", "BigBird")
# Settings of open_clip's tokenizers that change ids and that ours lack.
UNSUPPORTED = ("strip_sep_token", "tokenizer_mode", "additional_special_tokens", "reduction_mask")
_TOKENS = ("pad_token", "eos_token", "bos_token", "cls_token", "sep_token")
_GENERIC = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_ID = re.compile("[0-9]{1,9}")
_SILENT = contextvars.ContextVar("silent", default=False)


class Stated(NamedTuple):
  """A value that a file states.

  Args:
    value: the value.
    where: the file and the key.
  """

  value: Any
  where: str


Statements = Mapping[str, Stated]


def value(statements: Statements, name: str, default: Any) -> Any:
  """The stated value, or the default where no file states it."""
  return statements[name].value if name in statements else default


class Tokenizer(Protocol):
  """What is compared of a tokenizer; see tokenizers.Tokenizer for the members."""

  length: int
  vocab_size: int
  pad: int
  prompt: str
  truncation_side: str

  @property
  def name(self) -> str: ...
  @property
  def first_id(self) -> int: ...
  @property
  def last_id(self) -> int: ...
  @property
  def adds_start(self) -> bool: ...
  @property
  def adds_end(self) -> bool: ...
  def token_id(self, token: str) -> int | None: ...
  def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


def near(folder: pathlib.Path) -> dict[str, Stated]:
  """What the files of a folder state about its tokenizer, as far as it changes ids.

  Args:
    folder: of tokenizer.json, a vocabulary or a SentencePiece model.

  Returns:
    Some of: pad_token, eos_token, bos_token, cls_token, sep_token (str); lower, canonicalize,
    starts, ends, accents, chinese (bool: whether case is ignored, punctuation too, a start or end
    token is added, accents are stripped, Chinese characters separated); text_lower
    (bool: texts are lower-cased before the tokenizer);
    length (int); padding_side, truncation_side, prompt, class (str); added_tokens ({token: id});
    special_tokens (list of str).

  Raises:
    ValueError: for a file that is not a JSON object.
  """
  stated: dict[str, Stated] = {}

  def put(name: str, given: Any, where: str, kind: type | tuple[type, ...]) -> None:
    if isinstance(given, Mapping) and isinstance(given.get("content"), str):
      given = given["content"]
    if name not in stated and isinstance(given, kind):
      stated[name] = Stated(given, where)

  file = folder / "tokenizer_config.json"
  settings = read(file)
  # As transformers reads them: without added_tokens_decoder, the other file comes first.
  special_file = folder / "special_tokens_map.json"
  special = read(special_file)
  special_first = special if "added_tokens_decoder" not in settings else {}
  for name in _TOKENS:
    put(name, special_first.get(name), f"{special_file}: {name}", str)
  given = settings.get("tokenizer_class")
  kind = _family(given) if isinstance(given, str) else ""
  for name, key, types in (
    ("class", "tokenizer_class", str),
    *((name, name, str) for name in _TOKENS),
    # Classes of any tokenizer.json do not read these.
    *(
      (name, key, bool)
      for name, key in (
        ("lower", "do_lower_case"),
        ("accents", "strip_accents"),
        ("chinese", "tokenize_chinese_chars"),
      )
      if given not in _GENERIC
    ),
    ("starts", "add_bos_token", bool),
    ("ends", "add_eos_token", bool),
    ("padding_side", "padding_side", str),
    ("truncation_side", "truncation_side", str),
  ):
    put(name, settings.get(key), f"{file}: {key}", types)
  if kind in ("Siglip", "Siglip2"):
    put("lower", True, f"{file}: tokenizer_class: {given}", bool)
  if kind == "Siglip":
    put("canonicalize", True, f"{file}: tokenizer_class: {given}", bool)
  decoder = settings.get("added_tokens_decoder")
  if isinstance(decoder, Mapping):
    tokens = {
      x["content"]: int(i)
      for i, x in decoder.items()
      if isinstance(x, Mapping) and isinstance(x.get("content"), str) and _ID.fullmatch(i)
    }
    put("added_tokens", tokens, f"{file}: added_tokens_decoder", dict)
  for name in _TOKENS:
    put(name, special.get(name), f"{special_file}: {name}", str)
  for key in ("additional_special_tokens", "extra_special_tokens"):
    for place, content in ((file, settings), (special_file, special)):
      more = content.get(key)
      entries = more if isinstance(more, list) else []
      texts = [x.get("content") if isinstance(x, Mapping) else x for x in entries]
      if texts and all(isinstance(x, str) for x in texts):
        put("special_tokens", texts, f"{place}: {key}", list)
  file = folder / "added_tokens.json"
  tokens = {k: v for k, v in read(file).items() if type(v) is int}
  if tokens:
    put("added_tokens", tokens, f"{file}", dict)
  _sentence(folder, put)
  length = settings.get("model_max_length")
  if type(length) is int and length < _UNLIMITED:
    put("length", length, f"{folder / 'tokenizer_config.json'}: model_max_length", int)
  return stated


def files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """The files that `near` reads. Copied into one folder, they state the same there.

  Args:
    folder: as of `near`.
  """
  top = _sentence_folder(folder) or folder
  found = [*(folder / name for name in _FILES), *(top / name for name in _SENTENCE_FILES)]
  return tuple(file for file in found if file.is_file())


def _sentence_folder(folder: pathlib.Path) -> pathlib.Path | None:
  """The folder of a sentence-transformers model, whose encoder may have a folder of its own."""
  return next((x for x in (folder, folder.parent) if (x / "modules.json").is_file()), None)


def _sentence(folder: pathlib.Path, put: Any) -> None:
  """The statements of sentence-transformers."""
  file = folder / "sentence_bert_config.json"
  sentence = read(file)
  put("text_lower", sentence.get("do_lower_case"), f"{file}: do_lower_case", bool)
  put("length", sentence.get("max_seq_length"), f"{file}: max_seq_length", int)
  top = _sentence_folder(folder)
  file = (top or folder) / "config_sentence_transformers.json"
  settings = read(file) if top else {}
  name, prompts = settings.get("default_prompt_name"), settings.get("prompts")
  if isinstance(name, str) and isinstance(prompts, Mapping):
    put("prompt", prompts.get(name), f"{file}: prompts: {name}", str)


def read(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; {} without the file.

  Raises:
    ValueError: for anything else, with the file.
  """
  if not file.is_file():
    return {}
  try:
    if file.stat().st_size > _LARGEST:
      raise ValueError(f"{file.stat().st_size} bytes are more than {_LARGEST}")
    content = json.loads(file.read_text("utf-8"))
    json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is not a text
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not a JSON object: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{file}: not a JSON object, but a {type(content).__name__}")
  return content


def token_id(tokenizer: Tokenizer, stated: Stated) -> int | None:
  """The id of a stated token: the number itself, or that of its text; None without such an id."""
  token = stated.value
  found = token if isinstance(token, int) else tokenizer.token_id(token)
  return found if found is not None and 0 <= found < tokenizer.vocab_size else None


def differences(tokenizer: Tokenizer, statements: Statements) -> list[str]:
  """Returns how the ids of a tokenizer differ from what files state; each text shows both values.

  Args:
    tokenizer: the tokenizer. Its behaviour is compared, not its options.
    statements: as of `near`.
  """
  lines = [
    *_token_differences(tokenizer, statements),
    *(
      f"{what} {ours!r}, but {statements[name].where} is {statements[name].value!r}"
      for name, what, ours in _behaviour(tokenizer, statements)
      if name in statements and statements[name].value != ours
    ),
  ]
  return lines


def _behaviour(tokenizer: Tokenizer, statements: Statements) -> list[tuple[str, str, Any]]:
  """[(name of a statement, what it is about, what the tokenizer does)]."""
  lower = _same(tokenizer, _CASES)
  lowered_before = value(statements, "text_lower", False)
  known = tokenizer.name != "sentencepiece" or _plain_pieces(statements)
  stated_class = value(statements, "class", "")
  return [
    # Lower-casing of the text before the tokenizer makes the tokenizer's own irrelevant.
    ("text_lower" if lowered_before else "lower", "the tokenizer ignores case:", lower),
    ("canonicalize", "it ignores case and punctuation:", lower and _same(tokenizer, _MARKS)),
    ("starts", "a token precedes each text:", tokenizer.adds_start),
    ("ends", "a token ends each text:", tokenizer.adds_end),
    ("length", "texts are cut at this number of tokens:", tokenizer.length),
    ("padding_side", "padding is on the side", "right"),
    ("truncation_side", "long texts are cut on the side", tokenizer.truncation_side),
    ("prompt", "the prompt before each text is", tokenizer.prompt),
    ("class", "ids are those of the SentencePiece model,", stated_class if known else None),
    *((x, f"{x} (not possible here) is", None) for x in UNSUPPORTED),
  ]


def _plain_pieces(statements: Statements) -> bool:
  """Whether the stated class has the ids of its SentencePiece model; XLM-RoBERTa shifts them."""
  name = str(value(statements, "class", ""))
  return not name or _family(name) in _PLAIN_PIECES


def _family(tokenizer_class: str) -> str:
  """The family of a tokenizer class of transformers: BertTokenizerFast → Bert."""
  return tokenizer_class.removesuffix("Fast").removesuffix("Tokenizer")


def _token_differences(tokenizer: Tokenizer, statements: Statements) -> list[str]:
  """The differences of special and added tokens."""
  lines = []
  ends = tokenizer.adds_end and value(statements, "ends", True)
  tokens = [("pad_token", "padding has the id", tokenizer.pad)]
  if ends:
    end = "eos_token" if "eos_token" in statements else "sep_token"
    tokens.append((end, "a text ends with the id", tokenizer.last_id))
  if tokenizer.adds_start and not tokenizer.prompt:
    start = "cls_token" if "cls_token" in statements else "bos_token"
    tokens.append((start, "a text begins with the id", tokenizer.first_id))
  for name, what, ours in tokens:
    if name not in statements:
      continue
    theirs = token_id(tokenizer, statements[name])
    if theirs != ours:
      token, where = statements[name]
      suffix = "which the vocabulary lacks" if theirs is None else f"the id {theirs}"
      lines.append(f"{what} {ours}, but {where} is {token!r}, {suffix}")
  for token, theirs in value(statements, "added_tokens", {}).items():
    found = tokenizer.token_id(token)
    if found != theirs:
      where = statements["added_tokens"].where
      lines.append(f"the token {token!r} has the id {found}, but {where} is {theirs}")
  lines += [
    f"the vocabulary lacks {token!r}, but {statements['special_tokens'].where} has it"
    for token in value(statements, "special_tokens", ())
    if tokenizer.token_id(token) is None
  ]
  return lines


def _same(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> bool:
  """Whether the two texts of each pair have the same ids."""
  sides = [tokenizer.encode_batch(texts) for texts in zip(*pairs)]
  return all(np.array_equal(*some) for some in zip(*sides))


@contextlib.contextmanager
def silent() -> Iterator[None]:
  """A context in which `warn` logs nothing: tokenizers are tried."""
  token = _SILENT.set(True)
  try:
    yield
  finally:
    _SILENT.reset(token)


def warn(tokenizer: Tokenizer, statements: Statements) -> None:
  """Logs the differences once, and not again in the processes that read data."""
  # A parent process has logged them.
  if _SILENT.get() or multiprocessing.parent_process() is not None:
    return
  if lines := differences(tokenizer, statements):
    _warn_once(f"tokenizer {tokenizer.name!r}: {tree.shown(lines, sep='; ', width=600)}")


@functools.lru_cache
def _warn_once(text: str) -> None:
  logging.warning("%s", text)
