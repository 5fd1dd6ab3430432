"""Trees addressed by path: {"model/image_tower/ln/scale": array}."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": x}} -> {"a/b": x}; the order of the keys is kept, empty dicts vanish."""
  flat: dict[str, Any] = {}
  for name, value in nested.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{name}/"))
    else:
      flat[prefix + name] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} -> {"a": {"b": x}}, the inverse of `flatten`."""
  nested: dict[str, Any] = {}
  for path, value in flat.items():
    put(nested, path, value)
  return nested


def put(nested: dict[str, Any], path: str, value: Any) -> None:
  """Sets what is at a path, in place; dicts on the way are made."""
  *parents, name = path.split("/")
  for parent in parents:
    nested = nested.setdefault(parent, {})
  nested[name] = value


def subtree(flat: Mapping[str, T], prefix: str) -> dict[str, T]:
  """The entries under `prefix` ("model/"), with the prefix taken off."""
  return {path[len(prefix) :]: x for path, x in flat.items() if path.startswith(prefix)}


def partition(
  flat: Mapping[str, T], pattern: str, what: str = "pattern"
) -> tuple[dict[str, T], dict[str, T]]:
  """Splits by a regular expression searched in the path: (matching, rest).

  The empty pattern matches nothing.

  Raises:
    ValueError: for a pattern that matches no path, or that means some layers of a scanned tower,
      whose layers are one stacked array.
  """
  if not pattern:
    return {}, dict(flat)
  hit = {path: x for path, x in flat.items() if re.search(pattern, path)}
  apart = [path for path, x in flat.items() if _tells_layers_apart(pattern, path, x)]
  if apart or not hit:
    found = f"tells the layers of {apart[0]} apart" if apart else "matches no path"
    raise ValueError(
      f"{what}: {pattern!r} {found}. A tower with scan=True holds all its layers in one"
      f" array per parameter (…/blocks/…); scan=False gives each its own (…/block_3/…)."
      f" Paths: {sorted(flat)}"
    )
  return hit, {path: x for path, x in flat.items() if path not in hit}


def is_stacked(path: str) -> bool:
  """Whether a parameter holds all blocks of a scanned tower, with the layer as its first axis."""
  return "/blocks/" in path


def layer_path(path: str, layer: int) -> str:
  """The path that one layer of a stacked parameter has in a tower without scan."""
  return path.replace("/blocks/", f"/block_{layer}/")


def _tells_layers_apart(pattern: str, path: str, stack: Any) -> bool:
  """Whether the pattern would take some layers of a stack but not all, or all but not the stack."""
  if not is_stacked(path):
    return False
  layers = (layer_path(path, i) for i in range(stack.shape[0]))
  taken = {bool(re.search(pattern, layer)) for layer in layers}
  return taken == {True, False} or (taken == {True} and not re.search(pattern, path))


def match(
  rules: Sequence[tuple[str, T]],
  paths: Iterable[str],
  what: str = "rules",
  idle_rules: bool = False,
) -> dict[str, T]:
  """The value of the first rule (regular expression, value) found in each path.

  Args:
    rules: in their order.
    paths: to be matched.
    what: the place of the rules in the config, for errors.
    idle_rules: whether rules may match no path, as general defaults do.

  Raises:
    ValueError: for a path that no rule matches, and for a rule that is first for no path.
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
    raise ValueError(f"{what}: no rule matches {missing}. Rules: {[r for r, _ in rules]}")
  idle = [pattern for i, (pattern, _) in enumerate(rules) if i not in used]
  if idle and not idle_rules:
    raise ValueError(f"{what}: rules {idle} match no path that is left to them. Paths: {paths}")
  return chosen


def nearest(name: str, known: Iterable[str]) -> str:
  """ " Did you mean 'width'?" where something known is near, else the empty string."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean {close[0]!r}?" if close else ""
