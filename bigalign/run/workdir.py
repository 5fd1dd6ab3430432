"""A run's folder: local, or a bucket whose small files have a local copy.

Checkpoints are written to gs:// directly, with a commit marker last. All other files of a run are
small and grow line by line, which buckets do not allow. They are written to a local folder,
downloaded before a run resumes, and uploaded before each checkpoint and at the end. Losing a
machine therefore loses only the work since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from bigalign.data.files import storage
from bigalign.private_apis import coordination_client
from bigalign.run import copies
from bigalign.run.lock import FILE, WorkdirLock, WorkdirLost

_REJECTED = "rejected-"  # begins the name of each process's log of rejected samples
PATIENCE = 600  # seconds that the other processes wait for process 0 to hold the lock


class Workdir:
  """A run's folder.

  Attributes:
    local: folder of the small files.
    root: parent of the checkpoints: `local`, or the address of the bucket.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, reader: bool = False) -> None:
    """
    Args:
      workdir: a folder, in which ~ is the home folder, or an address gs://…
      reader: for programs that only read: uses a local folder of its own, so that it does not
        disturb a run that is training on this machine.

    Raises:
      ValueError: for the address of another object store than gs://.
      ImportError: if gcsfs is missing.
    """
    address = os.fspath(workdir)
    self.root: Any = pathlib.Path(address).expanduser().absolute()
    self.local: pathlib.Path = self.root
    self._uploaded: dict[str, int] = {}  # {file in the bucket: mtime of its local copy, ns}
    self._lock: WorkdirLock | None = None
    if "://" not in address:
      return
    if not address.startswith("gs://"):
      raise ValueError(f"{address}: a run's folder (--workdir) is a local path, a mount, or gs://…")
    if not importlib.util.find_spec("gcsfs"):
      raise ImportError(f"{address} needs gcsfs: pip install 'bigalign[gcs]'")
    address = address.rstrip("/")
    storage.forget_listings()
    self.root = epath.Path(address)
    cache = os.environ.get("BIGALIGN_RUNS") or "~/.cache/bigalign/runs"
    name = f"{self.root.name}-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    self.local = pathlib.Path(cache).expanduser() / (f"{name}-reader" if reader else name)

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """A context in which no other run may write into the folder; process 0 holds the lock.

    The other processes wait until it does: `download` would replace files of a run that is writing.

    Raises:
      WorkdirInUse: if another run writes there; names its machine and process.
    """
    if jax.process_index() == 0:
      lock = WorkdirLock(self.root)
      lock.acquire()
      self._lock = lock
    try:
      if jax.process_count() > 1:
        # Not a collective: the devices need not wait for the minute until a lock counts as stale.
        coordination_client().wait_at_barrier("bigalign/locked", PATIENCE * 1000)
      yield
    finally:
      if self._lock is not None:
        self._lock.release()
        self._lock = None

  def check(self, *, fresh: bool = True) -> None:
    """Call it before a write.

    Args:
      fresh: False: before a write to the local folder. What is known of a bucket since the last
        seconds counts then, because asking takes requests.

    Raises:
      WorkdirLost: if the folder was deleted or moved, or another run has taken it over.
    """
    if self._lock is not None:
      self._lock.check(fresh=fresh)
    elif not self.local.exists():
      raise WorkdirLost(f"{self.local} was deleted or moved while this run was writing there")

  def download(self) -> None:
    """Makes the local folder equal to the bucket; every process calls it before it writes.

    Of the logs of rejected samples, each process takes its own: a thousand processes would ask for
    a million files.
    """
    if self.root is self.local:
      return
    self.local.mkdir(parents=True, exist_ok=True)
    files = self.root.iterdir() if self.root.exists() else ()
    ours = [x for x in files if x.name != FILE and not _of_another(x.name, jax.process_index())]
    remote = [x for x in ours if not x.is_dir()]
    for path in {*self.local.iterdir()} - {self.local / file.name for file in remote}:
      if _of_another(path.name, jax.process_index()):
        continue  # of a process of this machine
      if path.is_file() and path.suffix != ".tmp":  # another process is about to rename those
        path.unlink(missing_ok=True)
    for file in remote:
      with storage.atomic_write(self.local / file.name, suffix=storage.unique_suffix()) as copy:
        copy.write(file.read_bytes())
      self._uploaded[file.name] = (self.local / file.name).stat().st_mtime_ns
    self._download_copies()

  def _download_copies(self) -> None:
    """Downloads the copies that are missing here: see run/copies.py."""
    if not (self.root / copies.FOLDER).exists():
      return
    for folder in (self.root / copies.FOLDER).iterdir():
      for file in folder.iterdir():
        name = f"{copies.FOLDER}/{folder.name}/{file.name}"
        copy = self.local / name
        if not copy.is_file():
          copy.parent.mkdir(parents=True, exist_ok=True)
          with storage.atomic_write(copy, suffix=storage.unique_suffix()) as out:
            out.write(file.read_bytes())
        self._uploaded[name] = copy.stat().st_mtime_ns

  def upload(self, process: int) -> None:
    """Uploads the files that changed.

    Args:
      process: number of this process. Each one uploads its own log of rejected samples; process 0
        uploads all other files too.
    """
    if self.root is self.local:
      return
    for path in sorted(self.local.rglob("*")):
      name = path.relative_to(self.local).as_posix()
      others = _of_another(name, process) or (process != 0 and not name.startswith(_REJECTED))
      partial = path.suffix in (".part", ".tmp")  # another process writes them, or was killed
      if not path.is_file() or partial or others:
        continue
      stamp = path.stat().st_mtime_ns
      if self._uploaded.get(name) != stamp:
        (self.root / name).write_bytes(path.read_bytes())
        self._uploaded[name] = stamp


def _of_another(name: str, process: int) -> bool:
  """Whether a file is the log of rejected samples of another process."""
  return name.startswith(_REJECTED) and not name.startswith(f"{_REJECTED}{process:05}.")
