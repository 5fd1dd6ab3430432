"""Where a run lies: a folder, or a bucket whose small files are kept in a folder beside it.

Checkpoints go to gs:// as they are written, a marker last. All else of a run is small and grows
line by line, which no bucket allows: it is written to a local folder, fetched before a run goes on,
and put into the bucket before each checkpoint and at the end. A machine may be lost at any time,
with nothing but what the next one computes again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
from typing import Any

from etils import epath

from bigalign.data.files import storage


class Workdir:
  """A run's folder.

  local: where its small files are. root: where its checkpoints are; `local`, or the address.
  reader: only looks, and has a local folder of its own beside that of a run that goes on here.

  Raises:
    ValueError: for the address of another store than gs://.
    ImportError: if gcsfs is missing.
  """

  def __init__(self, place: str | os.PathLike[str], *, reader: bool = False):
    address = os.fspath(place)
    self.root: Any = pathlib.Path(address).absolute()
    self.local: pathlib.Path = self.root
    self._there: dict[str, int] = {}  # {file: time of change} of those that are in the bucket
    if "://" not in address:
      return
    if not address.startswith("gs://"):
      raise ValueError(f"--workdir={address}: a run's folder is a local path, a mount, or gs://…")
    if not importlib.util.find_spec("gcsfs"):
      raise ImportError(f"--workdir={address} needs gcsfs: pip install 'bigalign[gcs]'")
    address = address.rstrip("/")
    self.root = epath.Path(address)
    cache = os.environ.get("BIGALIGN_RUNS") or "~/.cache/bigalign/runs"
    name = f"{self.root.name}-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    self.local = pathlib.Path(cache).expanduser() / (f"{name}-reader" if reader else name)

  def download(self) -> None:
    """Makes the local folder what is in the bucket; all processes do, before any writes there."""
    if self.root is self.local:
      return
    self.local.mkdir(parents=True, exist_ok=True)
    there = [x for x in self.root.iterdir() if not x.is_dir()] if self.root.exists() else []
    for path in {*self.local.iterdir()} - {self.local / file.name for file in there}:
      if path.is_file() and path.suffix != ".tmp":  # which another process is about to rename
        path.unlink(missing_ok=True)
    for file in there:
      with storage.whole(self.local / file.name, mark=storage.own_mark()) as copy:
        copy.write(file.read_bytes())
      self._there[file.name] = (self.local / file.name).stat().st_mtime_ns

  def upload(self, process: int) -> None:
    """Puts what changed into the bucket: process 0 all that is not another's rejected samples."""
    if self.root is self.local:
      return
    for path in sorted(self.local.rglob("*")):
      name, own = path.relative_to(self.local).as_posix(), f"rejected-{process:05}."
      others = name.startswith("rejected-") or process != 0
      if not path.is_file() or path.suffix == ".part" or (others and not name.startswith(own)):
        continue
      stamp = path.stat().st_mtime_ns
      if self._there.get(name) != stamp:
        (self.root / name).write_bytes(path.read_bytes())
        self._there[name] = stamp
