"""Which samples of a source a list of keys names, without holding the keys in memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bigalign.data.files import lines, processes
from bigalign.data.files.storage import Stream
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import base
from bigalign.data.sources.base import Spec, open_spec

TASK = 1 << 14  # samples whose keys a process reads at once
AHEAD = 512  # samples that a remote source may begin to fetch
_CHUNK = 1 << 16  # lines


class KeyMatches(NamedTuple):
  """The samples that a list of keys names."""

  indices: np.ndarray  # [N] int64, ascending, of the samples in the source
  listed: int  # different keys in the list
  unknown: int  # keys of the list that no sample has
  shared: int  # samples, beyond the first, whose listed key another sample has too


def find(spec: Spec, path: str, *, workers: int) -> KeyMatches:
  """Returns the samples of a source whose keys are in a file.

  Memory: 8 bytes for each key of the list, and 8 for each matching sample.

  Args:
    spec: of the source.
    path: a text in UTF-8, local or in an object store, with one key per line as records have it,
      such as "00000.tar/000000123"; compressed if it ends in .gz.
    workers: processes that read the keys of the source.

  Raises:
    ValueError: if the list is empty or names no sample; shows a key of each.
  """
  wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *_listed(path)]))
  if not len(wanted):
    raise ValueError(f"{path}: no keys; expected one sample key per line")
  source = open_spec(spec)
  tasks = [(spec, range(i, min(i + TASK, len(source)))) for i in range(0, len(source), TASK)]
  indices, matched = [], np.zeros(len(wanted), bool)
  for (_, span), ids in zip(tasks, processes.run(_ids, tasks, workers=workers)):
    candidates = np.searchsorted(wanted, ids).clip(max=len(wanted) - 1)
    hits = np.flatnonzero(wanted[candidates] == ids)
    matched[candidates[hits]] = True
    indices.append(span.start + hits)
  chosen = np.concatenate(indices)
  if not len(chosen):
    with _lines(path) as listed:
      line = next(listed).decode("utf-8", "replace")
    raise ValueError(
      f"{path} names no sample of {spec.source!r}: its keys are like {line!r},"
      f" and those of the source like {_example(source)!r}"
    )
  return KeyMatches(chosen, len(wanted), int((~matched).sum()), len(chosen) - int(matched.sum()))


@contextlib.contextmanager
def _lines(path: str) -> Iterator[Iterator[bytes]]:
  """The lines of a list that are not blank, without line ends."""
  raw: Any = io.BufferedReader(Stream(path), 1 << 20)
  try:
    with gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw as file:
      yield filter(None, lines.iterate(file, name=path))
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f"{path}: not a complete gzip file: {error}") from error


def _listed(path: str) -> Iterator[np.ndarray]:
  """Yields the ids of the keys in a list, [n] uint64 each."""
  with _lines(path) as listed:
    ids = (sample_id(line.decode("utf-8", "surrogateescape")) for line in listed)
    while len(chunk := np.fromiter(itertools.islice(ids, _CHUNK), np.uint64)):
      yield chunk


def _ids(task: tuple[Spec, range]) -> np.ndarray:
  """The ids of some samples, [n] uint64; 0 for a rejected sample whose key is unknown."""
  spec, span = task
  source = open_spec(spec)
  ids = np.zeros(len(span), np.uint64)
  for row, i in enumerate(span):
    if row % (AHEAD // 2) == 0:
      base.prefetch(source, range(i, min(i + AHEAD, span.stop)))
    try:
      ids[row] = sample_id(base.key(source, i))
    except Rejected:
      continue
  return ids


def _example(source: base.Source) -> str:
  """The key of the first sample that has one."""
  for i in range(len(source)):
    try:
      return base.key(source, i)
    except Rejected:
      continue
  return ""
