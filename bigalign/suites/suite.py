"""Suites: files that list evaluation tasks."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from bigalign import checks
from bigalign.data.files.lines import read_text
from bigalign.data.files.patterns import expand_variables
from bigalign.evals import EVALS, EvalOptions
from bigalign.evals.associations import dataset_options
from bigalign.evaluate import retrieval_folder, zeroshot_folder
from bigalign.options import Component, resolve_value
from bigalign.run import errors

SHIPPED = {x.stem: x for x in sorted(pathlib.Path(__file__).parent.glob("tasks/*.toml"))}
# The metrics whose mean is a task's score, by the type of its evaluator: the first that it has.
SCORES: dict[str, tuple[tuple[str, ...], ...]] = dict(
  zeroshot=(("top1",), ("mean_average_precision",), ("mean_top1",)),
  retrieval=(
    ("text_to_image_R@1", "image_to_text_R@1"),
    ("mean_text_to_image_R@1", "mean_image_to_text_R@1"),
  ),
  associations=(("jaccard",),),
  corruptions=(("mean_top1",),),
)
# Keys of a task; every other key is an option of the evaluator.
_OF_TASK = ("type", "dataset", "metrics", "get", "shift_of")


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of a suite.

  Attributes:
    name: of the task.
    kind: the type of its evaluator.
    evaluator: with its options, as config.evals.NAME; None if the data is missing.
    metrics: whose mean is the score of the task; (): it has none; None: those in SCORES.
    get: the command that gets its data; "" if the file names none.
    missing: why its data cannot be read; "" if it can.
    shift_of: the task whose images are not shifted, for effective robustness; "" for none.
  """

  name: str
  kind: str
  evaluator: Component | None
  metrics: tuple[str, ...] | None = None
  get: str = ""
  missing: str = ""
  shift_of: str = ""


def read_suite(suite: str) -> list[Task]:
  """Reads the tasks of a shipped suite, or of a file.

  A file is TOML with a table for each task:

    [cifar10]
    type = "zeroshot"               # of an evaluator; other keys are its options
    dataset = "$DATA/wds_cifar10"   # a CLIP_benchmark folder: its shards, class names and templates
    metrics = ["top1"]              # whose mean is the score
    get = "command that gets the data"

  Args:
    suite: name of a shipped suite, or the path of a .toml file.

  Returns:
    The tasks in the order of the file. A task whose data is not here has `missing`.

  Raises:
    FileNotFoundError: for a file that does not exist.
    ValueError, TypeError: for a file that is not TOML, or a task with an unknown type or option.
  """
  if suite in SHIPPED:
    path = SHIPPED[suite]
  elif not suite.endswith(".toml"):
    checks.known("--suite", suite, [*SHIPPED, "FILE.toml"])
  else:
    path = pathlib.Path(expand_variables(suite, what="--suite")).expanduser()
    if not path.is_file():
      raise FileNotFoundError(f"--suite={suite}: {path} does not exist")
  try:
    tables = tomllib.loads(read_text(path))
  except tomllib.TOMLDecodeError as error:
    raise ValueError(f"{path} is not TOML: {error}") from error
  if not tables:
    raise ValueError(f"{path} lists no task")
  tasks = [_task(path, name, given) for name, given in tables.items()]
  for task in tasks:
    if task.shift_of:
      checks.known(f"{path.name}: {task.name}.shift_of", task.shift_of, tables)
  return tasks


def _task(path: pathlib.Path, name: str, given: Any) -> Task:
  """One table of a suite's file."""
  where = f"{path.name}: {name}"
  if not isinstance(given, Mapping) or "type" not in given:
    raise ValueError(f"{where} has no type; write a table [{name}] with type = one of {[*EVALS]}")
  kind = str(given["type"])
  checks.known(f"{where}.type", kind, EVALS)
  metrics = given.get("metrics")
  if metrics is not None:
    if not isinstance(metrics, list) or not all(isinstance(x, str) for x in metrics):
      raise TypeError(f"{where}.metrics={metrics!r}: expected a list of names of metrics")
    metrics = tuple(metrics)
  own = {key: value for key, value in given.items() if key not in _OF_TASK}
  get, found = str(given.get("get", "")), {}
  shift_of = str(given.get("shift_of", ""))
  try:
    if "dataset" in given:
      found = _of_dataset(kind, str(given["dataset"]), where)
  except (FileNotFoundError, KeyError) as error:
    if not errors.is_mistake(error):
      raise
    return Task(name, kind, None, metrics, get, errors.message(error), shift_of)
  resolved = resolve_value(EvalOptions, {name: {"type": kind, **found, **own}}, path.name)
  return Task(name, kind, resolved[name], metrics, get, shift_of=shift_of)


def scored(task: Task, metrics: Collection[str]) -> tuple[str, ...]:
  """The metrics whose mean is the score of a task.

  Args:
    task: that was evaluated.
    metrics: what its evaluator measured.

  Raises:
    ValueError: if the suite names a metric that the evaluator does not have.
  """
  if task.metrics is None:
    choices = SCORES.get(task.kind, ())
    return next((names for names in choices if {*names} <= {*metrics}), ())
  if unknown := [name for name in task.metrics if name not in metrics]:
    raise ValueError(f"metrics={unknown} are none of its metrics: {', '.join(metrics)}")
  return task.metrics


def _of_dataset(kind: str, folder: str, where: str) -> dict[str, Any]:
  """The options that a folder of a dataset gives to an evaluator."""
  if kind not in ("zeroshot", "retrieval", "associations"):
    raise ValueError(
      f"{where}.dataset is of zeroshot, retrieval and associations; {kind} has options of its own"
    )
  option = f"{where}.dataset"
  expanded = expand_variables(folder, what=option)
  if kind == "associations":
    return dataset_options(expanded, option)
  if kind == "zeroshot":
    found = zeroshot_folder(expanded, option)[1]
  else:
    found = retrieval_folder(expanded, option)
  return {key: value for key, value in found.items() if key != "type"}
