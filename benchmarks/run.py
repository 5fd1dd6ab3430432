"""Runs the benchmarks one after the other, and prints a table: make bench

Each writes its JSON and its output to the folder of --out. Those whose data or device is not on
this machine are left out, and the table says why; one that takes longer than --limit is ended, and
the others run. The exit status is 1 if one missed a target or failed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bigalign.run.tables import show

FOLDER = pathlib.Path(__file__).parent
# {benchmark: variables that name its data}
NEEDS = {
  "loader": ["BIGALIGN_DATA"],
  "index": ["BIGALIGN_DATA"],
  "frozen": ["BIGALIGN_DATA", "MINILM"],
}
# {benchmark: (what its JSON is summed up by, the keys that lead there, how it is written)}
SUMMARIES = {
  "step": ("of open_clip", ["ratio", "wall_seconds"], "{:.2f}x"),
  "loader": ("of open_clip at 500 px", ["500px", "ratio", "bigalign"], "{:.2f}x"),
  "index": ("of webdataset", ["read_over_webdataset"], "{:.2f}x"),
  "remote": ("of single samples", ["ratio"], "{:.2f}x"),
  "frozen": ("of training with the towers", ["ratio", "stores / encoding"], "{:.2f}x"),
  "texts": ("of padded texts", ["ratio", "16 tokens"], "{:.2f}x"),
  "startup": ("CPU s, warm", ["best", "this checkout, warm cache", "cpu_seconds"], "{:.1f}"),
  "linear_probe": ("of the seconds of scikit-learn", ["ratio"], "{:.2f}x"),
  "retrieval": ("of the CPU seconds of faiss", ["ratio"], "{:.2f}x"),
  "search": ("s per query", ["seconds", "bigalign, in memory", "median"], "{:.4f}"),
}


class Result(NamedTuple):
  """How a benchmark ended: "met", "missed", "failed" or "left out", why or with what, and when.

  cpu_seconds: of its processes; unlike `seconds`, it hardly depends on other programs.
  """

  name: str
  end: str
  text: str
  seconds: float = 0.0
  cpu_seconds: float = 0.0


def names() -> list[str]:
  """The benchmarks: every file of this folder that is a program with --json, but this one."""
  return sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if path != pathlib.Path(__file__) and '"--json"' in path.read_text()
  )


def missing(name: str, environment: Mapping[str, str]) -> str:
  """Why a benchmark cannot run on this machine; "" if it can."""
  if name == "gpu" and not shutil.which("nvidia-smi"):
    return "no GPU"
  unset = [variable for variable in NEEDS.get(name, ()) if not environment.get(variable)]
  return f"{' and '.join(unset)} not set; benchmarks/README.md" if unset else ""


def summary(name: str, figures: Any) -> str:
  """One figure of a benchmark's JSON in words; "" if it has none, for lack of a rival."""
  if name not in SUMMARIES:
    return ""
  what, keys, form = SUMMARIES[name]
  for key in keys:
    figures = figures.get(key, {})
  return f"{form.format(figures)} {what}" if figures else ""


def run(name: str, out: pathlib.Path, limit: float) -> Result:
  """Runs a benchmark in processes of its own; its output goes to the terminal and to a file.

  Args:
    name: of the benchmark.
    out: folder of its figures and its output.
    limit: seconds after which it is ended.
  """
  print(f"\n{name}", flush=True)
  file, begin, cpu = out / f"{name}.json", time.perf_counter(), _cpu_seconds_of_children()
  file.unlink(missing_ok=True)
  lines: list[str] = []
  command = [sys.executable, str(FOLDER / f"{name}.py"), f"--json={file}"]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
  ) as process:
    assert process.stdout
    # Its own processes too, which hold the other end of its output.
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
      for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        lines.append(line)
    except BaseException:  # such as Ctrl-C, which does not reach its session
      os.killpg(process.pid, signal.SIGKILL)
      raise
    finally:
      timer.cancel()
  seconds, cpu = time.perf_counter() - begin, _cpu_seconds_of_children() - cpu
  (out / f"{name}.txt").write_text("".join(lines))
  last = lines[-1].strip() if lines else ""
  if process.returncode == -signal.SIGKILL and seconds >= limit:
    return Result(name, "failed", f"ended after {limit:.0f} s: {last}", seconds, cpu)
  if not file.exists():
    return Result(name, "failed", f"status {process.returncode}: {last}", seconds, cpu)
  text = summary(name, json.loads(file.read_text())) or last
  return Result(name, "missed" if process.returncode else "met", text, seconds, cpu)


def _cpu_seconds_of_children() -> float:
  """User and system time of all processes that ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def main() -> int:
  """Runs the chosen benchmarks; returns 1 if one missed a target or failed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; all")
  parser.add_argument("--out", type=pathlib.Path, default=FOLDER / "results", help="%(default)s")
  parser.add_argument("--limit", type=float, default=600, help="seconds for each; %(default)g")
  args = parser.parse_args()
  unknown = [name for name in args.names if name not in names()]
  if unknown:
    parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names())}")
  args.out.mkdir(parents=True, exist_ok=True)
  results = []
  for name in args.names or names():
    reason = missing(name, os.environ)
    results.append(Result(name, "left out", reason) if reason else run(name, args.out, args.limit))
  table = Table("benchmark", "targets", "", "minutes", "CPU minutes", box=SIMPLE_HEAD)
  for result in results:
    minutes = [f"{x / 60:.1f}" if x else "" for x in (result.seconds, result.cpu_seconds)]
    table.add_row(result.name, result.end, result.text, *minutes)
  show(table)
  total = [sum(x) / 60 for x in zip(*((r.seconds, r.cpu_seconds) for r in results))]
  print(f"in all {total[0]:.0f} minutes, {total[1]:.0f} CPU minutes")
  print(f"figures: {args.out}")
  return int(any(result.end in ("missed", "failed") for result in results))


if __name__ == "__main__":
  sys.exit(main())
