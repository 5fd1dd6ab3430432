"""Measures this machine: bigalign benchmark --json=mine.json

  bigalign benchmark --config=siglip_b16 --batch=512 --json=mine.json

A training step, the data loader, embedding and an evaluation, with random pixels and ids, next to
what `bigalign plan` predicts of the step. Neither data nor the files of the config are needed. The
JSON names the config and the versions, but no path and no host. docs/benchmark.md explains it.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.table
from absl import app, flags, logging

from bigalign.benchmark import measure
from bigalign.checkpoint import revision
from bigalign.config import Config, resolve_config, start
from bigalign.plan.variants import for_devices
from bigalign.run import preemption, runtime, tables
from bigalign.run.flags import config_name, define_flags, parse_flags

# Configs without --config.
SMALL, LARGE = "quickstart", "siglip_b16"


def benchmark(
  config: Mapping[str, Any],
  *,
  name: str = "config",
  batch: int | None = None,
  source: str = "",
  seconds: float = 10.0,
) -> dict[str, Any]:
  """The figures of this machine; see docs/benchmark.md.

  Args:
    config: as `bigalign train` takes it, in plain values.
    name: of the config.
    batch: pairs of a step; None: as many per device as the config has on its topology.
    source: what the loader and the evaluation read; "": made-up photos.
    seconds: of each measurement, without compilation.
  """
  options = resolve_config(for_devices(config, batch, jax.device_count()), files_needed=False)
  logging.info("Measuring a step of %d pairs", options.batch_size)
  with measure.fitting(options):
    ready = measure.prepare(options)
    step, state = measure.training(ready, seconds=seconds)
  result: dict[str, Any] = {
    "config": name,
    "revision": revision(),
    "versions": runtime.versions() | {"python": platform.python_version()},
    "device": runtime.describe(),
    "host": {"cores": measure.cores(), "system": f"{platform.system()} {platform.machine()}"},
    "step": step,
    "plan": measure.planned(ready),
    "embed": measure.embedding(ready, state, seconds=seconds / 2),
  }
  result["source"] = "given" if source else "made-up photos"
  with contextlib.nullcontext(source) if source else measure.photos() as pattern:
    result["loader"] = measure.loading(options, pattern, seconds=seconds / 2)
    result["evaluation"] = measure.evaluation(ready, state, pattern)
  return result


def table(result: Mapping[str, Any]) -> rich.table.Table:
  """The figures for people: what was measured, and what the plan says."""
  step, plan, loader = result["step"], result["plan"], result["loader"]
  device, number = result["device"], tables.number
  rows = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for heading in (
    f"{result['config']}, batch {plan['batch_size']:,}, {device['devices']} x"
    f" {device['device_kind']}",
    "measured",
    "planned",
  ):
    rows.add_column(heading, justify="left" if rows.columns == [] else "right")

  def time(x: float) -> str:
    return tables.scaled(x, tables.SECONDS)

  def size(x: float | None) -> str:
    return f"{x / 1e9:,.2f} GB" if x else ""

  times = sorted(plan.get("seconds_per_step", ()))
  rates = [number(plan["batch_size"] / x) for x in reversed(times)]
  rows.add_row("time of a step", time(step["seconds_per_step"]), " to ".join(map(time, times)))
  rows.add_row("images per second", number(step["images_per_second"]), " to ".join(rates))
  if step["mfu"]:
    rows.add_row("share of the peak (MFU)", f"{step['mfu']:.1%}", "")
  else:
    rows.add_row("useful work per second", tables.scaled(step["flops_per_second"], tables.FLOP), "")
  if step["peak_bytes_per_chip"]:
    memory = size(step["peak_bytes_per_chip"]), size(plan["peak_bytes_per_chip"])
    rows.add_row("memory of a device", *memory)
  workers = f"{loader['workers']} workers on {result['host']['cores']} cores"
  share = loader["images_per_second"] / step["images_per_second"]
  rows.add_row(f"loader, images per second, {workers}", number(loader["images_per_second"]), "")
  rows.add_row("loader / step, 1 or more is enough", f"{share:.2f}", "")
  for what, figures, key in (
    ("embedding, images per second", result["embed"], "images_per_second"),
    ("embedding, texts per second", result["embed"], "texts_per_second"),
  ):
    if figures:
      rows.add_row(what, number(figures[key]), "")
  if evaluation := result["evaluation"]:
    what = f"retrieval of {evaluation['pairs']:,} pairs, with the start of workers"
    rows.add_row(what, time(evaluation["seconds"]), "")
  return rows


def main(argv: Sequence[str]) -> None:
  """The program, once absl has read the flags."""
  values = flags.FLAGS
  config = start(argv, values)
  try:
    result = benchmark(
      config,
      name=config_name(),
      batch=values.batch,
      source=values.source or "",
      seconds=values.seconds,
    )
  except Exception as error:
    preemption.exit_on_error(error)
  if jax.process_index() == 0:
    tables.show(table(result))
    if values.json:
      tables.write_json(values.json, result)
      print(f"written to {values.json}")


def with_config(argv: Sequence[str]) -> list[str]:
  """The command line with the config for this machine, if it names none."""
  if any(word.partition("=")[0] in ("--config", "-config") for word in argv[1:]):
    return [*argv]
  return [*argv, f"--config={LARGE if runtime.has_accelerator() else SMALL}"]


def run() -> None:
  """The program `bigalign benchmark`."""
  define_flags(lambda: Config, "benchmark")
  app.run(main, flags_parser=lambda argv: parse_flags(with_config(argv)))


if __name__ == "__main__":
  run()
