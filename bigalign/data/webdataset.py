"""Random access to webdataset .tar shards (img2dataset, CLIP_benchmark) as they are."""

from __future__ import annotations

import collections
import glob
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data import index
from bigalign.data.rejects import Rejected

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


def expand_shards(pattern: str) -> list[str]:
  """Paths of a pattern with braces ({00000..00005}, {a,b}) and globs; all of them exist."""
  paths, missing = [], []
  for name in _expand_braces(os.path.expanduser(pattern)):
    found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    if not found:
      raise FileNotFoundError(f"No file matches {name!r} (source {pattern!r}); "
                              f"the folder {_nearest_folder(name)}")
    paths += found
  missing = [path for path in paths if not os.path.isfile(path)]
  if missing:
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    raise FileNotFoundError(
        f"{len(missing)} of {len(paths)} shards of {pattern!r} are missing: "
        f"{', '.join(missing[:5])}{more}; the folder {_nearest_folder(missing[0])}")
  doubles = [path for path, times in collections.Counter(paths).items() if times > 1]
  if doubles:
    raise ValueError(f"{pattern!r} names {doubles[0]} more than once")
  return paths


def _expand_braces(pattern: str) -> list[str]:
  pieces = re.split(r"\{([^{}]*)\}", pattern)
  choices = [[piece] if i % 2 == 0 else _alternatives(piece, pattern=pattern)
             for i, piece in enumerate(pieces)]
  return ["".join(choice) for choice in itertools.product(*choices)]


def _alternatives(piece: str, *, pattern: str) -> list[str]:
  numbers = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
  if not numbers:
    if "," not in piece:
      raise ValueError(f"{pattern!r}: {{{piece}}} is neither a range like {{00000..00005}} nor a "
                       "list like {a,b}")
    return piece.split(",")
  first, last = numbers[1], numbers[2]
  if int(last) < int(first):
    raise ValueError(f"{pattern!r}: the range {{{piece}}} is empty")
  width = len(first) if first.startswith("0") or len(first) == len(last) else 0
  return [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]


def _nearest_folder(path: str) -> str:
  folder = pathlib.Path(path).parent
  if not folder.is_dir():
    return f"{folder} does not exist"
  tars = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".tar"))
  return f"{folder} holds {len(tars)} .tar files{': ' + ', '.join(tars[:5]) if tars else ''}"


