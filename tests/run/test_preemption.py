"""Preemption, lost processes, processes that hang, damaged checkpoints."""

from __future__ import annotations

import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_runs

from bigalign import train
from bigalign.checkpoint import Checkpoints
from bigalign.run import preemption
from bigalign.run.flags import profile_span
from bigalign.run.metrics import read_metrics

ONE = {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.slow
def test_a_single_process_stops_at_sigterm_and_resumes(tmp_path, monkeypatch):
  """SIGTERM at step 3: a checkpoint, exit code 143, no additional rows; the times of the start."""
  c = small_runs.config(ONE, total_steps=6, checkpoint_every=0, log_every=2).to_dict()
  data_position, calls = train.data_position, []

  def interrupted(*args):
    calls.append(args)
    if len(calls) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return data_position(*args)

  monkeypatch.setattr(train, "data_position", interrupted)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as ended:
    train.train(c, tmp_path)
  assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
  assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["3"]
  train.train(c, tmp_path)
  first, *rows = [row for row in read_metrics(tmp_path) if "train/loss" in row]
  assert [row["step"] for row in (first, *rows)] == [2, 4, 6]
  assert 0 < first["perf/compile_seconds"] < first["perf/seconds_to_first_step"]
  assert 0 <= first["perf/programs_from_cache"] <= first["perf/programs"] > 0
  assert not any("seconds_to_first_step" in key for key in rows[1])


@pytest.mark.slow
def test_steps_are_traced(tmp_path):
  """In a process of its own: JAX's profiler crashes where the TPU compiler was loaded before."""
  c = small_runs.config(ONE, total_steps=3, checkpoint_every=0, profile=(1, 2)).to_dict()
  script = (
    "import json, sys; from bigalign.train import train;"
    " train(json.loads(sys.argv[2]), sys.argv[1])"
  )
  subprocess.run(
    [sys.executable, "-c", script, str(tmp_path), json.dumps(c)], check=True, cwd=small_runs.ROOT
  )
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_steps_of_the_profile_flag():
  assert profile_span("10:15") == (10, 15)
  for text in ("10", "10:", "a:b", "10:15:20"):
    with pytest.raises(Exception, match=f"--profile={text}: two steps are wanted"):
      profile_span(text)


class _Metadata(http.server.BaseHTTPRequestHandler):
  """Google's metadata server; its second answer about maintenance announces it."""

  asked: typing.ClassVar[list[str]] = []

  def do_GET(self):
    assert self.headers["Metadata-Flavor"] == "Google"
    name = self.path.removeprefix("/computeMetadata/v1/instance/")
    self.asked.append(name)
    ends = name == "maintenance-event" and self.asked.count(name) == 2
    self.send_response(200)
    self.end_headers()
    self.wfile.write(b"TERMINATE_ON_HOST_MAINTENANCE\n" if ends else b"NONE\n")

  def log_message(self, *_):
    """Silent."""


def test_a_maintenance_notice_stops_the_run(monkeypatch):
  server = http.server.HTTPServer(("127.0.0.1", 0), _Metadata)
  thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
  thread.start()
  monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
  monkeypatch.setattr(preemption, "POLL_SECONDS", 0.05)
  with preemption.PreemptionListener() as listener:
    assert not listener.should_stop(1)
    end = time.monotonic() + 20
    while not listener.should_stop(2):
      assert time.monotonic() < end, _Metadata.asked
      time.sleep(0.01)
  server.shutdown()
  thread.join()
  server.server_close()
  assert _Metadata.asked == ["maintenance-event", "preempted", "maintenance-event"]


@pytest.mark.parametrize(
  "error,code",
  [
    (KeyError("a mistake"), 1),
    (FloatingPointError("step 3: loss is not finite"), 1),
    (
      ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:53916"),
      143,
    ),
  ],
  ids=str,
)
def test_errors_exit_with_1_and_lost_processes_with_143(error, code, monkeypatch):
  with pytest.raises(type(error)):
    preemption.exit_on_error(error)  # a single process
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(preemption, "missing_processes", lambda seconds: [1])
  monkeypatch.setattr(os, "_exit", sys.exit)
  with pytest.raises(SystemExit) as ended:
    preemption.exit_on_error(error)
  assert ended.value.code == code


def test_processes_that_hang_are_named():
  message = preemption.hang_message({0: 13, 1: 12, 2: 13}, 600.0, 3)
  assert "No step in 600 s: processes [1] hang after step 12" in message
  assert "all 2 processes hang after step 7" in preemption.hang_message({0: 7, 1: 7}, 60.0, 2)
  assert "the process hangs after step 7" in preemption.hang_message({0: 7}, 60.0, 1)
  silent = preemption.hang_message({0: 7, 2: 7}, 60.0, 12)
  assert "processes [1, 3, 4, 5, 6, 7, 8, 9] and 2 more have not reported any step" in silent


def test_damaged_checkpoints_are_named_and_never_restored(tmp_path):
  """Each file of the newest checkpoint, cut or deleted: either the exact arrays, or an error that
  names the checkpoint; without it, the one before is restored."""

  def parts(step):
    # One array: when a read fails, orbax closes the event loop that others report to.
    return {"trainable": {"a/b": jnp.arange(5000.0) * step}}

  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts(1)
  )
  with Checkpoints(tmp_path / "run") as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, parts(step), {"step": step}, {})

  def taken(workdir):
    with Checkpoints(workdir) as checkpoints:
      step = checkpoints.latest()
      found = checkpoints.restore(step, abstract)
      assert checkpoints.meta(step) == {"step": step}
    jax.tree.map(np.testing.assert_array_equal, found, parts(step))
    return step

  newest, refused = tmp_path / "run/checkpoints/2", 0
  files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
  for i, file in enumerate(files):
    copy = tmp_path / str(i)
    shutil.copytree(tmp_path / "run", copy)
    damaged = copy / "checkpoints/2" / file
    if i % 2:
      damaged.unlink()
    else:
      os.truncate(damaged, damaged.stat().st_size // 2)
    try:
      assert taken(copy) == 2
    except RuntimeError as error:
      assert f"{copy / 'checkpoints/2'} was committed but cannot be read" in str(error)
      refused += 1
      shutil.rmtree(copy / "checkpoints/2")
      assert taken(copy) == 1
  assert refused >= 4  # files with arrays or their metadata; not markers and copies


LATE = """
import sys, time
from absl import logging
from bigalign.run import preemption, runtime
runtime.CONNECT_TIMEOUT = 6
if sys.argv[1] == "come":
  runtime.connect()
  import jax
  with preemption.Watchdog(2.0, 5) as watchdog:
    if jax.process_index() != 1:
      watchdog.completed(6)
    time.sleep(60)
"""


@pytest.mark.slow
def test_processes_that_do_not_connect_or_hang_are_named(tmp_path):
  """Process 1 of three: first it is killed before it connects, then it hangs at its step."""
  late = tmp_path / "late.py"
  late.write_text(LATE)
  with small_runs.Run(tmp_path / "start", 3, "come", devices=3, program=late) as run:
    run.tell(1, signal.SIGKILL)
    assert run.codes() == [-6, -9, -6]
    assert re.search(r"timed out task names:\s+1\s", run.read(0)), run.read(0)
  with small_runs.Run(tmp_path / "hang", 3, "come", devices=3, program=late) as run:
    codes = run.codes()
    assert 143 in codes and all(code in (143, -6) for code in codes), codes
    assert "processes [1] hang after step 5" in "".join(map(run.read, range(3)))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_random_kills(tmp_path):
  """kill -9 of one of four processes at random moments; then all are started again."""
  mesh = {"data": 2, "fsdp": 2, "tensor": 2}
  changes = dict(total_steps=300, checkpoint_every=5)
  config = small_runs.write(tmp_path / "config.py", small_runs.config(mesh, **changes))
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  flags = [f"--config={config}", "--workdir"]
  with small_runs.Run(tmp_path / "log", 4, *flags, whole) as run:
    run.ends()
  rng = random.Random(0)
  for kill in range(20):
    with small_runs.Run(tmp_path / f"log{kill}", 4, *flags, cut, step_seconds=0.2) as run:
      if kill % 2:
        time.sleep(rng.uniform(0.0, 12.0))
      else:
        step = small_runs.last_step(cut) + rng.randint(1, 9)
        run.wait_for(lambda step=step: small_runs.last_step(cut) >= step)
        time.sleep(rng.uniform(0.0, 0.3))
      run.tell(rng.randrange(4), signal.SIGKILL)
  assert small_runs.last_step(cut) < 300
  with small_runs.Run(tmp_path / "end", 4, *flags, cut) as run:
    run.ends()
  assert small_runs.exact(cut) == small_runs.exact(whole)
