"""The tokenizer of a pretrained text tower: options that its files state, and what differs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from bigalign.data.text import clip_text, stated
from bigalign.data.text.stated import Stated
from bigalign.data.text.tokenizers import Tokenizer, make_tokenizer
from bigalign.weights import Checkpoint

_FILLED = {"sentencepiece": ("pad", "eos"), "hf": ("pad", "prompt")}
# Options that say which tokenizer it is. If the first is given, the others are not filled in.
_IDENTITY = ("path", "lower", "canonicalize")
_PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_TEXTS = ("a photo of a dog", "Two CATS, on the beach!", "3 o'clock")
_ERRORS = (OSError, KeyError, TypeError, ValueError)  # of a tokenizer that cannot be made
# {cleaning of open_clip: (whether case is ignored, whether punctuation is)}
_CLEAN = {"lower": (True, False), "whitespace": (False, False), "canonicalize": (True, True)}


def of_checkpoint(checkpoint: Checkpoint, name: str | None = None) -> dict[str, Any] | None:
  """Returns the options of the tokenizer in the files of a checkpoint; None without one.

  If several files hold one, such as SigLIP's, the ids of the chosen one differ least from what the
  other files state.

  Args:
    checkpoint: with a text tower.
    name: of the tokenizer in TOKENIZERS, if only this kind is wanted.
  """
  statements = statements_of(checkpoint)
  best: tuple[int, dict[str, Any]] | None = None
  for options in _candidates(checkpoint, statements):
    if name not in (None, options["name"]):
      continue
    try:
      with stated.silent():
        tokenizer = make_tokenizer(**_with_pad(options, statements))
        count = len(stated.differences(tokenizer, statements))
    except _ERRORS:
      continue
    if best is None or count < best[0]:
      best = count, options
    if not count:
      break
  return None if best is None else best[1]


def _candidates(checkpoint: Checkpoint, statements: stated.Statements) -> Iterator[dict[str, Any]]:
  """The options of each tokenizer that the files may hold, the likeliest first."""
  length = dict(length=_length(checkpoint, statements))
  cleaning = {
    name: True for name in ("lower", "canonicalize") if stated.value(statements, name, False)
  }
  for folder in _folders(checkpoint):
    if (folder / "tokenizer.json").is_file():
      yield dict(name="hf", path=str(folder / "tokenizer.json"), **length)
    for name in _PIECES:
      if (folder / name).is_file():
        yield dict(name="sentencepiece", path=str(folder / name), **cleaning, **length)
    if (folder / "vocab.txt").is_file():
      lower = stated.value(statements, "lower", True)
      yield dict(name="wordpiece", path=str(folder / "vocab.txt"), lower=lower, **length)
  if checkpoint.kind == "open_clip" and _may_be_clip(checkpoint):
    try:
      clip_text.installed_vocabulary()
    except FileNotFoundError:
      return
    own = {k: stated.value(statements, k, k == "lower") for k in ("lower", "canonicalize")}
    yield dict(name="clip", **own, **length)


def _may_be_clip(checkpoint: Checkpoint) -> bool:
  """Whether an open_clip checkpoint may have open_clip's own tokenizer, CLIP's BPE.

  Not if the config names another tokenizer, and not next to a tokenizer.json for another vocabulary
  than CLIP's.
  """
  if checkpoint.model["text"]["name"] != "text" or _named(checkpoint) is not None:
    return False
  other = any((folder / "tokenizer.json").is_file() for folder in _folders(checkpoint))
  return not other or checkpoint.model["text"]["vocab_size"] == clip_text.SIZE


def _named(checkpoint: Checkpoint) -> tuple[str, str] | None:
  """(file and key, name) of the tokenizer that an open_clip_config.json names; None without."""
  if checkpoint.kind != "open_clip":
    return None
  where, text = _text_cfg(checkpoint.tensors.path.parent)
  for key in ("hf_tokenizer_name", "hf_model_name"):
    if text.get(key):
      return f"{where}: {key}", str(text[key])
  return None


def _folders(checkpoint: Checkpoint) -> list[pathlib.Path]:
  """The folders that may hold the tokenizer of a checkpoint."""
  return [*dict.fromkeys((checkpoint.tensors.path.parent, _folder(checkpoint)))]


def _folder(checkpoint: Checkpoint) -> pathlib.Path:
  """The folder of the checkpoint, in which that of its tensors may be."""
  return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _length(checkpoint: Checkpoint, statements: stated.Statements) -> int:
  """Ids of a text: as the files state it, but not more than the tower has positions."""
  positions = int(checkpoint.layout.data.get("length") or checkpoint.model["text"]["length"])
  return min(int(stated.value(statements, "length", positions)), positions)


def _with_pad(options: Mapping[str, Any], statements: stated.Statements) -> dict[str, Any]:
  """The options of a tokenizer with the stated id of padding, if the statement is a number."""
  pad = stated.value(statements, "pad_token", None)
  has_option = options["name"] in _FILLED or options["name"] == "clip"
  return {**options, "pad": pad} if has_option and type(pad) is int else dict(options)


def completed(
  checkpoint: Checkpoint, given: Mapping[str, Any] | None, init: str = ""
) -> dict[str, Any] | None:
  """Returns the options of a tokenizer with those that the files of a checkpoint state.

  Without a name or a file, the tokenizer is that of the checkpoint; without a length, it has that
  of the checkpoint. An option that is given and differs is kept; a warning shows both values, and
  all other differences of the ids.

  Args:
    checkpoint: of the text tower.
    given: options of the tokenizer; None for none.
    init: the path of the checkpoint as the config names it, with its variables.

  Returns:
    The options; None if none are given and the checkpoint has no tokenizer.

  Raises:
    ValueError: if none are given, and the checkpoint names a tokenizer whose files are missing.
  """
  return completed_and_compared(checkpoint, given, init)[0]


def completed_and_compared(
  checkpoint: Checkpoint, given: Mapping[str, Any] | None, init: str = ""
) -> tuple[dict[str, Any] | None, list[str]]:
  """Returns what `completed` returns, and the differences that it logs."""
  options = _identified(checkpoint, {k: v for k, v in (given or {}).items() if v is not None}, init)
  if "name" not in options:
    return options or None, []
  name = str(options["name"])
  try:
    tokenizer = make_tokenizer(**options)
  except _ERRORS:
    return options, []  # whoever opens the data reports it
  file = options.get("path")
  statements = statements_of(checkpoint, tokenizer.file.parent if tokenizer.file else None)
  before = dict(options)
  for option in _FILLED.get(name, ()):
    value, where = _stated(tokenizer, option, statements)
    ours = getattr(tokenizer, option)
    if options.get(option) is None and value not in (None, ours):
      logging.info(
        "config.data.tokenizer.%s=%r: stated in %s; %s alone gives %r",
        option,
        value,
        where,
        file,
        ours,
      )
      options[option] = value
  if options != before:
    tokenizer = make_tokenizer(**options)
  stated.warn(tokenizer, statements)
  differences = stated.differences(tokenizer, statements)  # which are logged now
  others = [] if differences else _other_ids(tokenizer, checkpoint)
  unknown = "pad_token" not in statements and options.get("pad") is None
  if unknown and _padding_matters(checkpoint.model["text"]):
    others.append(
      f"{checkpoint.path}: no file states which token pads, and the text tower sees padding; the"
      f" tokenizer {name!r} pads with {tokenizer.pad}. SigLIP pads with its end token, 1 in c4_en;"
      " SigLIP 2 with 0. Set config.data.tokenizer.pad"
    )
  for line in others:
    logging.warning("%s", line)
  return options, [*(f"config.data.tokenizer: {line}" for line in differences), *others]


def _identified(checkpoint: Checkpoint, given: dict[str, Any], init: str) -> dict[str, Any]:
  """The given options; name, file and length are those of the checkpoint where they are lacking."""
  options = dict(given)
  theirs = of_checkpoint(checkpoint, given.get("name")) if "path" not in given else None
  named = _named(checkpoint)
  if theirs is None and named is not None and not {"name", "path"} & given.keys():
    where, name = named
    raise ValueError(
      f"{where}: {name[:80]!r}, but {checkpoint.tensors.path.parent} holds no tokenizer. Copy its"
      f" tokenizer.json (or {', '.join(_PIECES)}, vocab.txt) there, or name one: tokenizer="
      "dict(name='hf', path='…/tokenizer.json'), in a config as config.data.tokenizer"
    )
  if theirs is not None and _refers_to(given, theirs):
    own = {k: v for k, v in theirs.items() if k in ("name", *_IDENTITY)}
    if "path" in own:
      own["path"] = _as_written(own["path"], checkpoint, init)
    options = own | options
    logging.info("config.data.tokenizer: %s, of %s", own, checkpoint.path)
  if "name" in options and "length" not in options:
    options["length"] = _length(checkpoint, statements_of(checkpoint))
    logging.info("config.data.tokenizer.length=%d, of %s", options["length"], checkpoint.path)
  if options != given:  # a tokenizer.json may not name its padding
    options = _with_pad(options, statements_of(checkpoint)) | given
  return options


def _refers_to(given: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """Whether options without a name or a file refer to this tokenizer."""
  if "name" not in given:
    return "path" not in given
  named = given["name"] == other["name"]
  return named and other.get("path") is not None and "path" not in given


def _as_written(path: str, checkpoint: Checkpoint, init: str) -> str:
  """The path of a file of a checkpoint, beginning with `init` and so with its variables."""
  folder = init if checkpoint.path.is_dir() else os.path.dirname(init)
  if not folder:
    return path
  inside = pathlib.Path(path).relative_to(_folder(checkpoint)).as_posix()
  return f"{folder.rstrip('/')}/{inside}"


def _other_ids(tokenizer: Tokenizer, checkpoint: Checkpoint) -> list[str]:
  """A text for which the tokenizer of the checkpoint gives other ids, if there is one."""
  folders = {x.resolve() for x in _folders(checkpoint)}
  if tokenizer.file is not None and tokenizer.file.resolve().parent in folders:
    return []
  theirs = of_checkpoint(checkpoint)
  if theirs is None or theirs["name"] == tokenizer.name == "clip":
    return []
  options = _with_pad({**theirs, "length": tokenizer.length}, statements_of(checkpoint))
  with stated.silent():
    other = make_tokenizer(**options)
  for text, ours, wanted in zip(_TEXTS, _ids(tokenizer), _ids(other)):
    if ours != wanted:
      return [
        f"config.data.tokenizer gives other ids than the tokenizer of {checkpoint.path}: for"
        f" {text!r} {ours}, not {wanted}"
      ]
  return []


def _ids(tokenizer: Tokenizer) -> list[list[int]]:
  """The ids of a few texts without padding."""
  ids, mask = tokenizer.encode_batch(_TEXTS)
  return [row[real].tolist() for row, real in zip(ids, mask)]


def as_recorded(given: Mapping[str, Any] | None, recorded: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of a tokenizer, those that `completed` filled in when the run began kept.

  Args:
    given: options of the tokenizer, as written; None for none.
    recorded: the same of the run that resumes, resolved.
  """
  given = {k: v for k, v in (given or {}).items() if v is not None}
  if given.get("name") not in (None, recorded["name"]):
    return given
  kept = {"name", "length", *_FILLED.get(recorded["name"], ())}
  if _refers_to(given, recorded):
    kept |= {*_IDENTITY}
  return {k: v for k, v in recorded.items() if k in kept and v is not None} | given


