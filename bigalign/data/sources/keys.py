"""Which samples of a source a list of keys names, without a text in memory for each."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bigalign.data.files import processes
from bigalign.data.files.storage import Stream
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import base
from bigalign.data.sources.base import Spec, open_spec
from bigalign.data.stores.reader import sample_id

TASK = 1 << 14  # samples whose keys a process reads at once
AHEAD = 512  # samples that a far source may begin to fetch
_CHUNK = 1 << 16  # lines


class Found(NamedTuple):
  """What a list of keys names."""

  places: np.ndarray  # [N] int64, ascending, of the samples in the source
  listed: int  # different keys in the list
  unknown: int  # of them, keys that no sample has
  shared: int  # samples, beyond the first, that have a key of the list which another one has too


def find(spec: Spec, path: str, *, workers: int) -> Found:
  """The samples of a source whose keys stand in a file.

  path  a text in UTF-8 with one key a line, "00000.tar/000000123" as records have it; .gz if it is
        compressed; local or in an object store

  In memory are 8 bytes for each key of the list, and as many for each sample that is found.

  Raises:
    ValueError: if the list is empty, or names no sample; with one key of each.
  """
  wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *_listed(path)]))
  if not len(wanted):
    raise ValueError(f"{path}: no keys; one sample key a line is expected")
  source = open_spec(spec)
  tasks = [(spec, range(i, min(i + TASK, len(source)))) for i in range(0, len(source), TASK)]
  places, seen = [], np.zeros(len(wanted), bool)
  for (_, span), ids in zip(tasks, processes.run(_ids, tasks, workers=workers)):
    at = np.searchsorted(wanted, ids).clip(max=len(wanted) - 1)
    hit = np.flatnonzero(wanted[at] == ids)
    seen[at[hit]] = True
    places.append(span.start + hit)
  chosen = np.concatenate(places)
  if not len(chosen):
    with _lines(path) as lines:
      line = next(lines).decode("utf-8", "replace")
    raise ValueError(
      f"{path} names no sample of {spec.source!r}: it holds keys such as {line!r},"
      f" the source such as {_example(source)!r}"
    )
  return Found(chosen, len(wanted), int((~seen).sum()), len(chosen) - int(seen.sum()))


@contextlib.contextmanager
def _lines(path: str) -> Iterator[Iterator[bytes]]:
  """Those that are not blank, without their ends."""
  raw: Any = io.BufferedReader(Stream(path), 1 << 20)
  with gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw as file:
    yield filter(None, (line.rstrip(b"\r\n") for line in file))


def _listed(path: str) -> Iterator[np.ndarray]:
  """The ids of the keys in a list, [n] uint64 each."""
  with _lines(path) as lines:
    ids = (sample_id(line.decode("utf-8", "surrogateescape")) for line in lines)
    while len(some := np.fromiter(itertools.islice(ids, _CHUNK), np.uint64)):
      yield some


def _ids(task: tuple[Spec, range]) -> np.ndarray:
  """The ids of some samples, [n] uint64; 0 where a sample that cannot be used has no key."""
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
  for i in range(len(source)):
    try:
      return base.key(source, i)
    except Rejected:
      continue
  return ""
