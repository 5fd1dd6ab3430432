"""Views: the samples of a source that pass a filter, a deduplication or a list.

  bigalign view 'DIR/{00000..00099}.tar' --where 'width >= 200 and json.similarity > 0.28' \\
      --unique sha256 --out good

A view is computed once, offline, from the columns of `bigalign index --stats`; a run filters
nothing while it reads. good.npy holds the indices of the kept samples, ascending, 4 bytes each;
good.json holds the source, the rule, and how many samples each part of the rule removed.
config.data.view="good" reads them. The samples of a view are numbered again without gaps, so the
tables of a loss have a row for each kept sample. A run does not resume with another view, because
its fingerprint differs.

--columns score=NAME adds a column that `bigalign score`, `noise` or `balance` wrote, and --draw
keeps each sample with the probability in such a column.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import operator
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.files import fingerprints, storage
from bigalign.data.files.patterns import expand_variables
from bigalign.data.sources.base import Source, prefetch, value, where
from bigalign.data.tar import stats

Columns = Mapping[str, np.ndarray]
_BLOCK = 1 << 16  # samples that share a generator; the numbers of `draw` depend on it

_OPERATIONS: dict[type, Callable[..., Any]] = {
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.USub: operator.neg,
  ast.Not: np.logical_not,
  ast.And: np.logical_and,
  ast.Or: np.logical_or,
}


class View:
  """The samples of a source that a view keeps.

  Attributes:
    source: that the view was made of.

  Args:
    source: that the view was made of.
    path: of the view, without .npy or .json; may hold $NAME.

  Raises:
    ValueError: if the view was made of another source, or the source changed since.
    FileNotFoundError: if the view does not exist.
  """

  def __init__(self, source: Source, path: str):
    name = expand_variables(path, what="config.data.view")
    manifest = _manifest(name)
    if manifest["fingerprint"] != source.fingerprint:
      raise ValueError(
        f"config.data.view={path!r} was made of {manifest['source']!r}, fingerprint"
        f" {manifest['fingerprint']}, but the source is {source!r}, {source.fingerprint}. It is"
        " another one, or changed since; make the view again with bigalign view"
      )
    self.source, self._path = source, path
    # The lower 32 bits of each kept index, and how many are below 2**32, below 2 * 2**32, ...
    self._low = np.load(f"{name}.npy", mmap_mode="r")
    self._ends = np.cumsum(manifest["kept_per_2**32"])
    self.fingerprint = fingerprints.of_names(source.fingerprint, manifest["kept_sha256"])
    self.classnames = getattr(source, "classnames", ())
    # Adjacent samples of a view are read together only if they are adjacent in the source.
    self.block = getattr(source, "block", 1)

  def __reduce__(self) -> tuple[Any, ...]:
    return View, (self.source, self._path)  # without the memory map

  def __repr__(self) -> str:
    return f"View({self.source!r}, {self._path!r})"

  def __len__(self) -> int:
    return len(self._low)

  def __getitem__(self, i: int) -> dict[str, Any]:
    if not 0 <= i < len(self):
      raise IndexError(f"{self!r} has {len(self)} samples; asked for {i}")
    return self.source[self.index(i)]

  def value(self, i: int, path: str) -> Any:
    """Returns one stored value of sample i."""
    return value(self.source, self.index(i), path)

  def where(self, i: int) -> tuple[str, int, int]:
    """Returns the file of sample i, its place there, and the samples in that file."""
    return where(self.source, self.index(i))

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Lets the source begin to fetch samples."""
    # Each sample may bring left-out neighbours with it, at most a block.
    fetched = min(-(-len(self.source) // len(self)), self.block)
    prefetch(self.source, map(self.index, ids), hold=hold * fetched)

  def index(self, i: int) -> int:
    """The index of sample i in the source."""
    high = int(np.searchsorted(self._ends, i, side="right"))
    return (high << 32) + int(self._low[i])


def make_view(
  source: Source,
  out: str,
  *,
  spec: str = "",
  rule: str = "",
  unique: str = "",
  ids: np.ndarray | None = None,
  columns: Columns | None = None,
  draw: str = "",
  seed: int = 0,
) -> dict[str, Any]:
  """Writes the view out.npy and out.json.

  Args:
    source: with columns, for `rule` and `unique`.
    out: path of the view.
    spec: the text that names the source, for the manifest.
    rule: a comparison of columns and numbers with and, or, not, + - * /. A comparison with a value
      that a sample does not have is false.
    unique: a column; of samples with equal values the first one is kept, and all samples without a
      value. Hashes, and integers from 2**53 on, are compared by 64 bits; all are held in memory, 8
      bytes each.
    ids: indices of the samples to choose from; all if None.
    columns: {name: [N]}, more columns for `rule`, `unique` and `draw`, which need no stats then.
    draw: the name of one of `columns`; each sample that is left is kept with this probability, by a
      random number that its index and `seed` decide.
    seed: of `draw`.

  Returns:
    The manifest, which is the content of out.json.

  Raises:
    ValueError: for a wrong rule, an unknown column, an id that is too large, or if no sample is
      left.
  """
  more = dict(columns or {})
  if draw and draw not in more:
    raise ValueError(f"draw={draw!r} is not one of the given columns {tree.shown([*more])}")
  kept, removed = _filtered(source, rule, more) if rule else (np.arange(len(source)), {})
  if ids is not None:
    ids = np.unique(np.asarray(ids, np.int64))
    if ids.size and (ids[0] < 0 or ids[-1] >= len(source)):
      raise ValueError(
        f"the list holds {ids[0]} to {ids[-1]}, but {source!r} has only samples 0 to"
        f" {len(source) - 1}"
      )
    chosen = np.intersect1d(kept, ids, assume_unique=True)
    removed["not in the list"] = len(kept) - len(chosen)
    kept = chosen
  if unique:
    every = [_words(part, unique, source) for part in _columns(source, more, {unique})]
    values = np.concatenate([words for words, _ in every])[kept]
    known = np.concatenate([have for _, have in every])[kept]
    _, first = np.unique(values[known], return_index=True)
    chosen = np.union1d(np.flatnonzero(known)[first], np.flatnonzero(~known))
    removed[f"{unique} of a sample before"] = len(kept) - len(chosen)
    kept = kept[chosen]
  if draw:
    chosen = _drawn(kept, more[draw], seed)
    removed[f"not drawn with the probability {draw}"] = len(kept) - len(chosen)
    kept = chosen
  if not len(kept):
    raise ValueError(f"{source!r}: no sample is left of {len(source)}: {removed}")
  made_by: dict[str, Any] = dict(source=spec, where=rule, unique=unique)
  if draw:
    made_by |= dict(draw=draw, seed=seed)
  return _write(kept, removed, source, out, made_by)


def _drawn(kept: np.ndarray, keep: np.ndarray, seed: int) -> np.ndarray:
  """Those of `kept`, ascending, whose own random number is below their probability."""
  parts, ends = [], np.searchsorted(kept, np.arange(0, len(keep) + _BLOCK, _BLOCK))
  for block, (begin, end) in enumerate(itertools.pairwise(ends)):
    own = kept[begin:end]
    # A generator for each block, so that a number is a function of the seed and the index.
    numbers = np.random.Generator(np.random.Philox(key=[seed, block])).random(_BLOCK)
    parts.append(own[numbers[own % _BLOCK] < keep[own]])
  return np.concatenate(parts)


def _filtered(source: Source, rule: str, more: Columns) -> tuple[np.ndarray, dict[str, int]]:
  """The indices of the samples for which `rule` holds; how many each part of it removed in turn."""
  tree = _parse(rule)
  top = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
  passed, first = [], 0
  removed = {f"not {ast.unparse(part)}": 0 for part in top}
  for columns in _columns(source, more, _named(tree)):
    size = len(next(iter(columns.values())))
    left = np.ones(size, bool)
    for part in top:
      holds = _evaluate(part, functools.partial(_column, columns, source=source))
      now = left & np.asarray(holds, bool)
      removed[f"not {ast.unparse(part)}"] += int(left.sum() - now.sum())
      left = now
    passed.append(first + np.flatnonzero(left))
    first += size
  return np.concatenate(passed), removed


def _named(rule: ast.AST) -> set[str]:
  """The columns that a rule names."""
  if isinstance(rule, ast.Name | ast.Attribute):
    return {ast.unparse(rule)}
  return set().union(*map(_named, ast.iter_child_nodes(rule)))


def _columns(source: Source, more: Columns, names: set[str]) -> Iterable[Columns]:
  """The columns of each part of a source; columns that a part does not have are NaN there.

  Args:
    source: with stats, unless `more` has all `names`.
    more: {name: [N]} of the whole source.
    names: the columns that are read.
  """
  own = [{}] if names and names <= more.keys() else _stats(source)
  sizes = [len(next(iter(part.values()), range(len(source)))) for part in own]
  for part, size, end in zip(own, sizes, itertools.accumulate(sizes)):
    yield {**part, **{name: column[end - size : end] for name, column in more.items()}}


def _stats(source: Source) -> list[Columns]:
  """The columns of `bigalign index --stats`, by part of the source."""
  if not hasattr(source, "columns"):
    raise ValueError(
      f"{source!r} has no columns to filter by; bigalign index --stats writes them for webdataset"
      " shards, `bigalign score` one for any source, which --columns names"
    )
  parts: list[np.ndarray] = list(source.columns())
  if sum(map(len, parts)) != len(source):
    raise ValueError(
      f"{source!r} has {len(source)} samples, but {sum(map(len, parts))} rows of"
      " columns; write them again with bigalign index --stats"
    )
  names = dict.fromkeys(itertools.chain.from_iterable(part.dtype.names or () for part in parts))
  return [
    {
      name: part[name] if name in (part.dtype.names or ()) else np.full(len(part), np.nan)
      for name in names
    }
    for part in parts
  ]


def _column(columns: Columns, name: str, source: Source) -> np.ndarray:
  names = sorted(column for column in columns if not column.startswith("word."))
  if name not in names:
    raise ValueError(f"{source!r} has no column {name!r}; it has {tree.shown(names)}")
  return columns[name]


def _words(columns: Columns, name: str, source: Source) -> tuple[np.ndarray, np.ndarray]:
  """Of a column, [N] uint64, equal for equal values, and whether each sample has a value, [N]."""
  values = _column(columns, name, source)
  if values.ndim == 2:  # hashes; zeros without an image
    words: np.ndarray = np.ascontiguousarray(values[:, :8]).view("<u8")[:, 0]
    return words, np.any(values, axis=1)
  # The unsigned columns, such as width, hold 0 for what a sample does not have.
  known = values != 0 if values.dtype.kind == "u" else ~np.isnan(values)
  exact = columns.get(f"word.{name}")
  if exact is not None and exact.dtype.kind == "u":
    return np.asarray(exact), known
  with np.errstate(invalid="ignore"):
    rounded = np.isfinite(values) & (np.abs(values) >= stats.EXACT)
  if rounded.any():
    raise ValueError(
      f"the column {name!r} of {source!r} holds {values[rounded][0]:.0f} and more; its stats are of"
      f" an older version, which rounded such integers. Remove the folder {stats.FOLDER} beside the"
      " index and write them again with bigalign index --stats"
    )
  return stats.words(values), known


def _parse(text: str) -> Any:
  try:
    return ast.parse(text, mode="eval").body
  except SyntaxError as error:
    raise ValueError(f"where={text!r}: {error.msg} at character {error.offset}") from None


def _evaluate(node: Any, column: Callable[[str], np.ndarray]) -> Any:
  """The value of an expression for every row; only columns, numbers and _OPERATIONS are allowed.

  Raises:
    ValueError: for anything else.
  """

  def value_of(part: Any) -> Any:
    return _evaluate(part, column)

  with np.errstate(divide="ignore", invalid="ignore"):
    match node:
      case ast.BoolOp(op=op, values=values):
        return _OPERATIONS[type(op)].reduce([value_of(value) for value in values])  # type: ignore
      case ast.Compare(left=left, ops=ops, comparators=rest) if all(
        type(op) in _OPERATIONS for op in ops
      ):
        _check_exact(node)
        sides = [value_of(part) for part in (left, *rest)]
        return np.logical_and.reduce(
          [
            _OPERATIONS[type(op)](x, y) & ~(np.isnan(x) | np.isnan(y))
            for op, x, y in zip(ops, sides, sides[1:])
          ]
        )
      case ast.BinOp(left=a, op=op, right=b) if type(op) in _OPERATIONS:
        return _OPERATIONS[type(op)](value_of(a), value_of(b))
      case ast.UnaryOp(op=op, operand=a) if type(op) in _OPERATIONS:
        return _OPERATIONS[type(op)](value_of(a))
      case ast.Constant(value=int() | float() as number):
        return np.float64(number)
      case ast.Name() | ast.Attribute():
        numbers = column(ast.unparse(node))
        if numbers.ndim != 1:
          raise ValueError(f"where: the column {ast.unparse(node)!r} does not hold numbers")
        return numbers.astype(np.float64)
  raise ValueError(
    f"where: {ast.unparse(node)!r} is not allowed; write comparisons of columns and"
    " numbers with < <= > >= == !=, and, or, not, + - * /"
  )


def _check_exact(comparison: ast.Compare) -> None:
  """Raises ValueError for == and != with an integer that float64 may round."""
  sides = [comparison.left, *comparison.comparators]
  for op, *both in zip(comparison.ops, sides, sides[1:]):
    for side in both if isinstance(op, ast.Eq | ast.NotEq) else ():
      if isinstance(side, ast.UnaryOp):
        side = side.operand
      value = side.value if isinstance(side, ast.Constant) else 0
      if isinstance(value, int) and abs(value) >= stats.EXACT:
        raise ValueError(
          f"where: {ast.unparse(comparison)!r} cannot be decided, because rules compare float64,"
          " which rounds integers from 2**53 on; choose these samples by --keys or --ids"
        )


def _write(
  kept: np.ndarray, removed: Mapping[str, int], source: Source, out: str, made_by: Mapping[str, Any]
) -> dict[str, Any]:
  low = (kept & 0xFFFFFFFF).astype("<u4")
  manifest = dict(
    **made_by,
    fingerprint=source.fingerprint,
    samples=len(source),
    kept=len(kept),
    left_out=dict(removed),
    kept_sha256=hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest(),
    **{"kept_per_2**32": np.bincount(kept >> 32).tolist()},
  )
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  # The manifest is written last: a view is valid once it exists.
  with storage.atomic_write(f"{out}.npy") as file:
    np.save(file, low)
  with storage.atomic_write(f"{out}.json") as file:
    file.write(json.dumps(manifest, indent=1).encode() + b"\n")
  return manifest


def _manifest(name: str) -> dict[str, Any]:
  path = pathlib.Path(f"{name}.json")
  if not path.is_file():
    raise FileNotFoundError(f"config.data.view={name!r}: no {path}; make it with bigalign view")
  manifest: dict[str, Any] = json.loads(path.read_text())
  return manifest
