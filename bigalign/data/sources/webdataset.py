"""Random access to webdataset .tar shards, as img2dataset and CLIP_benchmark write them."""

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
from bigalign.data.tar.remote_blocks import BLOCK, RemoteBlocks
from bigalign.data.tar.shards import Shards
from bigalign.data.tar.sidecars import Sidecars


class WebDataset:
  """Random access to webdataset .tar shards, local or remote, without unpacking them.

  KEY.cls holds the label. The names of the classes are read from classnames.txt, one per line, in
  the folder of the shards or in its parent. A source that has none of the caption fields is an
  error unless it has labels.

  `block` is the number of consecutive samples that are fetched with one request and kept until all
  are read, so an order that stays within blocks is fast. It is 1 on local disks, where every order
  is equally fast.

  Args:
    pattern: of the shards, such as DIR/{00000..00005}.tar.
    captions: fields in order of preference; the captions are those of the first that is not blank.
      "txt" is the member KEY.txt. "json.captions" is the entry `captions` of KEY.json, a string or
      a list of strings; "json.names.de" the entry `de` of an object `names`.
      "recap.parquet:caption" is the column `caption` of 00000.recap.parquet next to 00000.tar
      (sidecars.py).

  Raises:
    ValueError: if there are no samples, or none of the caption fields.

  Example:
    >>> import io, tarfile, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with tarfile.open(f"{folder.name}/00000.tar", "w") as tar:
    ...   for name, data in (("cat.jpg", b"an encoded image"), ("cat.txt", b"a photo of a cat")):
    ...     member = tarfile.TarInfo(name)
    ...     member.size = len(data)
    ...     tar.addfile(member, io.BytesIO(data))
    >>> source = WebDataset(f"{folder.name}/*.tar", captions=("txt",))
    >>> source[0]["key"], source[0]["captions"]
    ('00000.tar/cat', ('a photo of a cat',))
    >>> folder.cleanup()
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
    self.block = BLOCK if self.shards.remote else 1
    self._remote = RemoteBlocks(self.shards, block=BLOCK) if self.shards.remote else None
    # (i, members of sample i) that `fields` read last.
    self._last: tuple[int, tuple[int, str, dict[str, bytes]]] | None = None
    self.classnames = classnames_near(self.shards.paths[0])
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
    shard, name, fields = self._members(i)
    key = self._key(shard, name)
    image = members.image(fields)
    if image is None:
      raise Rejected("no_image", f"{key} has {sorted(fields)}")
    texts = {
      field: self._sidecars[field].texts(i, shard)
      if field in self._sidecars
      else members.field_texts(fields, field, key=key)
      for field in self.captions
    }
    return dict(
      image=image, key=key, label=members.label(fields, key=key), **members.captions(texts)
    )

  def fields(self, i: int) -> dict[str, bytes]:
    """Returns {extension: bytes} of sample i; its record then needs no further read."""
    sample = self._members(i)
    self._last = i, sample
    return sample[2]

  def key(self, i: int) -> str:
    """Returns the key of sample i; reads only the header of its first member if it is local."""
    shard = self.shards.shard(i)
    try:
      buffer: parse.Buffer = (
        self._remote[i]
        if self._remote
        else storage.FileSlice(
          self.shards.paths[shard], *self.shards.span(i, shard), expect=self.shards.stat(shard)
        )
      )
      names = (
        parse.split_name(member.name) for member in parse.members(buffer) if member is not None
      )
      return self._key(shard, next(filter(None, names))[0])
    except (storage.FileChanged, parse.BrokenTar) as error:
      raise self._read_error(error, i, shard) from error

  def _key(self, shard: int, name: str) -> str:
    return f"{os.path.basename(self.shards.paths[shard])}/{name}"

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    """Begins to fetch the blocks of samples that are read next; does nothing on local disks."""
    if self._remote:
      self._remote.prefetch(ids, hold=hold)

  def columns(self) -> Iterator[np.ndarray]:
    """Yields the statistics (stats.py) of each shard in order, [N] each, mapped into memory."""
    for shard, path in enumerate(self.shards.paths):
      yield stats.load(
        os.path.basename(path),
        self.shards.index_folder(shard),
        self.shards.stat(shard),
        pattern=self.pattern,
      )

  def where(self, i: int) -> tuple[str, int, int]:
    """Returns the path of the shard of sample i, its place there, and the samples of the shard."""
    shard = self.shards.shard(i)
    first = self.shards.firsts[shard]
    return self.shards.paths[shard], i - first, self.shards.firsts[shard + 1] - first

  def _members(self, i: int) -> tuple[int, str, dict[str, bytes]]:
    """The shard of sample i, its key in there, and {extension: bytes}."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    if self._last and self._last[0] == i:
      return self._last[1]
    shard = self.shards.shard(i)
    path = self.shards.paths[shard]
    try:
      buffer = (
        self._remote[i]
        if self._remote
        else storage.read(path, *self.shards.span(i, shard), expect=self.shards.stat(shard))
      )
      return shard, *parse.sample(buffer)
    except (storage.FileChanged, parse.BrokenTar) as error:
      raise self._read_error(error, i, shard) from error

  def _read_error(self, error: Exception, i: int, shard: int) -> OSError:
    """The error that names the sample, or the command that indexes a changed shard again."""
    if isinstance(error, storage.FileChanged):
      return self.shards.changed(error)
    return OSError(f"{self.shards.paths[shard]}: sample {i} differs from its index: {error}")

  def _check_fields(self) -> None:
    """Raises ValueError if the shards have neither a caption field nor labels."""
    if not self.captions or self._sidecars or "cls" in self.shards.fields:
      return
    have = set(self.shards.fields)
    if "json" in self.shards.fields:
      # The index does not list the keys inside of .json members, so a few samples are read.
      for i in range(0, len(self), max(1, len(self) // 8)):
        _, _, fields = self._members(i)
        with contextlib.suppress(Rejected):  # a broken one is counted when training reads it
          have |= {f"json.{key}" for key in members.read_json(fields.get("json", b"{}"), key="")}
    # Of "json.names.de", the entry `names` is enough.
    if not have & {
      part for name in self.captions for part in (name, ".".join(name.split(".")[:2]))
    }:
      raise ValueError(
        f"{self.pattern!r}: no caption field {list(self.captions)} in these shards; "
        f"the fields are: {sorted(have)}. Set captions=(...) to one of them."
      )


def classnames_near(shard: str) -> tuple[str, ...]:
  """Returns the names in the classnames.txt in the folder of a shard or its parent; () if none."""
  folder = pathlib.Path(shard).parent
  for path in (folder / "classnames.txt", folder.parent / "classnames.txt"):
    if path.is_file():
      return read_classnames(path)
  return ()


def read_classnames(path: pathlib.Path) -> tuple[str, ...]:
  """Returns the names of the classes in a file, one per line; the label is the line, from 0.

  Raises:
    ValueError: for a blank line before the last name; to skip it would shift all labels after it.
  """
  names = tuple(line.strip() for line in path.read_text("utf-8").rstrip().splitlines())
  if "" in names:
    raise ValueError(
      f"{path}: line {names.index('') + 1} is blank, but the line number of a name is its label;"
      " write the name of that class there, or remove the line if no class is missing"
    )
  return names
