"""A strict two-way table of keys: theirs -> ours to read, ours -> theirs to write.

A row lists our paths and their keys for the same numbers, and the order of the axes as an einops
pattern "theirs -> ours". The reversed pattern writes.
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

  Args:
    ours: a path, or several, into which their tensor is split: along axis "s" of the rule into
      equal parts (query, key and value of one matrix), or along axis "n" into the first row (a
      class token) and the others.
    theirs: a key, or several, which are concatenated along axis "n".
    rule: the einops pattern "theirs -> ours"; empty if the axes are the same.
    layers: with "block_{}" in ours and "{}" in theirs: the number of layers. Theirs without "{}"
      is stacked, as ours is under scan.
    optional: whether our tower may lack it.
    resize: method of `positions.resize` for the last of ours, for another number of patches.
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
  """Rows of one module.

  Args:
    ours: prefix of our paths.
    theirs: prefix of their keys.
    names: {rest of our path: (rest of their key, rule)}.
    layers: number of layers; 0 for a module outside of blocks.
  """
  return [Row(ours + name, theirs + other, rule, layers) for name, (other, rule) in names.items()]


def norm(ours: str, theirs: str, layers: int = 0) -> list[Row]:
  """Rows of a layer norm."""
  return rows(ours, theirs, {"/scale": (".weight", ""), "/bias": (".bias", "")}, layers)


def dense(ours: str, theirs: str, layers: int = 0, *, bias: bool = True) -> list[Row]:
  """Rows of a linear map, [out, in] in torch."""
  names = {"/kernel": (".weight", "o i -> i o"), "/bias": (".bias", "")}
  return rows(ours, theirs, names if bias else dict([*names.items()][:1]), layers)


def conv(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
  """Rows of a convolution of patches."""
  names = {"/kernel": (".weight", "d c p q -> p q c d"), "/bias": (".bias", "")}
  return rows(ours, theirs, names if bias else dict([*names.items()][:1]))


def attention(
  ours: str, theirs: str, names: tuple[str, str, str, str], layers: int = 0, biases: str = "qkvo"
) -> list[Row]:
  """Rows of attention with one matrix each for query, key, value and output.

  Args:
    ours: prefix of our paths.
    theirs: prefix of their keys.
    names: their names of query, key, value and output.
    layers: number of layers.
    biases: which of q, k, v and o(utput) have a bias.
  """
  projections = []
  for name, other in zip(("query", "key", "value", "out"), names):
    rule = "d (h k) -> h k d" if name == "out" else "(h k) d -> d h k"
    projections.append(Row(f"{ours}/{name}/kernel", f"{theirs}{other}.weight", rule, layers))
    if other and name[0] in biases:
      rule = "" if name == "out" else "(h k) -> h k"
      projections.append(Row(f"{ours}/{name}/bias", f"{theirs}{other}.bias", rule, layers))
  return projections


def fused(ours: tuple[str, ...], weight: str, bias: str, layers: int = 0) -> list[Row]:
  """Rows of one matrix that concatenates several of query, key and value."""
  kernels, biases = (tuple(f"{x}/{name}" for x in ours) for name in ("kernel", "bias"))
  return [
    Row(kernels, weight, "(s h k) d -> s d h k", layers),
    Row(biases, bias, "(s h k) -> s h k", layers),
  ]


class Conversion(NamedTuple):
  """A row, or one layer of it, for arrays of known shapes.

  Args:
    row: the row.
    ours: our paths.
    theirs: their keys.
    shapes: the shapes of our arrays, of one layer if they are stacked.
    layer: index of the layer in our arrays; None if they are not stacked.
    their_layer: index of the layer in their tensors; None if they are not stacked.
  """

  row: Row
  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  layer: int | None = None
  their_layer: int | None = None


def conversions(row: Row, shapes: Mapping[str, Any]) -> list[Conversion]:
  """The conversions of a row, one per layer; none if a path is missing in `shapes`."""
  ours, theirs = _tuple(row.ours), _tuple(row.theirs)
  if not row.layers:
    if not all(path in shapes for path in ours):
      return []
    return [Conversion(row, ours, theirs, tuple(tuple(shapes[path].shape) for path in ours))]
  layers = []
  for i in range(row.layers):
    paths = tuple(path.format(i) for path in ours)
    layer = None
    if not all(path in shapes for path in paths):
      paths, layer = tuple(path.replace("block_{}", "blocks") for path in ours), i
      if not all(path in shapes for path in paths):
        return []
    sizes = tuple(tuple(shapes[path].shape)[(layer is not None) :] for path in paths)
    stacked = any("{}" not in key for key in theirs)
    keys = theirs if stacked else tuple(key.format(i) for key in theirs)
    layers.append(Conversion(row, paths, keys, sizes, layer, i if stacked else None))
  return layers


def keys(row: Row) -> list[str]:
  """All of their keys in a row, of all layers."""
  return [key.format(i) for i in range(row.layers or 1) for key in _tuple(row.theirs)]


def expected(conversion: Conversion) -> tuple[tuple[int, ...], ...]:
  """The shapes that their tensors must have; without the axis of layers if they are stacked."""
  left, _ = sides(conversion.row.rule)
  if not conversion.row.rule:
    return (conversion.shapes[0],)
  sizes = _sizes(conversion)
  shape = tuple(math.prod(sizes[name] for name in group) for group in left)
  if len(conversion.theirs) == 1:
    return (shape,)
  n = left.index(("n",))
  return tuple((*shape[:n], count, *shape[n + 1 :]) for count in (1, shape[n] - 1))


def to_ours(conversion: Conversion, tensors: list[np.ndarray]) -> list[np.ndarray]:
  """Their tensors of one conversion as ours."""
  rule = conversion.row.rule
  if not rule:
    return tensors
  left, right = sides(rule)
  x = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, left.index(("n",)))
  x = _rearrange(x, rule, conversion)
  if len(conversion.ours) == 1:
    return [x]
  return list(x) if "s" in right else np.split(x, [1], right.index("n"))


def to_theirs(conversion: Conversion, arrays: list[np.ndarray]) -> list[np.ndarray]:
  """Our arrays of one conversion as theirs; the inverse of `to_ours`."""
  rule = conversion.row.rule
  if not rule:
    return arrays
  left, right = sides(rule)
  x = arrays[0]
  if len(arrays) > 1:
    x = np.stack(arrays) if "s" in right else np.concatenate(arrays, right.index("n"))
  theirs, ours = rule.split("->")
  x = _rearrange(x, f"{ours} -> {theirs}", conversion)
  return [x] if len(conversion.theirs) == 1 else np.split(x, [1], left.index(("n",)))


def _rearrange(x: np.ndarray, rule: str, conversion: Conversion) -> np.ndarray:
  """einops.rearrange with the sizes that the left side of the rule needs."""
  sizes = {name: n for name, n in _sizes(conversion).items() if name not in ("1", "n")}
  rearranged: np.ndarray = einops.rearrange(
    x, rule, **{k: v for k, v in sizes.items() if k in rule.split("->")[0]}
  )
  return rearranged


def _sizes(conversion: Conversion) -> dict[str, int]:
  """The length of every axis of a rule, from our shapes."""
  _, right = sides(conversion.row.rule)
  several = len(conversion.ours) > 1
  names = right[1:] if several and right[:1] == ("s",) else right
  sizes = {"1": 1, **({"s": len(conversion.ours)} if several else {})}
  for shape in conversion.shapes:
    if len(shape) != len(names):
      raise ValueError(f"{conversion.ours}: {shape} does not fit the rule {conversion.row.rule!r}")
    sizes.update(zip(names, shape))
    sizes["1"] = 1
  if several and "n" in names:
    sizes["n"] = sum(shape[names.index("n")] for shape in conversion.shapes)
  return sizes


@functools.cache
def sides(rule: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
  """ "(h k) d -> d h k" -> ((("h", "k"), ("d",)), ("d", "h", "k"))."""
  left, _, right = rule.partition("->")
  groups = re.findall(r"\(([^)]*)\)|(\w+)", left)
  return tuple(tuple((a or b).split()) for a, b in groups), tuple(right.split())


def _tuple(x: str | tuple[str, ...]) -> tuple[str, ...]:
  """A path or key, or several, as a tuple."""
  return (x,) if isinstance(x, str) else x
