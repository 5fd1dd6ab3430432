"""Devices of a pod that nobody holds: programs compile for them on any machine, by libtpu.

The extra `plan` installs libtpu; nothing here needs a TPU, a network or the cloud.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# What libtpu wants to know, or else looks for on a network, and how much it says.
_QUIET = dict(
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-16",
  TPU_STDERR_LOG_LEVEL="3",
  TPU_MIN_LOG_LEVEL="3",
  TF_CPP_MIN_LOG_LEVEL="3",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
# Topologies that are not one chip per device, or four chips a host, by themselves.
_OPTIONS: dict[str, dict[str, Any]] = {
  "v4": dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1)),
  "tpu7x": dict(chips_per_host_bounds=(2, 2, 1)),
}


def installed() -> bool:
  """Whether libtpu is here."""
  return importlib.util.find_spec("libtpu") is not None


EXAMPLES = (
  "v4:4x4x4, v5e:1x1 to v5e:16x16, v5p:4x4x8, v6e:8x8, tpu7x:4x4x4; two slices: v5e:16x16*2"
)


def devices(topology: str) -> Sequence[jax.Device]:
  """The devices of a slice such as "v5e:16x16", "v5p:4x4x8", "v6e:8x8": to compile for, not to run;
  of several slices: "v5e:16x16*2".

  Raises:
    ImportError: without libtpu.
    ValueError: for a topology that libtpu does not know.
  """
  if not installed():
    raise ImportError(
      "compiling for a TPU needs libtpu: pip install 'bigalign[plan]', or make install EXTRAS=plan"
    )
  said = re.fullmatch(r"([a-z0-9]+:\d+(?:x\d+)*)(?:\*(\d+))?", topology)
  if not said:
    raise ValueError(f"topology {topology!r} is not of the form 'v5e:16x16'; known: {EXAMPLES}")
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options = dict(_OPTIONS.get(topology.split(":")[0], {}))
  if said.group(2):
    options["num_slices"] = int(said.group(2))
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=said.group(1), **options)
  except Exception as error:  # libtpu raises plain RuntimeErrors, of many texts
    raise ValueError(
      f"libtpu knows no topology {topology!r}: {error}. Such are known: {EXAMPLES}"
    ) from error
  return found.devices


def compiled(lowered: Any) -> Any:
  """What `jax.jit(f).lower(...)` gave, compiled for devices that nobody holds.

  It passes by JAX's cache of compilations (JAX_COMPILATION_CACHE_DIR): what was compiled without a
  client is written there, and cannot be read again.
  """
  before = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it remembers whether it is used
  try:
    return lowered.compile()
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
