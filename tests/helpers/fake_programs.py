"""Programs that stand in for those of a cloud or a cluster: they write down how they were called,
and what is sent to hosts runs as processes of this machine, each with a home of its own.

`programs` puts them into a folder for PATH. Run as a program, this file is one of them.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

HOSTS = 2
ROOT = pathlib.Path(__file__).parents[2]
AWKWARD = [
  "a b",
  "it's",
  'say "x"',
  "$HOME",
  "$(HOME)",
  "$$",
  "`id`",
  "a\nb",
  "*",
  "\\n",
  "",
  "x;y|z&",
  "--",
  "é",
]
# Saves a checkpoint after SIGTERM, slowly; the next start finds it and ends.
SAVE = [
  "sh",
  "-c",
  "if [ -e $HOME/saved ]; then exit 0; fi;"
  "trap '/bin/sleep 0.3; echo x >>$HOME/saved; exit 143' TERM;"
  "touch $HOME/begun; for i in $(seq 200); do /bin/sleep 0.05; done; exit 9",
]
# Writes the words that follow it to a file in the home of the process.
SHOW = [
  sys.executable,
  "-c",
  "import json, os, sys; json.dump(sys.argv[1:], open(os.environ['HOME'] + '/words.json', 'w'))",
]


def programs(folder: pathlib.Path) -> dict[str, str]:
  """The environment under which the stand-ins are found; what they keep is in `folder`."""
  bin_ = folder / "bin"
  bin_.mkdir(parents=True)
  for name in PROGRAMS:
    # Without site-packages they start three times as fast; one of them needs these.
    python = [sys.executable] if name == "kubectl" else [sys.executable, "-S"]
    write_program(bin_ / name, f'exec {shlex.join([*python, __file__, name])} "$@"')
  write_program(bin_ / "sleep", "exec /bin/sleep 0.05")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    (folder / "port").write_text(str(free.getsockname()[1]))
  path = f"{bin_}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  return {**os.environ, "PATH": path, "STANDINS": str(folder), "TMPDIR": str(folder)}


def launcher(folder: pathlib.Path):
  """A function that runs a script of launch/ against the stand-ins."""
  env = programs(folder)

  def launch(script, *words, **variables):
    return subprocess.run(
      [ROOT / "launch" / script, *words],
      capture_output=True,
      text=True,
      timeout=300,
      env={**env, **variables},
    )

  return launch


def few_tools(folder: pathlib.Path) -> pathlib.Path:
  """A folder for PATH with what the scripts use before the programs of a cloud."""
  tools = folder / "tools"
  tools.mkdir()
  for name in ("env", "bash", "dirname", "basename", "cat", "date"):
    (tools / name).symlink_to(shutil.which(name))
  return tools


def shown(folder: pathlib.Path) -> list[list[str]]:
  """What SHOW has written on each host."""
  return [json.loads(path.read_text()) for path in folder.glob("hosts/*/*/words.json")]


def write_program(path: pathlib.Path, line: str) -> None:
  path.write_text(f"#!/bin/sh\n{line}\n")
  path.chmod(0o755)


def calls(folder: pathlib.Path) -> list[list[str]]:
  """The words of each call, in order."""
  path = folder / "calls.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def host(folder: pathlib.Path, target: str, worker: int) -> pathlib.Path:
  """The home of a host, made at its first use, with an environment that seems installed."""
  home = folder / "hosts" / target / str(worker)
  if not home.exists():
    bin_ = home / "bigalign/.venv/bin"
    bin_.mkdir(parents=True)
    write_program(bin_ / "pip", "exit 1")
    write_program(bin_ / "bigalign", f'exec "{sys.executable}" -m bigalign "$@"')
    (bin_.parent / ".installed-tpu-gcs").touch()
  return home


def start(folder: pathlib.Path, home: pathlib.Path, i: int, count: int, command, **variables):
  """Process i of count, which finds what a metadata server says on real hosts: the others.

  It leads a process group of its own, as a task of Slurm does.
  """
  env = {
    **os.environ,
    "HOME": str(home),
    "PYTHONPATH": str(home / "bigalign"),
    "BIGALIGN_COORDINATOR": f"127.0.0.1:{(folder / 'port').read_text()}",
    "BIGALIGN_NUM_PROCESSES": str(count),
    "BIGALIGN_PROCESS_ID": str(i),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    **variables,
  }
  return subprocess.Popen(command, cwd=home, env=env, start_new_session=True)


def gcloud(folder: pathlib.Path, words: list[str]) -> int:
  """Of the state file, `describe` prints what it holds; a test may write another state into it."""
  state = folder / "state"
  verb = next(w for w in words if w in GCLOUD_VERBS)
  rest = words[words.index(verb) + 1 :]
  whole = "queued-resources" in words or "instance-groups" in words
  if verb == "create" and whole:
    if state.exists():
      print("ALREADY_EXISTS", file=sys.stderr)
      return 1
    state.write_text("PROVISIONING")
  elif verb == "delete" and whole:
    state.unlink()
    shutil.rmtree(folder / "hosts", ignore_errors=True)
  elif verb in ("describe", "list-instances"):
    if not state.exists():
      print("NOT_FOUND", file=sys.stderr)
      return 1
    now = state.read_text()
    status = {"ACTIVE": "RUNNING", "SUSPENDED": "TERMINATED"}.get(now, now)
    group = [f"{rest[0]}-{i}\t{status}" for i in range(HOSTS)]
    print("\n".join(group) if verb == "list-instances" else now)
    if now == "PROVISIONING":
      state.write_text("ACTIVE")
  elif verb == "ssh":
    (command,) = [w.removeprefix("--command=") for w in rest if w.startswith("--command=")]
    workers = range(HOSTS if "--worker=all" in rest else 1)
    homes = [host(folder, rest[0], worker) for worker in workers]
    # A login shell that is no bash, which reads less.
    line = ["sh", "-c", command]
    processes = [start(folder, home, i, len(homes), line) for i, home in enumerate(homes)]
    # As gcloud does: waits for all, and the first that failed counts.
    statuses = [p.wait() for p in processes]
    lost = folder / "lose"
    if " run " in command and lost.exists():
      lost.unlink()
      return 255
    return next((status for status in statuses if status), 0)
  elif verb == "scp":
    target, path = rest[1].split(":")
    for worker in range(HOSTS if "--worker=all" in rest else 1):
      shutil.copy(rest[0], host(folder, target, worker) / (path or pathlib.Path(rest[0]).name))
  return 0


def kubectl(folder: pathlib.Path, words: list[str]) -> int:
  """`apply` runs the JobSet to its end, with the restarts that it asks for."""
  import yaml

  ended = folder / "ended.json"
  if words[0] == "apply":
    ended.write_text(json.dumps(run_jobset(folder, yaml.safe_load(sys.stdin))))
  elif words[0] == "get" and ended.exists():
    state, statuses = json.loads(ended.read_text())
    print(*(statuses if words[1] == "pods" else [words[2], state]))
  return 0


def run_jobset(folder: pathlib.Path, jobset: dict) -> tuple[str, list[int]]:
  """("Completed" or "Failed", exit statuses of the last time)"""
  (job,) = jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  (rule,) = spec["podFailurePolicy"]["rules"]
  # Kubernetes replaces $(NAME) and reads $$ as $; what is left alone would show in the words.
  command = [
    re.sub(r"\$\((\w+)\)|\$\$", lambda m: "?" if m[1] else "$", w) for w in container["command"]
  ]
  count = spec["parallelism"] * job["replicas"]
  for _ in range(jobset["spec"]["failurePolicy"]["maxRestarts"] + 1):
    homes = [host(folder, "pod", i) for i in range(count)]
    processes = [start(folder, home, i, count, command) for i, home in enumerate(homes)]
    statuses = [p.wait() for p in processes]
    if not any(statuses):
      return "Completed", statuses
    if any(status and status not in rule["onExitCodes"]["values"] for status in statuses):
      break
  return "Failed", statuses


def sbatch(folder: pathlib.Path, words: list[str]) -> int:
  """Runs the job at once, and again as long as it asks for it."""
  options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
  tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
  script, again = sys.stdin.read(), folder / "requeued"
  while True:
    again.unlink(missing_ok=True)
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks)}
    status = subprocess.run(["bash", "-c", script], env=env).returncode
    if not again.exists():
      return status if "wait" in options else 0


def srun(folder: pathlib.Path, words: list[str]) -> int:
  command = list(itertools.dropwhile(lambda word: word.startswith("--"), words))
  count = int(os.environ["SLURM_NTASKS"])
  homes = [host(folder, "node", i) for i in range(count)]
  processes = [
    start(folder, home, i, count, command, SLURM_PROCID=str(i), SLURM_STEP_NUM_TASKS=str(count))
    for i, home in enumerate(homes)
  ]
  send_signal(folder, homes, processes)
  return max(p.wait() for p in processes)


def send_signal(folder: pathlib.Path, homes, processes) -> None:
  """Sends SIGTERM once if the file `signal` holds "leader", a host's first process, or "group".

  It waits until each command has written the file `begun` into its home.
  """
  path = folder / "signal"
  if not path.exists():
    return
  to = path.read_text()
  path.unlink()
  deadline = time.monotonic() + 30
  while not all((home / "begun").exists() for home in homes) and time.monotonic() < deadline:
    time.sleep(0.02)
  for process in processes:
    {"leader": os.kill, "group": os.killpg}[to](process.pid, signal.SIGTERM)


def scontrol(folder: pathlib.Path, words: list[str]) -> int:
  assert words == ["requeue", "7"], words
  (folder / "requeued").touch()
  return 0


def squeue(folder: pathlib.Path, words: list[str]) -> int:
  """RUNNING, unless a test has written another state."""
  state = folder / "state"
  print(state.read_text() if state.exists() else "RUNNING")
  return 0


def docker(folder: pathlib.Path, words: list[str]) -> int:
  if words[0] == "build":
    (folder / "context.tar.gz").write_bytes(sys.stdin.buffer.read())
  return 0


GCLOUD_VERBS = ("create", "delete", "describe", "list-instances", "ssh", "scp")
PROGRAMS = {
  "gcloud": gcloud,
  "kubectl": kubectl,
  "sbatch": sbatch,
  "srun": srun,
  "scontrol": scontrol,
  "squeue": squeue,
  "docker": docker,
  "xpk": lambda folder, words: 0,
}


if __name__ == "__main__":
  _folder = pathlib.Path(os.environ["STANDINS"])
  with (_folder / "calls.jsonl").open("a") as _file:
    _file.write(json.dumps(sys.argv[1:]) + "\n")
  sys.exit(PROGRAMS[sys.argv[1]](_folder, sys.argv[2:]))
