"""Copies a source into ArrayRecord files: bigalign convert 'DIR/*.tar' --out COPY --short_side 256

The files hold tf.train.Examples in the order of the source. Training reads the same ids from them,
and with data.order="exact" the same batches. The files are written to OUT.part, which is renamed to
OUT when all are complete. After an interruption the same command writes the missing files.

  image      the encoded image, unchanged; with --short_side, larger ones as JPEG of --quality
  label      the class, if the sample has one; empty or missing if it has none
  __key__    the key of the sample in the source
  FIELD      the captions of each field, and all other content of the sample: members of a tar,
             columns; values other than texts, numbers and lists of them are stored as JSON

A sample that the source rejects keeps its position and its content, and the copy rejects it for the
same reason. A broken image is copied unchanged.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

from bigalign import tree
from bigalign.data.files import processes, storage
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, Spec, open_spec, read, texts_of
from bigalign.run import tables
from bigalign.run.progress import shown, track
from bigalign.shards import source_flags
from bigalign.shards.examples import Plan, write_file

LOG = "convert.jsonl"  # the plan, then a line for each finished file
PROBED = 100  # samples to try, to learn the caption fields from one of them


def convert(
  spec: Spec,
  out: str,
  *,
  records: int = 10_000,
  short_side: int = 0,
  quality: int = 95,
  workers: int = 1,
) -> dict[str, Any]:
  """Writes the folder `out`, or resumes writing it.

  Args:
    spec: the source.
    out: folder to create.
    records: samples per file.
    short_side: pixels; larger images are resized to this shorter side. 0: no resizing.
    quality: of the JPEGs of resized images.
    workers: processes.

  Returns:
    Totals: "files", "records", "bytes", "smaller" (resized images), "refused" by reason, and
    "already_there", the files that an earlier start had finished.

  Raises:
    FileExistsError: if `out` exists, or `out`.part is something else.
    ValueError: if `out`.part was started with other arguments or data.
  """
  if records < 1 or short_side < 0 or not 1 <= quality <= 100:
    raise ValueError(
      f"records={records}, short_side={short_side}, quality={quality}: records must be"
      " at least 1, short_side at least 0 (0: no resizing), quality from 1 to 100"
    )
  if os.path.exists(out):
    raise FileExistsError(f"{out} exists; remove it, or choose another folder")
  source = open_spec(spec)
  plan = Plan(
    spec,
    _caption_names(source, spec),
    f"{out.rstrip('/')}.part",
    len(source),
    records,
    short_side,
    quality,
  )
  started = dict(fingerprint=source.fingerprint, **plan._replace(folder="")._asdict())
  os.makedirs(plan.folder, exist_ok=True)
  with storage.locked(plan.folder, "bigalign convert"):
    done = _resume(plan, json.loads(json.dumps(started)))
    left = [(plan, n) for n in range(plan.files) if os.path.basename(plan.path(n)) not in done]
    with open(os.path.join(plan.folder, LOG), "a", encoding="utf-8") as log:
      files = processes.run(write_file, left, workers=workers)
      for written in track(files, "convert", len(left), unit="files"):
        log.write(json.dumps(written) + "\n")
        log.flush()
        done[written["file"]] = written
        print(
          f"{written['file']}: {written['records']:,} records, {written['bytes'] / 1e6:,.1f} MB",
          flush=True,
        )
    names = getattr(source, "classnames", ())
    if names:
      # A line is a name, so a line end inside of a name would shift the labels after it.
      lines = (" ".join(name.split()) for name in names)
      pathlib.Path(plan.folder, "classnames.txt").write_text("\n".join(lines) + "\n", "utf-8")
    os.rename(plan.folder, out)
  refused = sum(
    (collections.Counter(each["refused"]) for each in done.values()), collections.Counter()
  )
  return dict(
    files=plan.files,
    already_there=plan.files - len(left),
    refused=dict(refused),
    **{name: sum(each[name] for each in done.values()) for name in ("records", "bytes", "smaller")},
  )


def _caption_names(source: Source, spec: Spec) -> tuple[str, ...]:
  for i in range(min(len(source), PROBED)):
    with contextlib.suppress(Rejected):
      return tuple(texts_of(read(source, i), spec))
  return spec.captions or ()


def _resume(plan: Plan, started: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """{file: its entry in the log} of the finished files. Rewrites the log without a torn line."""
  path = pathlib.Path(plan.folder, LOG)
  lines = []
  for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      lines.append(json.loads(line))
  unknown = sorted(name for name in os.listdir(plan.folder) if not name.endswith(".tmp"))
  if unknown and not lines:
    raise FileExistsError(
      f"{plan.folder} holds {tree.shown(unknown)} and no {LOG} of bigalign convert;"
      " remove it, or choose another --out"
    )
  changed = [
    f"{name}={lines[0].get(name)!r}, now {value!r}"
    for name, value in started.items()
    if lines and lines[0].get(name) != value
  ]
  if changed:
    raise ValueError(
      f"{plan.folder} was started with {'; '.join(changed)}. Finish it with the same"
      " arguments, or remove it to start again"
    )
  done = {
    line["file"]: line for line in lines[1:] if pathlib.Path(plan.folder, line["file"]).exists()
  }
  with storage.atomic_write(path, suffix="tmp") as file:
    file.writelines((json.dumps(line) + "\n").encode() for line in (started, *done.values()))
  return done


def table(totals: Mapping[str, Any]) -> rich.table.Table:
  """Returns the totals of `convert` for the terminal."""
  rows = tables.pairs()
  there = f" ({totals['already_there']:,} from an earlier start)" if totals["already_there"] else ""
  rows.add_row("files", f"{totals['files']:,}{there}")
  rows.add_row("records", f"{totals['records']:,}")
  rows.add_row("size", f"{totals['bytes'] / 1e6:,.1f} MB")
  rows.add_row("resized images", f"{totals['smaller']:,}")
  rows.add_row("bad samples", tables.counts(totals["refused"]) or "none")
  return rows


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program: prints and returns the totals of `convert`."""
  parser = argparse.ArgumentParser(
    "bigalign convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source_flags.add_source_flags(parser)
  parser.add_argument("--out", required=True, help="folder to create")
  parser.add_argument("--records", type=int, default=10_000, help="samples per file (%(default)s)")
  parser.add_argument(
    "--short_side",
    type=int,
    default=0,
    help="pixels; resize larger images to this shorter side, as JPEG; 0: none",
  )
  parser.add_argument(
    "--quality", type=int, default=95, help="of the JPEGs of resized images (%(default)s)"
  )
  parser.add_argument(
    "--workers", type=int, default=os.cpu_count(), help="number of processes (%(default)s)"
  )
  parser.add_argument("--json", metavar="FILE", help="also write the totals to this file")
  given = parser.parse_args(words)
  with shown():
    totals = convert(
      source_flags.spec_from_flags(given),
      given.out,
      records=given.records,
      short_side=given.short_side,
      quality=given.quality,
      workers=given.workers,
    )
  tables.show(table(totals))
  print(f"{given.out}/*.array_record")
  if given.json:
    tables.write_json(given.json, totals)
  return totals


def run() -> None:
  """The program `bigalign convert`."""
  main()
