"""Measures a start of a run, from the command to its first step: python benchmarks/startup.py

Each start is a process of its own with `configs/tiny.py`, which ends after the first update. A cold
start finds an empty compilation cache, and the warm one that follows finds what the cold one wrote.
With --against=DIR, starts of another checkout alternate with those of this one. The smallest CPU
time counts: other programs on the machine never make a start faster. Exits with 1 if a warm start
of this checkout compiles a program.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
# `bigalign train` up to the end of its first step. It is changed once it is imported, because its
# imports are a part of what is measured.
START = """
import importlib, json, os, sys, time
from bigalign.__main__ import main

import_module = importlib.import_module

def import_and_change(name, package=None):
  module = import_module(name, package)
  if name == "bigalign.train":
    timer = sys.modules["bigalign.run.timing"].StartupTimer
    first_step = timer.first_step

    def first_step_and_exit(self, metrics):
      first_step(self, metrics)
      figures = {name.removeprefix("perf/"): x for name, x in self.take_metrics().items()}
      torch = "torch" in sys.modules
      print(json.dumps({"cpu_seconds": time.process_time(), "imports_torch": torch, **figures}))
      sys.stdout.flush()
      os._exit(0)

    timer.first_step = first_step_and_exit
  return module

importlib.import_module = import_and_change
main()
"""
FIGURES = {  # {figure of a start: its heading}
  "cpu_seconds": "CPU seconds",
  "seconds_to_first_step": "seconds without imports",
  "programs": "programs",
  "programs_from_cache": "of them from the cache",
}


def start(checkout: pathlib.Path, cache: pathlib.Path, config: str) -> dict[str, Any]:
  """The figures of one start.

  Args:
    checkout: the folder of the repository whose code runs.
    cache: folder of the compilation cache.
    config: name or file of the config.
  """
  with tempfile.TemporaryDirectory() as workdir:
    words = [f"--config={config}", f"--config.runtime.cache={cache}", f"--workdir={workdir}/run"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.setdefault("JAX_PLATFORMS", "cpu")
    # With it, each start would compile the modules of the package that a first start had not kept.
    for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
      environment.pop(name, None)
    done = subprocess.run(
      [sys.executable, "-c", START, "train", *words],
      cwd=checkout,
      env=environment,
      capture_output=True,
      text=True,
    )
  if done.returncode:
    sys.exit(f"the start in {checkout} failed:\n{done.stderr[-2000:]}")
  figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
  return figures


def main() -> int:
  """Prints a table and writes JSON; returns 1 if a warm start compiles a program."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--against", type=pathlib.Path, metavar="DIR", help="another checkout")
  parser.add_argument("--rounds", type=int, default=3, metavar="N", help="cold and warm starts")
  parser.add_argument("--config", default="tiny", help="name or file of the config")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where the figures go")
  args = parser.parse_args()
  checkouts = {"this checkout": ROOT}
  if args.against:
    checkouts["the other one"] = args.against.resolve()
  starts: dict[str, list[dict[str, Any]]] = {}
  for _ in range(args.rounds):
    for name, checkout in checkouts.items():
      with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
          figures = start(checkout, pathlib.Path(cache), args.config)
          starts.setdefault(f"{name}, {state} cache", []).append(figures)
  best = {name: min(several, key=lambda x: x["cpu_seconds"]) for name, several in starts.items()}
  print("| |", " | ".join(FIGURES.values()), "|\n|---" + "|---" * len(FIGURES) + "|")
  for name, figures in best.items():
    print(f"| {name} |", " | ".join(f"{figures[figure]:.4g}" for figure in FIGURES), "|")
  about = dict(rounds=args.rounds, config=args.config, cores=os.cpu_count())
  if args.json:
    args.json.write_text(json.dumps({**about, "best": best, "starts": starts}, indent=2) + "\n")
  warm = best["this checkout, warm cache"]
  return int(warm["programs_from_cache"] < warm["programs"])


if __name__ == "__main__":
  sys.exit(main())
