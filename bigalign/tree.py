"""Trees of arrays addressed by path: {"model/image_tower/ln/scale": array}. Names in errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

SHOWN = 8  # names of a list in an error


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested dicts as one dict of paths: {"a": {"b": x}} -> {"a/b": x}.

  Args:
    nested: dicts of dicts; the order of the keys is kept, empty dicts vanish.
    prefix: start of all paths.
  """
  flat: dict[str, Any] = {}
  for name, value in nested.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{name}/"))
    else:
      flat[prefix + name] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts from a dict of paths: {"a/b": x} -> {"a": {"b": x}}."""
  nested: dict[str, Any] = {}
  for path, value in flat.items():
    put(nested, path, value)
  return nested


def put(nested: dict[str, Any], path: str, value: Any) -> None:
  """Sets the value at a path, in place; missing dicts on the way are created."""
  *parents, name = path.split("/")
  for parent in parents:
    nested = nested.setdefault(parent, {})
  nested[name] = value


def subtree(flat: Mapping[str, T], prefix: str) -> dict[str, T]:
  """Returns the entries under `prefix` ("model/"), with the prefix removed from their paths."""
  return {path[len(prefix) :]: x for path, x in flat.items() if path.startswith(prefix)}


def partition(
  flat: Mapping[str, T], pattern: str, what: str = "pattern"
) -> tuple[dict[str, T], dict[str, T]]:
  """Splits a tree by a regular expression that is searched in the paths.

  Args:
    flat: {path: array}.
    pattern: the regular expression; the empty one matches nothing.
    what: the option that holds the pattern, for the error.

  Returns:
    (matching entries, the others).

  Raises:
    ValueError: if no path matches, or if the pattern selects some layers of a scanned tower, whose
      layers are one stacked array.
  """
  if not pattern:
    return {}, dict(flat)
  hit = {path: x for path, x in flat.items() if re.search(pattern, path)}
  split = [path for path, x in flat.items() if _selects_some_layers(pattern, path, x)]
  if split or not hit:
    problem = f"selects some layers of {split[0]}" if split else "matches no path"
    raise ValueError(
      f"{what}: {pattern!r} {problem}. A tower with scan=True holds all its layers in one"
      f" array per parameter (…/blocks/…); scan=False gives each its own (…/block_3/…)."
      f" Paths: {shown(sorted(flat))}"
    )
  return hit, {path: x for path, x in flat.items() if path not in hit}


def is_stacked(path: str) -> bool:
  """Whether a parameter holds all blocks of a scanned tower, with the layer as its first axis."""
  return "/blocks/" in path


def layer_path(path: str, layer: int) -> str:
  """The path that one layer of a stacked parameter has in a tower without scan."""
  return path.replace("/blocks/", f"/block_{layer}/")


def _selects_some_layers(pattern: str, path: str, stack: Any) -> bool:
  """Whether a pattern matches some layers of a stacked array, or all of them but not the array."""
  if not is_stacked(path):
    return False
  layers = (layer_path(path, i) for i in range(stack.shape[0]))
  matches = {bool(re.search(pattern, layer)) for layer in layers}
  return matches == {True, False} or (matches == {True} and not re.search(pattern, path))


def match(
  rules: Sequence[tuple[str, T]],
  paths: Iterable[str],
  what: str = "rules",
  idle_rules: bool = False,
) -> dict[str, T]:
  """Returns the value of the first rule that matches each path.

  Args:
    rules: (regular expression, value) pairs; the expression is searched in the path.
    paths: the paths to match.
    what: the option that holds the rules, for errors.
    idle_rules: whether a rule may be the first for no path, as general defaults may.

  Returns:
    {path: value}.

  Raises:
    ValueError: for a path that no rule matches, and for a rule that is the first for no path.
  """
  paths = list(paths)
  chosen: dict[str, T] = {}
  used: set[int] = set()
  for path in paths:
    for i, (pattern, value) in enumerate(rules):
      if re.search(pattern, path):
        chosen[path] = value
        used.add(i)
        break
  missing = [path for path in paths if path not in chosen]
  if missing:
    listed = shown(pattern for pattern, _ in rules)
    raise ValueError(f"{what}: no rule matches {shown(missing)}. Rules: {listed}")
  idle = [pattern for i, (pattern, _) in enumerate(rules) if i not in used]
  if idle and not idle_rules:
    raise ValueError(
      f"{what}: rules {shown(idle)} match no path that earlier rules do not match. Paths:"
      f" {shown(paths)}"
    )
  return chosen


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean 'width'?" for a similar known name, or ""."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def shown(names: Iterable[Any], *, sep: str = "", width: int = 80) -> str:
  """Returns a list as text, for an error: its first 8 entries and the number of the others.

  >>> shown(range(10)), shown("abc", sep=", ")
  ('[0, 1, 2, 3, 4, 5, 6, 7] and 2 more', 'a, b, c')

  Args:
    names: the entries.
    sep: is between the entries; by default they are written as Python writes a list.
    width: characters of an entry that are shown.
  """
  every = [*names]
  first = [cut(str(name), width) if isinstance(name, str) else name for name in every[:SHOWN]]
  text = sep.join(map(str, first)) if sep else f"{first}"
  return text if len(every) <= SHOWN else f"{text} and {len(every) - SHOWN} more"


def cut(text: str, most: int) -> str:
  """Returns a text; if it is longer than `most` characters, its beginning and its length."""
  return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
