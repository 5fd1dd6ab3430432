"""Checksums of a folder's files and of JSON, so that damaged bytes are found when they are read.

A folder that is sealed holds checksums.json: the size and the CRC-32 of each of its other files.
Several processes can write one folder: each records its own files, and one of them seals. Likewise
several processes can check one: each reads its share. A sealed JSON object holds its own CRC-32
under the key "checksum".

CRC-32 finds each single burst of up to 32 damaged bits, and misses other random damage once in 2^32
cases. It does not protect against an attacker.
"""

from __future__ import annotations

import concurrent.futures
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

FILE = "checksums.json"
KEY = "checksum"
_BLOCK = 1 << 24  # bytes that are read at a time
_THREADS = 8


class Damaged(ValueError):
  """Bytes differ from those that were written."""


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with its own checksum under "checksum".

  Args:
    value: anything that JSON can hold.

  >>> unseal(seal({"step": 3}), "config.json")
  {'step': 3}
  """
  plain = {name: x for name, x in value.items() if name != KEY}
  return {**plain, KEY: _digest(plain)}


def unseal(value: Any, where: object) -> dict[str, Any]:
  """Returns a JSON object without its checksum, which is checked if there is one.

  Args:
    value: what was read.
    where: the file that it was read from, for the error.

  Raises:
    Damaged: if the object differs from the one that was sealed, or is not an object.
  """
  if not isinstance(value, dict):
    raise Damaged(f"{where} is damaged: it holds {type(value).__name__}, not an object of JSON")
  plain = {name: x for name, x in value.items() if name != KEY}
  if KEY in value and value[KEY] != _digest(plain):
    raise Damaged(
      f"{where} was damaged or edited after it was written: its checksum is {_digest(plain)!r}, the"
      f" recorded one {value[KEY]!r}"
    )
  return plain


def read_json(path: Any) -> dict[str, Any]:
  """Returns the JSON object in a file, as `unseal` does; the file is named in each error.

  Args:
    path: a pathlib.Path or an epath.Path.

  Raises:
    Damaged: if the file is not JSON, or differs from what was written.
  """
  return unseal(load_json(path), path)


def load_json(path: Any) -> Any:
  """Returns the JSON value in a file, without checking a checksum.

  Args:
    path: a pathlib.Path or an epath.Path.

  Raises:
    Damaged: if the file is not JSON.
  """
  try:
    return json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:  # ValueError: not UTF-8 either
    raise Damaged(f"{path} is damaged: it is not JSON: {error}") from error


def _digest(value: Mapping[str, Any]) -> str:
  """Equal before and after a value went through JSON, however the text is laid out."""
  plain = json.loads(json.dumps(value))
  text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
  return f"{zlib.crc32(text.encode()):08x}"


def record(folder: Any, files: Iterable[str], process: int) -> None:
  """Records the checksums of the files that this process wrote, for `seal_folder`.

  Args:
    folder: a pathlib.Path or an epath.Path.
    files: paths relative to the folder.
    process: the number of this process.
  """
  sums = _sums(folder, files)
  (folder / f"checksums.{process}.json").write_text(json.dumps(seal({"files": sums})))


def seal_folder(folder: Any, *, without: Iterable[str] = ()) -> None:
  """Writes checksums.json; one process calls it once all others have recorded their files.

  It reads only the files that no process has recorded.

  Args:
    folder: a pathlib.Path or an epath.Path.
    without: files that change later.
  """
  parts = sorted(folder.glob("checksums.*.json"))
  sums: dict[str, list[int]] = {}
  for part in parts:
    sums |= read_json(part)["files"]
  others = {*list_files(folder)} - {*sums, FILE, *(part.name for part in parts), *without}
  sums |= _sums(folder, others)
  (folder / FILE).write_text(json.dumps(seal({"files": dict(sorted(sums.items()))})))
  for part in parts:
    part.unlink()


def list_files(folder: Any, under: str = "") -> list[str]:
  """Returns the paths of all files below folder/under, relative to the folder, sorted."""
  files: list[str] = []
  for path in (folder / under if under else folder).iterdir():
    name = f"{under}/{path.name}" if under else path.name
    files += list_files(folder, name) if path.is_dir() else [name]
  return sorted(files)


def damaged_file(folder: Any, share: int = 0, shares: int = 1) -> str:
  """Checks a share of the files of a sealed folder, at most 8 at a time.

  Args:
    folder: a pathlib.Path or an epath.Path.
    share: the number of this process.
    shares: the number of processes. Together they read each file once.

  Returns:
    The first damaged file of this share and what is wrong, or "".

  Raises:
    Damaged: if checksums.json itself is damaged.
    FileNotFoundError: if the folder is not sealed.
  """
  sums: dict[str, list[int]] = read_json(folder / FILE)["files"]
  by_size = sorted(sums, key=lambda name: (-sums[name][0], name))
  wanted = by_size[share::shares]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for name, now in zip(wanted, pool.map(lambda name: _sum_or_error(folder / name), wanted)):
      size, crc = sums[name]
      if isinstance(now, str):
        return f"{folder / name}: {now}"
      if now[0] != size:
        return f"{folder / name} has {now[0]} bytes, and had {size} when it was written"
      if now[1] != crc:
        return f"{folder / name} changed after it was written: its checksum differs"
  return ""


def _sums(folder: Any, files: Iterable[str]) -> dict[str, list[int]]:
  """{path: [bytes, CRC-32]}."""
  names = sorted(files)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _sum(folder / name), names)))


def _sum(path: Any) -> list[int]:
  size = crc = 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]


def _sum_or_error(path: Any) -> list[int] | str:
  try:
    return _sum(path)
  except OSError as error:
    return f"cannot be read: {error}"
