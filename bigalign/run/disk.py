"""A full disk: said in a few lines, without the files that were being written."""

from __future__ import annotations

import errno
import pathlib
import shutil
import sys
import time

from absl import logging

from bigalign.run import errors

_TRIES, _WAIT = 20, 0.1  # seconds
_TEXTS = ("No space left on device", "Disk quota exceeded", "not enough space")


def is_full(error: BaseException | None) -> bool:
  """Returns whether an error, or what caused it, says that a disk or a quota is full."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(text in str(error) for text in _TEXTS):  # tensorstore's errors are ValueErrors
      return True
    error = error.__cause__ or error.__context__
  return False


def remove_partial(folder: pathlib.Path) -> None:
  """Removes what was being written in the folder of a run: it is never read.

  Call it while the run holds the lock of its folder. The next run writes there after that.
  """
  for _ in range(_TRIES):
    partial = [
      path
      for place in (folder, folder / "checkpoints")
      for path in place.glob("*.orbax-checkpoint-tmp*")
    ]
    if not partial:
      break
    for path in partial:
      shutil.rmtree(path, ignore_errors=True)
    time.sleep(_WAIT)  # other threads of the failed save may still write their part
  for pattern in ("*.part", "*.tmp"):
    for path in folder.glob(pattern):
      path.unlink(missing_ok=True)


def exit_if_full(error: BaseException, folder: pathlib.Path, *, checkpoints: str = "") -> None:
  """Ends the program with status 1 if the error says that a disk is full; else returns.

  Args:
    error: that ended the run.
    folder: the local folder of the run, from which `train` has removed what was incomplete.
    checkpoints: the address of the checkpoints, if they are in a bucket.
  """
  if not is_full(error):
    return
  steps = [x.name for x in (folder / "checkpoints").glob("*") if x.name.isdecimal()]
  newest = f"from step {max(map(int, steps))}" if steps else "and starts again"
  newest = f"from the newest checkpoint in {checkpoints}" if checkpoints else newest
  usage = shutil.disk_usage(folder) if folder.exists() else None
  free = f"{usage.free / 1e9:.2f} GB of {usage.total / 1e9:.2f} GB are free" if usage else "missing"
  logging.error("The disk is full: %s", str(error).splitlines()[0][:300] if str(error) else error)
  logging.error("%s: %s, after the files that were incomplete were removed", folder, free)
  logging.error("Make room and run the same command again: it resumes %s, with equal bits", newest)
  sys.stdout.flush()
  # Not sys.exit: writes of tensorstore that are still pending would print hundreds of lines.
  errors.exit_now(1)
