"""Explains the options of a config: bigalign options data.augment.

The text is generated from the definitions of the options: their types, defaults, and documentation
in the code.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigalign import options, tree
from bigalign.cli.terminal import columns
from bigalign.options import MISSING, Inside, Option


class Section(NamedTuple):
  """A part of the reference.

  Args:
    where: its place in a config: "data.augment"; "" for the whole config.
    about: what it is.
    inside: its options, or the registry from which the config chooses.
    option: a single option; None for a group.
    elements: ".NAME" for a mapping to such groups, "[0]" for a sequence of them, "" for one group.
  """

  where: str
  about: str
  inside: Inside
  option: Option | None = None
  elements: str = ""

  @property
  def place(self) -> str:
    """As the command line names it: "config.data.mixture[0]"."""
    return ("config." + self.where).rstrip(".") + self.elements


def section(root: type, where: str) -> Section:
  """The part of the reference at a place in a config.

  Args:
    root: the dataclass of the options of a config.
    where: such as "optimizer", "data.augment.scale", "loss.siglip", "evals.retrieval".

  Raises:
    ValueError: if the place does not exist; it names the nearest one.
  """
  here = _group("", "", root)
  keys = where.removeprefix("config").strip(".").replace("[0]", "")
  for key in keys.split(".") if keys else ():
    here = _step(here, key)
  return here


def _step(here: Section, key: str) -> Section:
  where, inside = f"{here.where}.{key}".lstrip("."), here.inside
  if key == inside.key and key:  # it chooses one of the entries
    return here
  if key in inside.options:
    option = inside.options[key]
    group = _group(where, option.doc, option.type)
    return group if is_group(option) else group._replace(option=option)
  if key in inside.entries:
    return Section(where, inside.about[key], _only(inside.entries[key]))
  for own in inside.entries.values():
    if key in own:
      return _step(here._replace(inside=_only(own)), key)
  names = [*inside.options, *inside.entries]
  listed = f" There are: {tree.shown(names, sep=', ')}" if names else ""
  raise ValueError(f"{here.place} has no option {key!r}.{tree.nearest(key, names)}{listed}")


def _group(where: str, about: str, kind: Any) -> Section:
  inside = options.inside(kind)
  if inside.element not in (None, Any):  # a mapping or a sequence of groups
    element = options.inside(inside.element)
    if element.options or element.entries:
      return Section(where, about, element, elements=inside.place)
  return Section(where, about, inside)


def _only(known: Mapping[str, Option]) -> Inside:
  """A group with these options."""
  return Inside(known, {}, {}, "", "", None)


def _common(inside: Inside) -> dict[str, Option]:
  """The options that all entries of a registry have."""
  first, *others = inside.entries.values()
  return {name: x for name, x in first.items() if all(own.get(name) == x for own in others)}


def is_group(option: Option) -> bool:
  """Whether an option has options of its own."""
  inside = _group("", "", option.type).inside
  return bool(inside.options or inside.entries)


def default_text(option: Option) -> str:
  """How a default is shown; "" for a group, whose options have defaults."""
  if option.default is MISSING:
    return "required"
  return "" if option.default is None and is_group(option) else f"default {option.default!r}"


def lines(here: Section, width: int) -> Iterator[str]:
  """The lines of a section."""
  inside = here.inside
  yield from _wrapped(f"{here.place}: {here.about}" if here.about else here.place, width, 0)
  if here.option:
    yield from _wrapped(_type_and_default(here.option), width, 2)
    return
  if inside.options:
    yield ""
    yield from _options(here, inside.options, width)
  if not inside.entries:
    return
  common = _common(inside)
  if common:
    yield ""
    yield f"Options of all {len(inside.entries)} entries below:"
    yield from _options(here, common, width)
  yield ""
  if inside.key:
    default = f", {inside.default} by default" if inside.default else ""
    how = f"{here.place}.{inside.key}=ENTRY chooses one of these{default}:"
  else:
    how = f"Any of these can be given, with options: {here.place}.ENTRY.OPTION=VALUE"
  yield from _wrapped(how, width, 0)
  for name, own in inside.entries.items():
    yield from _wrapped(f"{name}: {inside.about[name]}", width, 2, hanging=4)
    special = [option for option in own if option not in common]
    if special:
      yield from _wrapped(f"options: {', '.join(special)}", width, 4, hanging=6)
  yield ""
  example = f"{here.where}.{next(iter(inside.entries))}"
  yield from _wrapped(f"`bigalign options {example}` explains the options of one entry.", width, 0)


def _options(here: Section, known: Mapping[str, Option], width: int) -> Iterator[str]:
  groups = []
  for name, option in known.items():
    if is_group(option):
      groups.append(f"{here.where}.{name}".lstrip("."))
    yield f"  {name}  {_type_and_default(option)}"
    if option.doc:
      yield from _wrapped(option.doc, width, 6)
  if groups:
    yield ""
    shown = ", ".join(groups)
    yield from _wrapped(f"Groups, which `bigalign options NAME` explains: {shown}", width, 0)


def _type_and_default(option: Option) -> str:
  kind = "group" if is_group(option) else options.spelled(option.type)
  return ", ".join(text for text in (kind, default_text(option)) if text)


def _wrapped(text: str, width: int, indent: int, hanging: int | None = None) -> list[str]:
  rest = indent if hanging is None else hanging
  return textwrap.wrap(
    text, width, initial_indent=" " * indent, subsequent_indent=" " * rest, break_long_words=False
  )


def as_json(here: Section) -> dict[str, Any]:
  """A section in plain values."""
  if here.option:
    return {"name": here.place, **_plain(here.option)}
  inside = here.inside
  values: dict[str, Any] = {"name": here.place, "about": here.about}
  values["options"] = {name: _plain(option) for name, option in inside.options.items()}
  if inside.entries:
    values["key"], values["default"] = inside.key, inside.default
    values["entries"] = {
      name: {
        "about": inside.about[name],
        "options": {option: _plain(x) for option, x in own.items()},
      }
      for name, own in inside.entries.items()
    }
  return values


def _plain(option: Option) -> dict[str, Any]:
  kind = "group" if is_group(option) else options.spelled(option.type)
  default = {} if option.default is MISSING else {"default": options.plain(option.default)}
  required = option.default is MISSING
  return {"type": kind, "required": required, **default, "about": option.doc}


def main(words: Sequence[str] | None = None) -> None:
  """The program."""
  parser = argparse.ArgumentParser(
    prog="bigalign options",
    description="Explains the options of a config, or of one of its parts: name, type, default and"
    " meaning. On the command line each is set as --config.PART.NAME=VALUE.",
  )
  parser.add_argument("part", nargs="?", default="", help="such as data.augment or loss.siglip")
  parser.add_argument("--json", action="store_true", help="print JSON")
  args = parser.parse_args(words)
  from bigalign.config import Config  # imports JAX, which --help does not need

  found = section(Config, args.part)
  if args.json:
    print(json.dumps(as_json(found), indent=1))
  else:
    print("\n".join(lines(found, columns())))


def run() -> None:
  """The program `bigalign options`."""
  main()
