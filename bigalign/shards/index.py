"""Indexes webdataset shards, so that training can read any of their samples: bigalign index SHARDS

  bigalign index '/data/laion/{00000..41455}.tar'
  bigalign index '$DATA/a/*.tar::$DATA/b/*.tar' --stats --captions txt,json.caption

Shards that are already indexed and did not change are not read again, so the same command resumes
after an interruption. If a shard is truncated, its complete samples are indexed and it is listed.
If a shard cannot be indexed at all, it is listed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bigalign.data.files import processes, storage
from bigalign.data.files.patterns import expand_shards, expand_variables
from bigalign.data.tar import index, sidecars, stats
from bigalign.shards import beam

STATES = ("indexed", "current", "failed")


class Task(NamedTuple):
  """The work on one shard.

  Attributes:
    path: of the shard.
    index_folder: folder of its index.
    captions: fields whose lengths go into the stats; None: no stats.
    sidecars: fields that are read from files next to the shard.
  """

  path: str
  index_folder: str
  captions: tuple[str, ...] | None
  sidecars: tuple[str, ...] = ()


class Outcome(NamedTuple):
  """The result of one shard.

  Attributes:
    path: of the shard.
    samples: number of indexed samples.
    problem: where it is truncated, or why it could not be indexed; "" if neither.
    state: one of STATES.
  """

  path: str
  samples: int
  problem: str
  state: str


def process_shard(task: Task) -> Outcome:
  """Indexes one shard.

  It can run in any process and several times, because files are written atomically. An error is the
  problem of this shard; the others are still indexed.
  """
  try:
    part = _known(task) or index.index_shard(task.path, task.index_folder)
    if task.captions is not None and not stats.is_current(
      part.name, task.index_folder, part.stat, task.captions
    ):
      stats.write(task.path, task.index_folder, captions=task.captions)
    for field in task.sidecars:
      if not sidecars.is_current(task.path, task.index_folder, part.stat, field):
        sidecars.write(task.path, task.index_folder, field)
  except Exception as error:
    known = isinstance(error, ValueError | OSError) and str(error)
    return Outcome(task.path, 0, str(error) if known else repr(error), "failed")
  return Outcome(task.path, part.entries - 1, part.problem, "indexed")


def _known(task: Task) -> index.Part | None:
  """The shard's entry in the index; None if there is none, it is damaged, or the shard changed."""
  located = None
  with contextlib.suppress(ValueError):
    located = index.locate(os.path.basename(task.path), task.index_folder)
  part = located[0].part(located[1]) if located else None
  return part if part and part.stat == storage.stat(task.path) else None


