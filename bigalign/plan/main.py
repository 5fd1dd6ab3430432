"""Whether a config fits a pod that you do not hold, what it moves there, and what it may cost.

  bigalign plan --config=configs/clip_b16.py --topology=v5e:16x16 --json=plan.json

The train step is compiled for the topology on this machine (extra `plan`); nothing runs, and no
data is read. Exit status 1 if it does not fit. docs/plan.md tells what the figures mean.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags

from bigalign import checks, options
from bigalign.data.files import storage
from bigalign.plan import chips, largest_batch, table
from bigalign.run.flags import config_name, define_flags, parse_flags

Found = dict[str, Any]
REMATS = ("none", "dots", "full")
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")


def plan(
  config: Mapping[str, Any],
  topology: str,
  *,
  samples: int = 0,
  stage: int = -1,
  cache: str | pathlib.Path,
) -> Found:
  """plan_step.measure of the other arguments, or what it found when it was asked last.

  cache: folder of the answers; one is good for the same config, code and packages.
  """
  stage %= count(config)
  path = pathlib.Path(cache).expanduser() / f"{_key(config, topology, samples, stage)}.json"
  if path.exists():
    found: Found = json.loads(path.read_text())
    return found
  # Nothing is set before, and no jax imported: a cached answer takes a second.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # A program compiled without its device can be written to that cache and not be read back.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
  from bigalign.plan import compile_step

  found = compile_step.measure(config, topology, samples=samples, stage=stage)
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.atomic_write(path, suffix=storage.unique_suffix()) as file:
    file.write(json.dumps(found).encode())
  return found


def count(config: Mapping[str, Any]) -> int:
  """How many stages a config has, itself among them."""
  return len(config.get("stages") or ()) + 1


def combine_stages(found: Sequence[Found]) -> Found:
  """The plan of a run from those of its stages, with their estimates; it fits if all of them do."""
  whole: Found = {name: found[0][name] for name in ("topology", "device_kind", "devices", "mesh")}
  whole |= {"fits": all(x["fits"] for x in found), "stages": list(found)}
  whole["total_steps"] = sum(x["total_steps"] for x in found)
  if not whole["fits"]:
    return whole
  samples = sum(x["total_samples"] for x in found)
  days = [sum(x["total_samples"] / x["samples_per_day"][i] for x in found) for i in (0, 1)]
  costs = [x["cost"] for x in found]
  return whole | {
    "measured": False,
    "total_samples": samples,
    "samples_per_day": [samples / x for x in days],
    "chip_hours": [sum(x["chip_hours"][i] for x in found) for i in (0, 1)],
    "cost": None if None in costs else [sum(x[i] for x in costs) for i in (0, 1)],
  }


def _key(config: Mapping[str, Any], topology: str, samples: int, stage: int) -> str:
  code = hashlib.sha256()
  for file in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
    code.update(file.read_bytes())
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)}
  files = _files(config["model"])
  return options.fingerprint([config, topology, samples, stage, versions, files, code.hexdigest()])


def _installed(name: str) -> bool:
  return any(True for _ in importlib.metadata.distributions(name=name))


def _files(model: Mapping[str, Any]) -> list[Any]:
  """What the answer takes from checkpoints that the model names: their files, by time and size."""
  parts = [model, *(x for x in model.values() if isinstance(x, Mapping))]
  roots = [pathlib.Path(os.path.expandvars(x["init"])).expanduser() for x in parts if "init" in x]
  files = [file for root in roots for file in (root, *sorted(root.glob("*")))]
  return [(str(x), x.stat().st_mtime_ns, x.stat().st_size) for x in files if x.exists()]


def with_changes(config: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
  """The config with another "batch" (pairs), "remat" (of both towers) or "mesh" (its fsdp).

  A stage keeps what it says of these itself.
  """
  made = copy.deepcopy(dict(config))
  if "batch" in parts:
    made["batch_size"] = parts["batch"]
  if "remat" in parts:
    for side in ("image", "text"):
      tower = made["model"].get(side, {})
      if tower.get("name") != "features":  # which are vectors, and compute nothing
        made["model"][side] = {**tower, "remat": parts["remat"]}
  if "mesh" in parts:
    made["mesh"] = {**(made.get("mesh") or {}), "data": -1, "fsdp": parts["mesh"]}
  return made


def variants(config: Mapping[str, Any], axes: Sequence[str], devices: int) -> Iterator[Found]:
  """All combinations of what `changed` takes: half, same and twice the batch; remat; fsdp."""
  values: dict[str, Sequence[Any]] = {
    "batch": [config["batch_size"] * n // 2 for n in (1, 2, 4)],
    "remat": REMATS,
    "mesh": [n for n in (1, 4, 16, 64) if devices % n == 0],
  }
  for axis in axes:
    checks.known("--sweep", axis, values)
  for chosen in itertools.product(*(values[axis] for axis in axes)):
    yield dict(zip(axes, chosen))


def main(argv: Sequence[str]) -> None:
  """What runs once absl has read the flags."""
  values = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f"unknown words {argv[1:]}; options are written --config.key=value")
  config = options.plain(values.config)
  topology = values.topology or config.get("topology")
  if not topology:
    raise app.UsageError("--topology is missing, and the config names none; v5e:16x16 is one")
  prices = json.loads(pathlib.Path(values.prices).read_text()) if values.prices else {}
  find = functools.partial(plan, topology=topology, samples=values.samples, cache=values.cache)

  def told(**what: Any) -> Found:
    made = with_changes(config, **what)
    plans = [find(made, stage=i) for i in range(count(made))]
    plans = [{**found, **chips.estimate(found, prices)} for found in plans]
    return combine_stages(plans) if len(plans) > 1 else plans[0]

  asked = {"batch": values.batch} if values.batch else {}
  found = told(**asked)
  name = config_name()
  print(table.format_plan(name, found))
  last = found.get("stages", [found])[-1]  # the config itself
  if values.largest_batch:
    found["largest_batch"] = largest_batch.search(
      last, lambda n: find(with_changes(config, batch=n))
    )
    print(f"Largest batch that was compiled and fits: {found['largest_batch']:,}")
  elif guess := largest_batch.predict([last]):
    print(f"About {guess:,} pairs should be the most that fit; --largest_batch compiles them")
  if values.sweep:
    found["sweep"] = [
      {"asked": what, **told(**{**asked, **what})}
      for what in variants(with_changes(config, **asked), values.sweep, found["devices"])
    ]
    print(table.format_sweep(found["sweep"]))
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(found, indent=1) + "\n")
  sys.exit(0 if found["fits"] else 1)


def run() -> None:
  """The program `bigalign plan`."""
  define_flags()
  flags.DEFINE_string(
    "topology",
    None,
    "A TPU slice such as v5e:16x16, or slices, v5e:16x16*2; the config's own if not given.",
  )
  flags.DEFINE_integer("batch", None, "Pairs in all, in the place of config.batch_size.")
  flags.DEFINE_list("sweep", [], "Of batch, remat, mesh: all combinations, each compiled.")
  flags.DEFINE_bool("largest_batch", False, "Compile larger or smaller batches to find it.")
  flags.DEFINE_integer("samples", 0, "Of the dataset, for epochs and losses that remember samples.")
  flags.DEFINE_string(
    "prices",
    os.environ.get("BIGALIGN_PRICES"),
    'A JSON file, the price of a chip for an hour by kind: {"v5e": 1.2}.',
  )
  flags.DEFINE_string("json", None, "Write the figures there too.")
  flags.DEFINE_string("cache", "~/.cache/bigalign/plans", "Folder of earlier answers.")
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run()
