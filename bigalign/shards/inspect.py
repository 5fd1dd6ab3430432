"""Shows the content of a source before training: bigalign inspect 'DIR/*.tar' --out shards.html

Reads and decodes evenly spread samples, the same ones each time, and writes a page with a contact
sheet, resolutions, aspect ratios, captions, scripts, duplicates, and bad samples with the reasons.
Then measures the speed of the data loader with and without decoding, and computes how many hosts
like this one a run needs:

  bigalign inspect '/data/laion/{00000..41455}.tar' --batch_size=16384 --steps_per_second=2
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table

from bigalign.data.files import processes
from bigalign.data.sources.base import Spec, open_spec
from bigalign.run.progress import shown, track
from bigalign.run.tables import counts, number, pairs, show, write_json
from bigalign.shards import sample_stats, source_flags
from bigalign.shards.sample_stats import SampleStats, StatsTask


def gather(spec: Spec, *, samples: int, language: str | None, workers: int) -> list[SampleStats]:
  """Returns the statistics of some samples of a source, in its order.

  Args:
    spec: the source.
    samples: how many, evenly spread; all if the source has no more.
    language: the field that holds the language of the captions, or None.
    workers: processes.
  """
  source = open_spec(spec)
  tasks = [
    StatsTask(spec, language, indices)
    for indices in sample_stats.spread(
      len(source), samples=samples, block=getattr(source, "block", 1)
    )
  ]
  running = processes.run(sample_stats.collect, tasks, workers=workers)
  results = track(running, "inspect", len(tasks), unit="blocks of samples")
  return [sample for part in results for sample in part]


def summary(samples: Sequence[SampleStats]) -> dict[str, Any]:
  """Returns the figures of the page; lengths are in characters, sizes in bytes."""
  decoded = [sample for sample in samples if sample.width]
  texts: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
  for sample in samples:
    for name, lengths in sample.lengths.items():
      texts[name].append(lengths)
  return dict(
    bad=_counts(sample.reason for sample in samples if sample.reason),
    repeated_images=sample_stats.repeated([sample.digest for sample in samples if sample.digest]),
    repeated_captions=sample_stats.repeated(
      [sample.caption for sample in samples if sample.caption]
    ),
    images=dict(
      width=sample_stats.quantiles(sample.width for sample in decoded),
      height=sample_stats.quantiles(sample.height for sample in decoded),
      shorter_side=sample_stats.quantiles(min(sample.width, sample.height) for sample in decoded),
      aspect_ratio=sample_stats.quantiles(sample.width / sample.height for sample in decoded),
      bytes=sample_stats.quantiles(sample.size for sample in decoded),
    ),
    kinds=_counts(sample.kind for sample in samples),
    captions={
      name: dict(
        samples_with_one=sum(map(bool, lengths)) / len(samples),
        per_sample=sum(map(len, lengths)) / max(sum(map(bool, lengths)), 1),
        characters=sample_stats.quantiles(n for each in lengths for n in each),
      )
      for name, lengths in texts.items()
    },
    scripts=_counts(script for sample in samples for script in sample.scripts),
    languages=_counts(language for sample in samples for language in sample.languages),
    frequent=dict(
      [
        (text, n)
        for text, n in _counts(sample.caption for sample in samples if sample.caption).items()
        if n > 1
      ][:10]
    ),
  )


def _counts(values: Any) -> dict[str, int]:
  return dict(collections.Counter(values).most_common())


def throughput(
  spec: Spec, *, image_size: int, workers: int, seconds: float, wanted: float
) -> dict[str, Any]:
  """Measures the data loader.

  Args:
    spec: the source.
    image_size: of training, pixels.
    workers: processes of the loader.
    seconds: length of each measurement.
    wanted: images per second that a run needs; 0: unknown.

  Returns:
    "read" and "decoded" samples per second, with `wanted` also "hosts"; or the "problem".
  """
  from bigalign.shards import speed  # imports JAX, which --help does not need

  try:
    rates: Mapping[str, Any] = speed.loader_speeds(
      open_spec(spec), image_size=image_size, workers=workers, seconds=seconds
    )
  except ValueError as error:
    return dict(problem=str(error))
  needed = dict(images_per_second=wanted, hosts=speed.hosts_needed(wanted, rates["decoded"]))
  return dict(rates, workers=workers, image_size=image_size, **(needed if wanted else {}))


def inspect(
  spec: Spec,
  out: str | pathlib.Path,
  *,
  samples: int = 10_000,
  language: str | None = None,
  workers: int = 1,
  image_size: int = 224,
  seconds: float = 5,
  wanted: float = 0,
) -> dict[str, Any]:
  """Writes the page and returns its figures.

  Args:
    spec: the source.
    out: path of the page.
    samples: how many to read, evenly spread; all if the source has no more.
    language: the field that holds the language of a caption; spec.captions must contain it too.
    workers: processes.
    image_size: of training, pixels, for the measurement of the loader.
    seconds: length of each measurement; 0: do not measure.
    wanted: images per second that a run needs; 0: unknown.
  """
  from bigalign.shards import inspect_page  # imports matplotlib, which --help does not need

  collected = gather(spec, samples=samples, language=language, workers=workers)
  figures = dict(
    source=spec.source, samples=len(open_spec(spec)), looked_at=len(collected), **summary(collected)
  )
  if seconds:
    figures["throughput"] = throughput(
      spec, image_size=image_size, workers=workers, seconds=seconds, wanted=wanted
    )
  # Invalid Unicode in a file name or a broken caption must not prevent the page.
  pathlib.Path(out).write_text(
    inspect_page.page(figures, collected, spec, language), encoding="utf-8", errors="replace"
  )
  return figures


def tables(figures: Mapping[str, Any]) -> list[rich.table.Table]:
  """Returns the figures of `inspect` for the terminal."""
  general, sizes = pairs(), rich.table.Table(box=rich.box.SIMPLE_HEAD)
  general.add_row("source", str(figures["source"]))
  general.add_row("samples", f"{figures['samples']:,}")
  general.add_row("samples read", f"{figures['looked_at']:,}")
  general.add_row("bad samples", counts(figures["bad"]) or "none")
  for name in ("repeated_images", "repeated_captions"):
    what = name.replace("repeated_", "duplicate ")
    general.add_row(what, f"{figures[name]:.1%}")
  for name in ("kinds", "scripts", "languages"):
    if figures[name]:
      general.add_row(name, counts(figures[name]))
  for text, count in [*figures["frequent"].items()][:3]:
    general.add_row("frequent caption", f"{count:,} times: {text[:100]}")
  rates = figures.get("throughput", {})
  for name, what in (
    ("problem", "reading speed"),
    ("read", "read, samples/s"),
    ("decoded", "decoded, samples/s"),
    ("hosts", "hosts needed"),
  ):
    if name in rates:
      value = rates[name]
      general.add_row(what, value if isinstance(value, str) else number(value))
  rows = {name.replace("_", " "): value for name, value in figures["images"].items() if value}
  rows |= {
    f"characters of {name}": value["characters"]
    for name, value in figures["captions"].items()
    if value["characters"]
  }
  names = list(dict.fromkeys(key for value in rows.values() for key in value))
  sizes.add_column("")
  for name in names:
    sizes.add_column(name, justify="right")
  for row, value in rows.items():
    sizes.add_row(row, *(number(value[name]) if name in value else "" for name in names))
  return [general, sizes] if rows else [general]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program: prints the figures and the path of the page."""
  parser = argparse.ArgumentParser(
    "bigalign inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source_flags.add_source_flags(parser)
  parser.add_argument("--out", default="inspect.html", help="path of the page (%(default)s)")
  parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
  parser.add_argument("--language", help="field that holds the language, such as json.lang")
  parser.add_argument(
    "--samples", type=int, default=10_000, help="number of samples to read (%(default)s)"
  )
  parser.add_argument(
    "--workers", type=int, default=os.cpu_count(), help="number of processes (%(default)s)"
  )
  parser.add_argument(
    "--image_size", type=int, default=224, help="image size of training, pixels (%(default)s)"
  )
  parser.add_argument(
    "--seconds",
    type=float,
    default=5,
    help="length of each of the two measurements of the loader (%(default)s); 0: do not measure",
  )
  parser.add_argument("--batch_size", type=int, help="batch size of the run, over all hosts")
  parser.add_argument("--steps_per_second", type=float, help="steps per second of the run")
  given = parser.parse_args(words)
  if (given.batch_size is None) != (given.steps_per_second is None):
    parser.error("give both --batch_size and --steps_per_second, or neither")
  if given.batch_size and not given.seconds:
    parser.error("the number of hosts is measured: set --seconds above 0")
  if given.language and not given.captions:
    parser.error("--language also needs --captions, the fields of the captions")
  spec = source_flags.spec_from_flags(given)
  if given.language:
    spec = spec._replace(captions=(*(spec.captions or ()), given.language))
  with shown():
    figures = inspect(
      spec,
      given.out,
      samples=given.samples,
      language=given.language,
      workers=given.workers,
      image_size=given.image_size,
      seconds=given.seconds,
      wanted=(given.batch_size or 0) * (given.steps_per_second or 0),
    )
  if given.json:
    write_json(given.json, figures)
  show(*tables(figures))
  print(given.out)
  return figures


def run() -> None:
  """The program `bigalign inspect`."""
  main()
