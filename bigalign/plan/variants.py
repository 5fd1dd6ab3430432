"""Variants of a config that is not resolved yet: plain values with other sizes.

A plan that is cached is answered without importing JAX, so configs stay plain values until one has
to be compiled. This is the only file besides the resolver that reads them.
"""

from __future__ import annotations

import copy
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigalign import checks
from bigalign.plan import chips

REMATS = ("none", "dots", "attention", "full")


def count_stages(config: Mapping[str, Any]) -> int:
  """The number of stages of a config, the config itself included."""
  return len(config.get("stages") or ()) + 1


def topology_of(config: Mapping[str, Any]) -> str:
  """config.topology; "" if it is not set."""
  return str(config.get("topology") or "")


def for_devices(config: Mapping[str, Any], batch: int | None, devices: int) -> dict[str, Any]:
  """A copy of a config with a batch for so many devices.

  Args:
    config: in plain values.
    batch: pairs; None: as many per device as the config has on its topology.
    devices: of a machine.
  """
  if batch is None:
    topology = topology_of(config)
    theirs = chips.devices(topology) if topology else devices
    batch = max(config["batch_size"] // theirs, 1) * devices
  return with_changes(config, batch=batch)


def named_files(config: Mapping[str, Any]) -> list[tuple[str, int, int]]:
  """(path, modification time in ns, size) of the checkpoint and tokenizer files of a config."""
  model = config["model"]
  parts = [model, *(x for x in model.values() if isinstance(x, Mapping))]
  named = [x["init"] for x in parts if x.get("init")]  # None: trained from the start
  roots = [pathlib.Path(os.path.expandvars(init)).expanduser() for init in named]
  files = [file for root in roots for file in (root, *sorted(root.glob("*")))]
  data = config.get("data")
  tokenizer = data.get("tokenizer") if isinstance(data, Mapping) else None
  options = tokenizer if isinstance(tokenizer, Mapping) else {}  # another type is refused later
  for path in filter(None, (options.get(option) for option in ("path", "vocabulary"))):
    file = pathlib.Path(os.path.expandvars(path)).expanduser()
    files += [file, *sorted(file.parent.glob("*.json"))]  # which state padding and more
  return [(str(x), x.stat().st_mtime_ns, x.stat().st_size) for x in files if x.exists()]


def with_changes(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
  """A copy of a config with other values; a stage keeps what it overrides.

  Args:
    config: in plain values.
    changes: "batch" (pairs), "remat" (of both towers) or "mesh" (the size of its axis fsdp).
  """
  changed = copy.deepcopy(dict(config))
  if "batch" in changes:
    changed["batch_size"] = changes["batch"]
  if "remat" in changes:
    for side in ("image", "text"):
      tower = changed["model"].get(side, {})
      if tower.get("name") != "features":  # stored vectors, which compute nothing
        changed["model"][side] = {**tower, "remat": changes["remat"]}
  if "mesh" in changes:
    changed["mesh"] = {**(changed.get("mesh") or {}), "data": -1, "fsdp": changes["mesh"]}
  return changed


def combinations(
  config: Mapping[str, Any], axes: Sequence[str], devices: int
) -> Iterator[dict[str, Any]]:
  """All combinations of changes: half, the same and twice the batch; each remat; sizes of fsdp.

  Args:
    config: in plain values.
    axes: of "batch", "remat" and "mesh".
    devices: number of devices of the topology.
  """
  values: dict[str, Sequence[Any]] = {
    "batch": [config["batch_size"] * n // 2 for n in (1, 2, 4)],
    "remat": REMATS,
    "mesh": [n for n in (1, 4, 16, 64) if devices % n == 0],
  }
  for axis in axes:
    checks.known("--sweep", axis, values)
  for chosen in itertools.product(*(values[axis] for axis in axes)):
    yield dict(zip(axes, chosen))
