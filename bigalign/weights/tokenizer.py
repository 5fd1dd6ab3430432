"""The tokenizer of a pretrained text tower: options that its files state, and what differs."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from bigalign.data.text import stated
from bigalign.data.text.stated import Stated
from bigalign.data.text.tokenizers import Tokenizer, make_tokenizer
from bigalign.weights import Checkpoint

_FILLED = {"sentencepiece": ("pad", "eos"), "hf": ("pad", "prompt")}
# {cleaning of open_clip: (whether case is ignored, whether punctuation is)}
_CLEAN = {"lower": (True, False), "whitespace": (False, False), "canonicalize": (True, True)}


def completed(checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of a tokenizer with those that the files of a checkpoint state.

  An option that is given and differs is kept; a warning shows both values, and all other
  differences of the ids.

  Args:
    checkpoint: of the text tower.
    given: options of the tokenizer, with its name.
  """
  name = str(given.get("name"))
  try:
    tokenizer = make_tokenizer(**given)
  except (OSError, KeyError, TypeError, ValueError):
    return dict(given)  # whoever opens the data reports it
  file = given.get("path")
  statements = statements_of(checkpoint, tokenizer.file.parent if tokenizer.file else None)
  options = dict(given)
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
  if options != given:
    tokenizer = make_tokenizer(**options)
  stated.warn(tokenizer, statements)
  unknown = "pad_token" not in statements and given.get("pad") is None
  if unknown and _padding_matters(checkpoint.model["text"]):
    logging.warning(
      "%s: no file states which token pads, and the text tower sees padding; the tokenizer %r"
      " pads with %d. SigLIP pads with its end token, 1 in c4_en; SigLIP 2 with 0. Set"
      " config.data.tokenizer.pad",
      checkpoint.path,
      name,
      tokenizer.pad,
    )
  return options


def as_recorded(given: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of a tokenizer, those that `completed` filled in when the run began kept.

  Args:
    given: options of the tokenizer, as written.
    recorded: the same of the run that resumes, resolved.
  """
  same = given.get("name") == recorded.get("name")
  kept = {x: recorded.get(x) for x in _FILLED.get(str(given.get("name")), ()) if same}
  return {**given, **{k: v for k, v in kept.items() if v is not None and given.get(k) is None}}


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
  file = folder / "open_clip_config.json"
  config = stated.read(file).get("model_cfg")
  text = config.get("text_cfg") if isinstance(config, Mapping) else None
  if not isinstance(text, Mapping):
    return {}
  where = f"{file}: text_cfg"
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
