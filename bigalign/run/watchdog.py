"""What a process that hangs waits for: the states of its workers, and where its main thread is."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import traceback

from bigalign import tree

_PROC = pathlib.Path("/proc")
_STATES = {
  "T": "is stopped (by SIGSTOP or a terminal); SIGCONT continues it",
  "t": "is stopped by a debugger",
  "D": "waits for a disk or a network file system",
  "Z": "has died",
}
BUSY = 0.05  # CPU seconds per second from which a process counts as computing


def describe() -> str:
  """Returns what this process waits for, in one or two sentences."""
  workers = [
    f"worker process {child.pid} {_STATES[state]}"
    for child in multiprocessing.active_children()
    if (state := _state(child.pid)) in _STATES
  ]
  listed = tree.shown(workers, sep="; ")
  where = f"The main thread is in {_main_thread()}."
  return f"{listed[:1].upper()}{listed[1:]}. {where}" if listed else where


def cpu_seconds() -> float:
  """Returns the CPU time that this process and its workers have used; 0 where /proc is missing."""
  pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
  ticks = sum(int(x) for pid in pids for x in _stat(pid)[11:13])
  return ticks / os.sysconf("SC_CLK_TCK")


def kill_workers() -> None:
  """Kills the workers: a stopped one would not notice the end of its parent."""
  for child in multiprocessing.active_children():
    if child.pid is not None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)


def _stat(pid: int | None) -> list[str]:
  """The fields of /proc/PID/stat after the name, which may contain spaces; [] if there is none."""
  try:
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
  except OSError:
    return []


def _state(pid: int | None) -> str:
  return (_stat(pid) or [""])[0]


def _main_thread() -> str:
  """The innermost frames of the main thread: "train.py:300 loop > workers.py:90 __next__ > …"."""
  frame = sys._current_frames().get(threading.main_thread().ident or 0)
  frames = traceback.extract_stack(frame)
  ours = [x for x in frames if f"{os.sep}bigalign{os.sep}" in x.filename][-3:]
  last = [x for x in frames[-1:] if x not in ours]
  return " > ".join(f"{pathlib.Path(x.filename).name}:{x.lineno} {x.name}" for x in [*ours, *last])
