"""Two runs never write into one folder, and a run notices that its folder is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
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
