"""Stores of the vectors of any model: bigalign embed --with=mine:embed --config=C --out=STORES.

mine.py defines embed(items), which takes a list of texts, or of PIL images, and returns an array
[n, D] of their vectors, in the order of the list: a model in PyTorch, or a request to a service.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import importlib
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigalign.config import resolve_config, without_stores
from bigalign.data.files import checksums, fingerprints
from bigalign.data.loader.options import DataOptions
from bigalign.data.samples.ids import class_key, sample_id
from bigalign.data.samples.rejects import rejection
from bigalign.data.sources.base import Source, prefetch, read
from bigalign.data.stores import reader, writer
from bigalign.evals.zeroshot import fill, read_lines, read_templates
from bigalign.frozen.embed import BATCHES, PIECES, check_source, claimed
from bigalign.inputs import open_data
from bigalign.run import progress

Embed = Callable[[list[Any]], Any]
_THREADS = 8  # that read and decode


class Prompts:
  """The prompts of classes as a source: a sample for each class, with one caption per template.

  Args:
    classnames: in the order of the labels.
    templates: with a placeholder for the name.
  """

  def __init__(self, classnames: Sequence[str], templates: Sequence[str]):
    self._names, self._templates = classnames, templates
    self.fingerprint = fingerprints.of_names(*classnames, "", *templates)

  def __len__(self) -> int:
    return len(self._names)

  def __repr__(self) -> str:
    return f"prompts of {len(self)} classes"

  def __getitem__(self, i: int) -> dict[str, Any]:
    captions = tuple(fill(template, self._names[i]) for template in self._templates)
    return dict(image=b"", captions=captions, key=class_key(i, self._names[i]), label=i)


def load_function(name: str) -> Embed:
  """The function that MODULE:FUNCTION names; modules in the current folder are found too.

  Raises:
    ValueError: if it has another form, or the module has no such function.
    ImportError: if the module cannot be imported.
  """
  module, _, function = name.partition(":")
  if not module or not function:
    raise ValueError(f"--with={name}: write MODULE:FUNCTION, such as mine:embed for mine.py")
  sys.path.insert(0, os.getcwd())
  try:
    found = getattr(importlib.import_module(module), function, None)
  finally:
    sys.path.remove(os.getcwd())
  if not callable(found):
    raise ValueError(f"--with={name}: {module} has no function {function}")
  embed: Embed = found
  return embed


def function_fingerprint(function: Embed) -> str:
  """What identifies the model of a function: its `fingerprint`, or else the code of its file."""
  given = getattr(function, "fingerprint", None)
  if given is not None:
    return str(given)
  source = pathlib.Path(inspect.getfile(inspect.unwrap(function)))
  return hashlib.sha256(source.read_bytes()).hexdigest()[:32]


def embed_with(
  name: str,
  values: Any,
  out: str | pathlib.Path,
  *,
  sides: Sequence[str] = ("image", "text"),
  batch_size: int = 256,
  dtype: str = "float16",
  classnames: str = "",
  templates: str = "photos",
) -> dict[str, pathlib.Path]:
  """Writes, completes or extends the stores OUT/<side>; returns their folders.

  Several processes share the batches; each calls the function for its own part.

  Args:
    name: MODULE:FUNCTION. A store records it, and `function.fingerprint`, a text, if there is one,
      or else a digest of the file of the function; it is not extended by another one.
    values: a config, of which `data` says what is read.
    out: of the stores.
    sides: of "image" and "text", one if the function takes only one of them.
    batch_size: items of a call, over all processes.
    dtype: of the vectors.
    classnames: a file of class names; then the prompts of each class are embedded instead of the
      data, into OUT/classes, which the evaluator `zeroshot` reads as class_store.
    templates: of the prompts, as of the evaluator.

  Raises:
    ValueError: for a function that does not return [n, D] numbers.
  """
  function = load_function(name)
  config = resolve_config(without_stores(values), files_needed=False)
  data: DataOptions = config.data
  source: Source
  if classnames:
    names = read_lines(classnames, "--classnames", labels=True)
    source, sides = Prompts(names, read_templates(templates, "--templates")), ("classes",)
  else:
    if data.frames:
      raise ValueError(
        "--with embeds single images, but config.data.frames reads several of a sample; leave it"
        " out"
      )
    inputs = open_data(data)
    source, data = inputs.source, inputs.options
    check_source(source, data, sides)
  folders = {side: pathlib.Path(out).expanduser() / side for side in sides}
  about = {"function": name, "fingerprint": function_fingerprint(function)}
  headers = {
    side: dict(
      side="image" if side == "image" else "text",
      **about,
      dtype=dtype,
      width=_width(folder, function, source, data, side),
    )
    for side, folder in folders.items()
  }
  per_piece = max(BATCHES, -(-len(source) // (batch_size * PIECES)))
  with claimed(
    folders, headers, source, data, batch_size=batch_size, per_piece=per_piece
  ) as ranges:
    left = {side: folder for side, folder in folders.items() if not ranges[side].done}
    if left:
      _fill(left, headers, ranges, function, source, data, batch_size, per_piece)
  return folders


class _Item(NamedTuple):
  """One sample: its id, its place in the source, its label, its image or its texts."""

  id: int
  place: int
  label: int
  image: Any
  texts: tuple[str, ...]


def _read(source: Source, data: DataOptions, i: int, image: bool) -> _Item | str:
  """A sample; the reason if it is left out."""
  try:
    record = read(source, i)
    pixels = data.decode(record["image"]) if image else None
  except Exception as error:
    return rejection(error).reason
  return _Item(sample_id(record["key"]), i, record["label"], pixels, record["captions"])


def _items(side: str, item: _Item) -> list[Any]:
  """What the function takes for one sample."""
  if side != "image":
    return [*item.texts]
  from PIL import Image

  return [Image.fromarray(item.image)]


def _width(
  folder: pathlib.Path, function: Embed, source: Source, data: DataOptions, side: str
) -> int:
  """D: of the vectors that are there, or else of those of the first sample that has some."""
  path = folder / "header.json"
  if path.exists():
    return int(checksums.read_json(path)["width"])
  for i in range(len(source)):
    item = _read(source, data, i, side == "image")
    if isinstance(item, _Item) and (items := _items(side, item)):
      return int(_call(function, items[:1]).shape[1])
  raise ValueError(f"no sample of {source!r} has {'an image' if side == 'image' else 'a text'}")


def _call(function: Embed, items: list[Any]) -> np.ndarray:
  """The vectors [n, D] float32 of some items."""
  found = function(items)
  if hasattr(found, "detach"):  # of PyTorch
    found = found.detach().float().cpu().numpy()
  vectors = np.asarray(found)
  if vectors.ndim != 2 or len(vectors) != len(items) or vectors.dtype.kind not in "fiV":
    raise ValueError(
      f"the function of --with returned {vectors.dtype} {vectors.shape} for {len(items)} items;"
      f" expected numbers [{len(items)}, D]"
    )
  return vectors.astype(np.float32)


def _fill(
  folders: Mapping[str, pathlib.Path],
  headers: Mapping[str, Mapping[str, Any]],
  ranges: Mapping[str, writer.Range],
  function: Embed,
  source: Source,
  data: DataOptions,
  batch_size: int,
  per_piece: int,
) -> None:
  """Embeds the pieces that are missing on some side, one after the other."""
  first = min(ranges[side].next for side in folders)
  size = batch_size * per_piece
  visible = progress.is_shown() and jax.process_index() == 0
  with progress.Progress(
    "embed", len(source), unit="samples", start=first * size, visible=visible
  ) as shown:
    for piece in range(first, -(-len(source) // size)):
      wanted = [side for side in folders if piece >= ranges[side].next]
      span = range(piece * size, min((piece + 1) * size, len(source)))
      made: dict[str, list[Any]] = {side: [] for side in wanted}
      left_out: collections.Counter[str] = collections.Counter()
      for batch in _batches(source, data, span, batch_size, image="image" in wanted):
        left_out.update(one for one in batch if isinstance(one, str))
        items = [one for one in batch if isinstance(one, _Item)]
        for side in wanted:
          made[side] += _embedded(side, items, function, batch_size)
        shown.reach(shown.clock.done + len(batch) * jax.process_count())
      for side in wanted:
        _write(folders[side], ranges[side], piece, made[side], headers[side], dict(left_out))


def _batches(
  source: Source, data: DataOptions, span: range, batch_size: int, *, image: bool
) -> Iterator[list[_Item | str]]:
  """This process's samples of each batch; threads read a batch ahead."""
  own, of = jax.process_index(), jax.process_count()

  def start(first: int) -> list[concurrent.futures.Future[_Item | str]]:
    some = range(first, min(first + batch_size, span.stop))[own::of]
    prefetch(source, some)
    return [pool.submit(_read, source, data, i, image) for i in some]

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    firsts = [*range(span.start, span.stop, batch_size)]
    ahead = start(firsts[0])
    for following in [*firsts[1:], None]:
      batch, ahead = ahead, [] if following is None else start(following)
      yield [one.result() for one in batch]


