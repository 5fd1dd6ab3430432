"""launch/slurm.sh, gke.sh and gce.sh with programs that stand in for those of a cluster."""

from __future__ import annotations

import subprocess
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
# Process 0 ends with the first status at first, with the second when it is started again.
ONCE = (
  "[ $BIGALIGN_PROCESS_ID = 0 ] || exit 0; echo x >> $0;[ $(wc -l < $0) -gt 1 ] || exit $1; exit $2"
)


@pytest.fixture
def folder(tmp_path):
  """Where the stand-ins are and keep what they hold."""
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
  found = launch(script, *options, "--", *SHOW, *AWKWARD)
  assert found.returncode == 0, found.stderr
  assert fake_programs.shown(folder) == [AWKWARD] * 2


def test_slurm_queues_again_after_a_checkpoint(folder, launch, tmp_path):
  options = [*SLURM, "--time=1:00", "--cpus-per-task", "4", "--name=seven"]
  found = launch("slurm.sh", *options, "--", *_once(tmp_path, 143))
  assert found.returncode == 0, found.stderr
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


@pytest.mark.parametrize("status, state", [(7, "RUNNING"), (143, "CANCELLED")])
def test_slurm_does_not_queue_a_failed_or_cancelled_job_again(
  status, state, folder, launch, tmp_path
):
  (folder / "state").write_text(state)
  found = launch("slurm.sh", *SLURM, "--", *_once(tmp_path, status))
  assert found.returncode == status and _times(tmp_path) == 1


def test_slurm_does_not_queue_a_mistake_again_for_which_the_others_report_143(folder, launch):
  """srun tells the largest status, that of a task which missed its peer."""
  work = f"echo step >> {folder}/steps; [ $SLURM_PROCID = 0 ] && exit 143; exit 1"
  found = launch("slurm.sh", *SLURM, "--", "sh", "-c", work)
  assert found.returncode == 1 and (folder / "steps").read_text() == "step\n" * 2


@pytest.mark.parametrize(
  "first, then, status, times",
  [
    (143, 0, 0, 2),
    (7, 0, 7, 1),
    (134, 9, 9, 2),
  ],
)
def test_gke_begins_anew_after_interruptions_only(
  first, then, status, times, folder, launch, tmp_path
):
  found = launch("gke.sh", "run", *GKE, "--delete=failure", "--", *_once(tmp_path, first, then))
  assert (found.returncode, _times(tmp_path)) == (status, times), found.stderr
  deleted = ["kubectl", "delete", "jobset", "pod"] in fake_programs.calls(folder)
  assert deleted is (status != 0)


def test_gke_does_not_take_an_old_end_for_that_of_a_new_run(folder, launch):
  assert launch("gke.sh", "run", *GKE, "--", "true").returncode == 0
  found = launch("gke.sh", "run", *GKE, "--delete=always", "--", "false")
  assert found.returncode == 2 and "pod has ended: Completed; launch/gke.sh delete" in found.stderr
  assert not [words for words in fake_programs.calls(folder) if "delete" in words]


