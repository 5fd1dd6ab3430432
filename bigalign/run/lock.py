"""A lock on a run's folder, so that two runs do not write into it, and its loss is noticed.

The file `lock` names its holder and counts up every few seconds. On one machine the system's lock
on the file decides, which ends with the process. Between machines, and in a bucket, a lock whose
count stands still belongs to a run that is dead, and is taken over. All locks have one size and are
written at once, so that a reader never finds half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging

from bigalign.data.files import storage

FILE = "lock"
BEAT = 15.0  # seconds between two counts
STALE = 3 * BEAT  # seconds without a count after which a holder counts as dead
_SIZE = 1024  # bytes of the file
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")


class WorkdirInUse(OSError):
  """Another run writes into the folder."""


class WorkdirLost(OSError):
  """The folder was deleted, moved, or taken over by another run."""


class WorkdirLock:
  """The lock of one run; `acquire` it before anything is written, `check` it before each write.

  Args:
    folder: of the run: a pathlib.Path, or an epath.Path of a bucket.
  """

  def __init__(self, folder: Any):
    self._folder = folder
    self._path = folder / FILE
    self._local = isinstance(folder, pathlib.PosixPath) and "://" not in os.fspath(folder)
    self._descriptor = -1
    self._created = False
    self._stop = threading.Event()
    self._writing = threading.Lock()  # so that nothing is written once the lock is given back
    self._seen = time.monotonic()  # when the lock was last seen to be ours
    self._me = {
      "id": uuid.uuid4().hex,
      "host": os.uname().nodename,
      "pid": os.getpid(),
      "boot": _BOOT.read_text().strip() if _BOOT.exists() else os.uname().nodename,
      "count": 0,
    }

  def acquire(self) -> None:
    """Takes the lock; waits STALE seconds if the last holder ran on another machine.

    Raises:
      WorkdirInUse: if another run holds it; names its machine and process.
    """
    self._created = self._local and not self._folder.exists()
    self._folder.mkdir(parents=True, exist_ok=True)
    exact = self._local and self._lock_file()
    try:
      holder = self._read()
      if holder and not (exact and holder.get("boot") == self._me["boot"]):
        self._wait_for_beat(holder)
        logging.warning("%s: taken over from %s", self._path, _who(holder))
      self._write()
    except BaseException:
      self._close()
      raise
    threading.Thread(target=self._count, daemon=True).start()

  def check(self, *, fresh: bool = True) -> None:
    """Raises WorkdirLost unless the folder is still there and still ours.

    Args:
      fresh: False: in a bucket, where it takes requests, what was seen within 2 BEAT counts.
    """
    if not (fresh or self._local) and time.monotonic() - self._seen < 2 * BEAT:
      return
    same = not self._local or storage.is_at(self._descriptor, self._path)
    holder = self._read() if same else None
    if holder is None or holder.get("id") != self._me["id"]:
      what = f"taken over by {_who(holder)}" if holder else "deleted, moved or replaced"
      raise WorkdirLost(
        f"{self._folder} was {what} while this run was writing there. The run ends; what it wrote"
        " since then is lost. If the folder still exists, the same command resumes from its newest"
        " checkpoint."
      )
    self._seen = time.monotonic()

  def release(self) -> None:
    """Gives the lock back; removes the folder if it was made for nothing."""
    self._stop.set()
    # Without _writing, the thread could write into another file that gets the number of this
    # descriptor, or into a bucket after the lock was deleted there.
    with self._writing:
      with contextlib.suppress(OSError):  # WorkdirLost too
        self.check()
        self._path.unlink()
        if self._created and self._local:
          self._folder.rmdir()  # fails unless it is empty
      self._close()

  def _lock_file(self) -> bool:
    """Whether the system has locked the file for this process; False if it cannot."""
    while True:
      descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
      except BlockingIOError:
        holder = _parse(os.pread(descriptor, 4096, 0))
        os.close(descriptor)
        raise self._in_use(holder) from None
      except OSError:  # some network file systems have no locks
        locked = False
      if storage.is_at(descriptor, self._path):
        self._descriptor = descriptor
        return locked
      os.close(descriptor)  # the holder deleted it in between

  def _in_use(self, holder: dict[str, Any] | None) -> WorkdirInUse:
    return WorkdirInUse(
      f"{self._folder} is in use: {_who(holder)} trains there. Wait for it, end it, or choose"
      " another --workdir."
    )

  def _wait_for_beat(self, holder: dict[str, Any]) -> None:
    """Raises WorkdirInUse if the holder is alive."""
    deadline = time.monotonic() + STALE
    logging.info("%s: held by %s; waiting %.0f s for a sign", self._path, _who(holder), STALE)
    while time.monotonic() < deadline:
      time.sleep(min(1.0, STALE / 10))
      now = self._read()
      if not now:
        return  # it has ended
      if (now.get("id"), now.get("count")) != (holder.get("id"), holder.get("count")):
        raise self._in_use(now)

  def _read(self) -> dict[str, Any] | None:
    """The holder; None if the file is missing or empty."""
    with contextlib.suppress(FileNotFoundError):
      for _ in range(3):
        # Opened anew each time: a network file system need not show what another machine has
        # written in the meantime to a descriptor that is held open.
        data = self._path.read_bytes()
        holder = _parse(data)
        if holder or not data:
          return holder
        time.sleep(min(1.0, BEAT / 10))  # of an older version, which wrote in two steps
    return None

  def _write(self) -> None:
    text = json.dumps(self._me).ljust(_SIZE - 1) + "\n"
    if self._descriptor >= 0:
      data = text.encode()
      os.pwrite(self._descriptor, data, 0)
      os.ftruncate(self._descriptor, len(data))
      # A network file system sends it only then, or much later. macOS has fsync alone.
      getattr(os, "fdatasync", os.fsync)(self._descriptor)
    else:
      self._path.write_text(text)

  def _count(self) -> None:
    while not self._stop.wait(BEAT):
      try:
        with self._writing:
          if self._stop.is_set():
            return
          self.check()
          self._me["count"] += 1  # type: ignore[operator]
          self._write()
      except WorkdirLost:
        return  # the next write raises it in the main thread
      except OSError as error:  # a full disk or a store that does not answer: try again
        logging.warning("%s: %s", self._path, error)

  def _close(self) -> None:
    if self._descriptor >= 0:
      os.close(self._descriptor)
      self._descriptor = -1


@contextlib.contextmanager
def held(lock: WorkdirLock) -> Iterator[None]:
  """A context that holds the lock."""
  lock.acquire()
  try:
    yield
  finally:
    lock.release()


def _parse(data: bytes) -> dict[str, Any] | None:
  """The holder; None for an empty file, and for one that was cut while it was written."""
  try:
    holder = json.loads(data)
  except ValueError:
    return None
  return holder if isinstance(holder, dict) else None


def _who(holder: dict[str, Any] | None) -> str:
  if not holder:
    return "another process"
  return f"process {holder.get('pid')} on {holder.get('host')}"
