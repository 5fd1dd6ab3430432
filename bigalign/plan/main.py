"""Predicts memory, speed and cost of a config on a TPU slice: bigalign plan --config=FILE

  bigalign plan --config=configs/clip_b16.py --topology=v5e:16x16 --json=plan.json

The train step is compiled for the topology on this machine (extra `plan`); nothing runs, and no
data is read. The exit status is 1 if the step does not fit. docs/plan.md explains the figures.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags

from bigalign import options
from bigalign.data.files import fingerprints, storage
from bigalign.plan import calibrate, chips, largest_batch, table
from bigalign.plan.variants import (
  combinations,
  count_stages,
  named_files,
  topology_of,
  with_changes,
)
from bigalign.run import errors, progress, tables
from bigalign.run.flags import config_name, define_flags, no_words, parse_flags

Plan = dict[str, Any]
CACHE = "~/.cache/bigalign/plans"
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")
_COMPILER_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # the user's


def plan(
  config: Mapping[str, Any],
  topology: str,
  *,
  samples: int = 0,
  stage: int = -1,
  cache: str | pathlib.Path,
) -> Plan:
  """compile_step.measure, from the cache if it holds this plan.

  Args:
    config: as `bigalign train` takes it, in plain values.
    topology: a TPU slice, or several of them: "v5e:16x16", "v5e:16x16*2".
    samples: of the dataset.
    stage: which of the config's stages; the last is the config itself.
    cache: folder of earlier plans. A plan is reused for the same config, code and packages.
  """
  stage %= count_stages(config)
  path = pathlib.Path(cache).expanduser() / f"{_key(config, topology, samples, stage)}.json"
  if path.exists():
    cached: Plan = json.loads(path.read_text())
    return cached
  _prepare_jax()  # imported only now, because a cached plan takes a second without it
  from bigalign.plan import compile_step

  with progress.Progress("compile", 0, visible=progress.is_shown()) as shown:
    shown.note = f"the step for {topology}"
    measured: Plan = compile_step.measure(config, topology, samples=samples, stage=stage)
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.atomic_write(path, suffix=storage.unique_suffix()) as file:
    file.write(json.dumps(measured).encode())
  return measured


def _key(config: Mapping[str, Any], topology: str, samples: int, stage: int) -> str:
  """Hex digits of what a plan depends on: arguments, code, packages, flags, named files."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)}
  files = named_files(config)
  parts = [
    config,
    topology,
    samples,
    stage,
    versions,
    files,
    fingerprints.of_code(),
    [os.environ.get(name, "") for name in _COMPILER_FLAGS],
  ]
  return options.fingerprint(parts)


def _installed(name: str) -> bool:
  return any(True for _ in importlib.metadata.distributions(name=name))


def combine_stages(stages: Sequence[Plan]) -> Plan:
  """The plan of a run from the plans of its stages, with estimates; it fits if all of them fit."""
  run: Plan = {name: stages[0][name] for name in ("topology", "device_kind", "devices", "mesh")}
  run |= {"fits": all(x["fits"] for x in stages), "stages": list(stages)}
  run["total_steps"] = sum(x["total_steps"] for x in stages)
  if not run["fits"]:
    return run
  samples = sum(x["total_samples"] for x in stages)
  days = [sum(x["total_samples"] / x["samples_per_day"][i] for x in stages) for i in (0, 1)]
  costs = [x["cost"] for x in stages]
  return run | {
    "measured": False,
    **{name: stages[0][name] for name in ("calibrated_by",) if name in stages[0]},
    "total_samples": samples,
    "samples_per_day": [samples / x for x in days],
    "chip_hours": [sum(x["chip_hours"][i] for x in stages) for i in (0, 1)],
    "cost": None if None in costs else [sum(x[i] for x in costs) for i in (0, 1)],
  }


def read_prices(path: str, kind: str) -> dict[str, float]:
  """{kind of chip: price of one chip for an hour}, from a JSON file.

  Args:
    path: of the file.
    kind: of the chips of this plan; a line says so if the file has no price for it.

  Raises:
    ValueError: if the file holds something else, before anything is compiled.
  """
  try:
    prices = json.loads(pathlib.Path(path).read_text())
  except ValueError as error:  # of the text or its encoding
    raise ValueError(f"--prices={path} is not JSON: {error}") from error
  if not isinstance(prices, dict):
    raise ValueError(f'--prices={path}: an object such as {{"v5e": 1.2}} is expected')
  for name, price in prices.items():
    if isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0:
      raise ValueError(f"--prices={path}: the price of {name!r} is {price!r}, not a number >= 0")
  if kind not in prices:
    print(f"{path} has no price for {kind}, so no cost is shown", file=sys.stderr)
  return prices


