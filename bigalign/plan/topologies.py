"""TPU devices to compile for on any machine, by libtpu.

The extra `plan` installs libtpu. Nothing here needs a TPU, a network or a cloud account.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

# Values that libtpu would otherwise look up on a network, and how much it logs.
_ENVIRONMENT = dict(
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-16",
  TPU_STDERR_LOG_LEVEL="3",
  TPU_MIN_LOG_LEVEL="3",
  TF_CPP_MIN_LOG_LEVEL="3",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
# Options of the kinds for which libtpu's defaults are not one device per chip and four chips per
# host.
_OPTIONS: dict[str, dict[str, Any]] = {
  "v4": dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1)),
  "tpu7x": dict(chips_per_host_bounds=(2, 2, 1)),
}
EXAMPLES = (
  "v4:4x4x4, v5e:1x1 to v5e:16x16, v5p:4x4x8, v6e:8x8, tpu7x:4x4x4; two slices: v5e:16x16*2"
)


def installed() -> bool:
  """Returns whether libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


def devices(topology: str) -> Sequence[jax.Device]:
  """Returns the devices of a TPU slice, for which programs can be compiled but not run.

  Args:
    topology: a slice, "v5e:16x16", "v5p:4x4x8", "v6e:8x8", or several: "v5e:16x16*2".

  Raises:
    ImportError: if libtpu is not installed.
    ValueError: for a topology that libtpu does not know.
  """
  if not installed():
    raise ImportError(
      "compiling for a TPU needs libtpu: pip install 'bigalign[plan]', or make install EXTRAS=plan"
    )
  parsed = re.fullmatch(r"([a-z0-9]+:\d+(?:x\d+)*)(?:\*(\d+))?", topology)
  if not parsed:
    raise ValueError(f"topology {topology!r} is not of the form 'v5e:16x16'; known: {EXAMPLES}")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options = dict(_OPTIONS.get(topology.split(":")[0], {}))
  if parsed.group(2):
    options["num_slices"] = int(parsed.group(2))
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=parsed.group(1), **options
    )
  except Exception as error:  # libtpu raises plain RuntimeErrors, of many texts
    raise ValueError(
      f"libtpu does not know topology {topology!r}: {error}. These are known: {EXAMPLES}"
    ) from error
  return description.devices


def compile_without_cache(
  lowered: jax.stages.Lowered, compiler_options: Mapping[str, str | bool] | None = None
) -> Any:
  """Compiles a program for devices that this machine does not have.

  It bypasses JAX's compilation cache (JAX_COMPILATION_CACHE_DIR): a program compiled without a
  client can be written to it but not be read again.

  Args:
    lowered: from jax.jit(f).lower(…).
    compiler_options: flags of XLA.

  Returns:
    A jax.stages.Compiled, whose text and memory analysis are not None.
  """
  before = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it remembers whether it is enabled
  try:
    return lowered.compile(compiler_options=dict(compiler_options) if compiler_options else None)
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def program_text(
  lowered: jax.stages.Lowered,
  compiled: jax.stages.Compiled,
  compiler_options: Mapping[str, str | bool] | None = None,
) -> str:
  """The text of a compiled program.

  For v5p, libtpu 0.0.51 moves large gathers to the SparseCore, by asynchronous operations with
  several operands, which jax 0.10.2 cannot read back. Such a program is compiled again, and the
  compiler writes its text to a file.

  Args:
    lowered: from jax.jit(f).lower(…).
    compiled: of compile_without_cache.
    compiler_options: with which it was compiled.
  """
  try:
    return str(compiled.as_text())
  except jax.errors.JaxRuntimeError as error:
    if "async-" not in str(error):
      raise
  logging.info("JAX cannot read the compiled program back; it is compiled again into a file")
  with tempfile.TemporaryDirectory() as folder:
    into_file: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compile_without_cache(lowered, {**(compiler_options or {}), **into_file})
    # Programs within it have files of their own, with higher numbers.
    file = min(pathlib.Path(folder).glob("*.after_optimizations.txt"))
    return file.read_text()