def _embedded(
  side: str, items: Sequence[_Item], function: Embed, batch_size: int
) -> list[tuple[np.ndarray, _Item]]:
  """The vectors [n, D] of each sample, and the sample."""
  each = [_items(side, item) for item in items]
  every = [one for several in each for one in several]
  calls = [_call(function, every[i : i + batch_size]) for i in range(0, len(every), batch_size)]
  if not calls:
    return []
  ends = np.cumsum([len(several) for several in each])
  parts = np.split(np.concatenate(calls), ends[:-1])
  return [(part, item) for part, item in zip(parts, items) if len(part)]


def _write(
  folder: pathlib.Path,
  range_: writer.Range,
  piece: int,
  made: Sequence[tuple[np.ndarray, _Item]],
  header: Mapping[str, Any],
  left_out: dict[str, int],
) -> None:
  empty = np.zeros((0, header["width"]), np.float32)
  with np.errstate(over="ignore"):  # vectors beyond float16's 65,504 are left out
    vectors = np.concatenate([empty, *(part for part, _ in made)]).astype(
      reader.DTYPES[header["dtype"]]
    )
  number = [len(part) for part, _ in made]
  samples = np.array([(item.id, item.place + range_.place) for _, item in made], np.uint64)
  samples = np.repeat(samples.reshape(-1, 2), number, axis=0)
  labels = np.repeat(np.array([item.label for _, item in made], np.int32), number)
  sound = reader.finite(vectors)
  if not sound.all():
    left_out["not_finite"] = int((~sound).sum())
  writer.write(
    folder,
    range_.first + piece,
    vectors[sound],
    samples[sound],
    labels=labels[sound] if header["side"] == "image" else None,
    part=jax.process_index(),
    parts=jax.process_count(),
    left_out=left_out,
  )
