"""Copies a source into ArrayRecord files: bigalign convert 'DIR/*.tar' --out COPY --short_side 256

The files hold tf.train.Examples in the order of the source: training reads from them the same ids,
and with data.order="exact" the same batches. OUT.part grows until all is there and is then renamed,
so that OUT is whole; after a kill the same command goes on with the files that are not finished.

  image      the encoded image as it is; with --short_side a JPEG of --quality where it was larger
  label      the class, where there is one
  __key__    the key of the sample in the source
  FIELD      the captions of each field, and all else that is stored of the sample: members of a
             tar, columns; what is no text, number or list of them as JSON
A sample that the source refuses is kept in its place with what there is, and refused for the same
reason; an image that is broken is kept as it is.
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

from bigalign.data.files import processes, storage
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, Spec, open_spec, texts_of
from bigalign.shards import source_flags
from bigalign.shards.examples import Plan, write_file

LOG = "convert.jsonl"  # the plan, then a line for each finished file
PROBED = 100  # samples of which one tells which caption fields there are


def convert(
  spec: Spec,
  out: str,
  *,
  records: int = 10_000,
  short_side: int = 0,
  quality: int = 95,
  workers: int = 1,
) -> dict[str, Any]:
  """Writes the folder `out`, or goes on with it, and returns what it holds in all.

  Raises:
    FileExistsError: if `out` exists, or `out`.part is something else.
    ValueError: if `out`.part was begun with other arguments or of other data.
  """
  if records < 1 or short_side < 0 or not 1 <= quality <= 100:
    raise ValueError(
      f"records={records}, short_side={short_side}, quality={quality}: records from"
      " 1, a side from 0 (none is made smaller), a quality of 1 to 100"
    )
  if os.path.exists(out):
    raise FileExistsError(f"{out} exists; name a folder that does not, or remove it")
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
  begun = dict(fingerprint=source.fingerprint, **plan._replace(folder="")._asdict())
  os.makedirs(plan.folder, exist_ok=True)
  with storage.alone(plan.folder, "bigalign convert"):
    done = _resume(plan, json.loads(json.dumps(begun)))
    left = [(plan, n) for n in range(plan.files) if os.path.basename(plan.path(n)) not in done]
    with open(os.path.join(plan.folder, LOG), "a", encoding="utf-8") as log:
      for written in processes.run(write_file, left, workers=workers):
        log.write(json.dumps(written) + "\n")
        log.flush()
        done[written["file"]] = written
        print(
          f"{written['file']}: {written['records']:,} records, {written['bytes'] / 1e6:,.1f} MB",
          flush=True,
        )
    names = getattr(source, "classnames", ())
    if names:
      pathlib.Path(plan.folder, "classnames.txt").write_text("\n".join(names) + "\n", "utf-8")
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
      return tuple(texts_of(source[i], spec))
  return spec.captions or ()


def _resume(plan: Plan, begun: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """{file: what it holds} of those that are finished. Writes the log anew, without a torn line."""
  path = pathlib.Path(plan.folder, LOG)
  lines = []
  for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      lines.append(json.loads(line))
  strange = sorted(name for name in os.listdir(plan.folder) if not name.endswith(".tmp"))
  if strange and not lines:
    raise FileExistsError(
      f"{plan.folder} holds {strange[:3]} and no {LOG} of bigalign convert;"
      " remove it, or name another --out"
    )
  other = [
    f"{name}={lines[0].get(name)!r}, now {value!r}"
    for name, value in begun.items()
    if lines and lines[0].get(name) != value
  ]
  if other:
    raise ValueError(
      f"{plan.folder} was begun with {'; '.join(other)}. Finish it with the same"
      " arguments, or remove it to begin anew"
    )
  done = {
    line["file"]: line for line in lines[1:] if pathlib.Path(plan.folder, line["file"]).exists()
  }
  with storage.whole(path, mark="tmp") as file:
    file.writelines((json.dumps(line) + "\n").encode() for line in (begun, *done.values()))
  return done


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """The program; what it wrote."""
  parser = argparse.ArgumentParser(
    "bigalign convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source_flags.add(parser)
  parser.add_argument("--out", required=True, help="folder to make")
  parser.add_argument("--records", type=int, default=10_000, help="of a file (%(default)s)")
  parser.add_argument(
    "--short_side",
    type=int,
    default=0,
    help="pixels; larger images are made that small and JPEGs, others kept as they are",
  )
  parser.add_argument("--quality", type=int, default=95, help="of these JPEGs (%(default)s)")
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
  given = parser.parse_args(words)
  found = convert(
    source_flags.spec(given),
    given.out,
    records=given.records,
    short_side=given.short_side,
    quality=given.quality,
    workers=given.workers,
  )
  print(json.dumps(found))
  print(f"{given.out}/*.array_record")
  return found


def run() -> None:
  """The program `bigalign convert`."""
  main()
