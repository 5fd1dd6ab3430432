"""Metrics of a run: metrics.jsonl, TensorBoard, W&B and the progress bar, in process 0 only."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging

from bigalign.data.files import storage
from bigalign.run.progress import Progress, clock_time

FILE = "metrics.jsonl"
# What follows an update; a run that is asked to stop leaves it to its next start.
DIAGNOSE, EVALUATE = "diagnose", "evaluate"
# tensorboardX imports torch for a type annotation, and clients of object stores for event files in
# a bucket; ours are in a local folder. These imports take 2 and 0.5 CPU seconds.
_SLOW_IMPORTS = ("torch", "google.cloud.storage", "boto3")
_NON_FINITE: dict[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Metrics measured in wall time: this prefix and these names. They differ between a run and its
# repetition; all other metrics are equal to the bit after a resume.
WALL_CLOCK_PREFIX = "perf/"
WALL_CLOCK_METRICS = frozenset(
  {
    "train/batch_time",
    "train/data_time",
    "train/samples_per_second",
    "train/samples_per_second_per_gpu",
  }
)


def is_wall_clock(name: str) -> bool:
  """Returns whether a metric is measured in wall time, by WALL_CLOCK_PREFIX and _METRICS."""
  return name.startswith(WALL_CLOCK_PREFIX) or name in WALL_CLOCK_METRICS


def scalar(name: str, value: Any) -> int | float:
  """Returns a Python number of the same value: an int for integers and booleans, else a float.

  Args:
    name: of the metric, for the error.
    value: a number, or an array of one element.

  Raises:
    TypeError: if the value is not one real number.
  """
  array = np.asarray(value)
  if array.size != 1 or (array.dtype.kind not in "iufb" and array.dtype != jax.numpy.bfloat16):
    raise TypeError(
      f"Metric {name!r} is not one real number: {type(value).__name__} of shape {array.shape},"
      f" dtype {array.dtype}"
    )
  return int(array.item()) if array.dtype.kind in "iub" else float(array.item())


def _line(step: int, metrics: Mapping[str, int | float]) -> str:
  """Returns one line of JSON.

  Floats are written by repr, which reads back to the same bits. JSON has no non-finite numbers, so
  these are the strings "nan", "inf" and "-inf".
  """
  plain = {name: value if math.isfinite(value) else repr(value) for name, value in metrics.items()}
  return json.dumps({"step": step, **plain}, allow_nan=False) + "\n"


def _parse(line: str, where: str) -> dict[str, int | float]:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not a line of JSON: {line[:80]!r}") from error
  if not isinstance(row, dict) or not isinstance(row.get("step"), int):
    raise ValueError(f"{where}: not an object with an integer 'step': {line[:80]!r}")
  words = [v for v in row.values() if isinstance(v, str) and v not in _NON_FINITE]
  if words:
    raise ValueError(
      f"{where}: {words[0]!r} is not a number; the only strings allowed are {[*_NON_FINITE]}"
    )
  return {name: _NON_FINITE[v] if isinstance(v, str) else v for name, v in row.items()}


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
  """Returns the rows of a metrics.jsonl, each a dict {name: number} with its "step".

  A last line without a newline is an incomplete write; it is skipped with a warning.

  Args:
    path: the file, or the workdir that holds it.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: for any other line that is not a row; names file and line.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / FILE
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; a training run writes it to its workdir")
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  if lines and not lines[-1].endswith("\n"):
    logging.warning("%s: skipped the incomplete last line: %r", path, lines.pop()[:80])
  return [_parse(line, f"{path}:{i}") for i, line in enumerate(lines, start=1)]


def _kind(row: Mapping[str, Any]) -> str:
  """Which part of a step wrote a row: "log", DIAGNOSE or EVALUATE."""
  if any(name.startswith(WALL_CLOCK_PREFIX) for name in row):
    return "log"
  return DIAGNOSE if any(name.startswith("train/") for name in row) else EVALUATE


