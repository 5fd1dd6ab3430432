"""What an exported folder makes public of the options of a run.

Addresses lose the user and the password. On the hub, paths of this machine lose their folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_USER = re.compile(r"(?<=://)[^/\s\"'`]*@")
_PATTERNS = ("rules", "frozen", "fresh", "drop", "optimizer")  # their texts are not paths
# A part of a source: a kind, such as "parquet:", and an absolute path.
_PATH = re.compile(r"(\s*(?:\w+:)?)/(?!/)(.*)", re.DOTALL)


def without_users(value: Any) -> Any:
  """A plain value with "https://host/…" instead of "https://user:token@host/…" everywhere."""
  return _changed(value, lambda text: _USER.sub("", text))


def facts(about: Mapping[str, Any]) -> dict[str, Any]:
  """The content of bigalign.json for the hub."""
  config = _changed(about.get("config", {}), _name, _PATTERNS)
  return dict(without_users({**about, "config": config}))


def card(text: str, about: Mapping[str, Any]) -> str:
  """A model card for the hub.

  Args:
    text: README.md of the exported folder.
    about: the content of its bigalign.json.
  """
  names: dict[str, str] = {}
  _changed(about.get("config", {}), lambda x: names.setdefault(x, _name(x)), _PATTERNS)
  for path, name in names.items():
    if path != name:  # the options quote it, and so does the table of the training
      text = text.replace(json.dumps(path), json.dumps(name)).replace(f"`{path}`", f"`{name}`")
  return str(without_users(text))


def _name(text: str) -> str:
  """A source or a path without the folders of this machine."""
  parts = []
  for part in text.split("::"):
    match = _PATH.fullmatch(part)
    name = match[2].rstrip("/").rpartition("/")[2] if match else ""
    parts.append(f"{match[1]}{name}" if match and name else part)
  return "::".join(parts)


def _changed(value: Any, change: Callable[[str], str], but: tuple[str, ...] = ()) -> Any:
  """A plain value with all its texts changed, except those below the keys `but`."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {key: x if key in but else _changed(x, change, but) for key, x in value.items()}
  return [_changed(x, change, but) for x in value] if isinstance(value, list | tuple) else value
