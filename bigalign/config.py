"""Experiments as data: compared, fingerprinted, handed to functions by their signatures."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bigalign import tree

# What may change between two runs in one workdir without touching what is learned.
HARMLESS = re.compile(
  r"^(mesh|topology|rules|evals|writer|runtime|keep|profile|logits)(/|$)"
  r"|^(log_every|checkpoint_every|eval_every|diagnose_every|(stages/\d+/)?microbatches|patience)$"
  # Where the data lies; what it is has a fingerprint.
  r"|^data/(workers|source)$|^data/stores/(image|text|second|keep)$|^data/tokenizer/(path|vocabulary)$"
)


def plain(config: Any) -> Any:
  """A ConfigDict or any nest of mappings and sequences as dicts and lists that JSON can hold."""
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {str(k): plain(v) for k, v in config.items()}
  if isinstance(config, list | tuple):
    return [plain(v) for v in config]
  return config


def fingerprint(config: Any) -> str:
  """16 hex digits that change when any value does."""
  return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
  """{path: (old, new)} where two configs part in what is learned; "(absent)" for a missing key."""
  a, b = (
    tree.flatten({**x, "stages": {str(i): stage for i, stage in enumerate(x.get("stages") or ())}})
    for x in (plain(old), plain(new))
  )
  return {
    path: (a.get(path, "(absent)"), b.get(path, "(absent)"))
    for path in sorted({*a, *b})
    if a.get(path, "(absent)") != b.get(path, "(absent)") and not HARMLESS.search(path)
  }


def call(function: Callable[..., Any], options: Mapping[str, Any], where: str, **fixed: Any) -> Any:
  """function(**fixed, **options), where the options come from the config at `where`.

  An option that the function does not take, or one that it needs and does not get, is a TypeError
  that names the place in the config, the nearest known option and all the others.
  """
  parameters = inspect.signature(function).parameters
  known = [name for name in parameters if name not in fixed]
  anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  for name in options:
    if name not in known and not anything:
      raise TypeError(
        f"{where}: unknown option {name!r}.{tree.nearest(name, known)} Options: {known}"
      )
  missing = [
    name
    for name in known
    if parameters[name].default is inspect.Parameter.empty
    and name not in options
    and parameters[name].kind
    in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  ]
  if missing:
    raise TypeError(f"{where}: option {missing[0]!r} is missing. Options: {known}")
  for name, value in options.items():
    if name in parameters and not fits(value, str(parameters[name].annotation)):
      raise TypeError(
        f"{where}.{name}={value!r} is of type {type(value).__name__}; it must be"
        f" {parameters[name].annotation}"
      )
  return function(**fixed, **options)


_KINDS: dict[str, tuple[type, ...]] = {
  "int": (int,),
  "float": (int, float),
  "str": (str,),
  "bool": (bool,),
  "None": (type(None),),
}


def fits(value: Any, annotation: str) -> bool:
  """Whether a value is of a plain type such as "int" or "float | None"; any other type passes."""
  kinds = [kind.strip() for kind in annotation.split("|")]
  if not all(kind in _KINDS for kind in kinds):
    return not (annotation.startswith("Mapping") and isinstance(value, int | float | str))
  if isinstance(value, bool) and "bool" not in kinds:
    return False
  return isinstance(value, tuple(t for kind in kinds for t in _KINDS[kind]))


def choose(registry: Mapping[str, Any], name: str, where: str) -> Any:
  """registry[name], or a ValueError that names what there is."""
  if name not in registry:
    raise ValueError(
      f"{where}: unknown {name!r}.{tree.nearest(name, registry)} Known: {sorted(registry)}"
    )
  return registry[name]


def known(where: str, value: Any, names: Iterable[str]) -> None:
  """Raises ValueError, naming `where`, unless `value` is one of `names`."""
  names = list(names)
  if value not in names:
    raise ValueError(f"{where}: unknown {value!r}; known: {sorted(names)}")


def above_zero(where: str, most: float = math.inf, **numbers: float) -> None:
  """Raises ValueError, naming `where` and the option, for a number not in (0, most]."""
  for name, value in numbers.items():
    # What is traced has no value yet.
    if isinstance(value, int | float) and not 0 < value <= most:
      bound = "" if most == math.inf else f" and at most {most:g}"
      raise ValueError(f"{where}.{name}={value!r} must be above 0{bound}")


class Duration(NamedTuple):
  """A stretch of training: 18 of unit "epoch", or "step", "sample", "%" of all updates."""

  number: float
  unit: str


def duration(value: int | str, where: str) -> Duration:
  """500, "500 steps", "1e9 samples", "18 epochs" or "50%", as a Duration.

  Raises:
    ValueError: for any other text.
  """
  found = re.fullmatch(
    r"\s*(\d[\d_]*\.?\d*(?:[eE]\+?\d+)?)\s*(steps?|samples?|epochs?|%)?\s*", str(value)
  )
  if not found:
    raise ValueError(
      f"{where}: {value!r} is no duration; write a number of steps, '1e9 samples', '3 epochs' or"
      " '2%'"
    )
  return Duration(float(found.group(1)), (found.group(2) or "step").rstrip("s"))


def steps(
  value: int | str, where: str, *, batch_size: int, dataset_size: int, total_steps: int = 0
) -> int:
  """A duration in updates: 500, "500 steps", "1e9 samples", "3 epochs" or "2%" of total_steps.

  Rounded to the nearest step, never below 1 unless the duration is 0.

  Raises:
    ValueError: for any other text, or a percentage where there is no total.
  """
  if isinstance(value, int):
    return value
  number, unit = duration(value, where)
  length = {
    "step": 1.0,
    "sample": 1 / batch_size,
    "epoch": dataset_size / batch_size,
    "%": total_steps / 100,
  }[unit]
  if not length and unit == "epoch":
    raise ValueError(
      f"{where}: {value!r} needs the size of the dataset, which is not known here;"
      " `bigalign plan` takes it as --samples"
    )
  if not length:
    raise ValueError(f"{where}: {value!r} is a share of the steps in all, which are not known here")
  return max(1, round(number * length)) if number else 0