def build(
  patterns: Sequence[str],
  run: Callable[[Sequence[Task]], Iterable[Outcome]],
  *,
  out: str | None = None,
  captions: tuple[str, ...] | None = None,
  sidecar_fields: tuple[str, ...] = (),
) -> list[Outcome]:
  """Indexes the shards that need it, then merges the indexes of each folder.

  Args:
    patterns: of shards; lists are joined by "::".
    run: returns the outcomes of some tasks, in any order.
    out: folder for the indexes, if they are not to be written next to the shards; readers find it
      by $BIGALIGN_INDEX.
    captions: fields whose lengths go into the stats; None: no stats.
    sidecar_fields: fields that are read from files next to the shards.

  Returns:
    An outcome per shard, in the order of the patterns.
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
    index_folder = _index_folder(folder, out)
    current = index.current(paths, index_folder)
    check = functools.partial(_is_current, index_folder, captions, sidecar_fields)
    with storage.requests(current) as pool:
      complete = [*pool.map(check, current, current.values())]
    outcomes |= {
      path: Outcome(path, part.entries - 1, part.problem, "current")
      for (path, part), is_complete in zip(current.items(), complete)
      if is_complete
    }
    tasks += [
      Task(path, index_folder, captions, sidecar_fields) for path in paths if path not in outcomes
    ]
  outcomes |= {outcome.path: outcome for outcome in run(tasks)}
  for folder in of_folder:
    index.merge(folder, _index_folder(folder, out))
  return [outcomes[path] for paths in of_folder.values() for path in paths]


def _is_current(
  index_folder: str,
  captions: tuple[str, ...] | None,
  sidecar_fields: tuple[str, ...],
  path: str,
  part: index.Part,
) -> bool:
  """Whether the files that belong to the index of a shard exist and can be read."""
  with contextlib.suppress(OSError, ValueError):
    return (
      captions is None or stats.is_current(part.name, index_folder, part.stat, captions)
    ) and all(sidecars.is_current(path, index_folder, part.stat, field) for field in sidecar_fields)
  return False


def _index_folder(folder: str, out: str | None) -> str:
  if out or storage.is_remote(folder) or not os.access(folder or os.curdir, os.W_OK):
    return index.home(folder, out)
  return folder


def report(outcomes: Sequence[Outcome]) -> str:
  """Returns a line for each shard with a problem, and a line of totals."""
  lines = []
  for outcome in outcomes:
    if outcome.problem:
      kept = (
        "not indexed"
        if outcome.state == "failed"
        else f"{_count(outcome.samples, 'complete sample')}"
      )
      lines.append(f"{outcome.path}: {kept}: {outcome.problem.removeprefix(f'{outcome.path}: ')}")
  found = totals(outcomes)
  counts = ", ".join(f"{found[state]:,} {state}" for state in STATES)
  total = f"{_count(found['samples'], 'sample')} in {_count(found['shards'], 'shard')}: {counts}"
  return "\n".join([*lines, total])


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """Returns "samples", "shards", shards of each of STATES, and the "problems" of shards."""
  states = [outcome.state for outcome in outcomes]
  return {
    "samples": sum(outcome.samples for outcome in outcomes),
    "shards": len(outcomes),
    **{state: states.count(state) for state in STATES},
    "problems": [
      {"shard": outcome.path, "samples": outcome.samples, "problem": outcome.problem}
      for outcome in outcomes
      if outcome.problem
    ],
  }


def _count(n: int, noun: str) -> str:
  return f"{n:,} {noun}{'' if n == 1 else 's'}"


def main(argv: list[str] | None = None) -> int:
  """Runs the program and returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="bigalign index", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("shards", nargs="+", help="patterns of .tar files; lists joined by ::")
  parser.add_argument(
    "--out",
    metavar="DIR",
    help="write there, not next to the shards; readers find it with\nBIGALIGN_INDEX=DIR",
  )
  parser.add_argument(
    "--stats",
    action="store_true",
    help="also write the columns that filters need: width, height,\nsha256, caption length, numbers"
    " of .json",
  )
  parser.add_argument(
    "--captions",
    metavar="A,B",
    default="txt",
    help="caption fields for --stats, such as txt,json.caption (%(default)s)",
  )
  parser.add_argument(
    "--sidecars",
    metavar="A,B",
    default="",
    help="caption fields from files next to the shards, such as\nrecap.parquet:caption",
  )
  parser.add_argument(
    "--workers", type=int, default=os.cpu_count(), help="number of processes (%(default)s)"
  )
  parser.add_argument(
    "--runner",
    help="runner of Apache Beam: DirectRunner, DataflowRunner, …; other flags\nare passed to Beam",
  )
  parser.add_argument("--json", metavar="FILE", help="also write the totals to this file")
  args, flags = parser.parse_known_args(argv)
  if flags and not args.runner:
    parser.error(f"unknown arguments: {' '.join(flags)}")
  sidecar_fields = tuple(filter(None, args.sidecars.split(",")))
  invalid = [field for field in sidecar_fields if not sidecars.is_field(field)]
  if invalid:
    parser.error(f"--sidecars {invalid[0]}: write ENDING:COLUMN, such as recap.parquet:caption")
  if args.stats and any(map(sidecars.is_field, args.captions.split(","))):
    parser.error("--captions of --stats must be fields in the shards, not in files next to them")
  run: Callable[[Sequence[Task]], Iterable[Outcome]] = functools.partial(
    _in_processes, workers=args.workers
  )
  if args.runner:
    run = functools.partial(beam.run, process_shard, flags=[f"--runner={args.runner}", *flags])
  outcomes = build(
    args.shards,
    run,
    out=args.out,
    captions=tuple(args.captions.split(",")) if args.stats else None,
    sidecar_fields=sidecar_fields,
  )
  print(report(outcomes))
  folders = {_index_folder(os.path.dirname(outcome.path), args.out) for outcome in outcomes}
  files = [os.path.join(index_folder, index.FILE) for index_folder in sorted(folders)]
  print("\n".join(files))
  if args.json:
    from bigalign.run.tables import write_json  # its packages are missing where Beam runs

    write_json(args.json, totals(outcomes) | {"indexes": files})
  return int(any(outcome.state == "failed" for outcome in outcomes))


def _in_processes(tasks: Sequence[Task], *, workers: int) -> Iterator[Outcome]:
  """The outcomes of tasks, done by processes of this machine, with a progress bar."""
  from bigalign.run.progress import shown, track  # its packages are missing where Beam runs

  with shown():
    done = processes.run(process_shard, tasks, workers=workers)
    yield from track(done, "index", len(tasks), unit="shards")


def run() -> None:
  """The program `bigalign index`."""
  sys.exit(main())


if __name__ == "__main__":
  run()
