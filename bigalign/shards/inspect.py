"""Tells what is in a source before training on it: bigalign inspect 'DIR/*.tar' --out shards.html

Looks at a sample, the same one each time, decodes it and writes a page with a contact sheet:
resolutions, aspect ratios, captions, scripts, repetitions, bad samples and why they are bad. Then
times the loader with and without decoding, and says how many hosts such as this one a run needs:

  bigalign inspect '/data/laion/{00000..41455}.tar' --batch_size=16384 --steps_per_second=2
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bigalign.data.files import processes
from bigalign.data.sources.base import Spec, open_spec
from bigalign.shards import facts, source_flags, speed
from bigalign.shards import inspect_page as html
from bigalign.shards.facts import Fact, Look


def gather(spec: Spec, *, samples: int, language: str | None, workers: int) -> list[Fact]:
  """The facts of some samples of a source, in its order."""
  source = open_spec(spec)
  tasks = [
    Look(spec, language, indices)
    for indices in facts.spread(len(source), samples=samples, block=getattr(source, "block", 1))
  ]
  return [fact for found in processes.run(facts.look, tasks, workers=workers) for fact in found]


def summary(found: Sequence[Fact]) -> dict[str, Any]:
  """The figures of the page, of the samples looked at; lengths in characters, sizes in bytes."""
  whole = [fact for fact in found if fact.width]
  texts: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
  for fact in found:
    for name, lengths in fact.lengths.items():
      texts[name].append(lengths)
  return dict(
    bad=_counts(fact.reason for fact in found if fact.reason),
    repeated_images=facts.repeated([fact.digest for fact in found if fact.digest]),
    repeated_captions=facts.repeated([fact.caption for fact in found if fact.caption]),
    images=dict(
      width=facts.quantiles(fact.width for fact in whole),
      height=facts.quantiles(fact.height for fact in whole),
      shorter_side=facts.quantiles(min(fact.width, fact.height) for fact in whole),
      aspect_ratio=facts.quantiles(fact.width / fact.height for fact in whole),
      bytes=facts.quantiles(fact.size for fact in whole),
    ),
    kinds=_counts(fact.kind for fact in found),
    captions={
      name: dict(
        samples_with_one=sum(map(bool, lengths)) / len(found),
        per_sample=sum(map(len, lengths)) / max(sum(map(bool, lengths)), 1),
        characters=facts.quantiles(n for each in lengths for n in each),
      )
      for name, lengths in texts.items()
    },
    scripts=_counts(script for fact in found for script in fact.scripts),
    languages=_counts(language for fact in found for language in fact.languages),
    frequent=dict(
      [
        (text, n)
        for text, n in _counts(fact.caption for fact in found if fact.caption).items()
        if n > 1
      ][:10]
    ),
  )


def _counts(values: Any) -> dict[str, int]:
  return dict(collections.Counter(values).most_common())


def throughput(
  spec: Spec, *, image_size: int, workers: int, seconds: float, wanted: float
) -> dict[str, Any]:
  """Samples a second, and hosts for `wanted` of them a second (0: not asked); or why not."""
  try:
    rates: Mapping[str, Any] = speed.speeds(
      open_spec(spec), image_size=image_size, workers=workers, seconds=seconds
    )
  except ValueError as error:
    return dict(problem=str(error))
  needed = dict(images_per_second=wanted, hosts=speed.hosts(wanted, rates["decoded"]))
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
  """Writes the page `out` and returns its figures.

  samples   how many to look at, evenly spread; all if there are no more
  language  the field that says the language of a caption, which spec.captions then holds too
  image_size, seconds, wanted   of the measurement: pixels, how long (0: none), images a second
            that a run needs (0: not asked)
  """
  found = gather(spec, samples=samples, language=language, workers=workers)
  figures = dict(
    source=spec.source, samples=len(open_spec(spec)), looked_at=len(found), **summary(found)
  )
  if seconds:
    figures["throughput"] = throughput(
      spec, image_size=image_size, workers=workers, seconds=seconds, wanted=wanted
    )
  # What is no Unicode, in the name of a file or a broken caption, must not lose the page.
  pathlib.Path(out).write_text(
    html.page(figures, found, spec, language), encoding="utf-8", errors="replace"
  )
  return figures


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """The program; prints the figures and the path of the page."""
  parser = argparse.ArgumentParser(
    "bigalign inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source_flags.add(parser)
  parser.add_argument("--out", default="inspect.html", help="the page (%(default)s)")
  parser.add_argument("--language", help="field that holds the language, as json.lang")
  parser.add_argument("--samples", type=int, default=10_000, help="to look at (%(default)s)")
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
  parser.add_argument("--image_size", type=int, default=224, help="of training (%(default)s)")
  parser.add_argument(
    "--seconds",
    type=float,
    default=5,
    help="of each of two measurements of the loader (%(default)s); 0: none",
  )
  parser.add_argument("--batch_size", type=int, help="of the run, over all hosts")
  parser.add_argument("--steps_per_second", type=float, help="of the run")
  given = parser.parse_args(words)
  if (given.batch_size is None) != (given.steps_per_second is None):
    parser.error("--batch_size and --steps_per_second go together")
  if given.batch_size and not given.seconds:
    parser.error("how many hosts are needed is measured: --seconds above 0")
  if given.language and not given.captions:
    parser.error("--language needs --captions, the fields of the captions themselves")
  spec = source_flags.spec(given)
  if given.language:
    spec = spec._replace(captions=(*(spec.captions or ()), given.language))
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
  for name, value in figures.items():
    print(f"{name}: {json.dumps(value)}")
  print(given.out)
  return figures


def run() -> None:
  """The program `bigalign inspect`."""
  main()
