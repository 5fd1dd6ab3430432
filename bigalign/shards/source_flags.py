"""Command-line flags of the programs that read one source."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bigalign.data.sources.base import Spec


def add_source_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags `source`, `--captions` and `--source_options` to a parser."""
  parser.add_argument("source", help="the source, as in config.data.source")
  parser.add_argument(
    "--captions",
    metavar="A,B",
    default="",
    help="caption fields, such as txt,json.caption; default: those of the source",
  )
  parser.add_argument(
    "--source_options",
    nargs="*",
    default=[],
    metavar="NAME=VALUE",
    help="as config.data.source_options, such as image=photo data_dir=DIR",
  )


def spec_from_flags(given: argparse.Namespace) -> Spec:
  """Returns the source that the parsed flags name.

  Raises:
    ValueError: if a word of --source_options is not NAME=VALUE.
  """
  options = pairs(given.source_options, "--source_options")
  captions = tuple(given.captions.split(",")) if given.captions else None
  return Spec(given.source, captions, tuple(options.items()))


def pairs(words: Sequence[str], flag: str) -> dict[str, str]:
  """Returns {NAME: VALUE} of words NAME=VALUE.

  Raises:
    ValueError: for another word; names the flag.
  """
  found = [word.partition("=")[::2] for word in words]
  if not all(name and value for name, value in found):
    raise ValueError(f"{flag} {' '.join(words)}: write NAME=VALUE, such as image=photo")
  return dict(found)
