"""Options on the command line: --config.optimizer.lr=3e-4, by the definitions of the options.

Any option that a config can have may be given, whether its file writes it or not. The definition of
the option says how its text is read: "3" is a number for a float, and text for a path.
"""

from __future__ import annotations

import ast
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigalign import options, tree
from bigalign.options import Option
from bigalign.run.configs import Key, get_option, join_path, load_config, set_option, split_path

_TRUE = ("true", "t", "yes", "1")
_FALSE = ("false", "f", "no", "0")


class Word(NamedTuple):
  """An override as it was typed.

  Args:
    name: of the option: "optimizer.lr".
    text: its value; None if a flag stands alone, as --config.data.shuffle does.
    negated: whether it was --noconfig.…
  """

  name: str
  text: str | None
  negated: bool = False


def take_words(argv: Sequence[str], flag: str = "config") -> tuple[list[Word], list[str]]:
  """Splits a command line into overrides and all other words.

  Args:
    argv: the words; those after "--" are not overrides.
    flag: the name before the first dot.

  Returns:
    The overrides, each with the word after it as its text if it has no "="; and the other words. A
    word that begins with a dash is not taken as a text.
  """
  words: list[Word] = []
  others: list[str] = []
  end = argv.index("--") if "--" in argv else len(argv)
  pattern = re.compile(rf"--?(?P<no>no)?{flag}\.(?P<name>[^=]+)(=(?P<text>.*))?", re.DOTALL)
  waiting = False  # for the text of the last override
  for word in argv[:end]:
    found = pattern.fullmatch(word)
    if found:
      words.append(Word(found["name"], found["text"], bool(found["no"])))
      waiting = found["text"] is None and not found["no"]
    elif waiting and not re.match(r"--?[a-z]", word):
      words[-1] = words[-1]._replace(text=word)
      waiting = False
    else:
      others.append(word)
      waiting = False
  return words, [*others, *argv[end:]]


def read_words(words: Sequence[Word], root: type, config: Any) -> dict[str, Any]:
  """The values of overrides.

  >>> from bigalign.data.loader.options import DataOptions
  >>> words = [Word("workers", "2"), Word("captions", "a"), Word("captions", "b")]
  >>> read_words(words, DataOptions, {})
  {'workers': 2, 'captions': ('a', 'b')}

  Args:
    words: the overrides. The last word of an option counts, but single elements of a sequence that
      are repeated give one sequence.
    root: the dataclass of the options of a config.
    config: the config whose options they replace, in plain values.

  Returns:
    {name: value} for configs.load_config.

  Raises:
    TypeError: for an option that does not exist, naming the nearest one and what there is, and for
      a text that its type excludes.
    ValueError: for an override that a later one would undo.
  """
  paths = [split_path(word.name) for word in words]
  _check_order(paths)
  # Which options there are depends on the entries of registries that other overrides may name.
  named = {
    path: word.text for path, word in zip(paths, words) if path[-1] in ("name", "type") and path[1:]
  }
  values: dict[str, Any] = {}
  elements: dict[tuple[Key, ...], tuple[Any, ...]] = {}  # given one by one
  changed = load_config(config)  # by the words so far: a group may name an entry of a registry
  for path, word in zip(paths, words):
    kind = kind_of(root, path, changed, named)
    value = _read(word, kind, get_option(changed, path), f"config.{join_path(path)}")
    if isinstance(value, tuple) and not _is_list(word.text or ""):
      value = elements[path] = (*elements.get(path, ()), *value)
    else:
      elements.pop(path, None)
    values.pop(join_path(path), None)  # the last word decides the order
    values[join_path(path)] = value
    with changed.unlocked(), changed.ignore_type():  # as load_config does
      set_option(changed, path, value)
  return values


