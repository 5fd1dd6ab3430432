"""--help of the programs that take a config: usage, examples, flags, and the options of the config.

Neither JAX nor a program is imported: the top-level options are read from the source of
bigalign/config.py.
"""

from __future__ import annotations

import ast
import pathlib
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags

from bigalign import options
from bigalign.cli import examples
from bigalign.cli.terminal import columns
from bigalign.run import configs
from bigalign.run.flags import define_flags

ABOUT = {
  "train": "Trains a model from a config. The same command resumes an interrupted run.",
  "embed": "Runs a dataset through the frozen towers of a config and stores the embeddings, for"
  " training, comparison and curation. The same command resumes.",
  "reinforce": "Runs a teacher over augmented views of each image and over its captions, for"
  " students with config.data.teachers. The same command resumes.",
  "plan": "Predicts memory, speed and cost of a config on a TPU slice, without one. Exit status 1:"
  " it does not fit.",
  "benchmark": "Measures a config on this machine, without data: step, loader, embedding and"
  " evaluation, next to what `bigalign plan` predicts. Without --config: quickstart on CPUs,"
  " siglip_b16 on accelerators.",
}
_VALUE = re.compile(r"<(?P<enum>[^>]+)>: |(?P<value>[A-Z|:,]+): ")
_PLAIN = re.compile(r"\b(int|float|str|bool|None|Any|Sequence|Mapping|tuple)\b|[\[\]|, ]")


class Field(NamedTuple):
  """A top-level option of a config, as its definition writes it.

  name: of the option. type: "int | str"; "" for a group. default: as Python writes it; "" if it
  must be given, and for groups. doc: its documentation.
  """

  name: str
  type: str
  default: str
  doc: str


def fields() -> list[Field]:
  """The top-level options of a config, from the source of bigalign.config.Config."""
  source = (pathlib.Path(__file__).parents[1] / "config.py").read_text()
  nodes = ast.parse(source).body
  cls = next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == "Config")
  docs = options.documentation(ast.get_docstring(cls) or "")
  found = []
  for node in cls.body:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      kind = ast.unparse(node.annotation)
      kind = "" if _PLAIN.sub("", kind) else kind
      default = ast.unparse(node.value) if node.value and kind else ""
      found.append(Field(node.target.id, kind, default, docs[node.target.id]))
  return found


def text(program: str) -> str:
  """The help of a program.

  Args:
    program: a key of bigalign.run.flags.PROGRAMS.
  """
  return "\n".join(_lines(program, columns()))


def _lines(program: str, width: int) -> Iterator[str]:
  yield f"usage: bigalign {program} --config=NAME|FILE [--config.OPTION=VALUE ...] [flags]"
  yield ""
  yield from textwrap.wrap(ABOUT[program], width)
  yield ""
  yield examples.text(program)
  yield ""
  yield "flags:"
  for name, default, doc in _flags(program):
    yield from _entry(name, f"{doc}{default}", width)
  yield from _entry("--traceback", "Show the traceback of a mistake too.", width)
  yield ""
  yield from textwrap.wrap(
    "options of the config, --config.NAME=VALUE; `bigalign options NAME` explains one, and the"
    " options of a group (…), such as --config.data.workers=8:",
    width,
  )
  for field in fields():
    name = field.name if field.type else f"{field.name}.…"
    yield _cut(f"  {name:<19}{field.doc.rstrip('.')}", width)
  yield ""
  yield from textwrap.wrap(
    f"shipped configs (`bigalign configs` describes them): {', '.join(configs.shipped())}", width
  )


def _flags(program: str) -> Iterator[tuple[str, str, str]]:
  """(name as typed, default, documentation) of each flag."""
  if "config" not in flags.FLAGS:
    define_flags(None, program)
  ours = flags.FLAGS.flags_by_module_dict()[define_flags.__module__]
  for flag in ours:
    value = "" if flag.boolean else f"={_placeholder(flag.name, flag.help)}"
    has_default = flag.default not in (None, False, "", [], 0)
    default = f" ({str(flag.default_as_str).strip(chr(39))})" if has_default else ""
    yield f"--{flag.name}{value}", default, re.sub(_VALUE, "", flag.help or "")


def _placeholder(name: str, doc: str | None) -> str:
  """The value of a flag in its help: "NAME|FILE" of "NAME|FILE: a config", "a|b" of an enum."""
  found = re.match(_VALUE, doc or "")
  return (found["enum"] or found["value"]) if found else name.upper()


def _entry(name: str, doc: str, width: int) -> list[str]:
  """A flag with its documentation, in two columns."""
  column = 28
  rest = textwrap.wrap(doc, max(width - column, 20))
  if len(name) + 4 > column:
    return [f"  {name}", *(" " * column + line for line in rest)]
  return [f"  {name:<{column - 2}}{rest[0]}", *(" " * column + line for line in rest[1:])]


def _cut(line: str, width: int) -> str:
  return line if len(line) <= width else f"{line[: width - 2].rstrip()} …"