class WebDataset:
  """Random access to webdataset .tar shards as they are.

  captions  fields in order of preference; the first that is there and not blank gives the
            captions. "txt" is the member KEY.txt; "json.captions" the entry `captions` of
            KEY.json, a string or a list of strings.
  KEY.cls holds the label; names of the classes are read from classnames.txt (one per line) in the
  folder of the shards or the one above it. A source without any of the caption fields is an error
  unless it has labels.
  """

  def __init__(self, pattern: str, *, captions: Sequence[str] = ("txt",)):
    self.pattern = pattern
    self.captions = tuple(captions)
    self.shards = expand_shards(pattern)
    shards = [index.scan(path) for path in self.shards]
    # Sample i of shard s is the pair starts[firsts[s] + s + i], starts[firsts[s] + s + i + 1]: each
    # shard has one entry more than samples.
    self._starts = np.concatenate([shard.starts for shard in shards])
    self._firsts = np.cumsum([0] + [len(shard.starts) - 1 for shard in shards])
    self.fields: collections.Counter[str] = collections.Counter()
    for shard in shards:
      self.fields.update(shard.fields)
    if not len(self):
      raise ValueError(f"{pattern!r}: no samples in {len(self.shards)} shards; members are named "
                       "KEY.jpg, KEY.txt, KEY.json")
    self.classnames = _classnames(self.shards[0])
    self.fingerprint = hashlib.sha256(json.dumps(
        [(os.path.basename(path), shard.size) for path, shard in zip(self.shards, shards)]
    ).encode() + self._starts.astype("<u4").tobytes()).hexdigest()[:32]
    self._files = _Files()
    self._check_fields()

  def __repr__(self) -> str:
    return f"WebDataset({self.pattern!r})"

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    shard, members = self._members(i)
    name = os.path.basename(self.shards[shard])
    key = f"{name}/{next(iter(members))[0]}"
    fields = {field: data for (_, field), data in members.items()}
    image = next((fields[kind] for kind in IMAGES if kind in fields), None)
    if image is None:
      raise Rejected("no_image", f"{key} has {sorted(fields)}")
    return dict(image=image, captions=_captions(fields, self.captions, key=key), key=key,
                label=_label(fields, key=key))

  def _members(self, i: int) -> tuple[int, dict[tuple[str, str], bytes]]:
    """The shard of sample i, and its members by (key, field)."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    shard = int(np.searchsorted(self._firsts, i, side="right")) - 1
    start, end = (int(block) * index.BLOCK for block in self._starts[i + shard:i + shard + 2])
    path = self.shards[shard]
    buffer = self._files.read(path, start, end - start)
    try:
      named = [(index.split_name(member.name), buffer[member.start:member.start + member.size])
               for member in index.members(buffer) if member is not None]
    except index.BrokenTar as error:
      raise OSError(f"{path}: the shard changed while in use: {error}, counted from {start}; "
                    "start again, so that it is indexed again") from error
    return shard, {name: data for name, data in named if name is not None}

  def _check_fields(self) -> None:
    if not self.captions or "cls" in self.fields:
      return
    have = set(self.fields)
    if "json" in self.fields:
      # The keys inside .json members are not indexed: a few samples stand for the rest.
      for i in range(0, len(self), max(1, len(self) // 8)):
        _, members = self._members(i)
        for (_, field), data in members.items():
          if field == "json":
            have |= {f"json.{key}" for key in _json(data, key="")}
    if not have.intersection(self.captions):
      raise ValueError(f"{self.pattern!r}: no caption field {list(self.captions)} in these shards; "
                       f"the fields there are: {sorted(have)}. Set captions=(...) to one of them.")


def _classnames(shard: str) -> tuple[str, ...]:
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
    raise ValueError(f"{path}: line {names.index('') + 1} is blank, but the place of a name is its "
                     "label; write the name of that class there, or take the line out if none is "
                     "missing")
  return names


def _label(fields: Mapping[str, bytes], *, key: str) -> int:
  if "cls" not in fields:
    return -1
  try:
    return int(fields["cls"])
  except ValueError:
    raise Rejected("bad_metadata", f"{key}.cls holds {fields['cls'][:32]!r}") from None


def _json(data: bytes, *, key: str) -> dict[str, Any]:
  try:
    value = json.loads(data)
  except ValueError as error:
    raise Rejected("bad_metadata", f"{key}.json: {error}") from None
  if not isinstance(value, dict):
    raise Rejected("bad_metadata", f"{key}.json holds a {type(value).__name__}, expected an object")
  return value


def _captions(fields: Mapping[str, bytes], names: Sequence[str], *, key: str) -> tuple[str, ...]:
  for name in names:
    field, _, entry = name.partition(".")
    value: Any = None
    if field == "json" and entry:
      value = _json(fields["json"], key=key).get(entry) if "json" in fields else None
    elif name in fields:
      value = _decode_text(fields[name], key=f"{key}.{name}")
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    captions = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    if captions:
      return captions
  return ()


def _decode_text(data: bytes, *, key: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    logger.warning("%s: not UTF-8 (%s); the bytes in question are replaced", key, error.reason)
    return data.decode("utf-8", "replace")


class _Files:
  """Shards opened on first use, the least recently used closed; pickles as empty."""

  def __init__(self, limit: int = 128):
    self._limit = limit
    self._open: collections.OrderedDict[str, int] = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(self, path: str, start: int, size: int) -> bytes:
    with self._lock:  # else another thread could close the file under the read
      if path not in self._open:
        while len(self._open) >= self._limit:
          os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
      self._open.move_to_end(path)
      return os.pread(self._open[path], size, start)

  def __reduce__(self):
    return _Files, (self._limit,)

  def __del__(self):
    for descriptor in self._open.values():
      os.close(descriptor)
