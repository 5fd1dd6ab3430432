"""Which files a pattern names: braces ({00000..00005}, {a,b}) and globs, local or remote."""

from __future__ import annotations

import collections
import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Sequence

import braceexpand

from bigalign import tree
from bigalign.data.files import storage

MOST_NAMES = 10_000_000  # that a pattern may expand to; as strings they take about 1 GB


def expand_variables(text: str, *, what: str) -> str:
  """Replaces $NAME and ${NAME} with the environment variable NAME.

  Args:
    text: a path, a pattern or a source.
    what: names the text in the error.

  Raises:
    KeyError: if a variable is not set; names it.
  """

  def value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
      raise KeyError(
        f"{what} {text!r}: the environment variable {name} is not set; "
        f"export {name}=... or write the path out"
      )
    return os.environ[name]

  return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)


def expand_shards(pattern: str) -> list[str]:
  """Returns the paths that a pattern with braces and globs names, in order.

  Args:
    pattern: local or remote, such as DIR/{00000..00005}.tar, {a,b}/*.tar.

  Raises:
    FileNotFoundError: if a glob matches no file, or a local file is missing.
    ValueError: for wrong braces, more than MOST_NAMES names, or a file that is named twice.
  """
  paths: list[str] = []
  plain = not glob.has_magic(pattern)
  for name in _expand_braces(os.path.expanduser(pattern)):
    matches = [name] if plain or not glob.has_magic(name) else _glob(name)
    if not matches:
      raise FileNotFoundError(
        f"No file matches {name!r} (source {pattern!r}); the folder {_nearest_folder(name)}"
      )
    paths += matches
  _check_present(paths, pattern=pattern)
  if len(set(paths)) < len(paths):
    double, _ = collections.Counter(paths).most_common(1)[0]
    raise ValueError(f"{pattern!r} names {double} more than once")
  return paths


def by_folder(paths: Sequence[str]) -> dict[str, tuple[list[int], list[str]]]:
  """Groups paths by folder; calls no stat, so that it is fast for 10^6 shards.

  Returns:
    {folder: (positions of its files in `paths`, names of these files)}.
  """
  positions: dict[str, list[int]] = {}
  for n, path in enumerate(paths):
    prefix = path[: path.rfind("/") + 1]
    if prefix in positions:
      positions[prefix].append(n)
    else:
      positions[prefix] = [n]
  return {
    prefix[:-1] or prefix: (chosen, [paths[n][len(prefix) :] for n in chosen])
    for prefix, chosen in positions.items()
  }


def expand_local(pattern: str, *, kind: str) -> list[str]:
  """Like expand_shards, for kinds of files that are read only from disks and mounts.

  Args:
    pattern: of local files.
    kind: names the kind of files in the error.

  Raises:
    ValueError: for a file in an object store; says which kinds are read from there.
  """
  paths = expand_shards(pattern)
  for path in paths:
    if storage.is_remote(path):
      raise ValueError(
        f"{path}: {kind} is read only from local disks and mounts; .tar and .parquet are also"
        " read from object stores. Copy the files, or mount the store"
      )
  return paths


def _glob(name: str) -> list[str]:
  if not storage.is_remote(name):
    return sorted(glob.glob(name))
  folder, _, last = name.rpartition("/")
  if glob.has_magic(folder):
    raise ValueError(
      f"{name!r}: remote patterns take * and ? only in the name of the file; write "
      "folders out, or as lists like {a,b}"
    )
  prefix = re.split(r"[*?[]", last, maxsplit=1)[0]
  names = storage.names(folder, prefix=prefix)
  return [f"{folder}/{entry}" for entry in sorted(fnmatch.filter(names, last))]


def _check_present(paths: list[str], *, pattern: str) -> None:
  """Raises FileNotFoundError if local files are missing; lists each folder once."""
  missing = []
  for folder, (positions, names) in by_folder(paths).items():
    if not storage.is_remote(folder):  # one request per file would take hours: checked when read
      present = set(storage.names(folder)) if os.path.isdir(folder or os.curdir) else set()
      if not present.issuperset(names):
        missing += [paths[n] for n, name in zip(positions, names) if name not in present]
  if missing:
    raise FileNotFoundError(
      f"{len(missing)} of {len(paths)} shards of {pattern!r} are missing: "
      f"{tree.shown(missing, sep=', ', width=300)}; the folder {_nearest_folder(missing[0])}"
    )


def _expand_braces(pattern: str) -> list[str]:
  """Returns the names that the braces of a pattern give, as bash does."""
  for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)[}.]", pattern):
    if int(last) < int(first):  # bash would count down
      raise ValueError(f"{pattern!r}: the range {{{first}..{last}}} is empty")
    # braceexpand holds all numbers of a range, so the size must be known before.
    if int(last) - int(first) >= MOST_NAMES:
      raise ValueError(
        f"{pattern!r}: the range {{{first}..{last}}} has more than {MOST_NAMES} numbers"
      )
  try:
    expanded = braceexpand.braceexpand(pattern, escape=False)
    names = list(itertools.islice(expanded, MOST_NAMES + 1))
  except ValueError:  # braceexpand.UnbalancedBracesError
    raise ValueError(f"{pattern!r}: a brace is not closed, or not opened") from None
  if len(names) > MOST_NAMES:
    raise ValueError(f"{pattern!r} names more than {MOST_NAMES} files")
  # What braceexpand does not understand keeps its braces.
  if literal := next((name for name in names if "{" in name), ""):
    piece = literal[literal.rindex("{") :].partition("}")[0]
    raise ValueError(
      f"{pattern!r}: {piece}}} is neither a range like {{00000..00005}} nor a list like {{a,b}}"
    )
  return names


def _nearest_folder(path: str) -> str:
  """Says what the folder of a missing file holds, for errors."""
  folder = os.path.dirname(path)
  if storage.is_remote(path):
    return f"{folder} holds no such object"
  if not os.path.isdir(folder or "."):
    return f"{folder} does not exist"
  tars = sorted(name for name in storage.names(folder) if name.endswith(".tar"))
  listed = f": {tree.shown(tars, sep=', ')}" if tars else ""
  return f"{folder} holds {len(tars)} .tar files{listed}"
