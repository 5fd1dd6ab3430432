"""The stages of a run: stretches with other options than those of the config.

  c.stages = (
    dict(until="90%", data=dict(image_size=112, tokenizer=dict(length=16)), batch_size=65_536),
    dict(until="97%", model=dict(image=dict(patch_dropout=0.5))),
  )

After the last `until`, the config's own options apply; evaluation and export use these too. One
learning rate schedule covers all stages. Two uses: CLIPA, https://arxiv.org/abs/2305.07017, and
FLIP's final tuning without masking, https://arxiv.org/abs/2212.00794.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigalign import durations, tree
from bigalign.config import Config
from bigalign.options import fits, plain, resolve, spelled

# What a stage may override, and its type: what changes no parameter's shape.
OVERRIDES: dict[str, Any] = {
  "batch_size": int,
  "microbatches": int,
  "data/image_size": int,
  "data/tokenizer/length": int,
  "data/augment": Mapping[str, Any] | None,
  "model/image/patch_dropout": float,
  "model/image/remat": str,
  "model/text/remat": str,
}


class Stage(NamedTuple):
  """The updates `begin` < n <= `end`, run with `config`, which has no stages of its own.

  number: from 0; the last stage is the config itself. where: its place in the config, for errors.
  """

  number: int
  where: str
  begin: int
  end: int
  config: Config

  @property
  def batch_size(self) -> int:
    """Of the global batch."""
    return self.config.batch_size


def split(config: Config, *, dataset_size: int = 0) -> list[Stage]:
  """The stages of a config in their order; of one without `stages`, the config alone.

  A stage ends at its `until`: after a number of updates ("5000 steps"), or at a position in the
  data ("1e9 samples", "3 epochs"), rounded to the nearest update of that stage's batch size.
  total_steps is interpreted in the same way. "90%" is a share of total_steps in its own unit: of
  updates if total_steps is in steps, of samples if it is in samples or epochs.

  Args:
    config: of the run.
    dataset_size: samples of an epoch, if a duration is in epochs.

  Raises:
    ValueError, TypeError: for an option that no stage may change, for a stage without updates, and
      if no update is left for the config itself.
  """
  base = {k: v for k, v in plain(config).items() if k != "stages"}
  _check_batch("config", config.batch_size)
  if not config.stages:
    total_steps = durations.steps(
      config.total_steps,
      "config.total_steps",
      batch_size=config.batch_size,
      dataset_size=dataset_size,
    )
    return [Stage(0, "config", 0, total_steps, config)]
  total = durations.duration(config.total_steps, "config.total_steps")
  stages: list[Stage] = []
  begin = samples = 0
  for number, given in enumerate([*config.stages, {"until": config.total_steps}]):
    last = number == len(config.stages)
    where = "config" if last else f"config.stages[{number}]"
    overrides = {} if last else _overrides(given, where)
    until = given["until"]
    place_of_until = "config.total_steps" if last else f"config.stages[{number}].until"
    batch_size = overrides.get("batch_size", config.batch_size)
    _check_batch(where, batch_size)
    position = _position(until, place_of_until, total, dataset_size)
    if position.unit == "sample":
      end = begin + round((position.number - samples) / batch_size)
    else:
      end = round(position.number)
    if end <= begin:
      before = (
        f"config.stages[{number - 1}] before it ends at {begin:,}"
        if number
        else "the run begins at 0"
      )
      raise ValueError(
        f"{place_of_until}={until!r} is update {end:,} of the run, but {before}. Stages must end in"
        f" ascending order, the last one before config.total_steps={config.total_steps!r}"
      )
    stage = Stage(number, where, begin, end, config)
    with named(stage):
      stages.append(stage._replace(config=resolve(Config, _changed(base, overrides), "config")))
    samples += (end - begin) * batch_size
    begin = end
  return stages


def steps(
  value: int | str,
  where: str,
  stages: Sequence[Stage],
  *,
  dataset_size: int = 0,
  back: bool = False,
) -> int:
  """How many updates a duration takes, whose samples are in batches of each stage's size.

  Args:
    value: the duration.
    where: its place in the config, for errors.
    stages: of the run.
    dataset_size: samples of an epoch.
    back: count from the end of the run instead of its start.
  """
  sizes = dict(dataset_size=dataset_size, total_steps=stages[-1].end)
  one_size = len({stage.batch_size for stage in stages}) == 1
  if one_size or isinstance(value, int) or durations.duration(value, where).unit in ("step", "%"):
    return durations.steps(value, where, batch_size=stages[-1].batch_size, **sizes)
  samples_left = durations.steps(value, where, batch_size=1, **sizes)
  if not samples_left:
    return 0
  done = 0
  last_size = stages[0].batch_size if back else stages[-1].batch_size
  for stage in reversed(stages) if back else stages:
    length = round(samples_left / stage.batch_size)
    if length <= stage.end - stage.begin:
      return max(1, done + length)
    samples_left -= (stage.end - stage.begin) * stage.batch_size
    done += stage.end - stage.begin
  return done + round(samples_left / last_size)


@contextlib.contextmanager
def named(stage: Stage) -> Iterator[None]:
  """A context whose errors name the stage, unless the stage is the config itself."""
  try:
    yield
  except (ValueError, TypeError) as error:
    if stage.where == "config":
      raise
    kind = TypeError if isinstance(error, TypeError) else ValueError
    raise kind(f"{stage.where}, with its overrides: {error}") from error


def _check_batch(where: str, batch_size: int) -> None:
  if batch_size < 2:
    raise ValueError(f"{where}.batch_size={batch_size}: a contrastive loss needs at least 2 pairs")


def _overrides(given: Any, where: str) -> dict[str, Any]:
  """{path: value} of what a stage overrides, checked."""
  if not isinstance(given, Mapping) or "until" not in given:
    raise ValueError(
      f"{where}={given!r}: a stage is a dict with the key until, such as until='90%'"
    )
  overrides = dict(_leaves({k: v for k, v in given.items() if k != "until"}))
  for path, value in overrides.items():
    dotted = path.replace("/", ".")
    if path not in OVERRIDES:
      known = [name.replace("/", ".") for name in OVERRIDES]
      raise ValueError(
        f"{where}: {dotted!r} is the same in all stages.{tree.nearest(dotted, known)} A stage may"
        f" change {', '.join(known)}"
      )
    if not fits(value, OVERRIDES[path]):
      raise TypeError(
        f"{where}.{dotted}={value!r} is of type {type(value).__name__}; it must be"
        f" {spelled(OVERRIDES[path])}"
      )
  return overrides


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in options.items():
    path = prefix + name
    if isinstance(value, Mapping) and path not in OVERRIDES:
      yield from _leaves(value, f"{path}/")
    else:
      yield path, value


def _changed(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of plain options with other values at some paths."""
  changed: dict[str, Any] = plain(base)
  for path, value in overrides.items():
    tree.put(changed, path, value)
  return changed


def _position(
  until: int | str, where: str, total: durations.Duration, dataset_size: int
) -> durations.Duration:
  """The distance from the start of the run, in units "step" or "sample"."""
  position = durations.duration(until, where)
  if position.unit == "%":
    position = durations.Duration(total.number * position.number / 100, total.unit)
  if position.unit != "epoch":
    return position
  epoch = durations.steps("1 epochs", where, batch_size=1, dataset_size=dataset_size)
  return durations.Duration(position.number * epoch, "sample")
