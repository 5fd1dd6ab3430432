"""Indexes webdataset shards, so that training can read any sample of them: bigalign index SHARDS

  bigalign index '/data/laion/{00000..41455}.tar'
  bigalign index '$DATA/a/*.tar::$DATA/b/*.tar' --stats --captions txt,json.caption

Shards that are indexed already and did not change are not read again, so a run that was stopped
goes on with the same command. A shard that breaks off keeps its whole samples and is listed; one
that cannot be indexed at all is listed too, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bigalign.data.files import processes, storage
from bigalign.data.files.patterns import expand_shards
from bigalign.data.sources.base import expand_variables
from bigalign.data.tar import index, sidecars, stats
from bigalign.shards import beam

STATES = ("indexed", "current", "failed")


class Task(NamedTuple):
  """What is to be done with a shard, and the place of its index."""

  path: str
  place: str
  captions: tuple[str, ...] | None  # the fields whose lengths go into stats; None: no stats
  sidecars: tuple[str, ...] = ()  # the fields that are read from files beside the shard


class Outcome(NamedTuple):
  """What came of a shard."""

  path: str
  samples: int
  problem: str  # where it breaks off, or why it could not be indexed
  state: str  # one of STATES


def process_shard(task: Task) -> Outcome:
  """Indexes one shard. May run anywhere and any number of times: what it writes is whole."""
  try:
    part = _known(task) or index.index_shard(task.path, task.place)
    if task.captions is not None and not stats.is_current(
      part.name, task.place, part.stat, task.captions
    ):
      stats.write(task.path, task.place, captions=task.captions)
    for field in task.sidecars:
      if not sidecars.is_current(task.path, task.place, part.stat, field):
        sidecars.write(task.path, task.place, field)
  except (ValueError, OSError) as error:
    return Outcome(task.path, 0, str(error), "failed")
  return Outcome(task.path, part.entries - 1, part.problem, "indexed")


def _known(task: Task) -> index.Part | None:
  """What the index says of the shard, if that is current."""
  located = index.locate(os.path.basename(task.path), task.place)
  part = located[0].part(located[1]) if located else None
  return part if part and part.stat == storage.stat(task.path) else None


def build(
  patterns: Sequence[str],
  run: Callable[[Sequence[Task]], Iterable[Outcome]],
  *,
  out: str | None = None,
  captions: tuple[str, ...] | None = None,
  beside: tuple[str, ...] = (),
) -> list[Outcome]:
  """Indexes the shards that need it with `run`, then merges; an outcome per shard, in order.

  out  the folder for indexes of shards whose own folder is not to be written, which readers look
       for in $BIGALIGN_INDEX
  captions  the fields whose lengths go into stats; None: no stats
  beside  the fields that are read from sidecars
  """
  parts = [
    part.strip()
    for pattern in patterns
    for part in expand_variables(pattern, what="pattern").split("::")
  ]
  of_folder: dict[str, list[str]] = {}
  for path in dict.fromkeys(path for part in parts for path in expand_shards(part)):
    of_folder.setdefault(os.path.dirname(path), []).append(path)
  outcomes: dict[str, Outcome] = {}
  tasks = []
  for folder, paths in of_folder.items():
    place = _place(folder, out)
    current = index.current(paths, place)
    outcomes |= {
      path: Outcome(path, part.entries - 1, part.problem, "current")
      for path, part in current.items()
      if (captions is None or stats.is_current(part.name, place, part.stat, captions))
      and all(sidecars.is_current(path, place, part.stat, field) for field in beside)
    }
    tasks += [Task(path, place, captions, beside) for path in paths if path not in outcomes]
  outcomes |= {outcome.path: outcome for outcome in run(tasks)}
  for folder in of_folder:
    index.merge(folder, _place(folder, out))
  return [outcomes[path] for paths in of_folder.values() for path in paths]


def _place(folder: str, out: str | None) -> str:
  if out or storage.is_remote(folder) or not os.access(folder or os.curdir, os.W_OK):
    return index.home(folder, out)
  return folder


def report(outcomes: Sequence[Outcome]) -> str:
  """A line for each shard that is not whole, and one for all."""
  lines = []
  for outcome in outcomes:
    if outcome.problem:
      kept = "not indexed" if outcome.state == "failed" else f"{outcome.samples:,} whole samples"
      lines.append(f"{outcome.path}: {kept}: {outcome.problem.removeprefix(f'{outcome.path}: ')}")
  states = [outcome.state for outcome in outcomes]
  counts = ", ".join(f"{states.count(state):,} {state}" for state in STATES)
  samples = sum(outcome.samples for outcome in outcomes)
  return "\n".join([*lines, f"{samples:,} samples in {len(outcomes):,} shards: {counts}"])


def main(argv: list[str] | None = None) -> int:
  """The exit status."""
  parser = argparse.ArgumentParser(
    prog="bigalign index", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("shards", nargs="+", help="patterns of .tar files; lists joined by ::")
  parser.add_argument(
    "--out",
    metavar="DIR",
    help="write there, not beside the shards; readers find it with\nBIGALIGN_INDEX=DIR",
  )
  parser.add_argument(
    "--stats",
    action="store_true",
    help="also write the columns that filters "
    "need: width, height,\nsha256, caption length, numbers of .json",
  )
  parser.add_argument(
    "--captions",
    metavar="A,B",
    default="txt",
    help="fields for --stats: txt, json.caption (%(default)s)",
  )
  parser.add_argument(
    "--sidecars",
    metavar="A,B",
    default="",
    help="caption fields from files beside\nthe shards: recap.parquet:caption",
  )
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
  parser.add_argument(
    "--runner",
    help="Apache Beam's: DirectRunner, DataflowRunner, …; flags that are not\nabove go to Beam",
  )
  args, flags = parser.parse_known_args(argv)
  if flags and not args.runner:
    parser.error(f"unknown arguments: {' '.join(flags)}")
  beside = tuple(filter(None, args.sidecars.split(",")))
  unsuited = [field for field in beside if not sidecars.is_field(field)]
  if unsuited:
    parser.error(f"--sidecars {unsuited[0]}: write ENDING:COLUMN, such as recap.parquet:caption")
  if args.stats and any(map(sidecars.is_field, args.captions.split(","))):
    parser.error("--stats counts the characters of fields in the shards, not beside them")
  run: Callable[[Sequence[Task]], Iterable[Outcome]] = functools.partial(
    processes.run, process_shard, workers=args.workers
  )
  if args.runner:
    run = functools.partial(beam.run, process_shard, flags=[f"--runner={args.runner}", *flags])
  outcomes = build(
    args.shards,
    run,
    out=args.out,
    captions=tuple(args.captions.split(",")) if args.stats else None,
    beside=beside,
  )
  print(report(outcomes))
  for place in sorted({_place(os.path.dirname(outcome.path), args.out) for outcome in outcomes}):
    print(os.path.join(place, index.FILE))
  return int(any(outcome.state == "failed" for outcome in outcomes))


def run() -> None:
  """The program `bigalign index`."""
  sys.exit(main())


if __name__ == "__main__":
  run()
