"""A function of a shard through Apache Beam: on this machine, Dataflow, Flink or Spark by flags.

Beam wants other versions of protobuf, pyarrow and pillow than training does, so it has an
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
  """The outcomes of all tasks, worked on by the runner that Beam's flags name.

  The workers must see the paths of the tasks. What a worker did is found on the disk afterwards:
  `process` must pass over what is done already, so that here it tells the outcome alone.
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
      # Without a shuffle the runner would fuse the list with the work, and one worker do it all.
      _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(process)
  return map(process, tasks)
