"""Damaged copies of small files, and what reading thousands of them ends in.

A process of its own reads them, and another watches it: a crash of native code and a hang are
outcomes as well, and the largest memory is that of the reading.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import queue
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from helpers.shipped import ROOT

# Reads the damaged input n, and returns its outcome: one of OUTCOMES. Any exception is a fault.
Trial = Callable[[int], str]
OUTCOMES = (
  "read",
  "rejected",  # samples of it are rejected, with a reason
  "refused",  # the whole is, by an error that names the file
)
_FAULTS = 20  # after which the rest is not tried
_START = 300.0  # seconds until the first input, on a busy machine
# Values that a number, text or list in JSON may have by mistake.
_ODD: tuple[Any, ...] = (
  *(None, True, 0, -1, 1, 2**31, 2**40, 10**400, 0.5, float("nan"), float("inf")),
  *("", "12", "\ud83d", "\0" * 300, "a" * 5_000, [], {}, [1, 2], [[]], ["a", None], {"a": 1}),
)


def mutated(data: bytes, random: np.random.Generator) -> bytes:
  """Returns bytes that differ in one to three places from `data`, as few as one bit.

  Bits are flipped, bytes replaced, removed or inserted, the end is cut off, parts are repeated or
  change places. Half of the places are near the start or the end, where headers are.
  """
  for _ in range(random.integers(1, 4)):
    data = _DAMAGES[random.integers(len(_DAMAGES))](data, random)
  return data


def _place(data: bytes, random: np.random.Generator) -> int:
  size = max(len(data), 1)
  near = min(int(size ** random.random()) - 1, size - 1)
  return int(random.choice([random.integers(size), random.integers(size), near, size - 1 - near]))


def _span(data: bytes, random: np.random.Generator, most: int) -> tuple[int, int]:
  start = _place(data, random)
  return start, min(start + int(random.integers(1, most + 1)), len(data))


def _flip(data: bytes, random: np.random.Generator) -> bytes:
  place, bit = _place(data, random), 1 << int(random.integers(8))
  return data[:place] + bytes(x ^ bit for x in data[place : place + 1]) + data[place + 1 :]


def _replace(data: bytes, random: np.random.Generator) -> bytes:
  start, end = _span(data, random, 8)
  kind = random.integers(4)
  new = random.bytes(end - start) if kind == 3 else (b"\0", b"\xff", b"\x7f")[kind] * (end - start)
  return data[:start] + new + data[end:]


def _remove(data: bytes, random: np.random.Generator) -> bytes:
  start, end = _span(data, random, 64)
  return data[:start] + data[end:]


def _insert(data: bytes, random: np.random.Generator) -> bytes:
  place = _place(data, random)
  return data[:place] + random.bytes(int(random.integers(1, 17))) + data[place:]


def _cut(data: bytes, random: np.random.Generator) -> bytes:
  return data[: _place(data, random)]


def _repeat(data: bytes, random: np.random.Generator) -> bytes:
  start, end = _span(data, random, max(len(data) // 4, 1))
  return data[:end] + data[start:end] * int(random.integers(1, 9)) + data[end:]


def _swap(data: bytes, random: np.random.Generator) -> bytes:
  size = int(random.integers(1, max(len(data) // 4, 1) + 1))
  one, two = sorted(_place(data, random) for _ in range(2))
  if two < one + size:
    return _flip(data, random)
  parts = data[two : two + size], data[one + size : two], data[one : one + size]
  return data[:one] + b"".join(parts) + data[two + size :]


_DAMAGES = (_flip, _replace, _remove, _insert, _cut, _repeat, _swap)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
  """Yields the path of every value in a nest of objects and lists."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inner in items:
    yield (*path, key)
    if isinstance(inner, dict | list):
      yield from places(inner, (*path, key))


def mutated_json(data: bytes, random: np.random.Generator) -> bytes:
  """Returns JSON in which one value is another one or missing, or damaged bytes."""
  if random.random() < 0.3:
    return mutated(data, random)
  value = json.loads(data)
  every = list(places(value))
  *way, last = every[random.integers(len(every))]
  node = value
  for key in way:
    node = node[key]
  if random.random() < 0.2:
    del node[last]
  else:
    node[last] = _ODD[random.integers(len(_ODD))]
  return json.dumps(value).encode()


def mutated_file(name: str, data: bytes, random: np.random.Generator) -> bytes:
  """Returns the content of a file with `mutated_json` for a .json, else with `mutated`."""
  return (mutated_json if name.endswith(".json") else mutated)(data, random)


