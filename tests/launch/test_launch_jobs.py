"""Tests of launch/slurm.sh, gke.sh and gce.sh with mocks of the programs of a cluster."""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest
import yaml
from helpers import fake_programs
from helpers.fake_programs import AWKWARD, SHOW
from helpers.shipped import ROOT

SLURM = ["--nodes=2", "--gpus-per-node=1", "--wait"]
GKE = ["pod", "--image=r/i:1", "--accelerator=tpu-v5-lite-podslice", "--topology=2x4"]
GCE = ["pod", "--zone=us-central1-c", "--machine=tpu7x-standard-4t", "--topology=2x2x2"]
NONE = ["pod", "--zone=us-central1-c"]
# Process 0 exits with the first status at its first start, and with the second one after a restart.
ONCE = (
  "[ $BIGALIGN_PROCESS_ID = 0 ] || exit 0; echo x >> $0;[ $(wc -l < $0) -gt 1 ] || exit $1; exit $2"
)


@pytest.fixture
def folder(tmp_path):
  """The folder of the mock programs and of their state."""
  return tmp_path / "cloud"


@pytest.fixture
def launch(folder):
  return fake_programs.launcher(folder)


def _once(tmp_path, first, then=0):
  return ["sh", "-c", ONCE, str(tmp_path / "times"), str(first), str(then)]


def _times(tmp_path):
  return len((tmp_path / "times").read_text().splitlines())


@pytest.mark.parametrize(
  "script, options",
  [
    ("slurm.sh", SLURM),
    ("gke.sh", ["run", *GKE]),
    ("gce.sh", ["train", *GCE]),
  ],
)
def test_awkward_words_reach_every_process(script, options, folder, launch):
  result = launch(script, *options, "--", *SHOW, *AWKWARD)
  assert result.returncode == 0, result.stderr
  assert fake_programs.shown(folder) == [AWKWARD] * 2


def test_slurm_queues_again_after_a_checkpoint(folder, launch, tmp_path):
  options = [*SLURM, "--time=1:00", "--cpus-per-task", "4", "--name=seven"]
  result = launch("slurm.sh", *options, "--", *_once(tmp_path, 143))
  assert result.returncode == 0, result.stderr
  assert _times(tmp_path) == 2
  ((_, *submitted), (_, *step), *_) = fake_programs.calls(folder)
  wanted = {
    "--ntasks-per-node=1",
    "--requeue",
    "--time=1:00",
    "--signal=TERM@300",
    "--cpus-per-task=4",
    "--job-name=seven",
    "--output=seven-%j.log",
  }
  assert wanted <= set(submitted)
  assert step[:2] == ["--kill-on-bad-exit=0", "--cpus-per-task=4"]


@pytest.mark.parametrize("to", ["leader", "group"])
def test_slurm_lets_every_task_save_before_the_job_is_queued_again(to, folder, launch):
  """Slurm's cgroup tracking sends SIGTERM to the first process of a task, others to its group."""
  (folder / "signal").write_text(to)
  result = launch("slurm.sh", *SLURM, "--", *fake_programs.SAVE)
  assert result.returncode == 0, result.stderr
  saved = [path.read_text() for path in folder.glob("hosts/node/*/saved")]
  assert saved == ["x\n"] * 2


@pytest.mark.parametrize("to", ["leader", "group"])
def test_the_first_process_of_the_container_passes_sigterm_on(to, tmp_path):
  lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
  (entry,) = [line.partition(" ")[2] for line in lines if line.startswith("ENTRYPOINT ")]
  (program,) = [word.replace("/bigalign", str(ROOT)) for word in json.loads(entry)]
  with subprocess.Popen(
    [program, *fake_programs.SAVE],
    env={**os.environ, "HOME": str(tmp_path)},
    start_new_session=True,
  ) as process:
    (tmp_path / "signal").write_text(to)
    fake_programs.send_signal(tmp_path, [tmp_path], [process])
  assert process.returncode == 143 and (tmp_path / "saved").exists()
  assert subprocess.run([program, "sh", "-c", "exit 7"]).returncode == 7
  shown = subprocess.run([program, "cat"], input=b"text", capture_output=True)
  assert shown.stdout == b"text"


