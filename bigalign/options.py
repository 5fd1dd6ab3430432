"""Options: defined once, resolved once from the plain values of a config.

An option is a parameter of a function or a field of a frozen dataclass: its name, its type, its
default and its line in the docstring's `Args:` are the whole definition. `resolve` turns plain
values into an object with every default filled in, and refuses unknown names, missing ones and
wrong types; `plain` turns the object back into values that JSON can hold.

Which of the two forms a group of options has depends on who reads it:

  a dataclass   several places read its fields (config.data, a tower)
  a function    one place calls it (a loss, an optimizer, an evaluator)

A field that holds another group says so in its type:

  data: DataOptions                                              a dataclass
  keep: Annotated[Component, Call(Checkpoints, fixed=("workdir",))]          one function
  tokenizer: Annotated[Component, Choose(TOKENIZERS)]            one of a registry, dict(name=…, …)
  evals: Mapping[str, Annotated[Component, Choose(EVALS, key="type")]]       several, by name
  columns: Mapping[str, ColumnOptions]     several, by name; a dataclass with SHORTHAND="field" lets
                                           a text stand for dict(field=text)

`inside` says what such a type holds; the command line and the reference of the options read it.

Nothing here imports JAX: data workers read options too.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import hashlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bigalign import tree

MISSING: Any = inspect.Parameter.empty
DEFAULTS: Any = None  # the default of a group of options: `resolve` fills in the group's defaults


@dataclasses.dataclass(frozen=True)
class Component:
  """A function of a config with every option filled in, ready to be called.

  Args:
    name: its key in the registry that it was chosen from; "" for a function that was not chosen.
    function: what takes the options.
    options: {option: value}; read-only.
    where: its place in the config, for errors.
  """

  name: str
  function: Callable[..., Any]
  options: Mapping[str, Any]
  where: str

  def make(self, *args: Any, **fixed: Any) -> Any:
    """function(*args, **fixed, **options)."""
    return self.function(*args, **fixed, **self.options)

  def option(self, name: str) -> Any:
    """The value of one option, given or default."""
    return self.options[name]

  @property
  def is_default(self) -> bool:
    """Whether every option has its default."""
    known = _definition(self.function)
    return all(value == known[name].default for name, value in self.options.items())


class Call(NamedTuple):
  """Marks a field whose options are the parameters of a function.

  Args:
    function: what takes the options.
    fixed: parameters that the program passes, which are not options.
    shared: a function whose parameters are options next to those of `function`; the program takes
      them out before it calls `function`.
  """

  function: Callable[..., Any]
  fixed: tuple[str, ...] = ()
  shared: Callable[..., Any] | None = None

  @property
  def known(self) -> dict[str, Option]:
    """All options by name."""
    return {
      **(definition(self.shared) if self.shared else {}),
      **definition(self.function, self.fixed),
    }


class Choose(NamedTuple):
  """Marks a field whose options are those of one entry of a registry.

  Args:
    registry: {name: function or dataclass}.
    key: the option that names the entry; "" where the field is a mapping whose keys name them.
    fixed: parameters that the program passes, which are not options.
    shared: a function whose parameters, without `fixed`, are options next to those of the entry.
    default: the entry if none is named; "" where one must be named.
  """

  registry: Mapping[str, Any]
  key: str = "name"
  fixed: tuple[str, ...] = ()
  shared: Callable[..., Any] | None = None
  default: str = ""


class Also(NamedTuple):
  """Marks a field whose group has more options in a config file than when it is resolved.

  Args:
    group: a dataclass with these options, which become others before the config is resolved.
  """

  group: type


class PartOfConfig(NamedTuple):
  """Marks a mapping that overrides options of the whole config, by the same names and types.

  Args:
    own: a dataclass with its options that the config does not have.
  """

  own: type


class Option(NamedTuple):
  """One option: its type, its default (MISSING if it must be given), and its documentation."""

  type: Any
  default: Any
  doc: str


def definition(target: Any, fixed: Sequence[str] = ()) -> dict[str, Option]:
  """{name: Option} of a function's parameters or of a dataclass's fields, in their order.

  Args:
    target: a function or a class.
    fixed: names that are not options.
  """
  return {name: option for name, option in _definition(target).items() if name not in fixed}


@functools.lru_cache(maxsize=1024)
def _definition(target: Any) -> dict[str, Option]:
  hints = typing.get_type_hints(_hinted(target), include_extras=True)
  docs = documentation(target)
  kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return {
    name: Option(hints.get(name, Any), parameter.default, docs.get(name, ""))
    for name, parameter in inspect.signature(target).parameters.items()
    if parameter.kind in kinds
  }


def _hinted(target: Any) -> Any:
  """What carries the annotations of a function or a class."""
  if isinstance(target, functools.partial):
    return target.func
  if isinstance(target, type) and not dataclasses.is_dataclass(target):
    return target.__init__  # type: ignore[misc]
  return target


def documentation(target: Any) -> dict[str, str]:
  """{option: text} of the `Args:` section of a docstring, of a class and its bases.

  Args:
    target: a function, a class, or a docstring.
  """
  if isinstance(target, str):
    return _args_section(inspect.cleandoc(target))
  if not isinstance(target, type):
    return _args_section(inspect.getdoc(target) or "")
  found: dict[str, str] = {}
  for base in reversed(target.__mro__):
    if base is object:
      continue
    found |= _args_section(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    found |= _args_section(inspect.getdoc(base.__dict__.get("__init__")) or "")
  return found


def _args_section(text: str) -> dict[str, str]:
  docs: dict[str, str] = {}
  names: list[str] = []
  inside, indent = False, 0
  for line in text.splitlines():
    stripped = line.strip()
    depth = len(line) - len(line.lstrip())
    if stripped in ("Args:", "Attributes:"):
      inside, indent, names = True, 0, []
    elif inside and stripped and depth == 0:
      inside = False
    elif inside and stripped:
      indent = indent or depth
      head, colon, rest = stripped.partition(":")
      if depth == indent and colon:
        names = [name.strip().lstrip("*") for name in head.split(",")]
        docs |= dict.fromkeys(names, rest.strip())
      else:
        docs |= {name: f"{docs[name]} {stripped}" for name in names}
  return docs


class Inside(NamedTuple):
  """What the value of an option holds.

  Args:
    options: {name: option} of one group.
    entries: {entry: {name: option}} of a registry from which the value names one, or several.
    about: {entry: the first paragraph of its documentation}.
    key: the option that names the entry; "" where the keys of a mapping do.
    default: the entry if none is named.
    element: the type of each element of a mapping by any name, or of a sequence; None for others.
    place: of an element: ".NAME" of a mapping, "[0]" of a sequence.
  """

  options: Mapping[str, Option]
  entries: Mapping[str, Mapping[str, Option]]
  about: Mapping[str, str]
  key: str
  default: str
  element: Any
  place: str = ""

  def known(self, entry: str | None = None) -> dict[str, Option]:
    """All options of the group; an unknown entry has the options of all entries."""
    if not self.key:
      return dict(self.options)
    one = self.entries.get(entry or "")
    chosen = [*self.entries.values()] if one is None else [one]
    named = {self.key: Option(str, self.default or MISSING, f"one of {', '.join(self.entries)}")}
    own = {name: option for options in reversed(chosen) for name, option in options.items()}
    return {**named, **self.options, **own}


def inside(kind: Any) -> Inside:
  """What the values of a type hold; nothing for plain values."""
  marker, base = _marker(kind)
  inner = _without_none(base)
  also = next((x for x in getattr(kind, "__metadata__", ()) if isinstance(x, Also)), None)
  options = definition(also.group) if also else {}
  if own := own_options(kind):
    return Inside(own, {}, {}, "", "", None)
  if isinstance(marker, Call):
    options |= marker.known
  elif isinstance(marker, Choose):
    hidden = (*marker.fixed, marker.key)
    shared = definition(marker.shared, hidden) if marker.shared else {}
    entries = {
      name: {**shared, **definition(entry, marker.fixed)} for name, entry in marker.registry.items()
    }
    about = {name: _first_paragraph(entry) for name, entry in marker.registry.items()}
    return Inside(options, entries, about, marker.key, marker.default, None)
  elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
    options |= definition(inner)
  elif _is_mapping(inner):
    return Inside({}, {}, {}, "", "", [*typing.get_args(inner), Any, Any][1], ".NAME")
  elif typing.get_origin(inner) in (tuple, list, collections.abc.Sequence):
    return Inside({}, {}, {}, "", "", [*typing.get_args(inner), Any][0], "[0]")
  return Inside(options, {}, {}, "", "", None)


def own_options(kind: Any) -> dict[str, Option]:
  """{name: option} of a part of the config besides those of the config; {} for other types."""
  extras = getattr(kind, "__metadata__", ())
  part = next((x for x in extras if isinstance(x, PartOfConfig)), None)
  return definition(part.own) if part else {}


def _first_paragraph(target: Any) -> str:
  return " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())


def resolve(target: Any, given: Any, where: str, fixed: Sequence[str] = ()) -> Any:
  """The options of a function or a dataclass, checked and with every default filled in.

  Args:
    target: a dataclass, of which an instance is returned, or a function.
    given: {option: value} in plain values: numbers, text, None, mappings, sequences.
    where: the place in the config, such as "config.data", for errors.
    fixed: parameters of a function that are not options.

  Returns:
    The dataclass, or a Component.

  Raises:
    TypeError: for an unknown or missing option and for a value of another type; it names the place,
      the nearest known option and all of them.
    ValueError: for an unknown name of a registry, and what a dataclass itself refuses.
  """
  known = definition(target, fixed)
  others: dict[str, Any] = {}
  if isinstance(given, Mapping) and _takes_others(target):
    others = {name: value for name, value in given.items() if name not in known}
    given = {name: value for name, value in given.items() if name in known}
  values = {**_values(known, given, where), **others}
  if not fixed and dataclasses.is_dataclass(target) and isinstance(target, type):
    return target(**values)
  return Component("", target, values, where)


def _takes_others(target: Any) -> bool:
  """Whether a function takes **options, which cannot be checked by name or type."""
  parameters = inspect.signature(target).parameters.values()
  return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def call(target: Any, given: Any, where: str, **fixed: Any) -> Any:
  """target(**fixed, **options) with the options of `given` resolved; errors as of `resolve`."""
  options = resolve(target, given, where, tuple(fixed))
  return options.make(**fixed) if isinstance(options, Component) else options


def _values(known: Mapping[str, Option], given: Any, where: str) -> dict[str, Any]:
  if not isinstance(given, Mapping):
    raise TypeError(
      f"{where}={_shown(given)} is of type {type(given).__name__}; it must be a dict of options:"
      f" {[*known]}"
    )
  for name in given:
    if name not in known:
      raise TypeError(
        f"{where}: unknown option {name!r}.{tree.nearest(name, known)} Options: {[*known]}"
      )
  values = {}
  for name, option in known.items():
    if name not in given and option.default is MISSING:
      raise TypeError(f"{where}: option {name!r} is missing. Options: {[*known]}")
    value = given.get(name, option.default)
    values[name] = resolve_value(option.type, value, f"{where}.{name}")
  return values


def resolve_value(kind: Any, value: Any, where: str) -> Any:
  """A plain value as its type wants it: groups resolved, sequences as tuples.

  Args:
    kind: the type, which may be Annotated.
    value: the plain value.
    where: its place in the config; errors are those of `resolve`.
  """
  marker, kind = _marker(kind)
  optional = _is_optional(kind)
  if value is None and optional:
    return None
  if isinstance(marker, Call):
    value = {} if value is None else value  # a group without an option has its defaults
    if marker.shared:
      return Component("", marker.function, _values(marker.known, value, where), where)
    return resolve(marker.function, value, where, marker.fixed)
  if isinstance(marker, Choose):
    if value is None and (marker.default or not marker.key):
      value = {}
    if marker.key:
      return _chosen(marker, value, where)
    if not isinstance(value, Mapping):
      raise TypeError(f"{where}={_shown(value)} must be a dict: {{name: options}}")
    return {
      str(name): _entry(marker, str(name), options, where, f"{where}.{name}")
      for name, options in value.items()
    }
  inner = _without_none(kind)
  if isinstance(inner, type) and dataclasses.is_dataclass(inner):
    if isinstance(value, str) and (short := getattr(inner, "SHORTHAND", "")):
      value = {short: value}  # a text alone is the value of this option
    return value if isinstance(value, inner) else resolve(inner, value or {}, where)
  nested = _nested(inner)
  if nested and value is None:
    value = {} if _is_mapping(inner) else ()
  if nested and isinstance(value, Mapping) and _is_mapping(inner):
    return {str(name): resolve_value(nested, x, f"{where}.{name}") for name, x in value.items()}
  if nested and isinstance(value, list | tuple) and not _is_mapping(inner):
    return tuple(resolve_value(nested, x, f"{where}[{i}]") for i, x in enumerate(value))
  if not fits(value, kind):
    is_one = isinstance(value, str) and fits((value,), kind)  # a sequence of one was meant
    raise TypeError(
      f"{where}={_shown(value)} is of type {type(value).__name__}; it must be {spelled(kind)}"
      + (f", such as {_shown((value,))}" if is_one else "")
    )
  return frozen(value)


def _shown(value: Any) -> str:
  """A value in an error: a checkpoint from elsewhere may have a very long one."""
  return tree.cut(repr(value), 500)


def _chosen(marker: Choose, value: Any, where: str) -> Any:
  if isinstance(value, Component):
    return value
  if not isinstance(value, Mapping):
    raise TypeError(f"{where}={_shown(value)} must be a dict: dict({marker.key}=…, …)")
  options = dict(value)
  name = options.pop(marker.key, marker.default or "(absent)")
  return _entry(marker, name, options, f"{where}.{marker.key}", where)


def _entry(marker: Choose, name: Any, options: Any, naming: str, where: str) -> Any:
  """One entry of a registry with its options; `naming` is the place of its name in the config."""
  if isinstance(options, Component):
    return options
  if not isinstance(name, str):
    raise TypeError(f"{naming}={_shown(name)} is of type {type(name).__name__}; it must be str")
  if name not in marker.registry:
    raise ValueError(
      f"{naming}: unknown {name!r}.{tree.nearest(name, marker.registry)}"
      f" Known: {sorted(marker.registry)}"
    )
  entry = marker.registry[name]
  is_group = dataclasses.is_dataclass(entry) and isinstance(entry, type)
  if is_group and not marker.fixed and not marker.shared:
    return resolve(entry, options, where)
  known = definition(entry, marker.fixed)
  if marker.shared:
    known = {**definition(marker.shared, (*marker.fixed, marker.key)), **known}
  return Component(name, entry, _values(known, options, where), where)


def _marker(kind: Any) -> tuple[Call | Choose | None, Any]:
  """The marker of an Annotated type, if it has one, and the type itself."""
  if typing.get_origin(kind) is typing.Annotated:
    base, *extras = typing.get_args(kind)
    marker = next((x for x in extras if isinstance(x, Call | Choose)), None)
    return marker, base
  if _is_optional(kind):  # Annotated[…] | None
    for part in typing.get_args(kind):
      marker, _ = _marker(part)
      if marker:
        return marker, kind
  return None, kind


def _is_optional(kind: Any) -> bool:
  return _is_union(kind) and type(None) in typing.get_args(kind)


def _is_union(kind: Any) -> bool:
  return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_mapping(kind: Any) -> bool:
  return typing.get_origin(kind) in (dict, collections.abc.Mapping)


def _without_none(kind: Any) -> Any:
  """X of X | None."""
  parts = [part for part in typing.get_args(kind) if part is not type(None)]
  return parts[0] if _is_optional(kind) and len(parts) == 1 else kind


def _nested(kind: Any) -> Any:
  """The type of the groups that a mapping or a sequence holds; None if it holds plain values."""
  args = typing.get_args(kind)
  if _is_mapping(kind) and len(args) == 2:
    inner = args[1]
  elif typing.get_origin(kind) in (tuple, list, collections.abc.Sequence) and args:
    inner = args[0]
  else:
    return None
  is_group = isinstance(inner, type) and dataclasses.is_dataclass(inner)
  return inner if is_group or _marker(inner)[0] else None


def fits(value: Any, kind: Any) -> bool:
  """Whether a plain value is of a type; an int is a float, a bool is not an int.

  >>> fits(3, float), fits(True, int), fits([1, 2], tuple[int, int]), fits("ab", Sequence[str])
  (True, False, True, False)
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is None or kind is type(None):
    return value is None
  if origin is typing.Annotated:
    return fits(value, args[0])
  if _is_union(kind):
    return any(fits(value, part) for part in args)
  if origin is typing.Literal:
    return value in args
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if kind is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if kind in (str, bool):
    return isinstance(value, kind)
  if origin is tuple and args and args[-1] is not Ellipsis:
    sized = isinstance(value, list | tuple) and len(value) == len(args)
    return sized and all(fits(x, part) for x, part in zip(value, args))
  if origin in (tuple, list, collections.abc.Sequence):
    part = args[0] if args else Any
    return isinstance(value, list | tuple) and all(fits(x, part) for x in value)
  if _is_mapping(kind):
    part = args[1] if args else Any
    return isinstance(value, Mapping) and all(fits(x, part) for x in value.values())
  return True


