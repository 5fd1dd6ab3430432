"""Two runs never write into one folder, and a run notices that its folder is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from helpers.shipped import ROOT

from bigalign.run import lock
from bigalign.run.lock import WorkdirInUse, WorkdirLock, WorkdirLost, held
from bigalign.run.workdir import Workdir


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.05)
  monkeypatch.setattr(lock, "STALE", 0.5)


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path):
  folder = tmp_path / "run"
  with held(WorkdirLock(folder)):
    with pytest.raises(WorkdirInUse, match=f"process {os.getpid()} on ") as error:
      WorkdirLock(folder).acquire()
    assert str(folder) in str(error.value)
  assert not folder.exists(), "made for nothing"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  for _ in range(2):
    with held(WorkdirLock(folder)):
      pass
  assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "STALE", 60.0)
  script = (
    "import pathlib, sys, time; from bigalign.run.lock import WorkdirLock\n"
    "WorkdirLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", script, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  with pytest.raises(WorkdirInUse, match=f"process {process.pid} on "):
    WorkdirLock(tmp_path).acquire()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with held(WorkdirLock(tmp_path)):
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_is_taken_over_once_it_stands_still(tmp_path):
  other = {"id": "x", "host": "other", "pid": 7, "boot": "another", "count": 3}
  (tmp_path / "lock").write_text(json.dumps(other))
  mine = WorkdirLock(tmp_path)
  mine.acquire()
  mine.check()
  # The other machine goes on after all, as one that was suspended.
  (tmp_path / "lock").write_text(json.dumps(other))
  with pytest.raises(WorkdirLost, match="taken over by process 7 on other"):
    mine.check()
  mine.release()
  assert json.loads((tmp_path / "lock").read_text()) == other, "not ours any more"


def test_a_living_run_of_another_machine_is_not_disturbed(tmp_path, monkeypatch):
  """A file system without locks: the first run counts up, so it is alive."""

  def no_locks(*_):
    raise OSError("no locks")

  monkeypatch.setattr(lock.fcntl, "flock", no_locks)
  with held(WorkdirLock(tmp_path)), pytest.raises(WorkdirInUse):
    WorkdirLock(tmp_path).acquire()
  with held(WorkdirLock(tmp_path)):
    pass


@pytest.mark.parametrize("how", ["delete", "move", "replace"])
def test_a_folder_that_is_gone_is_noticed_at_the_next_write(tmp_path, how):
  folder = Workdir(tmp_path / "run")
  with folder.locked():
    folder.check()
    if how == "delete":
      shutil.rmtree(tmp_path / "run")
    else:
      (tmp_path / "run").rename(tmp_path / "moved")
    if how == "replace":
      shutil.copytree(tmp_path / "moved", tmp_path / "run")
    with pytest.raises(WorkdirLost, match="deleted, moved or replaced"):
      folder.check()


def test_nothing_is_written_once_the_lock_is_given_back(tmp_path, monkeypatch):
  """The thread that counts up has checked the lock, and is about to write."""
  checked, goes_on, check = threading.Event(), threading.Event(), WorkdirLock.check

  def check_slowly(self, **options):
    check(self, **options)
    if threading.current_thread() is not threading.main_thread() and not checked.is_set():
      checked.set()
      goes_on.wait(5)

  monkeypatch.setattr(WorkdirLock, "check", check_slowly)
  mine = WorkdirLock(tmp_path)
  mine.acquire()
  assert checked.wait(5)
  giving_back = threading.Thread(target=mine.release)
  giving_back.start()
  giving_back.join(0.2)
  goes_on.set()
  giving_back.join(5)
  time.sleep(0.1)
  assert not list(tmp_path.iterdir())


def test_a_lock_that_is_being_written_has_not_ended(tmp_path, monkeypatch):
  other = {"id": "x", "host": "other", "pid": 7, "boot": "another", "count": 9}
  path = tmp_path / "lock"
  path.write_text(json.dumps(other)[:-3])

  def write_on(seconds):
    del seconds
    other["count"] += 1
    path.write_text(json.dumps(other))

  monkeypatch.setattr(lock.time, "sleep", write_on)
  with pytest.raises(WorkdirInUse, match="process 7 on other"):
    WorkdirLock(tmp_path).acquire()


def test_the_count_reaches_other_machines_and_has_one_size(tmp_path, monkeypatch):
  """A network file system sends it when it is told to; a reader must never find a part of it."""
  synced, sync = [], os.fdatasync
  monkeypatch.setattr(lock.os, "fdatasync", lambda file: (synced.append(file), sync(file)))
  sizes = set()
  with held(WorkdirLock(tmp_path)):
    deadline = time.monotonic() + 5
    while len(synced) < 3 and time.monotonic() < deadline:
      sizes.add((tmp_path / "lock").stat().st_size)
  assert len(synced) >= 3 and len(sizes) == 1


def test_a_log_does_not_ask_the_bucket(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 60.0)
  mine = WorkdirLock(epath.Path(tmp_path))  # no local folder for it
  mine.acquire()
  reads, read = [], mine._read
  monkeypatch.setattr(mine, "_read", lambda: (reads.append(1), read())[1])
  for _ in range(5):
    mine.check(fresh=False)
  assert not reads
  mine.check()
  assert len(reads) == 1
  (tmp_path / "lock").unlink()
  monkeypatch.setattr(lock, "BEAT", 0.0)  # long ago
  with pytest.raises(WorkdirLost):
    mine.check(fresh=False)
  mine.release()