@dataclasses.dataclass
class Tally:
  """What reading damaged inputs ended in.

  Attributes:
    outcomes: {outcome: number of inputs}.
    faults: the inputs that raised another error, crashed the process, or were not read in time.
    seconds: of all inputs.
    slowest: seconds of one input.
    memory: bytes that the process had at most, beyond those before the first input.
  """

  outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  faults: list[str] = dataclasses.field(default_factory=list)
  seconds: float = 0.0
  slowest: float = 0.0
  memory: int = 0

  def check(self, count: int, *, seconds: float, memory: int) -> None:
    """Raises AssertionError for faults, and beyond `seconds` for one input or `memory` bytes."""
    print(
      f"{count} inputs: {dict(self.outcomes)}, {len(self.faults)} faults, {self.seconds:.0f} s,"
      f" at most {self.slowest:.2f} s for one, {self.memory / 2**20:.0f} MiB"
    )
    assert not self.faults, "\n".join([f"{len(self.faults)} faults", *self.faults])
    assert sum(self.outcomes.values()) == count and set(self.outcomes) <= {*OUTCOMES}
    assert self.slowest < seconds, f"one input took {self.slowest:.1f} s"
    assert self.memory < memory, f"the process grew by {self.memory / 2**20:.0f} MiB"


def tally(script: str, name: str, count: int, *, first: int = 0, seconds: float = 60.0) -> Tally:
  """Reads the damaged inputs `first` to `first + count` in a process of its own.

  Args:
    script: a program that calls `serve`.
    name: of its trials.
    count: of inputs.
    first: the first of them.
    seconds: for one input, after which the process counts as hanging and is killed.
  """
  result, end = Tally(), first + count
  while first < end and len(result.faults) < _FAULTS:
    first = _watch(result, [script, name, str(first), str(end)], first, end, seconds)
  return result


def _watch(result: Tally, words: list[str], first: int, end: int, seconds: float) -> int:
  """Runs a process, adds its outcomes to `result`; returns the first input that is left to try."""
  with (
    tempfile.TemporaryDirectory() as folder,
    tempfile.TemporaryFile("w+", errors="replace") as errors,
  ):
    with subprocess.Popen(
      [sys.executable, "-X", "faulthandler", *words, folder],
      env={
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "BIGALIGN_INDEX": os.path.join(folder, "index"),
      },
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
    ) as process:
      lines: queue.Queue[str] = queue.Queue()

      def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
          lines.put(line)
        lines.put("")  # the process has ended

      thread = threading.Thread(target=read)
      thread.start()
      try:
        fault = _follow(result, lines, first, end, seconds)
        if fault is None or not fault[0]:
          process.wait(60)
      finally:
        process.kill()
        thread.join()
    if fault is None:
      return end
    how, done = fault
    errors.seek(0)
    how = how or f"the process ended with {process.returncode}"
    result.faults.append(f"input {first + done}: {how}\n{errors.read()[-1500:]}")
    return first + done + 1 if done >= 0 else end  # -1: it did not even start


def _follow(
  result: Tally, lines: queue.Queue[str], first: int, end: int, seconds: float
) -> tuple[str, int] | None:
  """Adds what the process reports to `result`.

  Returns:
    (what is wrong, or "" if the process ended; how many inputs came before, -1 if it did not even
    start), or None if all inputs were read.
  """
  before = None
  for done in range(-1, end - first):
    try:
      line = lines.get(timeout=_START if before is None else seconds)
    except queue.Empty:
      return "it hangs", done
    if not line:
      return "", done
    report = json.loads(line)
    if before is None:
      before = report["memory"]
      continue
    if report["fault"]:
      result.faults.append(f"input {first + done}: {report['fault']}")
    else:
      result.outcomes[report["outcome"]] += 1
    result.seconds += report["seconds"]
    result.slowest = max(result.slowest, report["seconds"])
    result.memory = max(result.memory, report["memory"] - before)
  return None


def serve(trials: Mapping[str, Callable[[pathlib.Path], Trial]]) -> None:
  """The program of the process that reads; its arguments are those of `_watch`.

  Args:
    trials: {name: function that writes what it needs into a folder and returns the trial}.
  """
  name, first, end, folder = sys.argv[1:]
  output = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print goes elsewhere
  trial = trials[name](pathlib.Path(folder))
  output.write(json.dumps(dict(memory=_peak())) + "\n")
  for n in range(int(first), int(end)):
    outcome = fault = ""
    began = time.monotonic()
    try:
      outcome = trial(n)
    except BaseException as error:  # a panic of a Rust library is not an Exception
      lines = "".join(traceback.format_exception(error)).splitlines()
      fault = "\n".join(line[:400] for line in lines[-12:])
    seconds = time.monotonic() - began
    report = dict(outcome=outcome, fault=fault, seconds=seconds, memory=_peak())
    output.write(json.dumps(report) + "\n")


def _peak() -> int:
  """The most memory that this process had so far, in bytes."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # ru_maxrss would begin with the memory of the process that started this one
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(found[1]) << 10 if found else 0
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def fresh(folder: pathlib.Path) -> pathlib.Path:
  """Returns an empty folder at this path."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  return folder
