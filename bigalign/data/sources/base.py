"""Sources: objects with __len__ and __getitem__(i) → record. Opening them, and joining several.

A record is dict(image=bytes | uint8 [H, W, 3], captions=tuple[str, ...], key=str, label=int), with
label -1 if there is none. Opened with frames, `image` may be a list of images.
Sources that were asked for several caption fields add
texts={field: captions}; `captions` are those of the first field that is not blank. Samples of a
multilabel dataset add label_set=bool [K], the classes that they have. A source has no order:
data/order chooses which sample is read next.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from bigalign import tree
from bigalign.data.files import fingerprints
from bigalign.data.files.patterns import expand_variables
from bigalign.data.samples.labels import Labels
from bigalign.data.samples.members import entry
from bigalign.data.samples.rejects import Rejected, rejection
from bigalign.data.sources.arrayrecord import ArrayRecord
from bigalign.data.sources.image_folder import ImageFolder
from bigalign.data.sources.parquet import Parquet
from bigalign.data.sources.synthetic import Synthetic
from bigalign.data.sources.table_files import TableFiles
from bigalign.data.sources.tfds import Tfds
from bigalign.data.sources.webdataset import WebDataset


class Source(Protocol):
  """Random access to records. Picklable: holds paths; each process opens the files for itself.

  A source may also have:
    classnames: a tuple, in the order of the labels.
    dataset_type: "classification", "retrieval", "multilabel", or "" if it is not stated.
    labels: a Labels that reads the labels of its samples.
    block: how many consecutive samples it reads at once, if more than one.
    where(i): (file of sample i, its place there, samples in that file).
    fields(i): all that is stored of sample i, {name: value}.
    value(i, path): what `value` below returns, if that is cheaper than all fields.
    key(i): the key of sample i, if that is cheaper than its record.
    prefetch(ids, hold=n): begins to fetch remote samples, and from then on has room for n samples
      that are fetched and not read yet.

  __getitem__ and key may raise Rejected.
  """

  fingerprint: str  # hex digits that change if the data changes

  def __len__(self) -> int: ...
  def __getitem__(self, i: int, /) -> dict[str, Any]: ...


def _glyphs(split: str, **options: Any) -> Source:
  # Imported late: drawing needs FreeType, but reading shards does not.
  glyphs = importlib.import_module("bigalign.data.sources.glyphs")
  source: Source = glyphs.Glyphs(split=split or "train", **options)
  return source


SOURCES: dict[str, Callable[..., Source]] = dict(
  glyphs=_glyphs,
  tar=WebDataset,
  parquet=Parquet,
  arrayrecord=ArrayRecord,
  table=TableFiles,
  folder=ImageFolder,
  tfds=Tfds,
  synthetic=Synthetic,
)
_OWN_CAPTIONS = ("glyphs", "synthetic")
_SEVERAL_IMAGES = ("tar", "parquet")
_ENDINGS = {
  ".tar": "tar",
  ".parquet": "parquet",
  ".array_record": "arrayrecord",
  ".csv": "table",
  ".tsv": "table",
  ".jsonl": "table",
}


def open_source(
  spec: str,
  *,
  captions: Sequence[str] | None = None,
  images: bool = True,
  frames: bool = False,
  **options: Any,
) -> Source:
  """Opens the source that a spec names.

  Args:
    spec: one of these, or several joined by "::", which are read as one source:
      glyphs, glyphs:heldout: the embedded dataset and its splits.
      synthetic:1000000: random images, for benchmarks.
      DIR/{00000..00005}.tar, DIR/*.tar: webdataset shards.
      DIR/*.parquet, DIR/*.array_record: encoded images with their captions.
      DIR/train.tsv, .csv, .jsonl: paths of image files with their captions.
      folder:DIR: image files, with a subfolder for each class.
      tfds:cifar10:train: a TFDS dataset prepared as array_record.
      KIND:PATTERN: a pattern of files with another ending; KIND is one of SOURCES.
      $NAME in a spec is an environment variable.
    captions: the fields to take captions from; not for glyphs and synthetic, which have their own.
    images: whether images are read; if not, samples need none.
    frames: whether a sample may have several images, of tars and Parquet; see their classes.
    **options: of the class of the source, for every part.

  Raises:
    ValueError: for an unknown source.

  Example:
    >>> source = open_source("synthetic:1000", size=32)
    >>> len(source), source[7]["captions"], source[7]["image"].shape
    (1000, ('synthetic picture number 7',), (32, 32, 3))
  """
  parts = [part.strip() for part in expand_variables(spec, what="source").split("::")]
  options |= {} if images else {"images": False}
  options |= {"frames": True} if frames else {}
  sources = [_open_part(part, spec=spec, captions=captions, options=options) for part in parts]
  return sources[0] if len(sources) == 1 else Concatenation(sources)


class Spec(NamedTuple):
  """The arguments of open_source, to open the source in another process."""

  source: str
  captions: tuple[str, ...] | None = None
  options: tuple[tuple[str, Any], ...] = ()


@functools.cache
def open_spec(spec: Spec) -> Source:
  """Returns the source of a spec, which is opened once in each process."""
  return open_source(spec.source, captions=spec.captions, **dict(spec.options))


def texts_of(record: Mapping[str, Any], spec: Spec) -> Mapping[str, Sequence[str]]:
  """Returns {field: captions} of a record; the only field of a source without names is "caption".

  Args:
    record: of a sample.
    spec: of its source.
  """
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
      " 'folder:DIR', 'synthetic:COUNT', patterns"
      f" of files that end in {', '.join(_ENDINGS)}, such as 'DIR/{{00000..00005}}.tar' or"
      f" 'DIR/*.tar', KIND:PATTERN with a KIND of {sorted(SOURCES)}, and lists joined by '::'"
    )
  chosen = {} if captions is None or kind in _OWN_CAPTIONS else {"captions": tuple(captions)}
  if kind in _OWN_CAPTIONS:
    options = {name: x for name, x in options.items() if name != "images"}
  if kind not in _SEVERAL_IMAGES:  # a sample of another kind may be an animation
    options = {name: x for name, x in options.items() if name != "frames"}
  return SOURCES[kind](rest, **chosen, **options)


class Concatenation:
  """Several sources as one, in order."""

  def __init__(self, sources: Sequence[Source]):
    self.sources = tuple(sources)
    self._firsts = [0, *itertools.accumulate(len(source) for source in sources)]
    self.fingerprint = fingerprints.of_names(*(source.fingerprint for source in sources), sep="::")
    names = {getattr(source, "classnames", ()) for source in sources}
    # Labels of different lists of classes would mean different things in one batch.
    self.classnames = names.pop() if len(names) == 1 else ()
    kinds = {getattr(source, "dataset_type", "") for source in sources}
    self.dataset_type = kinds.pop() if len(kinds) == 1 else ""
    self.block = max(getattr(source, "block", 1) for source in self.sources)

  def __repr__(self) -> str:
    return f"Concatenation({tree.shown(map(repr, self.sources), sep=', ', width=300)})"

  def __len__(self) -> int:
    return self._firsts[-1]

  def __getitem__(self, i: int) -> dict[str, Any]:
    if not 0 <= i < len(self):
      raise IndexError(f"The sources hold {len(self)} samples; asked for {i}")
    which = bisect.bisect_right(self._firsts, i) - 1
    return self.sources[which][i - self._firsts[which]]

  def where(self, i: int) -> tuple[str, int, int]:
    """Returns the file of sample i, its place there, and the samples in that file."""
    which = bisect.bisect_right(self._firsts, i) - 1
    return where(self.sources[which], i - self._firsts[which])

  def fields(self, i: int) -> dict[str, Any]:
    """Returns all that is stored of sample i."""
    which = bisect.bisect_right(self._firsts, i) - 1
    return fields(self.sources[which], i - self._firsts[which])

  def value(self, i: int, path: str) -> Any:
    """Returns one stored value of sample i."""
    which = bisect.bisect_right(self._firsts, i) - 1
    return value(self.sources[which], i - self._firsts[which], path)

  def key(self, i: int) -> str:
    """Returns the key of sample i."""
    which = bisect.bisect_right(self._firsts, i) - 1
    return key(self.sources[which], i - self._firsts[which])

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Lets each source begin to fetch its samples."""
    ids = list(ids)
    for source, first, end in zip(self.sources, self._firsts, self._firsts[1:]):
      prefetch(source, [i - first for i in ids if first <= i < end], hold=hold)


def prefetch(source: Source, ids: Iterable[int], *, hold: int = 0) -> None:
  """Lets a source begin to fetch samples, if it can.

  Args:
    source: any.
    ids: of the samples that are read next.
    hold: room for this many samples that are fetched and not read yet.
  """
  if hasattr(source, "prefetch"):
    source.prefetch(ids, hold=hold)


def where(source: Source, i: int) -> tuple[str, int, int]:
  """Returns the file of sample i, its place there, and the samples in that file.

  A source that does not know its files counts as one file.
  """
  if hasattr(source, "where"):
    location: tuple[str, int, int] = source.where(i)
    return location
  return repr(source), i, len(source)


class WithCaptions:
  """A source whose records have other captions.

  Args:
    source: the samples.
    captions: from a record to its captions; may raise Rejected.
  """

  def __init__(self, source: Any, captions: Callable[[Mapping[str, Any]], tuple[str, ...]]):
    self._source, self._captions = source, captions
    self.fingerprint: str = source.fingerprint

  def __repr__(self) -> str:
    return repr(self._source)

  def __len__(self) -> int:
    return len(self._source)

  def key(self, i: int) -> str:
    """The key of a sample."""
    return key(self._source, i)

  def where(self, i: int) -> tuple[str, int, int]:
    """The file of a sample, its place there, and the samples in that file."""
    return where(self._source, i)

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Lets the source begin to fetch samples."""
    prefetch(self._source, ids, hold=hold)

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = self._source[i]
    return {**record, "captions": self._captions(record)}


def read(source: Source, i: int) -> dict[str, Any]:
  """Returns the record of sample i.

  Raises:
    Rejected: if the sample cannot be used, whatever error reading it raised. Errors of the disk or
      of an object store are raised as they are.
  """
  try:
    return source[i]
  except Exception as error:
    raise rejection(error) from error


def repeated_key(source: Source) -> str:
  """Returns a key that two samples of different files have; "" if none is found.

  Compares the keys of the first samples of files that have equal names, in several folders.
  """
  first_of: dict[str, int] = {}
  i = 0
  while i < len(source):
    path, ordinal, size = where(source, i)
    name = os.path.basename(path)
    if name in first_of:
      try:
        text = key(source, i)
        if text == key(source, first_of[name]):
          return text
      except Rejected:
        pass
    else:
      first_of[name] = i
    i += max(size - ordinal, 1)
  return ""


def name_classes(source: Any, classnames: Sequence[str]) -> None:
  """Lets the labels of a source that are names be names of these classes."""
  for part in getattr(source, "sources", ()):
    name_classes(part, classnames)
  if isinstance(labels := getattr(source, "labels", None), Labels):
    labels.name(classnames)


def fields(source: Source, i: int) -> dict[str, Any]:
  """Returns all that is stored of sample i, {name: value}; {} if the source does not support it.

  Raises:
    Rejected: if they cannot be read.
  """
  try:
    return dict(source.fields(i)) if hasattr(source, "fields") else {}
  except Exception as error:
    raise rejection(error) from error


def value(source: Source, i: int, path: str) -> Any:
  """Returns one stored value of sample i; None if the sample does not have it.

  Args:
    source: any.
    i: the sample.
    path: its name in `fields`, or "a.b" for the entry b of a.

  Raises:
    Rejected: if it cannot be read.
    ValueError: if the source stores nothing by name.
  """
  if hasattr(source, "value"):
    return source.value(i, path)
  if not hasattr(source, "fields"):
    raise ValueError(f"{source!r} stores no values by name, so it has no {path!r}")
  return entry(fields(source, i), path)


def key(source: Source, i: int) -> str:
  """Returns the key of sample i.

  Raises:
    Rejected: if the sample cannot be used and its key is unknown.
  """
  try:
    text: str = source.key(i) if hasattr(source, "key") else source[i]["key"]
  except Exception as error:
    raise rejection(error) from error
  return text