def _stated(tokenizer: Tokenizer, option: str, statements: stated.Statements) -> tuple[Any, str]:
  """(the stated value of an option of a tokenizer or None, its file and key)."""
  name = option if option == "prompt" else f"{option}_token"
  if name not in statements:
    return None, ""
  value, where = statements[name]
  return value if option == "prompt" else stated.token_id(tokenizer, statements[name]), where


def statements_of(checkpoint: Checkpoint, folder: pathlib.Path | None = None) -> dict[str, Stated]:
  """Returns what the files of a checkpoint state about its tokenizer.

  The files of a tokenizer come before config.json, as in transformers: the latter often holds the
  defaults of a class.

  Args:
    checkpoint: of the text tower.
    folder: of the tokenizer's file, if it is another one.
  """
  home = checkpoint.tensors.path.parent
  text = checkpoint.model["text"]
  statements = dict(stated.near(home))
  if "pad_token" not in statements:
    padding = stated.read(home / "tokenizer.json").get("padding")
    if isinstance(padding, Mapping) and isinstance(padding.get("pad_token"), str):
      statements["pad_token"] = Stated(padding["pad_token"], f"{home / 'tokenizer.json'}: padding")
  if folder is not None and folder.resolve() != home.resolve():
    statements = stated.near(folder) | statements
  if checkpoint.kind == "open_clip":
    return _open_clip(home) | statements
  file = home / "config.json"
  config = stated.read(file)
  inner, where = config, f"{file}"
  if isinstance(config.get("text_config"), Mapping):
    inner, where = config["text_config"], f"{file}: text_config"
  stated_by_config: dict[str, Stated] = {}
  pad = inner.get("pad_token_id", config.get("pad_token_id"))
  if type(pad) is int and _padding_matters(text):
    stated_by_config["pad_token"] = Stated(pad, f"{where}: pad_token_id")
  if text.get("pool") == "eos" and text.get("eos") is not None:
    stated_by_config["eos_token"] = Stated(text["eos"], f"{where}: eos_token_id")
  if _padding_matters(text):
    key = "max_position_embeddings" if file.is_file() else "positions"
    stated_by_config["length"] = Stated(
      text["length"], f"{where if file.is_file() else checkpoint.path}: {key}"
    )
  return stated_by_config | statements