def sweep(
  combinations: Iterable[Mapping[str, Any]], plan_run: Callable[..., Mapping[str, Any]]
) -> list[Plan]:
  """The plans of all combinations of changes, each with what was "asked".

  A combination that the mesh excludes has an "error" instead: it does not end the sweep, which can
  take hours.
  """
  plans: list[Plan] = []
  every = list(combinations)
  for changes in progress.track(every, "sweep", len(every), unit="plans"):
    try:
      plans.append({"asked": changes, **plan_run(**changes)})
    except ValueError as error:
      plans.append({"asked": changes, "error": str(error)})
  return plans


def predict(
  config: Mapping[str, Any],
  topology: str = "",
  *,
  batch: int | None = None,
  sweeps: Sequence[str] = (),
  search: bool = False,
  samples: int = 0,
  prices: str | None = None,
  measured: str | os.PathLike[str] | None = None,
  cache: str | pathlib.Path = CACHE,
  name: str = "config",
  show: Callable[[str], None] = lambda text: None,
) -> Plan:
  """The plan of a run; with "sweep" and "largest_batch" if they are asked for.

  Args:
    config: as `bigalign train` takes it, in plain values.
    topology: as of `plan`; "": that of the config.
    batch: global batch size, instead of config.batch_size.
    sweeps: any of "batch", "remat", "mesh": all combinations are compiled.
    search: whether the largest batch that fits is found by compiling.
    samples: of the dataset, for epochs and losses with per-sample state.
    prices: JSON file with the price of a chip for an hour, by kind.
    measured: JSON of `bigalign benchmark`, or folder of a run, that narrows the times.
    cache: folder of earlier plans.
    name: of the config, for `show`.
    show: gets each result as a text, as soon as it is known.

  Raises:
    ValueError: if neither names a topology, or `measured` is of another kind of chip.
  """
  topology = topology or topology_of(config)
  if not topology:
    raise errors.UsageError("--topology is missing, and the config names none; v5e:16x16 is one")
  price_of = read_prices(prices, chips.kind(topology)) if prices else {}
  plan_stage = functools.partial(plan, topology=topology, samples=samples, cache=cache)
  known = None
  if measured:
    known = calibrate.read(measured, chips.kind(topology), functools.partial(plan, cache=cache))

  def estimate(stage: Plan) -> Plan:
    if known is None or not stage["fits"]:
      return chips.estimate(stage, price_of)
    seconds = calibrate.step_seconds(stage, known)
    return {**chips.estimate(stage, price_of, seconds), "calibrated_by": known.name}

  def plan_run(**changes: Any) -> Plan:
    changed = with_changes(config, **changes)
    stages = [plan_stage(changed, stage=i) for i in range(count_stages(changed))]
    stages = [{**stage, **estimate(stage)} for stage in stages]
    return combine_stages(stages) if len(stages) > 1 else stages[0]

  asked = {"batch": batch} if batch else {}
  result = plan_run(**asked)
  show(table.format_plan(name, result))
  last = result.get("stages", [result])[-1]  # the config itself
  if search:
    result["largest_batch"] = largest_batch.search(
      last, lambda n: plan_stage(with_changes(config, batch=n))
    )
    show(f"Largest batch that was compiled and fits: {result['largest_batch']:,}")
  elif guess := largest_batch.predict([last]):
    show(f"The largest batch that fits is about {guess:,} pairs; --largest_batch compiles it")
  if sweeps:
    changes = combinations(with_changes(config, **asked), sweeps, result["devices"])
    result["sweep"] = sweep(changes, functools.partial(plan_run, **asked))
    show(table.format_sweep(result["sweep"]))
  return result


def main(argv: Sequence[str]) -> None:
  """The program, once absl has read the flags."""
  values = flags.FLAGS
  no_words(argv)
  with progress.shown():
    result = predict(
      options.plain(values.config),
      values.topology or "",
      batch=values.batch,
      sweeps=values.sweep,
      search=values.largest_batch,
      samples=values.samples,
      prices=values.prices,
      measured=values.calibrate,
      cache=values.cache,
      name=config_name(),
      show=print,
    )
  if values.json:
    tables.write_json(values.json, result)
  sys.exit(0 if result["fits"] else 1)


def _prepare_jax() -> None:
  """Sets what JAX reads when it is imported."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # A program compiled without its device can be written to that cache but not read back.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"


def _options() -> type:
  """The options of a config; importing them imports JAX."""
  _prepare_jax()
  from bigalign.config import Config

  return Config


def run() -> None:
  """The program `bigalign plan`."""
  define_flags(_options, "plan")
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run()
