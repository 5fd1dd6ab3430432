"""Tests of launch/local.sh: which processes it starts, how it quotes, reports and stops them."""

from __future__ import annotations

import os
import pathlib
import shlex
import signal
import subprocess
import time

import pytest
from helpers import fake_programs
from helpers.marks import slow_unless

SCRIPT = pathlib.Path(__file__).parents[2] / "launch/local.sh"


def _launch(*words):
  return subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=60)


def test_dry_run_prints_commands_that_a_shell_reads_back():
  awkward = ["--config=configs/tiny.py", "--workdir=a b", "--x='$HOME'"]
  result = _launch("--dry-run", "-n", "2", "-d", "4", "--", *awkward)
  lines = [shlex.split(line) for line in result.stdout.splitlines()]
  assert len(lines) == 2 and not result.stderr
  for i, line in enumerate(lines):
    assert line[-4] == "train" and line[-5].endswith("bigalign") and line[-3:] == awkward
    settings = dict(word.split("=") for word in line[:-5])
    assert settings.pop("BIGALIGN_COORDINATOR") == lines[0][0].split("=")[1]
    assert settings == {
      "BIGALIGN_NUM_PROCESSES": "2",
      "BIGALIGN_PROCESS_ID": str(i),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "4",
    }


def test_each_process_knows_which_it_is_and_only_the_first_speaks(tmp_path):
  show = "echo $BIGALIGN_PROCESS_ID of $BIGALIGN_NUM_PROCESSES; exit 0"
  result = _launch("-n", "3", "-o", str(tmp_path), "--", "bash", "-c", show)
  assert (result.returncode, result.stdout) == (0, "0 of 3\n")
  logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
  assert logs == {"process_1.log": "1 of 3\n", "process_2.log": "2 of 3\n"}


@pytest.mark.parametrize("which", [0, 1])
def test_one_failure_ends_all_and_its_status_comes_through(which, tmp_path):
  fail = f"if [[ $BIGALIGN_PROCESS_ID == {which} ]]; then echo why >&2; exit 7; fi; sleep 61"
  begin = time.monotonic()
  result = _launch("-n", "2", "-o", str(tmp_path), "--", "bash", "-c", fail)
  assert result.returncode == 7 and time.monotonic() - begin < 30
  assert f"process {which} ended with status 7" in result.stderr and "why" in result.stderr


@pytest.mark.parametrize(
  "sent, status",
  slow_unless([(signal.SIGINT, 130), (signal.SIGTERM, 143)], (signal.SIGTERM, 143).__eq__),
)
def test_a_signal_ends_the_processes_and_what_they_started(sent, status, tmp_path):
  # The grandchild plays the part of a data worker.
  nest = f"(while sleep 0.1; do date +%s%N > {tmp_path}/$BIGALIGN_PROCESS_ID; done) & wait"
  script = subprocess.Popen(
    [SCRIPT, "-n", "2", "-o", tmp_path / "logs", "--", "bash", "-c", nest],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  marks = [tmp_path / "0", tmp_path / "1"]
  deadline = time.monotonic() + 30
  while not all(mark.exists() for mark in marks) and time.monotonic() < deadline:
    time.sleep(0.05)
  script.send_signal(sent)
  assert script.wait(30) == status
  last = [mark.read_text() for mark in marks]
  time.sleep(0.5)
  assert [mark.read_text() for mark in marks] == last


@pytest.mark.parametrize(
  "send", slow_unless([os.kill, os.killpg], os.killpg.__eq__), ids=["leader", "group"]
)
def test_sigterm_waits_for_the_checkpoints_of_all_processes(send, tmp_path):
  """Saving may take longer than the 10 s that Ctrl-C grants; here 50 x 0.02 s of a mocked sleep."""
  tools = tmp_path / "bin"
  tools.mkdir()
  fake_programs.write_program(tools / "sleep", "exec /bin/sleep 0.02")
  save = (
    f"trap '/bin/sleep 2; echo saved > {tmp_path}/saved_$BIGALIGN_PROCESS_ID; exit 143' TERM;"
    f"touch {tmp_path}/begun_$BIGALIGN_PROCESS_ID; while :; do /bin/sleep 0.05; done"
  )
  with subprocess.Popen(
    [SCRIPT, "-n", "2", "-o", tmp_path / "logs", "--", "sh", "-c", save],
    env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
    start_new_session=True,
    stderr=subprocess.DEVNULL,
  ) as script:
    deadline = time.monotonic() + 30
    while len([*tmp_path.glob("begun_*")]) < 2 and time.monotonic() < deadline:
      time.sleep(0.05)
    send(script.pid, signal.SIGTERM)
  assert script.returncode == 143 and len([*tmp_path.glob("saved_*")]) == 2


@pytest.mark.parametrize(
  "words, message",
  [
    (["-n", "2"], "nothing to run"),
    (["-n", "two", "--", "true"], "-n two: expected a number of processes >= 1"),
    (["-d", "0", "--", "true"], "-d 0: expected a number of devices >= 1"),
    (["--config=configs/tiny.py"], "unknown option --config=configs/tiny.py"),
    (["-n"], "-n needs a value"),
  ],
)
def test_wrong_use_says_what_is_wrong(words, message):
  result = _launch(*words)
  assert result.returncode == 2 and message in result.stderr and "-h" in result.stderr
