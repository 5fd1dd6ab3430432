"""Programs that stand in for those of a cloud: they write down how they were called, and what is
sent to all hosts of a slice runs as processes of this machine, each with a home of its own.

`programs` puts them into a folder for PATH. Run as a program, this file is one of them.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys

HOSTS = 2


def programs(folder: pathlib.Path) -> dict[str, str]:
  """The environment under which the stand-ins are found; what they keep is in `folder`."""
  bin_ = folder / "bin"
  bin_.mkdir(parents=True)
  for name in PROGRAMS:
    write_program(bin_ / name, f"exec {shlex.join([sys.executable, __file__, name])} \"$@\"")
  write_program(bin_ / "sleep", "exec /bin/sleep 0.05")
  path = f"{bin_}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  return {**os.environ, "PATH": path, "STANDINS": str(folder), "TMPDIR": str(folder)}


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
    (bin_.parent / ".installed-tpu").touch()
  return home


def run_on_hosts(folder: pathlib.Path, targets: list[str], command: str) -> int:
  """As `gcloud compute tpus tpu-vm ssh --worker=all`: all at once, the first status that is not 0.

  Each process finds what the metadata server tells on a real host: the others.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  homes = [(target, worker) for target in targets for worker in range(HOSTS)]
  processes = []
  for i, (target, worker) in enumerate(homes):
    home = host(folder, target, worker)
    env = {
      **os.environ, "HOME": str(home), "PYTHONPATH": str(home / "bigalign"),
      "BIGALIGN_COORDINATOR": f"127.0.0.1:{port}", "BIGALIGN_NUM_PROCESSES": str(len(homes)),
      "BIGALIGN_PROCESS_ID": str(i), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4",
    }
    # A login shell that is no bash, which reads less.
    processes.append(subprocess.Popen(["sh", "-c", command], cwd=home, env=env))
  return next((status for status in [p.wait() for p in processes] if status), 0)


def gcloud(folder: pathlib.Path, words: list[str]) -> int:
  """Of the state file, `describe` prints what it holds; a test may write another state into it."""
  state = folder / "state"
  verb = next(w for w in words if w in ("create", "delete", "describe", "ssh", "scp"))
  rest = words[words.index(verb) + 1 :]
  if verb == "create":
    if state.exists():
      print("ALREADY_EXISTS", file=sys.stderr)
      return 1
    state.write_text("PROVISIONING")
  elif verb == "delete":
    state.unlink()
    shutil.rmtree(folder / "hosts", ignore_errors=True)
  elif verb == "describe":
    if not state.exists():
      print("NOT_FOUND", file=sys.stderr)
      return 1
    print(state.read_text())
    if state.read_text() == "PROVISIONING":
      state.write_text("ACTIVE")
  elif verb == "ssh":
    (command,) = [w.removeprefix("--command=") for w in rest if w.startswith("--command=")]
    return run_on_hosts(folder, [rest[0]], command)
  elif verb == "scp":
    target, path = rest[1].split(":")
    for worker in range(HOSTS):
      home = host(folder, target, worker)
      shutil.copy(rest[0], home / (path or pathlib.Path(rest[0]).name))
  return 0


PROGRAMS = {"gcloud": gcloud}


if __name__ == "__main__":
  _folder = pathlib.Path(os.environ["STANDINS"])
  with (_folder / "calls.jsonl").open("a") as _file:
    _file.write(json.dumps(sys.argv[1:]) + "\n")
  sys.exit(PROGRAMS[sys.argv[1]](_folder, sys.argv[2:]))
