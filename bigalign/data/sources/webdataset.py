"""Random access to webdataset .tar shards (img2dataset, CLIP_benchmark) as they are."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bigalign.data.files import storage
from bigalign.data.files.patterns import expand_shards
from bigalign.data.samples import members
from bigalign.data.samples.rejects import Rejected
from bigalign.data.tar import parse, sidecars, stats
from bigalign.data.tar.remote_blocks import RUN, Runs
from bigalign.data.tar.shards import Shards
from bigalign.data.tar.sidecars import Sidecars


class WebDataset:
  """Random access to webdataset .tar shards as they are.

  captions  fields in order of preference; the first that is there and not blank gives the
            captions. "txt" is the member KEY.txt; "json.captions" the entry `captions` of
            KEY.json, a string or a list of strings, "json.names.de" the entry `de` of an object
            `names`; "recap.parquet:caption" the column `caption` of 00000.recap.parquet beside
            00000.tar (sidecars.py).
  KEY.cls holds the label; names of the classes are read from classnames.txt (one per line) in the
  folder of the shards or the one above it. A source without any of the caption fields is an error
  unless it has labels.

  block  consecutive samples that are fetched with one request and kept until all are read: an
         order that stays within blocks pays; 1 on local disks, where any order is as good
  """

  def __init__(self, pattern: str, *, captions: Sequence[str] = ("txt",)):
    self.pattern = pattern
    self.captions = tuple(captions)
    self.shards = Shards(expand_shards(pattern), pattern=pattern)
    if not len(self):
      raise ValueError(
        f"{pattern!r}: no samples in {len(self.shards.paths)} shards; members are "
        "named KEY.jpg, KEY.txt, KEY.json"
      )
    self.block = RUN if self.shards.remote else 1
    self._runs = Runs(self.shards, block=RUN) if self.shards.remote else None
    self._held: tuple[int, tuple[int, str, dict[str, bytes]]] | None = None
    self.classnames = classnames_beside(self.shards.paths[0])
    self.fingerprint = self.shards.fingerprint
    self._sidecars = {
      name: Sidecars(self.shards, name, pattern=pattern)
      for name in self.captions
      if sidecars.is_field(name)
    }
    self._check_fields()

  def __repr__(self) -> str:
    return f"WebDataset({self.pattern!r})"

  def __len__(self) -> int:
    return len(self.shards)

  def __getitem__(self, i: int) -> dict[str, Any]:
    shard, name, found = self._members(i)
    key = self._key(shard, name)
    image = members.image(found)
    if image is None:
      raise Rejected("no_image", f"{key} has {sorted(found)}")
    texts = {
      field: self._sidecars[field].texts(i, shard)
      if field in self._sidecars
      else members.field_texts(found, field, key=key)
      for field in self.captions
    }
    return dict(
      image=image, key=key, label=members.label(found, key=key), **members.captions(texts)
    )

  def fields(self, i: int) -> dict[str, bytes]:
    """The members of sample i by their extensions; its record does not fetch them once more."""
    found = self._members(i)
    self._held = i, found
    return found[2]

  def key(self, i: int) -> str:
    """The key of sample i; of a local shard nothing is read but the headers of its first member."""
    shard = self.shards.shard(i)
    try:
      buffer: parse.Buffer = (
        self._runs[i]
        if self._runs
        else storage.Window(
          self.shards.paths[shard], *self.shards.span(i, shard), expect=self.shards.stat(shard)
        )
      )
      names = (
        parse.split_name(member.name) for member in parse.members(buffer) if member is not None
      )
      return self._key(shard, next(filter(None, names))[0])
    except (storage.Changed, parse.BrokenTar) as error:
      raise self._told(error, i, shard) from error

  def _key(self, shard: int, name: str) -> str:
    return f"{os.path.basename(self.shards.paths[shard])}/{name}"

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Begins to fetch the blocks of samples that will be read soon; of no use on local disks."""
    if self._runs:
      self._runs.prefetch(ids, hold=hold)

  def columns(self) -> Iterator[np.ndarray]:
    """The columns for filters (stats.py) of each shard in order, [N] each, mapped into memory."""
    for shard, path in enumerate(self.shards.paths):
      yield stats.load(
        os.path.basename(path),
        self.shards.place(shard),
        self.shards.stat(shard),
        pattern=self.pattern,
      )

  def where(self, i: int) -> tuple[str, int, int]:
    """The path of the shard of sample i, the place of i in it, and how many samples it holds."""
    shard = self.shards.shard(i)
    first = self.shards.firsts[shard]
    return self.shards.paths[shard], i - first, self.shards.firsts[shard + 1] - first

  def _members(self, i: int) -> tuple[int, str, dict[str, bytes]]:
    """The shard of sample i, its key in there, and its members by field."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    if self._held and self._held[0] == i:
      return self._held[1]
    shard = self.shards.shard(i)
    path = self.shards.paths[shard]
    try:
      buffer = (
        self._runs[i]
        if self._runs
        else storage.read(path, *self.shards.span(i, shard), expect=self.shards.stat(shard))
      )
      return shard, *parse.sample(buffer)
    except (storage.Changed, parse.BrokenTar) as error:
      raise self._told(error, i, shard) from error

  def _told(self, error: Exception, i: int, shard: int) -> OSError:
    """The error that says which sample could not be read."""
    if isinstance(error, storage.Changed):
      return self.shards.changed(error)
    return OSError(f"{self.shards.paths[shard]}: sample {i} is not what was indexed: {error}")

  def _check_fields(self) -> None:
    if not self.captions or self._sidecars or "cls" in self.shards.fields:
      return
    have = set(self.shards.fields)
    if "json" in self.shards.fields:
      # The keys inside .json members are not indexed: a few samples stand for the rest.
      for i in range(0, len(self), max(1, len(self) // 8)):
        _, _, found = self._members(i)
        with contextlib.suppress(Rejected):  # a broken one is counted when it is drawn
          have |= {f"json.{key}" for key in members.read_json(found.get("json", b"{}"), key="")}
    # Of "json.names.de" the entry `names` is looked for.
    if not have & {
      part for name in self.captions for part in (name, ".".join(name.split(".")[:2]))
    }:
      raise ValueError(
        f"{self.pattern!r}: no caption field {list(self.captions)} in these shards; "
        f"the fields there are: {sorted(have)}. Set captions=(...) to one of them."
      )


def classnames_beside(shard: str) -> tuple[str, ...]:
  """The names in the classnames.txt of the folder of a shard or of the one above it."""
  folder = pathlib.Path(shard).parent
  for path in (folder / "classnames.txt", folder.parent / "classnames.txt"):
    if path.is_file():
      return read_classnames(path)
  return ()


def read_classnames(path: pathlib.Path) -> tuple[str, ...]:
  """The names of the classes, one per line; the label of a class is the number of its line, from 0.

  Raises:
    ValueError: for a blank line before the last name; leaving it out would move all labels after.
  """
  names = tuple(line.strip() for line in path.read_text("utf-8").rstrip().splitlines())
  if "" in names:
    raise ValueError(
      f"{path}: line {names.index('') + 1} is blank, but the place of a name is its "
      "label; write the name of that class there, or take the line out if none is "
      "missing"
    )
  return names
