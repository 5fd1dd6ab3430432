"""What hangs is named within `patience`, in a run of one process too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.shipped import ROOT

SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
import numpy as np
from bigalign.data.loader import workers
from bigalign.run import preemption

class Source:
  def __len__(self):
    return 1000
  def __getitem__(self, k):
    return {"k": np.full(10, k)}

def main():
  kind = sys.argv[1]
  with preemption.Watchdog(2.0, 5) as watchdog:
    if kind == "stopped":
      batches = workers.iterate(Source(), workers=1)
      for k, batch in enumerate(batches):
        watchdog.completed(k)
        if k == 20:
          (child,) = multiprocessing.active_children()
          print(child.pid, flush=True)
          os.kill(child.pid, signal.SIGSTOP)
    elif kind == "blocked":
      os.read(os.pipe()[0], 1)
    elif kind == "computing":
      until = time.monotonic() + 5
      while time.monotonic() < until:
        pass
      print("done", flush=True)
    else:
      print("ready", flush=True)
      for k in range(8):
        time.sleep(0.5)
        watchdog.completed(k)
      print("done", flush=True)

if __name__ == "__main__":
  main()
"""


def start(tmp_path, kind):
  (tmp_path / "script.py").write_text(SCRIPT)
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, str(tmp_path / "script.py"), kind],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "status", "texts"),
  [
    ("stopped", 143, ["the process hangs after step 2", "is stopped (by SIGSTOP", "in workers.py"]),
    ("blocked", 143, ["the process hangs after step 5", "The main thread is in script.py"]),
    ("computing", 0, ["this process is computing, so it goes on"]),
  ],
)
def test_what_one_process_waits_for_is_named(tmp_path, kind, status, texts):
  process = start(tmp_path, kind)
  out, log = process.communicate(timeout=120)
  assert process.returncode == status, log
  for text in texts:
    assert text in log
  if kind == "stopped":
    worker = int(out.split()[0])
    assert f"orker process {worker} is stopped" in log
    for _ in range(100):  # its new parent takes a moment to reap it
      if not os.path.exists(f"/proc/{worker}") or _state(worker) == "Z":
        break
      time.sleep(0.05)
    else:
      raise AssertionError("the stopped worker outlives the run")


@pytest.mark.slow
def test_a_run_that_was_stopped_itself_goes_on(tmp_path):
  process = start(tmp_path, "steps")
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(4)
  process.send_signal(signal.SIGCONT)
  out, log = process.communicate(timeout=60)
  assert process.returncode == 0 and out == "done\n", log


def _state(pid):
  with open(f"/proc/{pid}/stat") as file:
    return file.read().rpartition(")")[2].split()[0]