def _rewind(path: pathlib.Path, step: int | None, repeats: Collection[str] = ()) -> None:
  """Cuts the rows after `step`; for a run from the start (None), renames an older file.

  Also cuts the rows of `step` of the kinds that will be written again.
  """
  if not path.exists():
    return
  if step is None:
    older = len(list(path.parent.glob("metrics.jsonl.old*")))
    aside = path.with_suffix(f".jsonl.old{older or ''}")
    logging.warning("%s belongs to an earlier start of this run; renamed to %s", path, aside.name)
    os.replace(path, aside)
    return
  rows = read_metrics(path)
  kept = [
    row for row in rows if row["step"] < step or (row["step"] == step and _kind(row) not in repeats)
  ]
  if len(kept) < len(rows):
    logging.info("%s: cut the rows after step %d: %d", path, step, len(rows) - len(kept))
  with storage.atomic_write(
    path
  ) as file:  # if it is killed, the old file or the new one is complete
    for row in kept:
      file.write(_line(int(row.pop("step")), row).encode())


class MetricWriter:
  """Writes the metrics of a step to workdir/metrics.jsonl, TensorBoard and W&B.

  A step can have several rows: training and evaluation metrics of one step are two. Every process
  may call it; only process 0 writes.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    tensorboard: bool = True,
    wandb: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
    repeats: Collection[str] = (),
  ) -> None:
    """
    Args:
      workdir: a local folder; created if it is missing.
      tensorboard: write event files to workdir/tensorboard.
      wandb: options of wandb.init ({} for its defaults), or None for no W&B.
      resume_step: the restored step; later rows are cut. None for a run from the start.
      repeats: DIAGNOSE, EVALUATE: rows of the restored step that will be written again.

    Raises:
      ImportError: if W&B is requested and not installed.
    """
    self._file: TextIO | None = None
    self._tensorboard: Any = None
    self._wandb: Any = None
    if jax.process_index() != 0:
      return
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if wandb is not None:
      self._wandb = _start_wandb(folder, wandb)
    _rewind(folder / FILE, resume_step, repeats)
    self._file = (folder / FILE).open("a", encoding="utf-8")
    if tensorboard:
      with _without(*_SLOW_IMPORTS):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

      # Not SummaryWriter: its thread dies of a full disk, and then the run waits for it for ever.
      (folder / "tensorboard").mkdir(exist_ok=True)
      self._tensorboard = EventsWriter(str(folder / "tensorboard" / "events"))
      # TensorBoard hides what an earlier start wrote at this step and later.
      purge = 0 if resume_step is None else resume_step + 1
      start = SessionLog(status=SessionLog.START)
      self._tensorboard.write_event(Event(wall_time=time.time(), step=purge, session_log=start))

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one row.

    Args:
      step: number of updates done.
      metrics: {name: a Python or numpy number, or an array of one element}.

    Raises:
      TypeError: if a value is not one real number; names the metric.
    """
    row = {name: scalar(name, value) for name, value in metrics.items()}
    if self._file is not None:
      self._file.write(_line(step, row))
      self._file.flush()
    if self._tensorboard is not None:
      from tensorboardX.proto.event_pb2 import Event
      from tensorboardX.proto.summary_pb2 import Summary

      # add_scalar would write R@1 as R_1.
      values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
      event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
      self._tensorboard.write_event(event)
      self._tensorboard.flush()
    if self._wandb is not None:
      self._wandb.log({"step": step, **row})

  def close(self) -> None:
    """Flushes and closes all writers; a second call does nothing."""
    if self._file is not None:
      self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._file = self._tensorboard = self._wandb = None

  def __enter__(self) -> MetricWriter:
    return self

  def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
    # Closing flushes again, which fails again if the disk is full.
    with contextlib.suppress(*([OSError] if kind else [])):
      self.close()


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
  """A context in which modules seem to be missing, unless they are loaded; see _SLOW_IMPORTS.

  Later imports of them are not affected.
  """
  hidden = [name for name in modules if name not in sys.modules]
  sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
  try:
    yield
  finally:
    for name in hidden:
      del sys.modules[name]


