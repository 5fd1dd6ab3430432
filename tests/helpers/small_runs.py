"""Runs of several processes on this machine, in a config of which steps and starts are cheap.

Run as a program, this file is `bigalign train` with steps of at least STEP_SECONDS.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

from absl import app
from helpers.shipped import ROOT, load
from helpers.small_shards import samples, write_tar
from jax._src import compiler, distributed

from bigalign import train
from bigalign.config import Config
from bigalign.run import flags
from bigalign.run.metrics import is_wall_clock, read_metrics

# Narrow and flat: what a run costs here is its start, tracing and compiling.
SMALL = {
  "model.image.depth": 1,
  "model.text.depth": 1,
  "model.image.width": 32,
  "model.text.width": 32,
  "log_every": 1,
  "evals": {},
  "writer": {"tensorboard": False},
}

# Runs a program whose modules no garbage collection looks through, as `bigalign train` does.
START = """
import gc, runpy, sys
gc.disable()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def config(mesh, **changes):
  """configs/tiny.py made small and logged at each step; eight heads, for any tensor axis."""
  c = load("tiny")
  c.update_from_flattened_dict({"mesh": mesh, **SMALL, **changes})
  return c


def evals(folder, count=40, batch_size=64):
  """Retrieval among `count` small images: drawing and embedding glyphs would take most of a run."""
  source = write_tar(folder / "val.tar", samples(500, count))
  return {"val": {"type": "retrieval", "source": source, "batch_size": batch_size}}


def write(path: pathlib.Path, c) -> pathlib.Path:
  """A config file of the very config."""
  path.write_text(
    "from ml_collections import ConfigDict\n\ndef get_config():\n"
    f"  return ConfigDict({c.to_dict()!r})\n"
  )
  return path


class Run:
  """Processes of one run, of eight devices in all; what they print lies in `folder`."""

  def __init__(self, folder, count, *words, devices=8, program=__file__, step_seconds=0.0):
    folder.mkdir()
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    self.logs = [folder / f"{i}.log" for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "STEP_SECONDS": str(step_seconds),
        "JAX_NUM_CPU_DEVICES": str(devices // count),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      }
      if count > 1:
        env |= {
          "BIGALIGN_COORDINATOR": coordinator,
          "BIGALIGN_NUM_PROCESSES": str(count),
          "BIGALIGN_PROCESS_ID": str(i),
        }
      with log.open("wb") as file:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, "-c", START, str(program), *map(str, words)],
            env=env,
            stdout=file,
            stderr=file,
          )
        )

  def tell(self, process, signal):
    self.processes[process].send_signal(signal)

  def read(self, process=0):
    return self.logs[process].read_text()

  def wait_for(self, condition, *, seconds=400):
    """Until condition() holds, which is an error if a process ends or time runs out first."""
    end = time.monotonic() + seconds
    while not condition():
      assert all(p.poll() is None for p in self.processes), self._tails()
      assert time.monotonic() < end, self._tails()
      time.sleep(0.05)

  def codes(self, *, seconds=400):
    """The exit codes of all, when the last has ended."""
    end = time.monotonic() + seconds
    try:
      return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]
    except subprocess.TimeoutExpired:
      raise AssertionError(f"still running\n{self._tails()}") from None

  def ends(self):
    """Waits for an end without errors."""
    codes = self.codes()
    assert codes == [0] * len(codes), self._tails()

  def _tails(self):
    return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in self.logs)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
      process.wait()


def losses(workdir):
  """{step: loss}"""
  return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


def exact(workdir):
  """The rows of metrics.jsonl without what a clock says."""
  return [{k: v for k, v in row.items() if not is_wall_clock(k)} for row in read_metrics(workdir)]


def last_step(workdir):
  """The newest step in metrics.jsonl, 0 for none; a line may be in the making."""
  path = workdir / "metrics.jsonl"
  return max(losses(workdir), default=0) if path.exists() else 0


def main(argv):
  """The program's main, with steps that last long enough for a signal to find one."""
  write = compiler._cache_write

  def write_everywhere(*args):
    # Only process 0 keeps what it compiled; on CPUs no other can use it.
    with mock.patch.object(distributed.global_state, "process_id", 0):
      write(*args)

  compiler._cache_write = write_everywhere
  gc.freeze()
  gc.enable()
  pause, position = float(os.environ["STEP_SECONDS"]), train.data_position
  train.data_position = lambda *args: (time.sleep(pause), position(*args))[1]
  train.main(argv)


if __name__ == "__main__":
  flags.define_flags(lambda: Config)
  app.run(main, flags_parser=flags.parse_flags)