def _padding_matters(text: Mapping[str, Any]) -> bool:
  """Whether a text tower sees padding: attention does not mask it, or it pools the last token."""
  if text["name"] != "text":
    return False
  unseen = text.get("causal", False) and text.get("pool") in ("argmax", "eos")
  return not unseen and (text.get("pool") == "last" or not text.get("mask_padding", True))


def _open_clip(folder: pathlib.Path) -> dict[str, Stated]:
  """What the text_cfg of an open_clip_config.json states."""
  where, text = _text_cfg(folder)
  if not text:
    return {}
  settings = text.get("tokenizer_kwargs")
  settings = settings if isinstance(settings, Mapping) else {}
  own = "hf_tokenizer_name" not in text
  clean = settings.get("clean", "lower" if own else None)
  statements = {"length": Stated(text.get("context_length", 77), f"{where}: context_length")}
  if own:
    statements["pad_token"] = Stated(0, f"{where}: open_clip's own tokenizer pads with")
  if clean in _CLEAN:
    place = f"{where}: tokenizer_kwargs: clean={clean!r}: "
    lower, bare = _CLEAN[clean]
    if own or lower:
      statements["lower"] = Stated(lower, f"{place}lower")
    if own or bare:
      statements["canonicalize"] = Stated(bare, f"{place}canonicalize")
  for key in stated.UNSUPPORTED:
    value = settings.get(key, text.get(key))
    if value:
      statements[key] = Stated(value, f"{where}: tokenizer_kwargs: {key}")
  return statements


def _text_cfg(folder: pathlib.Path) -> tuple[str, Mapping[str, Any]]:
  """(file and key, text_cfg) of an open_clip_config.json; an empty one if there is none."""
  file = folder / "open_clip_config.json"
  config = stated.read(file).get("model_cfg")
  text = config.get("text_cfg") if isinstance(config, Mapping) else None
  return f"{file}: text_cfg", text if isinstance(text, Mapping) else {}
