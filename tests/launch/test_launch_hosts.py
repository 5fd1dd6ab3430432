"""Tests of launch/tpu_vm.sh from an empty project to the end of a run, with a mock of gcloud."""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import subprocess
import time

import pytest
from helpers import fake_programs
from helpers.fake_programs import AWKWARD
from helpers.shipped import ROOT

from bigalign.run.metrics import read_metrics

SLICE = ["pod", "--zone", "z", "--type=v5litepod-16"]


@pytest.fixture
def folder(tmp_path):
  """The folder of the mock programs and of their state."""
  return tmp_path / "cloud"


@pytest.fixture
def launch(folder):
  return functools.partial(fake_programs.launcher(folder), "tpu_vm.sh")


def _verbs(folder):
  """The verbs of all calls of gcloud, without `describe`."""
  known = {"create", "delete", "describe", "scp", "ssh"}
  verbs = [next(w for w in words if w in known) for words in fake_programs.calls(folder)]
  return [verb for verb in verbs if verb != "describe"]


def test_training_from_nothing_on_every_host_with_awkward_words(folder, launch):
  result = launch(
    "train",
    *SLICE,
    "--spot",
    "--delete=failure",
    "--prepare",
    "mkdir ~/mnt && touch ~/mnt/'a b'",
    "--",
    *fake_programs.SHOW,
    *AWKWARD,
  )
  assert result.returncode == 0, result.stderr
  assert _verbs(folder) == ["create", "scp", "ssh", "ssh", "ssh"]
  (created,) = [words for words in fake_programs.calls(folder) if "create" in words]
  assert created == [
    "gcloud",
    "compute",
    "tpus",
    "queued-resources",
    "create",
    "pod",
    "--zone",
    "z",
    "--accelerator-type",
    "v5litepod-16",
    "--runtime-version",
    "v2-alpha-tpuv5-lite",
    "--node-id",
    "pod",
    "--spot",
  ]
  assert fake_programs.shown(folder) == [AWKWARD] * fake_programs.HOSTS
  for worker in range(fake_programs.HOSTS):
    home = fake_programs.host(folder, "pod", worker)
    assert (home / "bigalign/bigalign/train.py").read_bytes() == (
      ROOT / "bigalign/train.py"
    ).read_bytes()
    assert not (home / "bigalign/.git").exists()
    assert (home / "mnt/a b").exists()
  assert not list(folder.glob("bigalign-launch.*"))
  assert "pod was not deleted. Delete it: launch/tpu_vm.sh delete pod --zone z" in result.stderr


@pytest.mark.slow
def test_slices_are_reached_one_by_one(folder, launch):
  result = launch("train", *SLICE, "--slices", "2", "--", "sh", "-c", "touch ~/here")
  assert result.returncode == 0, result.stderr
  for target in ("pod-0", "pod-1"):
    assert all((fake_programs.host(folder, target, i) / "here").exists() for i in (0, 1))
  (created,) = [words for words in fake_programs.calls(folder) if "create" in words]
  assert created[-4:] == ["--node-count", "2", "--node-prefix", "pod"]


@pytest.mark.slow
@pytest.mark.parametrize("when, deleted", [("failure", True), ("never", False)])
def test_a_failing_worker_ends_all_with_its_status(when, deleted, folder, launch):
  fail = "[ $BIGALIGN_PROCESS_ID = 0 ] || { echo why >&2; exit 7; }"
  result = launch("train", *SLICE, "--delete", when, "--", "sh", "-c", fail)
  assert result.returncode == 7 and "why" in result.stdout
  assert _verbs(folder).count("create") == 1
  assert ("delete" in _verbs(folder)) is deleted
  assert (folder / "state").exists() is not deleted


def test_a_failure_before_the_run_deletes_too(folder, launch):
  fake_programs.write_program(folder / "bin/make", "exit 3")
  result = launch("train", *SLICE, "--delete=failure", "--", "true")
  assert result.returncode == 3 and _verbs(folder)[-1] == "delete"


