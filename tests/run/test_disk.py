"""A full disk, a port in use, and shared memory of a killed run."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import small_runs
from helpers.shipped import ROOT

from bigalign import train
from bigalign.data.files import checksums, storage
from bigalign.data.loader import shared_memory, workers
from bigalign.run import disk, runtime
from bigalign.run.metrics import read_metrics

ONE = {"data": 8, "fsdp": 1, "tensor": 1}
FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_recognised_in_any_error():
  wrapped = RuntimeError("a save failed")
  wrapped.__cause__ = ValueError(
    'RESOURCE_EXHAUSTED: Failed to write: "a" [No space left on device]'
  )
  for error in (FULL, wrapped, OSError(errno.EDQUOT, "x")):
    assert disk.is_full(error)
  assert not disk.is_full(ValueError("RESOURCE_EXHAUSTED: out of memory"))


def test_what_was_incomplete_is_removed(tmp_path):
  for name in (
    "checkpoints/4",
    "checkpoints/6.orbax-checkpoint-tmp/opt",
    "frozen.orbax-checkpoint-tmp",
  ):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "config.json.part").write_text("")
  (tmp_path / "metrics.jsonl").write_text("")
  disk.remove_partial(tmp_path)
  left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
  assert left == ["checkpoints", "checkpoints/4", "metrics.jsonl"]
  with pytest.raises(OSError), storage.atomic_write(tmp_path / "a") as file:
    file.write(b"1")
    raise FULL
  assert not [path for path in tmp_path.iterdir() if path.name.startswith("a")]


@pytest.mark.slow
def test_a_run_ended_by_a_full_disk_continues_with_equal_bits(tmp_path, monkeypatch, capsys):
  config = small_runs.config(ONE, total_steps=6, checkpoint_every=2).to_dict()
  train.train(config, tmp_path / "whole")
  record, calls = checksums.record, []

  def full(folder, *rest):
    calls.append(folder)
    if "/4." in str(folder):
      raise FULL
    record(folder, *rest)

  monkeypatch.setattr(checksums, "record", full)
  ended = []
  monkeypatch.setattr(os, "_exit", ended.append)
  with pytest.raises(OSError, match="No space left") as error:
    train.train(config, tmp_path / "run")
  disk.exit_if_full(error.value, tmp_path / "run")
  assert ended == [1]
  assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
  monkeypatch.setattr(checksums, "record", record)
  train.train(config, tmp_path / "run")
  whole, run = small_runs.losses(tmp_path / "whole"), small_runs.losses(tmp_path / "run")
  assert whole == run and len(read_metrics(tmp_path / "run")) == len(
    read_metrics(tmp_path / "whole")
  )


def test_a_port_in_use_is_an_error_and_not_a_crash(monkeypatch):
  monkeypatch.setattr(runtime, "_initialize", lambda **_: None)
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f"cannot listen on port {port}: .*in use"):
      runtime.connect(f"127.0.0.1:{port}", 2, 0)
    runtime.connect(f"127.0.0.1:{port}", 2, 1)  # only process 0 listens
  runtime.connect(f"127.0.0.1:{port}", 2, 0)
  for wrong in ("host", "host:port", "host:99999999"):
    with pytest.raises((OSError, ValueError), match=wrong):
      runtime.connect(wrong, 2, 0)


class Batches:
  """The first ones fit into slots; later ones are larger, and go through grain's own memory."""

  def __len__(self):
    return 1000

  def __getitem__(self, k):
    return {"k": np.full(1000 if k < 5 else 5000, k)}


def read(folder):
  workers.own_shared_memory(folder)
  for _ in workers.iterate(Batches(), workers=2):
    print("read", flush=True)
    time.sleep(0.01)


@pytest.mark.slow
def test_the_next_start_removes_the_shared_memory_of_a_killed_run(tmp_path):
  shared = pathlib.Path("/dev/shm")
  before = {*shared.iterdir()}
  process = subprocess.Popen(
    [sys.executable, __file__, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    stdout=subprocess.PIPE,
    start_new_session=True,
  )
  for _ in range(20):
    assert process.stdout.readline() == b"read\n"
  os.killpg(process.pid, 9)
  process.communicate()
  time.sleep(0.5)
  left = {path.name for path in {*shared.iterdir()} - before}
  status = tmp_path.stat()
  place = f"{status.st_dev}/{status.st_ino}"
  owner = "bigalign-" + hashlib.sha256(place.encode()).hexdigest()[:16] + "-"
  mine = {name for name in left if name.startswith((owner, f"sem.{owner}"))}
  assert {name.partition("-")[0] for name in mine} == {"bigalign", "sem.bigalign"}
  assert not shared_memory.remove_left_over("bigalign-another-", "x")
  assert {*shared_memory.remove_left_over(owner, "x")} == mine
  assert not any((shared / name).exists() for name in mine)


@pytest.fixture
def names(monkeypatch):
  """Beginnings of the names of shared memory, of each owner in turn."""
  made: list[str] = []
  monkeypatch.setattr(workers, "_PREFIX", [*workers._PREFIX])
  monkeypatch.setattr(workers, "name_shared_memory", lambda prefix: None)
  monkeypatch.setattr(shared_memory, "remove_left_over", lambda owner, mine: made.append(owner))
  return made


def test_another_folder_with_the_same_path_is_another_owner(names, tmp_path):
  """As /workdir of two containers that share /dev/shm."""
  one, link = tmp_path / "one", tmp_path / "link"
  one.mkdir()
  link.symlink_to(one)
  workers.own_shared_memory(str(one))
  workers.own_shared_memory(str(link))
  one.rename(tmp_path / "kept")
  one.mkdir()
  workers.own_shared_memory(str(one))
  workers.own_shared_memory(str(tmp_path / "kept"))
  workers.own_shared_memory("gs://bucket/one")
  first, same, other, kept, bucket = names
  assert first == same == kept and len({first, other, bucket}) == 3


def test_shared_memory_of_another_user_stays(monkeypatch, tmp_path):
  monkeypatch.setattr(shared_memory, "_MOUNT", str(tmp_path))
  for name in ("run-a", "run-theirs", "run-mine-b"):
    (tmp_path / name).touch()
  unlink = os.unlink

  def refuse(path):
    if path.endswith("theirs"):
      raise PermissionError(errno.EPERM, "Operation not permitted")
    unlink(path)

  monkeypatch.setattr(os, "unlink", refuse)
  assert shared_memory.remove_left_over("run-", "run-mine-") == ["run-a"]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["run-mine-b", "run-theirs"]


def test_incomplete_files_are_removed_while_the_lock_is_held(tmp_path, monkeypatch):
  """Afterwards the folder belongs to the next run."""
  done = []

  class Locked:
    local = tmp_path

    @contextlib.contextmanager
    def locked(self):
      try:
        yield
      finally:
        done.append("released")

  def fail(*args, **options):
    raise FULL

  monkeypatch.setattr(train, "Workdir", lambda workdir: Locked())
  monkeypatch.setattr(train, "setup", fail)
  monkeypatch.setattr(disk, "remove_partial", lambda folder: done.append("removed"))
  with pytest.raises(OSError, match="No space left"):
    train.train({}, tmp_path)
  monkeypatch.setattr(os, "_exit", done.append)
  disk.exit_if_full(FULL, tmp_path)
  assert done == ["removed", "released", 1]


if __name__ == "__main__":
  read(sys.argv[1])