def spelled(kind: Any) -> str:
  """A type as a person writes it: "int | None"."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is type(None):
    return "None"
  if origin is typing.Annotated:
    return spelled(args[0])
  if _is_union(kind):
    return " | ".join(spelled(part) for part in args)
  if kind is Ellipsis:
    return "…"
  name = getattr(origin or kind, "__name__", str(kind))
  return f"{name}[{', '.join(map(spelled, args))}]" if args else name


def frozen(value: Any) -> Any:
  """A plain value whose lists are tuples and whose mappings are copies."""
  if isinstance(value, Mapping):
    return {str(name): frozen(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return tuple(frozen(x) for x in value)
  return value


def plain(value: Any) -> Any:
  """Options, or any nest of mappings and sequences, as dicts and lists that JSON can hold.

  `resolve` of the result gives equal options again.
  """
  if isinstance(value, Component):
    return {**({"name": value.name} if value.name else {}), **plain(value.options)}
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {
      name: plain_value(option.type, getattr(value, name))
      for name, option in definition(type(value)).items()
    }
  if hasattr(value, "to_dict"):  # a ConfigDict
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {str(name): plain(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [plain(x) for x in value]
  return value


def fingerprint(values: Any) -> str:
  """16 hex digits that change when any value does; the order of keys does not count."""
  text = json.dumps(plain(values), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_defaults(value: Any) -> dict[str, Any]:
  """The plain values of a Component or of a dataclass of options that differ from their defaults.

  A fingerprint of them does not change when an option with a default is added.
  """
  if isinstance(value, Component):
    known = _definition(value.function)
    named = {"name": value.name} if value.name else {}
    items: Any = value.options.items()
  else:
    group: Any = type(value)
    known, named = _definition(group), {}
    items = ((name, getattr(value, name)) for name in known)
  return {**named, **{name: plain(x) for name, x in items if x != known[name].default}}


def plain_value(kind: Any, value: Any) -> Any:
  """The inverse of resolve_value: plain values, with the name of each entry of a registry."""
  marker, base = _marker(kind)
  if value is None:
    return None
  if isinstance(marker, Choose):
    if not marker.key:
      return {name: plain(x.options) for name, x in value.items()}
    return _named(marker, value)
  nested = _nested(_without_none(base))
  if nested and isinstance(_marker(nested)[0], Choose) and isinstance(value, Mapping):
    return {name: plain_value(nested, x) for name, x in value.items()}
  return plain(value)


def _named(marker: Choose, value: Any) -> dict[str, Any]:
  if isinstance(value, Component):
    return {marker.key: value.name, **plain(value.options)}
  name = next(name for name, entry in marker.registry.items() if entry is type(value))
  return {marker.key: name, **plain(value)}
