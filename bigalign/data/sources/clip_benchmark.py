"""What the folders of CLIP_benchmark state outside their shards: kind of dataset, number of shards.

  DIR/dataset_type.txt     classification (without the file), retrieval or multilabel
  DIR/SPLIT/nshards.txt    number of shards: 0.tar, 1.tar ...

The folder of the shards and its parent are looked at, as for classnames.txt.
"""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Sequence

from bigalign import tree
from bigalign.data.files import lines, storage

logger = logging.getLogger(__name__)

TYPES = ("classification", "retrieval", "multilabel")


def dataset_type(shard: str) -> str:
  """Returns the kind of dataset that dataset_type.txt states; "" without the file.

  Raises:
    ValueError: for an unknown kind.
  """
  file = near(shard, "dataset_type.txt")
  if file is None:
    return ""
  kind = lines.read_text(file).strip().lower()
  if kind not in TYPES:
    raise ValueError(f"{file}: {kind[:80]!r}; known: {list(TYPES)}")
  return kind


def stated_shards(paths: Sequence[str], *, pattern: str) -> list[str]:
  """Returns the shards that nshards.txt states, 0.tar to (N - 1).tar; all without the file.

  Args:
    paths: of the shards.
    pattern: that gave the paths. One with "*" asks for all shards; another one may choose some.

  Raises:
    ValueError: if shards are missing, or the file holds another text.
  """
  file = near(paths[0], "nshards.txt", parent=False) if paths else None
  if file is None or any(not _number(path).isdigit() for path in paths):
    return list(paths)
  text = lines.read_text(file).strip()
  if not text.isdigit() or not 0 < int(text) < 10**9:
    raise ValueError(f"{file}: {text[:80]!r} is not a number of shards")
  count = int(text)
  kept = [path for path in paths if int(_number(path)) < count]
  if len(kept) < len(paths):
    left_out = [os.path.basename(path) for path in paths if path not in set(kept)]
    logger.warning(
      "%s: left out %d shards, %s, because %s states %d",
      pattern,
      len(left_out),
      tree.shown(left_out),
      file,
      count,
    )
  if "*" in pattern and len(kept) < count:
    have = {int(_number(path)) for path in kept}
    # The file may state any number; these contain all that are shown.
    numbers = range(min(count, len(have) + tree.SHOWN))
    first = [f"{i}.tar" for i in numbers if i not in have][: tree.SHOWN]
    raise ValueError(
      f"{pattern!r}: {file} states {count} shards, but {count - len(kept)} are missing:"
      f" {tree.shown(first)}. Copy them, or name the shards to read without '*'"
    )
  if not kept:
    raise ValueError(f"{pattern!r}: {file} states {count} shards, and none of these is among them")
  return kept


def _number(path: str) -> str:
  """The name of a shard without its ending."""
  return os.path.basename(path).partition(".")[0]


def near(shard: str, name: str, *, parent: bool = True) -> str | None:
  """The path of the file of this name in the folder of a shard or its parent, local or remote."""
  folder = shard.rpartition("/")[0] if storage.is_remote(shard) else str(pathlib.Path(shard).parent)
  places = [folder]
  if parent and storage.is_remote(shard):
    above = folder.rpartition("/")[0]
    places += [above] if "://" in above else []  # else the folder is the bucket
  elif parent:
    places.append(str(pathlib.Path(folder).parent))
  files = (f"{place.removesuffix('/')}/{name}" for place in places)
  return next((file for file in files if storage.exists(file)), None)
