"""A table of names, strict and two-way: theirs -> ours to read, ours -> theirs to write.

A row says which of our paths and which of their keys hold the same numbers, and how the axes lie:
an einops pattern "theirs -> ours". The pattern reversed writes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import einops
import numpy as np


class Row(NamedTuple):
  """The same numbers on both sides.

  ours: a path, or several: theirs, divided. Axis "s" of the rule counts equal parts (query, key,
    value of one matrix); along axis "n" the first part has one row (a class token) and the second
    the others.
  theirs: a key, or several, which along axis "n" make one of ours.
  rule: "theirs -> ours"; empty where the axes lie the same way.
  layers: with "block_{}" in ours and "{}" in theirs: one row per layer. Theirs without "{}" is
    stacked, as ours under scan.
  optional: a tower may have no place for it.
  resize: how `positions.resize` fits the last of ours to another number of patches.
  """

  ours: str | tuple[str, ...]
  theirs: str | tuple[str, ...]
  rule: str = ""
  layers: int = 0
  optional: bool = False
  resize: str = ""


def rows(
  ours: str, theirs: str, names: Mapping[str, tuple[str, str]], layers: int = 0
) -> list[Row]:
  """Rows of one module: {our name: (their name, rule)}, with a prefix for each side."""
  return [Row(ours + name, theirs + other, rule, layers) for name, (other, rule) in names.items()]


def norm(ours: str, theirs: str, layers: int = 0) -> list[Row]:
  """A layer norm."""
  return rows(ours, theirs, {"/scale": (".weight", ""), "/bias": (".bias", "")}, layers)


def dense(ours: str, theirs: str, layers: int = 0, *, bias: bool = True) -> list[Row]:
  """A linear map, [out, in] in torch."""
  names = {"/kernel": (".weight", "o i -> i o"), "/bias": (".bias", "")}
  return rows(ours, theirs, names if bias else dict([*names.items()][:1]), layers)


def conv(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
  """A convolution of patches."""
  names = {"/kernel": (".weight", "d c p q -> p q c d"), "/bias": (".bias", "")}
  return rows(ours, theirs, names if bias else dict([*names.items()][:1]))


def attention(
  ours: str, theirs: str, names: tuple[str, str, str, str], layers: int = 0, biases: str = "qkvo"
) -> list[Row]:
  """Attention with a matrix each for query, key, value and output; heads lie first in torch."""
  found = []
  for name, other in zip(("query", "key", "value", "out"), names):
    rule = "d (h k) -> h k d" if name == "out" else "(h k) d -> d h k"
    found.append(Row(f"{ours}/{name}/kernel", f"{theirs}{other}.weight", rule, layers))
    if other and name[0] in biases:
      rule = "" if name == "out" else "(h k) -> h k"
      found.append(Row(f"{ours}/{name}/bias", f"{theirs}{other}.bias", rule, layers))
  return found


def fused(ours: tuple[str, ...], weight: str, bias: str, layers: int = 0) -> list[Row]:
  """Several of query, key and value in one matrix, one after the other."""
  kernels, biases = (tuple(f"{x}/{name}" for x in ours) for name in ("kernel", "bias"))
  return [
    Row(kernels, weight, "(s h k) d -> s d h k", layers),
    Row(biases, bias, "(s h k) -> s h k", layers),
  ]


class Step(NamedTuple):
  """A row, or one layer of it, for arrays of known shapes."""

  row: Row
  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]  # of ours
  layer: int | None = None  # the index in ours, where that is stacked
  slot: int | None = None  # the index in theirs, where that is stacked


def steps(row: Row, shapes: Mapping[str, Any]) -> list[Step]:
  """The steps of a row; none if `shapes` lacks its paths. Stacked layers count as their own."""
  ours, theirs = _tuple(row.ours), _tuple(row.theirs)
  if not row.layers:
    if not all(path in shapes for path in ours):
      return []
    return [Step(row, ours, theirs, tuple(tuple(shapes[path].shape) for path in ours))]
  found = []
  for i in range(row.layers):
    paths = tuple(path.format(i) for path in ours)
    layer = None
    if not all(path in shapes for path in paths):
      paths, layer = tuple(path.replace("block_{}", "blocks") for path in ours), i
      if not all(path in shapes for path in paths):
        return []
    of = tuple(tuple(shapes[path].shape)[(layer is not None) :] for path in paths)
    stacked = any("{}" not in key for key in theirs)
    keys = theirs if stacked else tuple(key.format(i) for key in theirs)
    found.append(Step(row, paths, keys, of, layer, i if stacked else None))
  return found


def keys(row: Row) -> list[str]:
  """All of their keys that a row speaks of."""
  return [key.format(i) for i in range(row.layers or 1) for key in _tuple(row.theirs)]


def expected(step: Step) -> tuple[tuple[int, ...], ...]:
  """The shapes that their tensors must have; a stacked one without its axis of layers."""
  left, _ = sides(step.row.rule)
  if not step.row.rule:
    return (step.shapes[0],)
  sizes = _sizes(step)
  shape = tuple(math.prod(sizes[name] for name in group) for group in left)
  if len(step.theirs) == 1:
    return (shape,)
  n = left.index(("n",))
  return tuple((*shape[:n], rows_, *shape[n + 1 :]) for rows_ in (1, shape[n] - 1))


def to_ours(step: Step, tensors: list[np.ndarray]) -> list[np.ndarray]:
  """Their tensors of one step as ours."""
  rule = step.row.rule
  if not rule:
    return tensors
  left, right = sides(rule)
  x = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, left.index(("n",)))
  x = _rearrange(x, rule, step)
  if len(step.ours) == 1:
    return [x]
  return list(x) if "s" in right else np.split(x, [1], right.index("n"))


def to_theirs(step: Step, arrays: list[np.ndarray]) -> list[np.ndarray]:
  """Our arrays of one step as theirs; the inverse of `to_ours`."""
  rule = step.row.rule
  if not rule:
    return arrays
  left, right = sides(rule)
  x = arrays[0]
  if len(arrays) > 1:
    x = np.stack(arrays) if "s" in right else np.concatenate(arrays, right.index("n"))
  theirs, ours = rule.split("->")
  x = _rearrange(x, f"{ours} -> {theirs}", step)
  return [x] if len(step.theirs) == 1 else np.split(x, [1], left.index(("n",)))


def _rearrange(x: np.ndarray, rule: str, step: Step) -> np.ndarray:
  sizes = {name: n for name, n in _sizes(step).items() if name not in ("1", "n")}
  return einops.rearrange(x, rule, **{k: v for k, v in sizes.items() if k in rule.split("->")[0]})


def _sizes(step: Step) -> dict[str, int]:
  """The length of every axis of a rule, from our shapes."""
  _, right = sides(step.row.rule)
  several = len(step.ours) > 1
  names = right[1:] if several and right[:1] == ("s",) else right
  sizes = {"1": 1, **({"s": len(step.ours)} if several else {})}
  for shape in step.shapes:
    if len(shape) != len(names):
      raise ValueError(f"{step.ours}: {shape} does not fit the rule {step.row.rule!r}")
    sizes.update(zip(names, shape))
    sizes["1"] = 1
  if several and "n" in names:
    sizes["n"] = sum(shape[names.index("n")] for shape in step.shapes)
  return sizes


@functools.cache
def sides(rule: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
  """ "(h k) d -> d h k" -> ((("h", "k"), ("d",)), ("d", "h", "k"))."""
  left, _, right = rule.partition("->")
  groups = re.findall(r"\(([^)]*)\)|(\w+)", left)
  return tuple(tuple((a or b).split()) for a, b in groups), tuple(right.split())


def _tuple(x: str | tuple[str, ...]) -> tuple[str, ...]:
  return (x,) if isinstance(x, str) else x