@pytest.mark.parametrize(
  "state, status, again",
  [
    ("ACTIVE", 143, ["ssh", "ssh"]),  # did a host fail by itself?; the run again
    pytest.param("ACTIVE", 134, ["ssh", "ssh"], marks=pytest.mark.slow),
    pytest.param(
      "SUSPENDED",
      137,
      ["ssh", "delete", "create", "scp", "ssh", "ssh", "ssh"],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_after_preemption_the_run_restarts(state, status, again, folder, launch):
  work = (
    f"[ $BIGALIGN_PROCESS_ID = 0 ] || exit 0; echo step >> {folder}/steps;"
    f"[ $(wc -l < {folder}/steps) = 1 ] || exit 0; printf {state} > {folder}/state; exit {status}"
  )
  result = launch("train", *SLICE, "--delete=failure", "--", "sh", "-c", work)
  assert result.returncode == 0, result.stderr
  assert (folder / "steps").read_text() == "step\n" * 2
  assert _verbs(folder) == ["create", "scp", "ssh", "ssh", "ssh", *again]


def test_a_failure_is_not_mistaken_for_the_interruption_of_its_peers(folder, launch):
  result = launch(
    "train",
    *SLICE,
    "--delete=failure",
    "--",
    "sh",
    "-c",
    "[ $BIGALIGN_PROCESS_ID = 0 ] && exit 143; exit 1",
  )
  assert result.returncode == 1 and _verbs(folder).count("create") == 1


def test_a_lost_connection_does_not_start_the_run_again(folder, launch):
  """The mock loses it at the first command that runs; ssh then returns 255."""
  (folder / "lose").touch()
  work = f"echo step >> {folder}/steps; exit 9"
  result = launch("train", *SLICE, "--", "sh", "-c", work)
  assert result.returncode == 9 and "status 255: restarting" in result.stderr
  assert (folder / "steps").read_text() == "step\n" * fake_programs.HOSTS
  assert not (folder / "lose").exists()


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ctrl_c_deletes_when_asked_and_a_closed_terminal_does_not(sent, status, folder):
  env = fake_programs.programs(folder)
  work = f"touch {folder}/begun; until [ -e {folder}/end ]; do /bin/sleep 0.1; done"
  with subprocess.Popen(
    [ROOT / "launch/tpu_vm.sh", "train", *SLICE, "--delete=failure", "--", "sh", "-c", work],
    env=env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  ) as script:
    deadline = time.monotonic() + 60
    while not (folder / "begun").exists() and time.monotonic() < deadline:
      time.sleep(0.05)
    script.send_signal(sent)
  (folder / "end").touch()
  assert script.returncode == status
  assert ("delete" in _verbs(folder)) is (sent == signal.SIGINT)


@pytest.mark.slow
def test_the_number_of_restarts_is_limited(folder, launch):
  result = launch("train", *SLICE, "--restarts=1", "--delete=failure", "--", "sh", "-c", "exit 143")
  assert result.returncode == 143 and "--restarts 1 is used up" in result.stderr
  assert _verbs(folder) == ["create", "scp", *["ssh"] * 6, "delete"]


def test_the_run_outlives_the_connection_and_can_be_followed_again(tmp_path):
  env = {**os.environ, "BIGALIGN_LAUNCH": str(tmp_path / "runs")}
  on_host = ["bash", ROOT / "launch/on_host.sh"]
  work = f"echo begun; until [ -e {tmp_path}/go ]; do /bin/sleep 0.05; done; echo done; exit 5"
  with subprocess.Popen(
    [*on_host, "run", "one", "sh", "-c", work],
    env=env,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as first:
    assert first.stdout.readline() == "begun\n"
    os.killpg(first.pid, signal.SIGHUP)
  assert first.returncode == -signal.SIGHUP
  with subprocess.Popen(
    [*on_host, "run", "two", "echo", "another"],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as second:
    assert "following one" in second.stderr.readline()
    (tmp_path / "go").touch()
    rest = second.stdout.read()
  assert second.returncode == 5 and rest.endswith("done\n") and "another" not in rest
  again = subprocess.run([*on_host, "run", "one", "false"], env=env, capture_output=True, text=True)
  assert (again.returncode, again.stdout) == (5, "begun\ndone\n")
  fresh = subprocess.run([*on_host, "run", "two", "echo", "new"], env=env, capture_output=True)
  assert (fresh.returncode, fresh.stdout) == (0, b"new\n")
  logs = subprocess.run([*on_host, "logs", "50"], env=env, capture_output=True)
  assert logs.stdout == b"new\n"


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["leader", "group"])
def test_sigterm_leaves_the_command_time_for_a_checkpoint(send, tmp_path):
  """A host that shuts down sends SIGTERM to all its processes, a person to the recorded one."""
  env = {**os.environ, "BIGALIGN_LAUNCH": str(tmp_path)}
  work = "trap 'echo saved; exit 143' TERM; echo begun; while :; do /bin/sleep 0.05; done"
  with subprocess.Popen(
    ["bash", ROOT / "launch/on_host.sh", "run", "one", "sh", "-c", work],
    env=env,
    stdout=subprocess.PIPE,
    text=True,
  ) as followed:
    assert followed.stdout.readline() == "begun\n"
    send(int((tmp_path / "one/pid").read_text()), signal.SIGTERM)
    assert followed.stdout.read().endswith("saved\n")
  assert followed.returncode == 143


def test_dry_run_prints_every_command_and_runs_none(folder, launch):
  result = launch("train", *SLICE, "--project=p", "--delete=always", "--dry-run", "--", *AWKWARD)
  assert result.returncode == 0 and not result.stderr and not fake_programs.calls(folder)
  lines = shlex.split(result.stdout.replace("\ngcloud ", "\n\0 gcloud "))
  assert lines.count("\0") == 6 and lines.count("gcloud") == 7
  (command,) = [w.removeprefix("--command=") for w in lines if "on_host.sh run" in w]
  assert shlex.split(command)[-len(AWKWARD) :] == AWKWARD
  assert sorted(p.name for p in folder.iterdir()) == ["bin", "port"]


@pytest.mark.parametrize(
  "words, message",
  [
    (["fly", "pod"], "unknown verb fly; known: train create"),
    (["train", "Pod"], "needs a NAME of lower-case letters"),
    (["logs", "pod"], "--zone is needed"),
    (["create", "pod", "--zone=z"], "--type is needed"),
    (["train", *SLICE, "--spott"], "unknown option --spott"),
    (["train", *SLICE], "nothing to run"),
    (["train", *SLICE, "--delete=maybe", "--", "true"], "--delete maybe: expected one of: always"),
    (["train", *SLICE, "--slices=0", "--", "true"], "--slices 0: expected a whole number >= 1"),
    (["create", "pod", "--zone=z", "--type=tpu7x-8"], "for TPU7x, use launch/gce.sh"),
  ],
)
def test_wrong_use_says_what_is_wrong(words, message, folder, launch):
  result = launch(*words)
  assert result.returncode == 2
  assert message in result.stderr and "-h shows the usage" in result.stderr
  assert not fake_programs.calls(folder)


def test_a_missing_program_is_named(folder, launch):
  tools = fake_programs.few_tools(folder)
  result = launch("train", *SLICE, "--", "true", PATH=str(tools))
  assert result.returncode == 2
  assert "gcloud is not on PATH: install it, https://cloud.google.com" in result.stderr
  assert launch("train", *SLICE, "--dry-run", "--", "true", PATH=str(tools)).returncode == 0


@pytest.mark.slow
def test_two_hosts_train_with_real_collectives(launch, tmp_path):
  small = ["model.image.depth=1", "model.text.depth=1", "total_steps=3", "log_every=1", "evals={}"]
  result = launch(
    "train",
    *SLICE,
    "--delete=failure",
    "--",
    "--config=configs/tiny.py",
    f"--workdir={tmp_path}/a run",
    *(f"--config.{change}" for change in small),
  )
  assert result.returncode == 0, result.stderr[-4000:]
  assert [row["step"] for row in read_metrics(tmp_path / "a run")] == [1, 2, 3]
  meta = json.loads((tmp_path / "a run/config.json").read_text())
  assert meta["hardware"]["processes"] == fake_programs.HOSTS