def _start_wandb(folder: pathlib.Path, options: Mapping[str, Any]) -> Any:
  """Starts a W&B run; its id is kept in the workdir, so that a resume continues the same curves."""
  try:
    wandb = importlib.import_module("wandb")
  except ImportError as error:
    raise ImportError(
      "config.writer.wandb requests Weights & Biases, which is not installed:"
      " pip install 'bigalign[wandb]', or set config.writer.wandb=None"
    ) from error
  name = folder / "wandb_id.txt"
  known = {"id": name.read_text(encoding="utf-8").strip()} if name.exists() else {}
  run = wandb.init(**{"dir": str(folder), "resume": "allow", **known, **options})
  name.write_text(run.id + "\n", encoding="utf-8")
  # Our step goes back when a run resumes from a checkpoint; W&B's own step must not.
  run.define_metric("*", step_metric="step")
  return run


def _short(value: int | float) -> str:
  return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


class TrainingProgress(Progress):
  """A progress bar on a terminal, otherwise a line for each log; process 0 only.

  with TrainingProgress(280, start=0, evaluate_every=100) as progress:
    progress.reach(step)         # after each step; cheap, waits for nothing
    progress.log(step, metrics)  # train/* go to the bar, all others to lines of their own

  Args:
    total_steps: of the run.
    start: steps done before.
    evaluate_every: steps between two evaluations; 0: none but the last.
    stream: where to write; standard error by default.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    start: int = 0,
    evaluate_every: int = 0,
    stream: TextIO | None = None,
  ) -> None:
    shown = jax.process_index() == 0
    # Each log is a line already.
    super().__init__("compile", total_steps, start=start, visible=shown, lines=False, stream=stream)
    self._evaluate_every = evaluate_every
    self._evaluations: list[float] = []  # seconds that each one took

  def reach(self, done: int) -> None:
    self.what = "train"
    super().reach(done)

  @contextlib.contextmanager
  def evaluating(self) -> Iterator[None]:
    """A context of one evaluation."""
    before, self.what = self.what, "evaluate"
    begin = time.monotonic()
    with self.clock.paused():
      yield
    self._evaluations.append(time.monotonic() - begin)
    self.what = before

  def seconds_left(self) -> float | None:
    left = self.clock.left()
    later = self._evaluations[1:]  # the first one compiles
    if left is None or not later:
      return left
    return left + self._evaluations_left() * sum(later) / len(later)

  def _evaluations_left(self) -> int:
    done, total, every = self.clock.done, self.clock.total, self._evaluate_every
    regular = total // every - done // every if every else 0
    return regular + int(not every or total % every > 0)  # and the one at the end

  def log(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows the metrics {name: number} of a step."""
    if not self.visible:
      return
    values = {name: scalar(name, value) for name, value in metrics.items()}
    train = "  ".join(
      f"{label} {values[name]:{form}}"
      for name, label, form in (
        ("train/loss", "loss", ".4f"),
        ("train/samples_per_second", "images/s", ",.0f"),
      )
      if name in values
    )
    if train:
      self.reach(step)
      self.note = train
    if train and self._bar is None:
      total = self.clock.total
      self.say(f"step {step:>{len(str(total))}}/{total}  {train}{self._time_left()}")
    others = {n: v for n, v in values.items() if not n.startswith(("train/", "perf/"))}
    names = dict.fromkeys(name.removeprefix("ema/") for name in others)
    lines = [f"step {step}"]
    for name in names:
      # The scores of the running average of the parameters share the line of the plain ones.
      pair = [("", others.get(name)), ("ema ", others.get(f"ema/{name}"))]
      shown = "  ".join(label + _short(value) for label, value in pair if value is not None)
      lines.append(f"  {name:<{max(map(len, names))}}  {shown}")
    if others:
      self.say("\n".join(lines))

  def _time_left(self) -> str:
    seconds = self.seconds_left()
    return "" if seconds is None else f"  {clock_time(seconds)} left"
