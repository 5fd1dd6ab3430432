"""Balances concepts of captions: bigalign balance 'DIR/*.tar' --entries concepts.txt --out keep.

MetaCLIP (https://arxiv.org/abs/2309.16671): each caption is matched with the entries of a list, and
the matches of each entry are counted. A sample is kept with the probability 1 - product over its
entries of (1 - t / max(count, t)), so that an entry with more than t samples keeps about t of them,
and rare entries keep all. A sample that matches no entry is never kept.

NAME.npy holds the probability of each sample, NAME.counts.json how often each entry occurs.
`bigalign view --columns keep=NAME --draw keep` draws the samples. NAME.frequency.npy holds
the geometric mean of how often the entries of each sample occur. A run whose loss has a temperature
per sample reads it: config.data.columns.caption_frequency=dict(file="NAME.frequency", default=0.0).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bigalign.data.fields import column_files
from bigalign.data.files import processes, storage
from bigalign.data.files.lines import read_names
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Spec, open_spec, prefetch, read
from bigalign.data.text.lemmas import lemma
from bigalign.run import progress, tables
from bigalign.shards import source_flags

TASK = 1 << 12  # samples that a process matches at once
AHEAD = 512  # samples that a remote source may begin to fetch
_APART = {ord(x): f" {x} " for x in ",.;:?!`"} | {ord(x): " " for x in "\t\n\r"}


class Matcher:
  """Finds which entries occur in a text. Case counts.

  Whole words, by the rules of MetaCLIP: these punctuation marks are words of their own: , . ; : ? !
  and the backtick. In languages without spaces, anywhere.

  >>> Matcher(["red", "red car", "cars"]).find("A red car, two cars")
  {0, 1, 2}
  >>> sorted(Matcher(["ab", "c"], spaces=False).find("xabc"))
  [0, 1]
  >>> sorted(Matcher(["tabby cat", "Cats"], lemmas=True).find("Two tabby cats"))
  [0, 1]

  Args:
    entries: the texts to find.
    spaces: whether words are separated by spaces.
    lemmas: whether English words match in lower case and in the singular.
  """

  def __init__(self, entries: Sequence[str], *, spaces: bool = True, lemmas: bool = False):
    self._spaces, self._lemmas = spaces, lemmas
    # An entry of n words can only equal n consecutive words, so a look-up for each place and length
    # finds what an automaton would.
    self._number: dict[tuple[str, ...] | str, list[int]] = {}
    for i, entry in enumerate(entries):
      self._number.setdefault(self._parts(entry), []).append(i)
    self._lengths = sorted({len(parts) for parts in self._number})

  def _parts(self, text: str) -> tuple[str, ...] | str:
    if self._lemmas:
      return tuple(map(lemma, text.split()))
    return tuple(text.split(" ")) if self._spaces else text

  def find(self, text: str) -> set[int]:
    """The numbers of the entries in a text."""
    parts = self._parts(text.translate(_APART) if self._spaces else text)
    found = (
      self._number.get(parts[start : start + length], ())
      for length in self._lengths
      for start in range(len(parts) - length + 1)
    )
    return {number for numbers in found for number in numbers}


def entry_probability(counts: np.ndarray, t: float) -> np.ndarray:
  """The probability with which a match of each entry is kept: [E] -> [E]."""
  found: np.ndarray = t / np.maximum(counts, t)
  return found


def keep_probability(probability: np.ndarray, matches: Iterable[np.ndarray]) -> np.ndarray:
  """The probability that one of the entries of a text keeps it: [N].

  Args:
    probability: [E], of entry_probability.
    matches: the numbers of the entries of each of N texts.
  """
  kept = [1 - np.prod(1 - probability[np.asarray(one, np.int64)]) for one in matches]
  return np.array(kept, np.float64)


def frequency(counts: np.ndarray, matches: Iterable[np.ndarray]) -> np.ndarray:
  """The geometric mean of how often the entries of each text occur: [N], NaN without an entry.

  >>> frequency(np.array([1, 100]), [np.array([0, 1]), np.array([1]), np.array([])]).tolist()
  [10.0, 100.0, nan]

  Args:
    counts: [E], at least 1 for each entry that a text has.
    matches: the numbers of the entries of each of N texts.
  """
  logs = np.log10(np.maximum(counts, 1))
  means = [logs[one.astype(np.int64)].mean() if len(one) else np.nan for one in matches]
  return np.power(10.0, means)


def threshold(counts: np.ndarray, tail: float) -> float:
  """The count t at which entries below it have about this share of all matches.

  MetaCLIP 2 chooses t of a language so that its tail has the share that it has in English.

  Args:
    counts: [E].
    tail: the share.
  """
  ascending = np.sort(counts)
  shares = np.cumsum(ascending) / max(ascending.sum(), 1)
  return float(ascending[np.argmin(abs(shares - tail))])


def tail_share(counts: np.ndarray, t: float) -> float:
  """The share of all matches that entries with fewer than t have."""
  return float(counts[counts < t].sum() / max(counts.sum(), 1))


def balance(
  spec: Spec,
  entries: str,
  out: str,
  *,
  t: float = 20_000,
  tail: float | None = None,
  spaces: bool = True,
  lemmas: bool = False,
  workers: int = 1,
) -> dict[str, Any]:
  """Writes the columns of probabilities and frequencies, and the counts of the entries.

  Captions of a sample count together: it matches the entries of all of them.

  Args:
    spec: of the source.
    entries: file of the concepts, one per line.
    out: path of the column, without an ending.
    t: matches that an entry keeps.
    tail: instead of t, the share of all matches that entries below it have, see `threshold`.
    spaces, lemmas: see Matcher.
    workers: processes that read captions.

  Returns:
    The manifest of the column, and the expected number of samples that are kept.

  Raises:
    ValueError: if no caption matches an entry.
  """
  source, names = open_spec(spec), _entries(entries)
  spans = (range(i, min(i + TASK, len(source))) for i in range(0, len(source), TASK))
  tasks = [(spec, entries, spaces, lemmas, span) for span in spans]
  counts = np.zeros(len(names), np.int64)
  sizes: list[tuple[int, int]] = []  # samples and matches of each task
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  with (
    tempfile.TemporaryFile(dir=pathlib.Path(out).parent) as scratch,
    progress.Progress("balance", len(source), unit="samples") as shown,
  ):
    for (*_, span), (number, matches) in zip(
      tasks, processes.run(_matches, tasks, workers=workers)
    ):
      counts += np.bincount(matches, minlength=len(names))
      scratch.write(number.tobytes() + matches.tobytes())
      sizes.append((len(number), len(matches)))
      shown.reach(span.stop)
    if not counts.any():
      raise ValueError(f"{entries}: no line of it occurs in a caption of {source!r}")
    kept = t if tail is None else threshold(counts, tail)
    probability = entry_probability(counts, kept)
    expected = 0.0

    def matched() -> Iterator[list[np.ndarray]]:
      """The numbers of the entries of each sample of a task."""
      scratch.seek(0)
      for sample_count, total in sizes:
        number, matches = (
          np.frombuffer(scratch.read(4 * n), np.int32) for n in (sample_count, total)
        )
        yield np.split(matches, np.cumsum(number)[:-1])

    def parts() -> Iterator[np.ndarray]:
      nonlocal expected
      for matches in matched():
        part = keep_probability(probability, matches)
        expected += part.sum()
        yield part

    about = dict(
      what="keep",
      t=kept,
      tail_share=tail_share(counts, kept),
      entries=len(names),
      matched=int((counts > 0).sum()),
    )
    manifest = column_files.write(out, source, parts(), made_by=about)
    often = (frequency(counts, matches) for matches in matched())
    column_files.write(f"{out}.frequency", source, often, made_by=dict(what="frequency"))
  with storage.atomic_write(f"{out}.counts.json") as file:
    file.write(json.dumps(dict(zip(names, counts.tolist())), indent=1).encode() + b"\n")
  return manifest | dict(expected=expected)


@functools.cache
def _entries(path: str) -> list[str]:
  """The lines of a file that are not blank, once in each process."""
  names = [*filter(None, read_names(path))]
  if not names:
    raise ValueError(f"{path} holds no entries; expected one per line")
  return names


@functools.cache
def _matcher(path: str, spaces: bool, lemmas: bool) -> Matcher:
  return Matcher(_entries(path), spaces=spaces, lemmas=lemmas)


def _matches(task: tuple[Spec, str, bool, bool, range]) -> tuple[np.ndarray, np.ndarray]:
  """How many entries each sample of a task matches [n], and their numbers, int32."""
  spec, entries, spaces, lemmas, span = task
  source, matcher = open_spec(spec), _matcher(entries, spaces, lemmas)
  number, matches = [], []
  for row, i in enumerate(span):
    if row % (AHEAD // 2) == 0:
      prefetch(source, range(i, min(i + AHEAD, span.stop)))
    try:
      captions = read(source, i)["captions"]
    except Rejected:
      captions = ()
    found = set().union(*map(matcher.find, captions))
    number.append(len(found))
    matches += sorted(found)
  return np.array(number, np.int32), np.array(matches, np.int32)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program; returns the manifest of the column."""
  parser = argparse.ArgumentParser(
    "bigalign balance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  source_flags.add_source_flags(parser)
  parser.add_argument("--entries", required=True, metavar="FILE", help="one concept per line")
  parser.add_argument(
    "--out",
    required=True,
    metavar="NAME",
    help="writes the columns NAME and NAME.frequency, and NAME.counts.json",
  )
  parser.add_argument(
    "--t", type=float, default=20_000, help="matches that each entry keeps (%(default)s)"
  )
  parser.add_argument(
    "--tail",
    type=float,
    metavar="SHARE",
    help="instead of --t: the t below which entries have this share of all matches",
  )
  parser.add_argument(
    "--no_spaces", action="store_true", help="words of the language are not separated by spaces"
  )
  parser.add_argument(
    "--lemmas", action="store_true", help="match English words in lower case and in the singular"
  )
  parser.add_argument(
    "--workers",
    type=int,
    default=os.cpu_count(),
    help="number of processes that read captions (%(default)s)",
  )
  parser.add_argument("--json", metavar="FILE", help="also write the summary to this file")
  given = parser.parse_args(words)
  if given.lemmas and given.no_spaces:
    parser.error("--lemmas are of English, whose words are separated by spaces; drop --no_spaces")
  manifest = balance(
    source_flags.spec_from_flags(given),
    given.entries,
    given.out,
    t=given.t,
    tail=given.tail,
    spaces=not given.no_spaces,
    lemmas=given.lemmas,
    workers=given.workers,
  )
  print(
    f"{manifest['matched']:,} of {manifest['entries']:,} entries occur; about"
    f" {manifest['expected']:,.0f} of {manifest['samples']:,} samples are kept with t ="
    f" {manifest['t']:g}\n{given.out}.npy, {given.out}.frequency.npy"
  )
  if given.json:
    tables.write_json(given.json, manifest)
  return manifest


def run() -> None:
  """The program `bigalign balance`."""
  main()