def kind_of(
  root: Any,
  path: tuple[Key, ...],
  config: Any,
  named: Mapping[tuple[Key, ...], str | None] = types.MappingProxyType({}),
  outer: tuple[Key, ...] = (),
) -> Any:
  """The type of an option, or {name: Option} of one entry of a registry.

  Args:
    root: the dataclass of the options of a config.
    path: of the option.
    config: the config, which names the entries of registries.
    named: {path: name} of entries that replace those of the config.
    outer: the place of the part of a config that `path` starts from, such as ("stages", 0).

  Raises:
    TypeError: for an option that does not exist.
  """
  kind: Any = root
  for i, key in enumerate(path):
    here, where = path[:i], join_path(("config", *outer, *path[:i]))
    own = options.own_options(kind)
    if own and key not in own:  # a part of the config: its options are those of the config
      return kind_of(root, path[i:], config, named, (*outer, *here))
    known, element = _options_at(kind, here, config, named)
    if isinstance(key, str) and key in known:
      kind = known[key].type
    elif element is not None and (kind is Any or isinstance(key, int) == _is_sequence(kind)):
      kind = element
    elif element is not None:
      what, way = ("sequence", "[0]") if _is_sequence(kind) else ("mapping", ".NAME")
      raise TypeError(f"{where} is a {what}: its elements are {where}{way}, not {key!r}")
    elif known:
      entries = {} if isinstance(kind, Mapping) else options.inside(kind).entries
      raise TypeError(_unknown(root, str(key), known, where, config, entries))
    else:
      raise TypeError(f"{where} is a single value; it has no option {key!r}")
  return kind


def _options_at(
  kind: Any,
  here: tuple[Key, ...],
  config: Any,
  named: Mapping[tuple[Key, ...], str | None],
) -> tuple[Mapping[str, Option], Any]:
  """({name: option}, type of other elements or None) inside the value at `here`."""
  if kind is Any:
    return {}, Any
  if isinstance(kind, Mapping):  # one entry of a registry
    return kind, None
  group = options.inside(kind)
  if group.entries and not group.key:  # {entry: its options}
    return {name: Option(known, None, "") for name, known in group.entries.items()}, None
  if group.entries:
    given = named.get((*here, group.key), get_option(config, (*here, group.key)))
    return group.known(given or group.default or None), None
  return group.known(), group.element


def _unknown(
  root: Any,
  key: str,
  known: Mapping[str, Option],
  where: str,
  config: Any,
  entries: Mapping[str, Mapping[str, Option]],
) -> str:
  """The message for an option that does not exist: the nearest ones, and what there is."""
  owners = [entry for entry, own in entries.items() if key in own]
  near = tree.nearest(key, known)
  if owners:
    near = f" It is an option of {tree.shown(owners, sep=', ')}."
  elif not near:
    found = [name for name in names(root, config) if name.endswith(f".{key}")]
    if "_" in key:  # two words of the documentation, such as "learning rate"
      words = key.replace("_", " ")
      found += [f"{where}.{name}" for name, x in known.items() if words in x.doc][:1]
    near = f" Did you mean {' or '.join(found[:3])}?" if found else ""
  section = where.removeprefix("config").lstrip(".")
  return (
    f"{where}: unknown option {key!r}.{near} Options: {tree.shown(known, sep=', ')};"
    f" `bigalign options{' ' * bool(section)}{section}` explains all"
  )


def names(kind: Any, config: Any, here: tuple[Key, ...] = ()) -> Iterator[str]:
  """The names of all options of a config, such as "config.optimizer.lr", from the top down."""
  known, _ = _options_at(kind, here, config, {})
  groups = []
  for name, option in known.items():
    yield join_path(("config", *here, name))
    is_written = isinstance(option.type, Mapping)  # a loss: only those of the config
    if not is_written or get_option(config, (*here, name)) is not None:
      groups.append((option.type, (*here, name)))
  for inner, path in groups:
    yield from names(inner, config, path)


def _check_order(paths: Sequence[tuple[Key, ...]]) -> None:
  for i, later in enumerate(paths):
    for earlier in paths[:i]:
      if earlier != later and earlier[: len(later)] == later:
        raise ValueError(
          f"--config.{join_path(later)} after --config.{join_path(earlier)} would undo it;"
          " give the group first"
        )


