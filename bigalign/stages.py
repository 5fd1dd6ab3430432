"""A run in stages: what each stretch of it does differently from the config.

  c.stages = (
    dict(until="90%", data=dict(image_size=112, tokenizer=dict(length=16)), batch_size=65_536),
    dict(until="97%", model=dict(image=dict(patch_dropout=0.5))),
  )

The config itself is the last stage, behind the last `until`: its parameters are those of the run,
and what is evaluated and exported. One learning rate goes over all stages. CLIPA,
https://arxiv.org/abs/2305.07017; FLIP's tuning without masks, https://arxiv.org/abs/2212.00794.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigalign import config as configs
from bigalign import tree

# What a stage may say beside `until`, and of which type: what changes no parameter's shape.
OVERRIDES = {
  "batch_size": "int",
  "microbatches": "int",
  "data/image_size": "int",
  "data/tokenizer/length": "int",
  "data/augment": "Mapping[str, Any] | None",
  "model/image/patch_dropout": "float",
  "model/image/remat": "str",
  "model/text/remat": "str",
}


class Stage(NamedTuple):
  """The updates behind the first `begin` up to the `end`-th, by a config without stages.

  number: from 0; the last is the config itself. where: its place in the config, for errors.
  """

  number: int
  where: str
  begin: int
  end: int
  config: Mapping[str, Any]

  @property
  def batch_size(self) -> int:
    """Of the global batch."""
    return int(self.config["batch_size"])


def split(config: Mapping[str, Any], *, dataset_size: int = 0) -> list[Stage]:
  """The stages of a config in their order; of one without `stages` itself alone.

  A stage ends where `until` says: behind so many updates ("5000 steps"), or at a place in the data
  ("1e9 samples", "3 epochs"), to the nearest update, each stage reading batches of its own size.
  total_steps is such a place too. A share, "90%", is one of total_steps as that is written: of the
  updates, or of the samples where it says samples or epochs.

  Args:
    config: as `train` takes it; needs total_steps, batch_size, and what its stages change.
    dataset_size: samples of an epoch, if something is said in epochs.

  Raises:
    ValueError, TypeError: for a stage that says what none may, that holds no update, or that leaves
      none to the config itself.
  """
  base = configs.plain({k: v for k, v in config.items() if k != "stages"})
  given = configs.plain(config.get("stages") or [])
  _check_batch(Stage(0, "config", 0, 0, base))
  whole = configs.steps(
    base["total_steps"],
    "config.total_steps",
    batch_size=base["batch_size"],
    dataset_size=dataset_size,
  )
  if not given:
    return [Stage(0, "config", 0, whole, base)]
  total = configs.duration(base["total_steps"], "config.total_steps")
  found: list[Stage] = []
  begin = samples = 0
  for number, said in enumerate([*given, {"until": base["total_steps"]}]):
    last = number == len(given)
    where = "config" if last else f"config.stages[{number}]"
    options = {} if last else _overrides(said, where)
    until, what = said["until"], f"config.{'total_steps' if last else f'stages[{number}].until'}"
    stage = Stage(number, where, begin, 0, _changed(base, options))
    _check_batch(stage)
    place = _place(until, what, total, dataset_size)
    end = round(place.number)
    if place.unit == "sample":
      end = begin + round((place.number - samples) / stage.batch_size)
    if end <= begin:
      before = (
        f"config.stages[{number - 1}] before it ends at {begin:,}"
        if number
        else ("the run begins at 0")
      )
      raise ValueError(
        f"{what}={until!r} is update {end:,} of the run, and {before}; each stage must end behind"
        f" the one before it, and all before config.total_steps={base['total_steps']!r}"
      )
    found.append(stage._replace(end=end))
    samples += (end - begin) * stage.batch_size
    begin = end
  return found


def steps(
  value: int | str,
  where: str,
  stages: Sequence[Stage],
  *,
  dataset_size: int = 0,
  back: bool = False,
) -> int:
  """config.steps of a stretch at the start of the run, or `back` from its end: its samples are
  those of the batches that lie in it, whatever their sizes."""
  sizes = dict(dataset_size=dataset_size, total_steps=stages[-1].end)
  alike = len({stage.batch_size for stage in stages}) == 1
  if alike or isinstance(value, int) or configs.duration(value, where).unit in ("step", "%"):
    return configs.steps(value, where, batch_size=stages[-1].batch_size, **sizes)
  asked = left = configs.steps(value, where, batch_size=1, **sizes)
  done = 0
  for stage in reversed(stages) if back else stages:
    length = round(left / stage.batch_size)
    if length <= stage.end - stage.begin:
      return max(1, done + length) if asked else 0
    left -= (stage.end - stage.begin) * stage.batch_size
    done += stage.end - stage.begin
  return done + round(left / stage.batch_size)


@contextlib.contextmanager
def named(stage: Stage) -> Iterator[None]:
  """A context whose errors name the stage, if it is not the config itself."""
  try:
    yield
  except (ValueError, TypeError) as error:
    if stage.where == "config":
      raise
    kind = TypeError if isinstance(error, TypeError) else ValueError
    raise kind(f"{stage.where}, with what it changes: {error}") from error


def _check_batch(stage: Stage) -> None:
  if stage.batch_size < 2:
    raise ValueError(
      f"{stage.where}.batch_size={stage.batch_size}: contrast needs two pairs at least"
    )


def _overrides(said: Any, where: str) -> dict[str, Any]:
  """{path: value} of what a stage says beside `until`, checked."""
  if not isinstance(said, Mapping) or "until" not in said:
    raise ValueError(f"{where}={said!r}: a stage is a dict, and says where it ends: until='90%'")
  found = dict(_leaves({k: v for k, v in said.items() if k != "until"}))
  for path, value in found.items():
    dotted = path.replace("/", ".")
    if path not in OVERRIDES:
      known = [name.replace("/", ".") for name in OVERRIDES]
      raise ValueError(
        f"{where}: {dotted!r} is the same in all stages.{tree.nearest(dotted, known)} A stage may"
        f" change {', '.join(known)}"
      )
    if not configs.fits(value, OVERRIDES[path]):
      raise TypeError(
        f"{where}.{dotted}={value!r} is of type {type(value).__name__}; it must be"
        f" {OVERRIDES[path]}"
      )
  return found


def _leaves(said: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in said.items():
    path = prefix + name
    if isinstance(value, Mapping) and path not in OVERRIDES:
      yield from _leaves(value, f"{path}/")
    else:
      yield path, value


def _changed(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of a config with other values at some paths."""
  made: dict[str, Any] = configs.plain(base)
  for path, value in options.items():
    tree.put(made, path, value)
  return made


def _place(
  until: int | str, where: str, total: configs.Duration, dataset_size: int
) -> configs.Duration:
  """How far from the start of the run, in units "step" or "sample"."""
  place = configs.duration(until, where)
  if place.unit == "%":
    place = configs.Duration(total.number * place.number / 100, total.unit)
  if place.unit != "epoch":
    return place
  epoch = configs.steps("1 epochs", where, batch_size=1, dataset_size=dataset_size)
  return configs.Duration(place.number * epoch, "sample")