def test_the_jobset(launch):
  found = launch("gke.sh", "yaml", *GKE, "--slices=3", "--spot", "--restarts=5", "--", "--config=x")
  jobset = yaml.safe_load(found.stdout)
  (job,) = jobset["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  assert (jobset["kind"], jobset["spec"]["failurePolicy"]["maxRestarts"]) == ("JobSet", 5)
  assert (job["replicas"], job["template"]["spec"]["completions"]) == (3, 2)
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "2x4",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["command"] == ["bigalign", "train", "--config=x"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_the_image_is_made_of_what_git_holds(folder, launch):
  found = launch("gke.sh", "image", "pod", "--image=r/i:1")
  assert found.returncode == 0, found.stderr
  build, push = fake_programs.calls(folder)
  assert build[1] == "build" and "r/i:1" in build and push == ["docker", "push", "r/i:1"]
  with tarfile.open(folder / "context.tar.gz") as context:
    names = set(context.getnames())
  sent = [line.split() for line in (ROOT / "launch/Dockerfile").read_text().splitlines()]
  copied = {name for words in sent if words[:1] == ["COPY"] for name in words[1:-1]} - {"."}
  assert copied and copied <= names and not any(name.startswith(".git/") for name in names)


def test_xpk_gets_words_that_its_shell_and_kubernetes_read_back(folder, launch):
  words = [word for word in AWKWARD if "\n" not in word]
  where = ["--type=v5litepod-16", "--cluster=c", "--zone=z", "--project=p", "--image=r/i:1"]
  found = launch("gke.sh", "xpk", "pod", *where, "--", "printf", "%s\\n", *words)
  assert found.returncode == 0, found.stderr
  ((*_, command),) = fake_programs.calls(folder)
  read = subprocess.run(["sh", "-c", command.replace("$$", "$")], capture_output=True, text=True)
  assert read.stdout.splitlines() == words
  found = launch("gke.sh", "xpk", "pod", *where, "--", "a\nb")
  assert found.returncode == 2 and "xpk cannot carry a line break" in found.stderr


def test_a_slice_of_compute_engine(folder, launch, tmp_path):
  """All that was made is deleted, after the status of the worker that failed."""
  fail = "[ $(basename $(dirname $HOME)) = pod-0 ] || exit 7"
  found = launch("gce.sh", "train", *GCE, "--spot", "--delete=failure", "--", "sh", "-c", fail)
  assert found.returncode == 7, found.stderr
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
  assert "0 of 2 hosts" in found.stderr  # while it waited


@pytest.mark.parametrize("script", ["gce.sh", "tpu_vm.sh"])
def test_waiting_ends_where_nothing_comes(script, folder, launch):
  found = launch(script, "wait", *NONE)
  assert found.returncode == 1 and "there is no pod: gcloud" in found.stderr
  (folder / "state").write_text("SUSPENDED")
  found = launch(script, "wait", *NONE)
  assert found.returncode == 1 and "pod was refused or taken away: gcloud" in found.stderr
  (folder / "state").write_text("ACTIVE")
  assert launch(script, "wait", *NONE).returncode == 0


@pytest.mark.parametrize(
  "words, message",
  [
    (["gce.sh", "create", *NONE], "--machine is needed"),
    (["gce.sh", "create", *NONE, "--machine=m", "--topology=big"], "--topology big is no 4x4"),
    (["gce.sh", "create", *NONE, "--machine=m", "--topology=1x1x3"], "are 3 chips"),
    (["gke.sh", "run", *GKE, "--chips-per-host=3", "--", "true"], "8 chips, which"),
    (["gke.sh", "run", *GKE, "--", "\1"], "a control character"),
    (["gke.sh", "run", *GKE, "--delete=no", "--", "true"], "--delete no: one of always"),
    (["gke.sh", "image", "pod"], "--image is needed"),
    (["slurm.sh", "--nodes=2", "--", "true"], "--gpus-per-node is needed"),
    (["slurm.sh", "--nodes=x", "--gpus-per-node=1", "--", "true"], "--nodes x is no number from 1"),
    (
      ["gke.sh", "run", *GKE, "--restarts=-1", "--", "true"],
      "--restarts -1 is no number from 0 on",
    ),
    (["slurm.sh", *SLURM], "nothing to run"),
  ],
)
def test_wrong_use_says_what_is_wrong(words, message, folder, launch):
  found = launch(*words)
  assert found.returncode == 2 and message in found.stderr and "-h tells" in found.stderr
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
  ],
  ids=lambda words: " ".join(words[:2]),
)
def test_dry_run_and_help_run_nothing(words, folder, launch):
  arguments = ["--", "$HOME"] if set(words) & {"run", "xpk", "train", "slurm.sh"} else []
  found = launch(*words, "--dry-run", *arguments)
  assert found.returncode == 0 and not found.stderr, found.stderr
  assert found.stdout and (not arguments or "$HOME" in found.stdout)
  assert launch(words[0], "-h").stdout.startswith(f"usage: launch/{words[0]}")
  assert not fake_programs.calls(folder)
  assert sorted(path.name for path in folder.iterdir()) == ["bin", "port"]


def test_setup_installs_what_the_system_lacks(folder, launch):
  tools = fake_programs.few_tools(folder)
  found = launch("setup_host.sh", "--dry-run", PATH=str(tools))
  assert found.returncode == 2 and "here is no apt-get" in found.stderr
  fake_programs.write_program(tools / "id", "echo 1000")
  fake_programs.write_program(tools / "apt-get", "exit 9")
  found = launch("setup_host.sh", "--dry-run", "--extras=tpu", PATH=str(tools))
  update, install, make = found.stdout.splitlines()
  assert update.startswith("sudo -n env DEBIAN_FRONTEND=noninteractive apt-get ")
  assert install.endswith(" install -y ca-certificates make python3 python3-venv")
  assert make == f"make -C {ROOT} base EXTRAS=tpu"
  fake_programs.write_program(tools / "python3", "exit 1")  # too old
  found = launch("setup_host.sh", "--dry-run", "--tests", PATH=str(tools))
  _, install, make = found.stdout.splitlines()
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
  found = launch(*words, PATH=str(tools))
  assert found.returncode == 2 and f"there is no {program} on PATH; " in found.stderr
