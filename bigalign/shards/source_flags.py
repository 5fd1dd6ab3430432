"""The flags with which programs that read one source are told of it."""

from __future__ import annotations

import argparse

from bigalign.data.sources.base import Spec


def add(parser: argparse.ArgumentParser) -> None:
  """Tells a parser the flags."""
  parser.add_argument("source", help="what config.data.source would say")
  parser.add_argument(
    "--captions",
    metavar="A,B",
    default="",
    help="fields of captions: txt,json.caption; the source's own if not given",
  )
  parser.add_argument(
    "--source_options",
    nargs="*",
    default=[],
    metavar="NAME=VALUE",
    help="as config.data.source_options: image=photo data_dir=DIR",
  )


def spec(given: argparse.Namespace) -> Spec:
  """What was given."""
  pairs = [word.partition("=")[::2] for word in given.source_options]
  if not all(name and value for name, value in pairs):
    raise ValueError(
      f"--source_options {' '.join(given.source_options)}: write NAME=VALUE, such as image=photo"
    )
  captions = tuple(given.captions.split(",")) if given.captions else None
  return Spec(given.source, captions, tuple(pairs))
