"""Which files a pattern names: braces ({00000..00005}, {a,b}) and globs, local or remote."""

from __future__ import annotations

import collections
import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Sequence

from bigalign.data.files import storage


def expand_shards(pattern: str) -> list[str]:
  """Paths of a pattern with braces and globs; local ones all exist."""
  paths: list[str] = []
  plain = not glob.has_magic(pattern)
  for name in _expand_braces(os.path.expanduser(pattern)):
    found = [name] if plain or not glob.has_magic(name) else _glob(name)
    if not found:
      raise FileNotFoundError(
        f"No file matches {name!r} (source {pattern!r}); the folder {_nearest_folder(name)}"
      )
    paths += found
  _check_present(paths, pattern=pattern)
  if len(set(paths)) < len(paths):
    double, _ = collections.Counter(paths).most_common(1)[0]
    raise ValueError(f"{pattern!r} names {double} more than once")
  return paths


def by_folder(paths: Sequence[str]) -> dict[str, tuple[list[int], list[str]]]:
  """Folder → (places of its files in `paths`, their names). For sets of 10^6 shards: no stat."""
  places: dict[str, list[int]] = {}
  for n, path in enumerate(paths):
    ahead = path[: path.rfind("/") + 1]
    if ahead in places:
      places[ahead].append(n)
    else:
      places[ahead] = [n]
  return {
    ahead[:-1] or ahead: (chosen, [paths[n][len(ahead) :] for n in chosen])
    for ahead, chosen in places.items()
  }


def expand_local(pattern: str, *, kind: str) -> list[str]:
  """expand_shards of a kind of files that is read from disks and mounts alone.

  Raises:
    ValueError: for an object store, with what is read from there.
  """
  paths = expand_shards(pattern)
  for path in paths:
    if storage.is_remote(path):
      raise ValueError(
        f"{path}: {kind} is read from local disks and mounts; from object stores"
        " .tar and .parquet are. Copy it, or mount the store"
      )
  return paths


def _glob(name: str) -> list[str]:
  if not storage.is_remote(name):
    return sorted(glob.glob(name))
  folder, _, last = name.rpartition("/")
  if glob.has_magic(folder):
    raise ValueError(
      f"{name!r}: remote patterns take * and ? in the name of the file alone; write "
      "folders out, or as lists like {a,b}"
    )
  return [f"{folder}/{entry}" for entry in sorted(fnmatch.filter(storage.names(folder), last))]


def _check_present(paths: list[str], *, pattern: str) -> None:
  """Raises FileNotFoundError for local files that are not there; one listing per folder."""
  missing = []
  for folder, (places, names) in by_folder(paths).items():
    if not storage.is_remote(folder):  # found missing when read: a request each would take hours
      present = set(storage.names(folder)) if os.path.isdir(folder or os.curdir) else set()
      if not present.issuperset(names):
        missing += [paths[n] for n, name in zip(places, names) if name not in present]
  if missing:
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    raise FileNotFoundError(
      f"{len(missing)} of {len(paths)} shards of {pattern!r} are missing: "
      f"{', '.join(missing[:5])}{more}; the folder {_nearest_folder(missing[0])}"
    )


def _expand_braces(pattern: str) -> list[str]:
  pieces = re.split(r"\{([^{}]*)\}", pattern)
  choices = [
    [piece] if i % 2 == 0 else _alternatives(piece, pattern=pattern)
    for i, piece in enumerate(pieces)
  ]
  return ["".join(choice) for choice in itertools.product(*choices)]


def _alternatives(piece: str, *, pattern: str) -> list[str]:
  numbers = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
  if not numbers:
    if "," not in piece:
      raise ValueError(
        f"{pattern!r}: {{{piece}}} is neither a range like {{00000..00005}} nor a list like {{a,b}}"
      )
    return piece.split(",")
  first, last = numbers[1], numbers[2]
  if int(last) < int(first):
    raise ValueError(f"{pattern!r}: the range {{{piece}}} is empty")
  width = len(first) if first.startswith("0") or len(first) == len(last) else 0
  return [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]


def _nearest_folder(path: str) -> str:
  folder = os.path.dirname(path)
  if storage.is_remote(path):
    return f"{folder} holds no such object"
  if not os.path.isdir(folder or "."):
    return f"{folder} does not exist"
  tars = sorted(name for name in storage.names(folder) if name.endswith(".tar"))
  return f"{folder} holds {len(tars)} .tar files{': ' + ', '.join(tars[:5]) if tars else ''}"
