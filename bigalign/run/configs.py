"""Configs by name, path or value, with overrides of single options.

A config is named as people type it: "siglip_b16", one of the shipped configs, which work from any
folder; or the path of a Python file that has a function `get_config()`. "FILE.py:TEXT" calls
`get_config(TEXT)`.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigalign import tree

Key = str | int  # of a mapping, or the place in a sequence

_FILE_AND_TEXT = re.compile(r"(?P<file>.*\.py):(?P<text>.*)", re.DOTALL)


def folder() -> pathlib.Path:
  """The folder of the shipped configs: inside the installed package, or configs/ of a checkout."""
  package = pathlib.Path(__file__).parents[1]
  installed = package / "configs"
  return installed if installed.is_dir() else package.parent / "configs"


def shipped() -> list[str]:
  """The names of the configs that are installed with the package, in alphabetical order."""
  return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def config_name(config: str | os.PathLike[str]) -> str:
  """The name of a config without folder and suffix: "configs/tiny.py" -> "tiny"."""
  return pathlib.Path(_split(config)[0]).stem


def find_file(config: str | os.PathLike[str]) -> pathlib.Path:
  """The file of a config.

  Args:
    config: the path of a file, or the name of a shipped config.

  Raises:
    FileNotFoundError: if there is neither; it names the nearest shipped config and all of them.
  """
  name = _split(config)[0]
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    return path
  known = shipped()
  if name in known:
    return folder() / f"{name}.py"
  near = path.stem if path.stem in known else ""
  hint = f" --config={near} is a shipped config." if near else tree.nearest(path.stem, known)
  raise FileNotFoundError(f"No config file {name}.{hint} Shipped configs: {', '.join(known)}")


def load_config(
  config: str | os.PathLike[str] | Mapping[str, Any] | ConfigDict,
  overrides: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """A config, read from its file or copied, with some options replaced.

  >>> load_config("tiny", {"optimizer.lr": 3e-4, "data__workers": 2}).optimizer.lr
  0.0003

  Args:
    config: the name of a shipped config, the path of a config file, or the config itself.
    overrides: {option: value}, applied in their order. "a.b.c" and "a__b__c" name the same option;
      "a.b[0]" is the first element of a sequence. Groups that the config does not write yet are
      created. A mapping replaces a whole group. Names and types are checked later, when the config
      is resolved.

  Raises:
    FileNotFoundError: for a config that does not exist.
    ValueError: for a file without get_config() or that is not Python, and for a place that cannot
      hold an option.
    TypeError: for a get_config() that does not return a config.
  """
  if isinstance(config, ConfigDict):
    read = config.copy_and_resolve_references()
  elif isinstance(config, Mapping):
    read = ConfigDict(copy.deepcopy(dict(config)))
  else:
    read = _read(config)
  # An option may get another type: a number of steps becomes "3 epochs".
  with read.unlocked(), read.ignore_type():
    for name, value in (overrides or {}).items():
      set_option(read, split_path(name), value)
  return read


def split_path(name: str) -> tuple[Key, ...]:
  """The keys of an option: "data.mixture[0].weight" -> ("data", "mixture", 0, "weight").

  >>> split_path("optimizer__lr"), split_path("loss.siglip.bias")
  (('optimizer', 'lr'), ('loss', 'siglip', 'bias'))

  Raises:
    ValueError: if it is not a path of names and indices.
  """
  text = name if re.search(r"[.\[]", name) else name.replace("__", ".")
  keys: list[Key] = []
  for part in text.split("."):
    found = re.fullmatch(r"(?P<key>[^\[\]]+)(?P<indices>(\[-?\d+\])*)", part)
    if not found:
      raise ValueError(
        f"{name!r} does not name an option; a name is written data.mixture[0].weight"
      )
    keys.append(found["key"])
    keys += [int(index) for index in re.findall(r"-?\d+", found["indices"])]
  return tuple(keys)


def join_path(keys: tuple[Key, ...]) -> str:
  """The inverse of split_path: ("data", "mixture", 0) -> "data.mixture[0]"."""
  return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def get_option(config: Any, keys: tuple[Key, ...]) -> Any:
  """The value at a path; None if the config does not write it."""
  for key in keys:
    if isinstance(key, int):
      is_there = isinstance(config, list | tuple) and -len(config) <= key < len(config)
    else:
      is_there = isinstance(config, Mapping | ConfigDict) and key in config
    if not is_there:
      return None
    config = config[key]
  return config


def set_option(config: Any, keys: tuple[Key, ...], value: Any, where: str = "config") -> None:
  """Sets an option of a ConfigDict or a dict in place; missing groups on the way are created.

  Args:
    config: of which the option is set.
    keys: see split_path.
    value: its new value.
    where: the place of `config`, for errors.

  Raises:
    ValueError: if there is a value instead of a group on the way, or a sequence is too short.
  """
  key, *rest = keys
  if not rest:
    config[key] = value
    return
  place = f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}"
  inner = config[key] if isinstance(key, int) or key in config else None
  if isinstance(rest[0], int):  # a tuple cannot be changed in place
    if not isinstance(inner, list | tuple) or not -len(inner) <= rest[0] < len(inner):
      length = len(inner) if isinstance(inner, list | tuple) else 0
      raise ValueError(f"{place} has no element {rest[0]}; its length is {length}")
    elements = [*inner]
    if rest[1:]:
      elements[rest[0]] = copy.deepcopy(elements[rest[0]])  # it may be the caller's
      set_option(elements, tuple(rest), value, place)
    else:
      elements[rest[0]] = value
    config[key] = type(inner)(elements)
    return
  if inner is None:
    config[key] = {}
    inner = config[key]
  elif not isinstance(inner, Mapping | ConfigDict):
    raise ValueError(f"{place}={inner!r} is not a group of options, so it has no {rest[0]!r}")
  set_option(inner, tuple(rest), value, place)


def _split(config: str | os.PathLike[str]) -> tuple[str, str | None]:
  """("FILE.py", "TEXT") of "FILE.py:TEXT"; the text is None without a colon."""
  text = os.fspath(config)
  found = _FILE_AND_TEXT.fullmatch(text)
  return (found["file"], found["text"]) if found else (text, None)


def _read(config: str | os.PathLike[str]) -> ConfigDict:
  path, argument = find_file(config), _split(config)[1]
  # The name is one that cannot hide an installed module.
  spec = importlib.util.spec_from_file_location(f"config file {path.stem}", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"{path} is not a Python file; a config file is one that has get_config()")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise ValueError(f"{error.filename or path}:{error.lineno}: {error.msg}") from error
  if not callable(getattr(module, "get_config", None)):
    raise ValueError(f"{path} has no function get_config() that returns a ConfigDict")
  made = module.get_config() if argument is None else module.get_config(argument)
  if isinstance(made, ConfigDict):
    return made
  if isinstance(made, Mapping):
    return ConfigDict(dict(made))
  raise TypeError(
    f"{path}: get_config() returned {type(made).__name__}; it must return a ConfigDict or a dict"
  )


def summary(name: str) -> str:
  """The first sentence of the docstring of a shipped config, which is not run for it."""
  text = ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text())) or ""
  paragraph = " ".join(text.split("\n\n")[0].split())
  return paragraph.split(": bigalign ")[0].rstrip(".")
