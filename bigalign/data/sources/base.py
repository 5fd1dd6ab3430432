"""Things with __len__ and __getitem__(i) → record: glyphs, shards, tables, TFDS, and lists of them.

A record is dict(image=bytes | uint8 [H, W, 3], captions=tuple[str, ...], key=str, label=int);
label is -1 where there is none. Sources add texts={field: captions} of all fields that
were asked for; `captions` are those of the first that is not blank. A source knows no order: that
belongs to order.py.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from bigalign.data.files import fingerprints
from bigalign.data.sources.arrayrecord import ArrayRecord
from bigalign.data.sources.parquet import Parquet
from bigalign.data.sources.synthetic import Synthetic
from bigalign.data.sources.table_files import TableFiles
from bigalign.data.sources.tfds import Tfds
from bigalign.data.sources.webdataset import WebDataset


class Source(Protocol):
  """Random access to records. Picklable: paths only, files are opened lazily per process.

  May have `classnames`, a tuple in the order of the labels; `block`, how many consecutive samples
  it reads at once if not one; `where`(i) → (file of sample i, its place there, samples in that
  file); `fields`(i) → all that is stored of sample i, by name; `key`(i), for less than the record
  costs; `prefetch`(ids, hold=n), which begins to fetch what is far away and from then on has room
  for n samples that were fetched and not read. __getitem__ and key may raise Rejected.
  """

  fingerprint: str  # hex; changes if the data changed

  def __len__(self) -> int: ...
  def __getitem__(self, i: int, /) -> dict[str, Any]: ...


def _glyphs(split: str, **options: Any) -> Source:
  # Looked up late: drawing needs FreeType, which readers of shards do not.
  glyphs = importlib.import_module("bigalign.data.sources.glyphs")
  return glyphs.Glyphs(split=split or "train", **options)


SOURCES: dict[str, Callable[..., Source]] = dict(
  glyphs=_glyphs,
  tar=WebDataset,
  parquet=Parquet,
  arrayrecord=ArrayRecord,
  table=TableFiles,
  tfds=Tfds,
  synthetic=Synthetic,
)
_OWN_CAPTIONS = ("glyphs", "synthetic")
_ENDINGS = {
  ".tar": "tar",
  ".parquet": "parquet",
  ".array_record": "arrayrecord",
  ".csv": "table",
  ".tsv": "table",
  ".jsonl": "table",
}


def open_source(spec: str, *, captions: Sequence[str] | None = None, **options) -> Source:
  """Open what a spec names; parts joined by "::" are read as one, each sample once per epoch.

    glyphs, glyphs:heldout                  the embedded dataset and its splits
    synthetic:1000000                       noise, to measure with
    DIR/{00000..00005}.tar, DIR/*.tar       webdataset shards
    DIR/*.parquet, DIR/*.array_record       encoded images beside their captions
    DIR/train.tsv, .csv, .jsonl             paths of image files beside their captions
    tfds:cifar10:train                      a TFDS dataset prepared as array_record
  KIND: before a pattern says what its ending does not. $NAME in a spec is an environment variable.
  `captions` names the fields to take captions from (all but glyphs and synthetic, which have their
  own); `options` go to every part.
  """
  parts = [part.strip() for part in expand_variables(spec, what="source").split("::")]
  sources = [_open_part(part, spec=spec, captions=captions, options=options) for part in parts]
  return sources[0] if len(sources) == 1 else Concatenation(sources)


class Spec(NamedTuple):
  """The arguments of open_source, to open a source in another process."""

  source: str
  captions: tuple[str, ...] | None = None
  options: tuple[tuple[str, Any], ...] = ()


@functools.cache
def open_spec(spec: Spec) -> Source:
  """The source, opened once in each process."""
  return open_source(spec.source, captions=spec.captions, **dict(spec.options))


def texts_of(record: Mapping[str, Any], spec: Spec) -> Mapping[str, Sequence[str]]:
  """{name: captions} of a record; of a source that has one field and no name for it, "caption"."""
  texts: Mapping[str, Sequence[str]] = record.get("texts") or {
    (spec.captions or ("caption",))[0]: record["captions"]
  }
  return texts


def _open_part(
  part: str, *, spec: str, captions: Sequence[str] | None, options: Mapping[str, Any]
) -> Source:
  kind, _, rest = part.partition(":")
  if kind not in SOURCES:
    kind, rest = next((kind for ending, kind in _ENDINGS.items() if ending in part), kind), part
  if kind not in SOURCES:
    raise ValueError(
      f"Unknown source {part!r} in {spec!r}; known: 'glyphs[:SPLIT]', 'tfds:NAME:SPLIT',"
      " 'synthetic:COUNT', patterns"
      f" of files that end in {', '.join(_ENDINGS)}, such as 'DIR/{{00000..00005}}.tar' or"
      f" 'DIR/*.tar', KIND:PATTERN with a KIND of {sorted(SOURCES)}, and lists joined by '::'"
    )
  chosen = {} if captions is None or kind in _OWN_CAPTIONS else {"captions": tuple(captions)}
  return SOURCES[kind](rest, **chosen, **options)


def expand_variables(text: str, *, what: str) -> str:
  """$NAME and ${NAME} from the environment; a KeyError with the name if it is not set."""

  def value(match: re.Match) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
      raise KeyError(
        f"{what} {text!r}: the environment variable {name} is not set; "
        f"export {name}=... or write the path out"
      )
    return os.environ[name]

  return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)


class Concatenation:
  """Several sources as one, in order."""

  def __init__(self, sources: Sequence[Source]):
    self.sources = tuple(sources)
    self._firsts = [0, *itertools.accumulate(len(source) for source in sources)]
    self.fingerprint = fingerprints.of_names(*(source.fingerprint for source in sources), sep="::")
    names = {getattr(source, "classnames", ()) for source in sources}
    # Labels of different class lists must not meet in one column.
    self.classnames = names.pop() if len(names) == 1 else ()
    self.block = max(getattr(source, "block", 1) for source in self.sources)

  def __repr__(self) -> str:
    return f"Concatenation({', '.join(map(repr, self.sources))})"

  def __len__(self) -> int:
    return self._firsts[-1]

  def __getitem__(self, i: int) -> dict[str, Any]:
    if not 0 <= i < len(self):
      raise IndexError(f"The sources hold {len(self)} samples; asked for {i}")
    which = bisect.bisect_right(self._firsts, i) - 1
    return self.sources[which][i - self._firsts[which]]

  def where(self, i: int) -> tuple[str, int, int]:
    which = bisect.bisect_right(self._firsts, i) - 1
    return where(self.sources[which], i - self._firsts[which])

  def fields(self, i: int) -> dict[str, Any]:
    which = bisect.bisect_right(self._firsts, i) - 1
    return fields(self.sources[which], i - self._firsts[which])

  def key(self, i: int) -> str:
    which = bisect.bisect_right(self._firsts, i) - 1
    return key(self.sources[which], i - self._firsts[which])

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    ids = list(ids)
    for source, first, end in zip(self.sources, self._firsts, self._firsts[1:]):
      prefetch(source, [i - first for i in ids if first <= i < end], hold=hold)


def prefetch(source: Source, ids: Iterable[int], *, hold: int = 0) -> None:
  """Has a source that can begin to fetch samples; nothing for others."""
  if hasattr(source, "prefetch"):
    source.prefetch(ids, hold=hold)


def where(source: Source, i: int) -> tuple[str, int, int]:
  """The file of sample i, its place there, and how many samples it holds; of a source that does not
  tell, all of it."""
  if hasattr(source, "where"):
    found: tuple[str, int, int] = source.where(i)
    return found
  return repr(source), i, len(source)


def fields(source: Source, i: int) -> dict[str, Any]:
  """All that is stored of sample i, by the names there; {} of a source that does not tell."""
  return dict(source.fields(i)) if hasattr(source, "fields") else {}


def key(source: Source, i: int) -> str:
  """The key of sample i; Rejected if it is not known of a sample that cannot be used."""
  found: str = source.key(i) if hasattr(source, "key") else source[i]["key"]
  return found
