"""The stages of a run: stretches with other options than those of the config.

  c.stages = (
    dict(until="90%", data=dict(image_size=112, tokenizer=dict(length=16)), batch_size=65_536),
    dict(until="97%", model=dict(image=dict(patch_dropout=0.5))),
  )

After the last `until`, the config's own options apply; evaluation and export use these too. Uses:
CLIPA, https://arxiv.org/abs/2305.07017, FLIP's final tuning without masking,
https://arxiv.org/abs/2212.00794, and an image tower that is locked at first (LiT,
https://arxiv.org/abs/2111.07991). border.py has what happens to the state between two stages.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigalign import durations, tree
from bigalign.config import Config
from bigalign.data.order.lengths import LengthSchedule
from bigalign.options import fits, plain, resolve, spelled

# Options of config.optimizer with which a stage has a schedule of its own.
SCHEDULE: dict[str, Any] = {
  "lr": float,
  "schedule": str,
  "warmup": int | str,
  "cooldown": int | str,
  "end": float,
}
# What a stage may override, and its type: what changes no parameter's shape. Under "loss" stands
# any option of any term.
OVERRIDES: dict[str, Any] = {
  "batch_size": int,
  "microbatches": int,
  "frozen": str,
  "loss": Mapping[str, Any],
  **{f"optimizer/{name}": kind for name, kind in SCHEDULE.items()},
  "optimizer/weight_decay": float,
  "optimizer/independent_weight_decay": float,
  "optimizer/multipliers": Sequence[Any],
  "data/image_size": int,
  "data/tokenizer/length": int,
  "data/augment": Mapping[str, Any] | None,
  "data/views": Mapping[str, Any],
  "data/mixture": Mapping[str, float],
  "model/image/patch_dropout": float,
  "model/image/remat": str,
  "model/text/remat": str,
}


class Stage(NamedTuple):
  """The updates `begin` < n <= `end`, run with `config`, which has no stages of its own.

  number: from 0; the last stage is the config itself. where: its place in the config, for errors.
  own_schedule: whether it has a schedule of the learning rate for its updates alone; the schedule
  of the config counts the updates of the other stages.
  """

  number: int
  where: str
  begin: int
  end: int
  config: Config
  own_schedule: bool = False

  @property
  def batch_size(self) -> int:
    """Of the global batch; of config.data.naflex, of the largest."""
    return self.config.batch_size

  @property
  def schedule(self) -> LengthSchedule | None:
    """The lengths and batch sizes of config.data.naflex; None for squares."""
    return self.config.data.length_schedule(self.batch_size, self.config.seed)

  @property
  def batch_sizes(self) -> list[int]:
    """The different sizes of its batches, ascending."""
    return sorted({*(self.schedule.sizes if self.schedule else (self.batch_size,))})

  @property
  def mean_batch_size(self) -> float:
    """Of the global batches."""
    return mean_batch_size(self.config)

  def batch_size_at(self, step: int) -> int:
    """Of the global batch of a step, counted from 0."""
    return self.schedule.at(step)[1] if self.schedule else self.batch_size

  def samples(self, begin: int, end: int) -> int:
    """The samples of the steps `begin` <= step < `end`."""
    if len(self.batch_sizes) == 1:
      return (end - begin) * self.batch_sizes[0]
    assert self.schedule is not None
    return self.schedule.samples(begin, end)


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
      batch_size=mean_batch_size(config),
      dataset_size=dataset_size,
    )
    return [Stage(0, "config", 0, total_steps, config)]
  if config.data.naflex and config.data.naflex.tokens_per_batch:
    raise ValueError(
      "config.stages count samples in batches of one size; leave out"
      " config.data.naflex.tokens_per_batch, or the stages"
    )
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
    own_schedule = any(path.removeprefix("optimizer/") in SCHEDULE for path in overrides)
    stage = Stage(number, where, begin, end, config, own_schedule)
    with named(stage):
      stages.append(stage._replace(config=resolve(Config, _changed(base, overrides), "config")))
    samples += (end - begin) * batch_size
    begin = end
  return stages


def mean_batch_size(config: Config) -> float:
  """The mean number of pairs of a global batch, with which durations in samples are counted."""
  schedule = config.data.length_schedule(config.batch_size, config.seed)
  return schedule.mean_size if schedule else config.batch_size


def at(run_stages: Sequence[Stage], step: int) -> Stage:
  """The stage to which the state after `step` updates belongs: a stage begins with its first."""
  return next((stage for stage in run_stages if step <= stage.end), run_stages[-1])


def with_run_schedule(run_stages: Sequence[Stage]) -> list[Stage]:
  """The stages without a schedule of their own, as if the others did not exist."""
  end, left = 0, []
  for stage in run_stages:
    if not stage.own_schedule:
      begin, end = end, end + stage.end - stage.begin
      left.append(stage._replace(begin=begin, end=end))
  return left


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
    return durations.steps(value, where, batch_size=stages[-1].mean_batch_size, **sizes)
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
    if path.startswith("loss/"):
      continue  # `resolve` checks the options of losses
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
    nested = path == "loss" or path not in OVERRIDES
    if isinstance(value, Mapping) and nested and (value or not path.startswith("loss/")):
      yield from _leaves(value, f"{path}/")
    else:
      yield path, value


def _changed(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of plain options with other values at some paths."""
  changed: dict[str, Any] = plain(base)
  for path, value in overrides.items():
    if path == "data/mixture":
      changed["data"]["mixture"] = _weighted(changed["data"]["mixture"], value)
    elif path.startswith("loss/") and value == {}:  # a term with its defaults
      changed["loss"].setdefault(path.removeprefix("loss/"), {})
    else:
      tree.put(changed, path, value)
  return changed


def _weighted(
  parts: Sequence[Mapping[str, Any]], weights: Mapping[str, float]
) -> list[dict[str, Any]]:
  """config.data.mixture with other weights; 0 for the sources that `weights` does not name."""
  names = [part["name"] for part in parts]
  for name, weight in weights.items():
    if name not in names:
      raise ValueError(
        f"data.mixture: no source {name!r}.{tree.nearest(name, names)} Known: {tree.shown(names)}"
      )
    if not 0 < weight < math.inf:
      raise ValueError(
        f"data.mixture.{name}={weight}: a weight is above 0; leave out a source that is not read"
      )
  return [
    {**part, "weight": float(weights.get(part["name"], 0)), "upsampling": None} for part in parts
  ]


def mixture_phases(run_stages: Sequence[Stage]) -> list[tuple[int, dict[str, float] | None]]:
  """(first sample, {name: weight}) where a stage changes the weights of the mixture.

  Weights are None where those of the config apply. [] if no stage changes them.

  Raises:
    ValueError: if config.data.schedule changes them too.
  """
  last = run_stages[-1].config.data
  phases: list[tuple[int, dict[str, float] | None]] = []
  samples, before = 0, last.mixture
  for stage in run_stages:
    parts = stage.config.data.mixture
    if parts != before:
      if last.schedule:
        raise ValueError(
          f"{stage.where}.data.mixture and config.data.schedule both change the weights of the"
          " mixture: use either"
        )
      own = {part.name: part.weight for part in parts if part.weight}
      phases.append((samples, None if parts == last.mixture else own))
    before = parts
    samples += (stage.end - stage.begin) * stage.batch_size
  return phases


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
