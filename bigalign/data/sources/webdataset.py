"""Random access to webdataset .tar shards, as img2dataset and CLIP_benchmark write them."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.files import lines, storage
from bigalign.data.files.draws import draw
from bigalign.data.files.patterns import expand_shards
from bigalign.data.samples import columns, members
from bigalign.data.samples.label_sets import LabelSets
from bigalign.data.samples.labels import Labels
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import clip_benchmark
from bigalign.data.tar import parse, sidecars, stats
from bigalign.data.tar.remote_blocks import BLOCK, RemoteBlocks
from bigalign.data.tar.shards import Shards
from bigalign.data.tar.sidecars import Sidecars

logger = logging.getLogger(__name__)

STATS = "stats:"  # before the name of a statistic, in `value`

_MOST_BYTES = 1 << 30  # of a sample that is read
_PROBES = 64  # samples that are read to find the keys of .json members


class WebDataset:
  """Random access to webdataset .tar shards, local or remote, without unpacking them.

  KEY.cls holds the label, an integer or the name of a class (samples/labels.py). The names of the
  classes are read from classnames.txt, one per line, in the folder of the shards or in its parent.
  CLIP_benchmark's dataset_type.txt (of "retrieval", each line of KEY.txt is a caption; of
  "multilabel", KEY.npy holds a number for each class, 0 or 1) and nshards.txt are read too
  (clip_benchmark.py).
  A source that has none of the caption fields is an error unless it has labels.

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
    image: the member that holds the image: "jpg" or "photo.jpg", or "photo" for any format. By
      default the first with an extension of an image (samples/members.py), or KEY.image.jpg.
    images: whether images are read; if not, samples need none, and a record has image=b"".
    frames: whether a sample has several images, KEY.0.jpg, KEY.1.jpg, ..., or one, which may be an
      animation or a video (KEY.mp4); a record's image is then a list of them, in the order of
      their numbers. `image` "camera" reads KEY.camera.0.jpg.

  Raises:
    ValueError: if there are no samples, no images, or none of the caption fields.

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

  def __init__(
    self,
    pattern: str,
    *,
    captions: Sequence[str] = ("txt",),
    image: str | None = None,
    images: bool = True,
    frames: bool = False,
  ):
    self.pattern = pattern
    self._image, self._images, self._frames = image, images, frames
    self.captions = tuple(captions)
    paths = clip_benchmark.stated_shards(expand_shards(pattern), pattern=pattern)
    self.shards = Shards(paths, pattern=pattern)
    self.dataset_type = clip_benchmark.dataset_type(paths[0])
    self._noticed = False  # a text of several lines, which is logged once
    if not len(self):
      raise ValueError(
        f"{pattern!r}: no samples in {len(self.shards.paths)} shards; members are "
        "named KEY.jpg, KEY.txt, KEY.json"
      )
    self.block = BLOCK if self.shards.remote else 1
    self._remote = RemoteBlocks(self.shards, block=BLOCK) if self.shards.remote else None
    # (i, members of sample i) that were read last: for the record, or for fields and values.
    self._last: tuple[int, tuple[int, str, dict[str, bytes]]] | None = None
    self._last_stats: tuple[int, np.ndarray] | None = None  # of the shard that was read last
    self.classnames = classnames_near(self.shards.paths[0])
    self.labels = Labels(self.classnames, what=".cls")
    self._label_sets = LabelSets() if self.dataset_type == "multilabel" else None
    self.fingerprint = self.shards.fingerprint
    self._sidecars = {
      name: Sidecars(self.shards, name, pattern=pattern)
      for name in self.captions
      if sidecars.is_field(name)
    }
    if images:
      self._check_image()
    self._check_fields()

  def __repr__(self) -> str:
    return f"WebDataset({self.pattern!r})"

  def __len__(self) -> int:
    return len(self.shards)

  def __getitem__(self, i: int) -> dict[str, Any]:
    shard, name, fields = self._members(i)
    key = self._key(shard, name)
    find = members.frames if self._frames else members.image
    image = find(fields, self._image) if self._images else b""
    if image is None or image == []:
      raise Rejected("no_image", f"{key} has {tree.shown(sorted(fields))}")
    texts = {
      field: self._sidecars[field].texts(i, shard)
      if field in self._sidecars
      else self._split(field, members.field_texts(fields, field, key=key), key)
      for field in self.captions
    }
    label_set = self._label_sets(fields.get("npy"), key=key) if self._label_sets else None
    return dict(
      image=image,
      key=key,
      label=self.labels(fields.get("cls"), key=key),
      **({} if label_set is None else dict(label_set=label_set)),
      **members.captions(texts),
    )

  def _split(self, field: str, texts: tuple[str, ...], key: str) -> tuple[str, ...]:
    """The captions of a member: its lines if dataset_type.txt says retrieval, else its text."""
    if "." in field or not any("\n" in text for text in texts):
      return texts
    if self.dataset_type == "retrieval":
      return tuple(filter(None, (x.strip() for text in texts for x in lines.split(text))))
    if not self._noticed:
      self._noticed = True
      logger.warning(
        "%s.%s has %d lines and is read as one caption; if each line is a caption, as in the"
        " retrieval datasets of CLIP_benchmark, write 'retrieval' to a dataset_type.txt in the"
        " folder of the shards or its parent",
        key,
        field,
        texts[0].count("\n") + 1,
      )
    return texts

  def fields(self, i: int) -> dict[str, bytes]:
    """Returns {extension: bytes} of sample i; its record then needs no further read."""
    return self._members(i)[2]

  def value(self, i: int, path: str) -> Any:
    """Returns one stored value of sample i; its record then needs no further read.

    Args:
      i: the sample.
      path: as a caption field: "npy" for KEY.npy, "json.a.b", "scores.parquet:noise"; or
        "stats:NAME" for a column of `columns`.

    Raises:
      FileNotFoundError: if the shard has no statistics.
    """
    if path.startswith(STATS):
      return self._stat(i, path.removeprefix(STATS))
    if sidecars.is_field(path):
      if path not in self._sidecars:
        self._sidecars[path] = Sidecars(self.shards, path, pattern=self.pattern)
      return self._sidecars[path].value(i, self.shards.shard(i))
    stored = self.fields(i)
    if path in stored:
      return stored[path]
    extension, _, rest = path.partition(".")
    if extension != "json" or "json" not in stored:
      return None
    return members.entry(members.read_json(stored["json"], key=f"sample {i}"), rest)

  def _stat(self, i: int, name: str) -> Any:
    """A statistic of sample i; None if its shard or the sample has none of this name."""
    shard = self.shards.shard(i)
    if self._last_stats is None or self._last_stats[0] != shard:
      self._last_stats = shard, self._stats_of(shard)
    rows = self._last_stats[1]
    if name not in (rows.dtype.names or ()):
      return None
    number = rows[name][i - self.shards.firsts[shard]]
    return None if rows.dtype[name].kind == "f" and np.isnan(number) else number

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
    """The statistics (stats.py) of each shard in order, [N] each, mapped into memory."""
    return map(self._stats_of, range(len(self.shards.paths)))

  def _stats_of(self, shard: int) -> np.ndarray:
    """The statistics of a shard, [N], mapped into memory."""
    return stats.load(
      os.path.basename(self.shards.paths[shard]),
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
    start, end = self.shards.span(i, shard)
    if end - start > _MOST_BYTES:
      raise Rejected("too_large", f"sample {i} of {path} has {end - start} bytes")
    try:
      buffer = (
        self._remote[i]
        if self._remote
        else storage.read(path, start, end, expect=self.shards.stat(shard))
      )
      self._last = i, (shard, *parse.sample(buffer))
      return self._last[1]
    except (storage.FileChanged, parse.BrokenTar) as error:
      raise self._read_error(error, i, shard) from error

  def _read_error(self, error: Exception, i: int, shard: int) -> OSError:
    """The error that names the sample, or the command that indexes a changed shard again."""
    if isinstance(error, storage.FileChanged):
      return self.shards.changed(error)
    return OSError(f"{self.shards.paths[shard]}: sample {i} differs from its index: {error}")

  def _check_image(self) -> None:
    """Raises ValueError if the members of images have other names than those that are read."""
    have = sorted(self.shards.fields)
    if self._frames and any(members.frame_number(x, self._image) >= 0 for x in have):
      return
    videos = members.image_stems(have, members.VIDEOS)
    stems, wanted = members.image_stems(have), self._image
    if self._frames:
      stems |= videos
    elif videos and not stems:
      raise ValueError(
        f"{self.pattern!r}: these shards hold videos and no images; the extensions are:"
        f" {tree.shown(have)}. Set config.data.frames=dict(count=8) to train on frames of them"
      )
    known = {"", "image"} & stems if wanted is None else {wanted} & {*have, *stems}
    if known or (wanted is None and not stems):
      return
    named = f"no image member {wanted!r}" if wanted else "no image member (KEY.jpg, KEY.png, ...)"
    raise ValueError(
      f"{self.pattern!r}: {named} in these shards; the extensions are: {tree.shown(have)}."
      f"{_dots(have)} Set config.data.source_options=dict(image=...) to one of"
      f" {tree.shown(sorted(stems))} (command line tools: --source_options image=...)."
    )

  def _check_fields(self) -> None:
    """Raises ValueError if the shards have neither a caption field nor labels."""
    labels = "npy" if self.dataset_type == "multilabel" else "cls"
    if not self.captions or self._sidecars or {"cls", labels} & {*self.shards.fields}:
      return
    have = set(self.shards.fields)
    # Of "json.names.de", the entry `names` is enough.
    wanted = {part for name in self.captions for part in (name, ".".join(name.split(".")[:2]))}
    if "json" in self.shards.fields:
      # The index does not list the keys inside of .json members. Samples are drawn, because few or
      # regular ones may all lack an optional key.
      for i in draw(len(self), _PROBES):
        if have & wanted:
          break
        with contextlib.suppress(Rejected):  # a broken one is counted when training reads it
          _, _, fields = self._members(i)
          have |= {f"json.{key}" for key in members.read_json(fields.get("json", b"{}"), key="")}
    if not have & wanted:
      raise ValueError(
        f"{self.pattern!r}: no caption field {tree.shown(self.captions)} in these shards; the"
        f" fields are: {tree.shown(sorted(have))}.{_dots(have)}{columns.CAPTION_ADVICE}"
      )


def _dots(extensions: Iterable[str]) -> str:
  """A hint for an error if names of files seem to have dots in their keys."""
  dotted = [name for name in extensions if "." in name and not name.startswith("json.")]
  if len(dotted) <= tree.SHOWN:
    return ""
  return (
    " Keys end at the first dot, as webdataset splits them: 'a.1.jpg' is the member '1.jpg' of the"
    " sample 'a'. If these are samples of their own, write the shards again without dots in keys."
  )


def classnames_near(shard: str) -> tuple[str, ...]:
  """Returns the names in the classnames.txt in the folder of a shard or its parent; () if none."""
  path = clip_benchmark.near(shard, "classnames.txt")
  return () if path is None else read_classnames(path)


def read_classnames(path: str | pathlib.Path) -> tuple[str, ...]:
  """Returns the names of the classes in a file, one per line; the label is the line, from 0.

  Raises:
    ValueError: for a blank line before the last name, because to skip it would shift all labels
      after it; for a text that is not UTF-8.
  """
  names = tuple(lines.read_names(path))
  if "" in names:
    raise ValueError(
      f"{path}: line {names.index('') + 1} is blank, but the line number of a name is its label;"
      " write the name of that class there, or remove the line if no class is missing"
    )
  return names
