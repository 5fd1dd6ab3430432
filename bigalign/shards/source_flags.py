"""Command-line flags of the programs that read one source."""

from __future__ import annotations

import argparse

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
  pairs = [word.partition("=")[::2] for word in given.source_options]
  if not all(name and value for name, value in pairs):
    raise ValueError(
      f"--source_options {' '.join(given.source_options)}: write NAME=VALUE, such as image=photo"
    )
  captions = tuple(given.captions.split(",")) if given.captions else None
  return Spec(given.source, captions, tuple(pairs))