def test_forwarding_leaves_the_signals_of_the_command_as_they_were():
  """A background command of bash would ignore Ctrl-C."""
  show = "import signal; print(*(signal.getsignal(s) is signal.SIG_IGN for s in (2, 3, 15)))"
  words = [ROOT / "launch/forward.sh", sys.executable, "-S", "-c", show]
  assert subprocess.run(words, capture_output=True, text=True).stdout == "False False False\n"


@pytest.mark.parametrize("status, state", [(7, "RUNNING"), (143, "CANCELLED")])
def test_slurm_does_not_queue_a_failed_or_cancelled_job_again(
  status, state, folder, launch, tmp_path
):
  (folder / "state").write_text(state)
  result = launch("slurm.sh", *SLURM, "--", *_once(tmp_path, status))
  assert result.returncode == status and _times(tmp_path) == 1


def test_slurm_does_not_requeue_a_failure_for_which_the_others_report_143(folder, launch):
  """srun returns the largest status, that of a task which lost its peer."""
  work = f"echo step >> {folder}/steps; [ $SLURM_PROCID = 0 ] && exit 143; exit 1"
  result = launch("slurm.sh", *SLURM, "--", "sh", "-c", work)
  assert result.returncode == 1 and (folder / "steps").read_text() == "step\n" * 2


@pytest.mark.parametrize(
  "first, then, status, times",
  [
    (143, 0, 0, 2),
    (7, 0, 7, 1),
    (134, 9, 9, 2),
  ],
)
def test_gke_restarts_after_interruptions_only(
  first, then, status, times, folder, launch, tmp_path
):
  result = launch("gke.sh", "run", *GKE, "--delete=failure", "--", *_once(tmp_path, first, then))
  assert (result.returncode, _times(tmp_path)) == (status, times), result.stderr
  deleted = ["kubectl", "delete", "jobset", "pod"] in fake_programs.calls(folder)
  assert deleted is (status != 0)


def test_gke_does_not_mistake_the_end_of_an_old_run_for_that_of_a_new_one(folder, launch):
  assert launch("gke.sh", "run", *GKE, "--", "true").returncode == 0
  result = launch("gke.sh", "run", *GKE, "--delete=always", "--", "false")
  assert result.returncode == 2 and "pod has ended: Completed. Before" in result.stderr
  assert "a new run of this name: launch/gke.sh delete pod" in result.stderr
  assert not [words for words in fake_programs.calls(folder) if "delete" in words]