def _read(word: Word, kind: Any, current: Any, where: str) -> Any:
  is_switch = bool in _parts(kind) or isinstance(current, bool)
  if word.negated or word.text is None:
    if not is_switch:
      written = f"--{'no' * word.negated}{where}"
      raise TypeError(f"{written}: {where} needs a value, --{where}=VALUE; it is {_spelled(kind)}")
    return not word.negated
  try:
    return read_text(word.text, kind, current)
  except ValueError:
    group = None if isinstance(kind, Mapping) else options.inside(kind)
    way = ""
    if group and group.key and word.text in group.entries:
      way = f"; to choose {word.text}, write --{where}.{group.key}={word.text}"
    raise TypeError(f"{where}={word.text!r} must be {_spelled(kind)}{way}") from None


def read_text(text: str, kind: Any, current: Any = None) -> Any:
  """The value that a text means for an option of a type.

  >>> read_text("3", float), read_text("3 epochs", int | str), read_text("(1, 2)", tuple[int, int])
  (3.0, '3 epochs', (1, 2))
  >>> read_text("None", int | None), read_text("None", str), read_text("txt", Sequence[str])
  (None, 'None', ('txt',))

  Args:
    text: as it was typed; lists, tuples and dicts as in Python.
    kind: the type, or {name: Option}.
    current: the value that it replaces; if `kind` allows any, a text replaces a text.

  Raises:
    ValueError: if the type excludes it.
  """
  parts = _parts(kind)
  if type(None) in parts and text == "None":
    return None
  if bool in parts and text.lower() in (*_TRUE, *_FALSE):
    return text.lower() in _TRUE
  for number in (int, float):
    if number in parts:
      try:
        return number(text)
      except ValueError:
        pass
  for part in parts:
    if typing.get_origin(part) is typing.Literal:
      for value in typing.get_args(part):
        if text == str(value):
          return value
    elif part is Any:
      return text if isinstance(current, str) else _any(text)
    elif _is_sequence(part):
      if str not in parts or _is_list(text):
        return _sequence(text, part)
    elif _is_group(part):
      value = _literal_or_text(text) if str in parts else _literal(text)
      if isinstance(value, dict) or (value is None and str not in parts):
        return value
  if str in parts:
    return text
  raise ValueError(f"{text!r} is not {_spelled(kind)}")


def _parts(kind: Any) -> list[Any]:
  """The types of a union; [kind] if it is not a union."""
  if isinstance(kind, Mapping) or options.inside(kind).entries:
    return [kind]
  if typing.get_origin(kind) is typing.Annotated:
    return [kind] if _is_group(kind) else _parts(typing.get_args(kind)[0])
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return [x for part in typing.get_args(kind) for x in _parts(part)]
  return [kind]


def _is_group(kind: Any) -> bool:
  """Whether values of a type are mappings."""
  if isinstance(kind, Mapping):
    return True
  group = options.inside(kind)
  return bool(
    group.options or group.entries or (group.element is not None and not _is_sequence(kind))
  )


def _is_sequence(kind: Any) -> bool:
  origin = typing.get_origin(kind)
  return isinstance(origin, type) and issubclass(origin, Sequence)


def _sequence(text: str, kind: Any) -> tuple[Any, ...]:
  """A tuple of a literal; a text that is not a literal is the only element."""
  value = _literal_or_text(text)
  made = tuple(value) if isinstance(value, list | tuple) else (value,)
  if options.fits(made, kind) or options.inside(kind).element is not str:
    return made
  if options.fits((text,), kind):
    return (text,)
  raise ValueError(text)


def _is_list(text: str) -> bool:
  """Whether a text is a list or a tuple as Python writes it."""
  return isinstance(_literal_or_text(text), list | tuple)


def _any(text: str) -> Any:
  """The value of an option without a type: a switch, a value as Python writes it, or the text."""
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  return _literal_or_text(text)


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    raise ValueError(f"{text!r} is not a value as Python writes it") from None


def _literal_or_text(text: str) -> Any:
  try:
    return _literal(text)
  except ValueError:
    return text


def _spelled(kind: Any) -> str:
  """A type as an error names it."""
  if any(_is_group(part) for part in _parts(kind)):
    return "a group, whose options are given one by one, or together as {'option': value}"
  return options.spelled(kind)
