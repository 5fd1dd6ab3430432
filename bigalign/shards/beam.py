"""Runs a function on shards by Apache Beam: on this machine, Dataflow, Flink or Spark, by flags.

Beam needs other versions of protobuf, pyarrow and pillow than training, so install it in an
environment of its own: pip install 'bigalign[beam]'.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def run(
  process: Callable[[Task], Outcome], tasks: Sequence[Task], *, flags: Sequence[str]
) -> Iterable[Outcome]:
  """Processes all tasks on the runner that Beam's flags name, and returns their outcomes.

  The workers write to storage that this process can read. Afterwards `process` runs here once more
  for every task: it must skip finished work and only return the outcome.

  Args:
    process: function of one task.
    tasks: whose paths the workers must be able to read.
    flags: of Beam, such as --runner.

  Raises:
    ImportError: if Beam is not installed.
  """
  try:
    beam = importlib.import_module("apache_beam")
    options = importlib.import_module("apache_beam.options.pipeline_options")
  except ImportError as error:
    raise ImportError(
      f"--runner needs Apache Beam ({error}), in an environment of its own: "
      "pip install 'bigalign[beam]'"
    ) from error
  if tasks:
    with beam.Pipeline(options=options.PipelineOptions(list(flags))) as pipeline:
      # Without a shuffle the runner fuses the list with the work, and one worker does all of it.
      _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(process)
  return map(process, tasks)
