"""Copies of the small files that a run needs, so that its folder works on another machine.

  copies/tokenizer-0f3a9c21d4e5b687/tokenizer.json      the tokenizer, and the files next to it
  copies/classnames-5d1e07b3c9a86f42/classnames.txt     a file that an option of config.evals names

The name of each folder ends with a digest of its files, and the record of each checkpoint names its
own folders. So no copy is ever replaced, and one that was damaged or edited is noticed.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bigalign.data.files import checksums, storage

FOLDER = "copies"
_PARTIAL = (".part", ".tmp")  # what another process is writing


class Original(NamedTuple):
  """Files that an option names.

  Args:
    label: begins the name of the folder of the copies.
    option: the keys of the option, from the config down.
    file: the file that the option names.
    neighbours: other files that are read with it; they are copied next to it.
  """

  label: str
  option: tuple[str, ...]
  file: pathlib.Path
  neighbours: tuple[pathlib.Path, ...] = ()


class Copies(NamedTuple):
  """Files to copy.

  Args:
    record: nested like the config: where the copy of the file that an option names is, relative to
      the folder of the run.
    contents: {path relative to the folder of the run: content} of all files.
  """

  record: dict[str, Any]
  contents: dict[str, bytes]


def read(originals: Iterable[Original]) -> Copies:
  """Returns the content of the files that options name, and where their copies belong.

  Raises:
    OSError: for a file that cannot be read.
  """
  record: dict[str, Any] = {}
  contents: dict[str, bytes] = {}
  for original in originals:
    files = {x.name: x.read_bytes() for x in (*original.neighbours, original.file)}
    folder = f"{FOLDER}/{original.label}-{_digest(files)}"
    contents |= {f"{folder}/{name}": content for name, content in files.items()}
    group = record
    for key in original.option[:-1]:
      group = group.setdefault(key, {})
    group[original.option[-1]] = f"{folder}/{original.file.name}"
  return Copies(record, contents)


def write(copies: Copies, workdir: pathlib.Path) -> None:
  """Writes the copies that the folder of a run lacks."""
  for name, content in copies.contents.items():
    file = workdir / name
    if not file.is_file() or file.read_bytes() != content:
      file.parent.mkdir(parents=True, exist_ok=True)
      with storage.atomic_write(file) as out:
        out.write(content)


def used(
  config: Mapping[str, Any], record: Mapping[str, Any], workdir: pathlib.Path, where: str = "config"
) -> dict[str, Any]:
  """Returns a config whose options name the copies instead of the original files.

  Args:
    config: in plain values.
    record: of `Copies`.
    workdir: the folder of the run. An option whose copy is missing there keeps its value.
    where: the place in the config, for errors.

  Raises:
    checksums.Damaged: if a copy was damaged or edited.
  """
  changed = dict(config)
  for name, value in record.items():
    given = changed.get(name)
    if isinstance(value, Mapping):
      if isinstance(given, Mapping):
        changed[name] = used(given, value, workdir, f"{where}.{name}")
      continue
    file = workdir / value
    if not file.is_file():
      continue
    files = (x for x in file.parent.iterdir() if x.is_file())
    whole = (x for x in files if not x.name.startswith(".") and x.suffix not in _PARTIAL)
    if not file.parent.name.endswith(f"-{_digest({x.name: x.read_bytes() for x in whole})}"):
      raise checksums.Damaged(
        f"{file.parent} was damaged or edited: its files are not those that the run was trained"
        f" with. Copy them from a backup, or remove the folder; then {where}.{name}={given!r} is"
        " read"
      )
    changed[name] = str(file)
  return changed


def _digest(files: Mapping[str, bytes]) -> str:
  """16 hex digits that identify the names and the contents of files."""
  sha = hashlib.sha256()
  for name, content in sorted(files.items()):
    sha.update(f"{name}\n{len(content)}\n".encode() + content)
  return sha.hexdigest()[:16]