def test_the_jobset(launch):
  result = launch(
    "gke.sh", "yaml", *GKE, "--slices=3", "--spot", "--restarts=5", "--", "--config=x"
  )
  jobset = yaml.safe_load(result.stdout)
  (job,) = jobset["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  assert (jobset["kind"], jobset["spec"]["failurePolicy"]["maxRestarts"]) == ("JobSet", 5)
  assert (job["replicas"], job["template"]["spec"]["completions"]) == (3, 2)
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
  assert pod["shareProcessNamespace"] is True  # else SIGTERM is ignored until there is a handler
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "2x4",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["command"] == ["bigalign", "train", "--config=x"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["securityContext"] == {"runAsUser": 0}
  result = launch("gke.sh", "yaml", *GKE, "--user=1000", "--", "--config=x")
  assert "runAsUser: 1000" in result.stdout


def test_the_image_is_made_of_what_git_holds(folder, launch):
  result = launch("gke.sh", "image", "pod", "--image=r/i:1")
  assert result.returncode == 0, result.stderr
  build, push = fake_programs.calls(folder)
  assert build[1] == "build" and "r/i:1" in build and push == ["docker", "push", "r/i:1"]
  with tarfile.open(folder / "context.tar.gz") as context:
    names = set(context.getnames())
  sent = [line.split() for line in (ROOT / "launch/Dockerfile").read_text().splitlines()]
  copied = {name for words in sent if words[:1] == ["COPY"] for name in words[1:-1]} - {"."}
  copied -= {"--chown=$RUN_AS"}
  assert copied and copied <= names and not any(name.startswith(".git/") for name in names)


def test_the_image_runs_as_an_ordinary_user():
  lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
  assert [line for line in lines if line.startswith(("USER", "ARG RUN_AS"))] == [
    "ARG RUN_AS=1000:1000",
    "USER $RUN_AS",
  ]


def test_a_build_from_the_checkout_leaves_out_what_git_ignores_and_the_history():
  """`docker build .` sends the whole folder; the image would hold runs, caches and .git."""

  def patterns(name):
    lines = (ROOT / name).read_text().splitlines()
    return {line.removeprefix("**/").strip("/") for line in lines if line and line[0] != "#"}

  left_out = patterns(".dockerignore")
  assert left_out == patterns(".gitignore") | {".git"}
  sent = [line.split() for line in (ROOT / "launch/Dockerfile").read_text().splitlines()]
  copied = {name for words in sent if words[:1] == ["COPY"] for name in words[1:-1]} - {"."}
  assert not [name for name in copied for p in left_out if fnmatch.fnmatch(name.strip("/"), p)]


def test_xpk_gets_words_that_its_shell_and_kubernetes_read_back(folder, launch):
  words = [word for word in AWKWARD if "\n" not in word]
  where = ["--type=v5litepod-16", "--cluster=c", "--zone=z", "--project=p", "--image=r/i:1"]
  result = launch("gke.sh", "xpk", "pod", *where, "--", "printf", "%s\\n", *words)
  assert result.returncode == 0, result.stderr
  ((*_, command),) = fake_programs.calls(folder)
  assert command.startswith("exec ")  # xpk sends SIGTERM to the subshell that reads this
  read = subprocess.run(["sh", "-c", command.replace("$$", "$")], capture_output=True, text=True)
  assert read.stdout.splitlines() == words
  result = launch("gke.sh", "xpk", "pod", *where, "--", "a\nb")
  assert result.returncode == 2 and "xpk cannot pass on a line break" in result.stderr


@pytest.mark.slow
def test_a_slice_of_compute_engine(folder, launch, tmp_path):
  """If a worker fails, the script deletes what create made and returns the status of the worker."""
  fail = "[ $(basename $(dirname $HOME)) = pod-0 ] || exit 7"
  result = launch("gce.sh", "train", *GCE, "--spot", "--delete=failure", "--", "sh", "-c", fail)
  assert result.returncode == 7, result.stderr
  made = [words for words in fake_programs.calls(folder) if "create" in words]
  group = next(words for words in made if "instance-groups" in words)
  assert group[group.index("--size") + 1] == "2" and "bulk" in group
  template = next(words for words in made if "instance-templates" in words)
  assert "ubuntu-accel-2404-amd64-tpu-tpu7x" in template and "SPOT" in template
  deleted = [words for words in fake_programs.calls(folder) if "delete" in words]
  assert [words[:4] for words in deleted] == [
    ["gcloud", "alpha", "compute", "instance-groups"],
    ["gcloud", "compute", "instance-templates", "delete"],
    ["gcloud", "compute", "resource-policies", "delete"],
  ]
  assert "0 of 2 hosts" in result.stderr  # while it waited


@pytest.mark.parametrize("script", ["gce.sh", "tpu_vm.sh"])
def test_waiting_ends_if_the_machines_do_not_exist_or_are_gone(script, folder, launch):
  result = launch(script, "wait", *NONE)
  assert result.returncode == 1 and "pod does not exist: gcloud" in result.stderr
  (folder / "state").write_text("SUSPENDED")
  result = launch(script, "wait", *NONE)
  assert result.returncode == 1 and "pod was refused or reclaimed: gcloud" in result.stderr
  (folder / "state").write_text("ACTIVE")
  assert launch(script, "wait", *NONE).returncode == 0


@pytest.mark.parametrize(
  "words, message",
  [
    (["gce.sh", "create", *NONE], "--machine is needed"),
    (
      ["gce.sh", "create", *NONE, "--machine=m", "--topology=big"],
      "--topology big: expected a shape such as 4x4",
    ),
    (
      ["gce.sh", "create", *NONE, "--machine=m", "--topology=1x1x3"],
      "has 3 chips, not a multiple of 4",
    ),
    (
      ["gke.sh", "run", *GKE, "--chips-per-host=3", "--", "true"],
      "8 chips, not a multiple of --chips-per-host 3",
    ),
    (["gke.sh", "run", *GKE, "--", "\1"], "a JobSet cannot hold a control character"),
    (["gke.sh", "run", *GKE, "--delete=no", "--", "true"], "--delete no: expected one of: always"),
    (["gke.sh", "image", "pod"], "--image is needed"),
    (["slurm.sh", "--nodes=2", "--", "true"], "--gpus-per-node is needed"),
    (
      ["slurm.sh", "--nodes=x", "--gpus-per-node=1", "--", "true"],
      "--nodes x: expected a whole number >= 1",
    ),
    (
      ["gke.sh", "run", *GKE, "--restarts=-1", "--", "true"],
      "--restarts -1: expected a whole number >= 0",
    ),
    (["slurm.sh", *SLURM], "nothing to run"),
  ],
)
def test_wrong_use_says_what_is_wrong(words, message, folder, launch):
  result = launch(*words)
  assert result.returncode == 2
  assert message in result.stderr and "-h shows the usage" in result.stderr
  assert not fake_programs.calls(folder)


@pytest.mark.parametrize(
  "words",
  [
    ["slurm.sh", *SLURM],
    ["gke.sh", "run", *GKE],
    ["gke.sh", "image", *GKE],
    ["gke.sh", "xpk", *GKE, "--type=t", "--cluster=c", "--zone=z"],
    ["gce.sh", "train", *GCE],
    ["tpu_vm.sh", "train", *NONE, "--type=v4-8"],
    ["setup_host.sh"],
    ["smoke.sh"],
  ],
  ids=lambda words: " ".join(words[:2]),
)
def test_dry_run_and_help_run_nothing(words, folder, launch):
  takes = {"run", "xpk", "train", "slurm.sh", "smoke.sh"}
  arguments = ["--", "$HOME"] if set(words) & takes else []
  result = launch(*words, "--dry-run", *arguments)
  assert result.returncode == 0 and not result.stderr, result.stderr
  assert result.stdout and (not arguments or "$HOME" in result.stdout)
  assert launch(words[0], "-h").stdout.startswith(f"usage: launch/{words[0]}")
  assert not fake_programs.calls(folder)
  assert sorted(path.name for path in folder.iterdir()) == ["bin", "port"]


@pytest.mark.parametrize("gpu", [False, True])
def test_a_smoke_test_sets_up_the_host_for_its_devices_and_measures_it(gpu, folder, launch):
  tools = fake_programs.few_tools(folder)
  if gpu:
    fake_programs.write_program(tools / "nvidia-smi", "exit 9")  # it is not run
  result = launch("smoke.sh", "--dry-run", "--", "--batch=8", PATH=str(tools))
  setup, measure = result.stdout.splitlines()
  tpus = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
  extras = "tpu" if tpus else "cuda" if gpu else "''"
  assert setup == f"{ROOT}/launch/setup_host.sh --extras {extras}"
  assert measure == f"{ROOT}/.venv/bin/bigalign benchmark --json=smoke.json --batch=8"
  result = launch("smoke.sh", "--dry-run", "--extras=tpu gcs", "--json=a b", PATH=str(tools))
  setup, measure = result.stdout.splitlines()
  assert setup.endswith(" --extras 'tpu gcs'") and measure.endswith(" benchmark '--json=a b'")


def test_setup_installs_what_the_system_lacks(folder, launch):
  tools = fake_programs.few_tools(folder)
  result = launch("setup_host.sh", "--dry-run", PATH=str(tools))
  assert result.returncode == 2 and "there is no apt-get to install them" in result.stderr
  fake_programs.write_program(tools / "id", "echo 1000")
  fake_programs.write_program(tools / "apt-get", "exit 9")
  result = launch("setup_host.sh", "--dry-run", "--extras=tpu", PATH=str(tools))
  update, install, make = result.stdout.splitlines()
  assert update.startswith("sudo -n env DEBIAN_FRONTEND=noninteractive apt-get ")
  assert install.endswith(" install -y ca-certificates make python3 python3-venv")
  assert make == f"make -C {ROOT} base EXTRAS=tpu"
  fake_programs.write_program(tools / "python3", "exit 1")  # too old
  result = launch("setup_host.sh", "--dry-run", "--tests", PATH=str(tools))
  _, install, make = result.stdout.splitlines()
  assert install.endswith(" python3.11 python3.11-venv") and " install EXTRAS=" in make


@pytest.mark.parametrize(
  "words, program",
  [
    (["slurm.sh", *SLURM, "--", "true"], "sbatch"),
    (["gke.sh", "run", *GKE, "--", "true"], "kubectl"),
    (["gke.sh", "image", *GKE], "docker"),
  ],
)
def test_a_missing_program_is_named(words, program, folder, launch):
  tools = fake_programs.few_tools(folder)
  result = launch(*words, PATH=str(tools))
  assert result.returncode == 2 and f"{program} is not on PATH: " in result.stderr
