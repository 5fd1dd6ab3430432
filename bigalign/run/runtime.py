"""The machine that a program runs on: XLA flags, memory, compilation cache, other processes."""

from __future__ import annotations

import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import socket
from typing import Any

import jax
from absl import logging

from bigalign.private_apis import registration_timeout, skip_tpu

CONNECT_TIMEOUT = 300  # seconds within which all processes must connect

# Collectives overlap with computation.
LIBTPU_INIT_ARGS = (
  "--xla_tpu_enable_async_collective_fusion=true",
  "--xla_tpu_overlap_compute_collective_tc=true",
  "--xla_enable_async_all_gather=true",
)
# The compiler refuses the first flag for every other kind of chip. With the others, all-reduces of
# gradients run during the backward pass, layer by layer: those above 4 MB are not combined with
# others, for which they would wait.
_V5E = (
  "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
  "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true",
  "--xla_enable_async_all_reduce=true",
  "--xla_jf_crs_combiner_threshold_in_bytes=4194304",
)
# Additional flags by kind of chip: the first word of its accelerator type or topology.
LIBTPU_INIT_ARGS_OF_KIND = {
  "v5litepod": _V5E,
  "v5e": _V5E,
  # Three quarters of its 128 MiB of VMEM for one fusion: common practice, not documented by Google.
  "v6e": ("--xla_tpu_scoped_vmem_limit_kib=98304",),
}
# The only flag that NVIDIA's own images set, for all GPUs:
# https://docs.nvidia.com/jax-toolbox/environment-variables
XLA_FLAGS_GPU = ("--xla_gpu_enable_latency_hiding_scheduler=true",)
XLA_FLAGS_DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")

# Number and value of the parameters of glibc's mallopt (malloc.h): one arena, whose freed memory is
# not returned to the kernel, for arrays of all sizes. It grows by 64 MiB at a time.
MALLOPT = {
  "arena_max": (-8, 1),
  "mmap_max": (-4, 0),
  "trim_threshold": (-1, -1),
  "top_pad": (-2, 64 << 20),
}

# Variables that TPU hosts and their containers set, and other machines do not.
TPU_VARIABLES = {"TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"}

# Vendor id of Google, and kind of TPU by device id.
PCI = "/sys/bus/pci/devices"
GOOGLE = "0x1ae0"
TPU_OF_PCI = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5litepod", "0x006f": "v6e"}


def setup(
  *,
  deterministic: bool = False,
  gpu_memory_fraction: float | None = None,
  cache: str | None = "~/.cache/bigalign/xla",
  debug_nans: bool = False,
) -> None:
  """Sets what must be set before the first device is used; settings of the user are kept.

  Args:
    deterministic: equal runs give equal bits on GPUs too, which is slower; CPUs and TPUs always do.
    gpu_memory_fraction: share of each GPU's memory to allocate at the start; None: JAX's 0.75.
    cache: folder of the compilation cache, so that a second start does not compile; None: no cache.
    debug_nans: stop at the operation that first produces a NaN (slow).
  """
  if _gpu():
    flags = XLA_FLAGS_GPU + (XLA_FLAGS_DETERMINISTIC if deterministic else ())
    _add_flags("XLA_FLAGS", flags)
  if _tpu():
    set_libtpu_flags(_tpu_kind())
  elif (
    not _may_be_tpu()
    and not jax.config.values["jax_platforms"]
    and importlib.util.find_spec("libtpu")
  ):
    skip_tpu()  # libtpu is here to compile for TPUs elsewhere
  set_by_user = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ)
  if gpu_memory_fraction is not None and not set_by_user:
    os.environ["XLA_CLIENT_MEM_FRACTION"] = str(gpu_memory_fraction)
  if (
    cache
    and "JAX_COMPILATION_CACHE_DIR" not in os.environ
    and jax.config.values["jax_compilation_cache_dir"] is None
  ):
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache).expanduser()))
  least = "jax_persistent_cache_min_compile_time_secs"
  if jax.config.values.get(least) == 1.0:  # JAX's default, which keeps only slow compilations
    jax.config.update(least, 0.0)
  if debug_nans:
    jax.config.update("jax_debug_nans", True)
  if not (_gpu() or _tpu()):
    keep_freed_memory()


def keep_freed_memory() -> None:
  """Lets a program that computes on the CPU use freed memory again, where the C library is glibc.

  XLA allocates the arrays of each step anew. By default glibc returns large ones to the kernel when
  they are freed, and the next step waits for fresh pages. Parameters that the user has set by
  GLIBC_TUNABLES or MALLOC_… keep their values.
  """
  if platform.libc_ver()[0] != "glibc":
    return
  mallopt = ctypes.CDLL(None).mallopt
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  for name, (parameter, value) in MALLOPT.items():
    variables = {f"MALLOC_{name.upper()}", f"MALLOC_{name.upper()}_"}
    if f"glibc.malloc.{name}=" not in tunables and not variables & set(os.environ):
      mallopt(parameter, value)


def set_libtpu_flags(kind: str) -> None:
  """Sets libtpu's flags for this machine's kind of chip, such as "v5e", before libtpu is loaded."""
  _add_flags("LIBTPU_INIT_ARGS", _libtpu_flags(kind))


def libtpu_options(kind: str) -> dict[str, str]:
  """The same flags as options of one compilation, for a kind of chip that may be elsewhere.

  libtpu reads LIBTPU_INIT_ARGS once, and refuses flags of another kind of chip. What the variable
  sets is left out, because options would replace it.
  """
  flags = _not_set("LIBTPU_INIT_ARGS", _libtpu_flags(kind))
  return dict(flag.removeprefix("--").split("=") for flag in flags)


def _libtpu_flags(kind: str) -> tuple[str, ...]:
  return LIBTPU_INIT_ARGS + LIBTPU_INIT_ARGS_OF_KIND.get(kind, ())


def connect(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Connects to the other processes of the run; call it before any device is used.

  Each value comes from its argument, or from the variables BIGALIGN_COORDINATOR,
  BIGALIGN_NUM_PROCESSES and BIGALIGN_PROCESS_ID. Without any of them, TPU pods and Slurm are
  detected. A single process needs nothing.

  Args:
    coordinator: "host:port" of process 0 (flag --coordinator).
    num_processes: number of processes (flag --num_processes).
    process_id: number of this process, from 0 (flag --process_id).

  Raises:
    ValueError: if only some of the three are given, or one is not a number.
  """
  given = {
    "coordinator": coordinator or os.environ.get("BIGALIGN_COORDINATOR") or None,
    "num_processes": _number("num_processes", num_processes),
    "process_id": _number("process_id", process_id),
  }
  missing = [name for name, value in given.items() if value is None]
  if not missing:
    count, index = given["num_processes"], given["process_id"]
    if not 0 <= index < count:  # type: ignore[operator]
      raise ValueError(f"process_id {index} is not below num_processes {count}; they count from 0")
    if index == 0:
      _check_port(str(given["coordinator"]))
    _initialize(coordinator_address=given["coordinator"], num_processes=count, process_id=index)
  elif len(missing) < len(given):
    names = [f"--{name} or BIGALIGN_{name.upper()}" for name in missing]
    raise ValueError(f"a run of several processes also needs {', '.join(names)}")
  elif _slurm() or _tpu():
    _initialize()


def _slurm() -> bool:
  """Whether srun started this process as one of several.

  SLURM_NTASKS does not show it: the shells of salloc and sbatch have that variable too, and a run
  that is started there by hand is one process, which would wait for others.
  """
  if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # which srun sets
    return True
  if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
    logging.warning(
      "This Slurm job has %s tasks, but srun did not start this process as one of them, so it runs"
      " alone. Put srun before the command to use all tasks.",
      os.environ["SLURM_NTASKS"],
    )
  return False


def _initialize(**given: Any) -> None:
  """Runs jax.distributed.initialize; after CONNECT_TIMEOUT the error names the missing processes.

  JAX's own timeout is per process, and a process knows nothing of the others. The coordination
  service, at which all register, can list those that are missing.
  """
  logging.info(
    "Waiting up to %d s for the other processes; the exit code is 134 if some do not connect. Check"
    " that every host runs the same command and can reach the coordinator.",
    CONNECT_TIMEOUT,
  )
  with registration_timeout(CONNECT_TIMEOUT):
    jax.distributed.initialize(**given, initialization_timeout=CONNECT_TIMEOUT + 30)


def _check_port(address: str) -> None:
  """Raises OSError if process 0 cannot listen there: JAX's service would crash (status 139)."""
  _, colon, port = address.rpartition(":")
  if not colon or not port.isdecimal():
    raise ValueError(f"--coordinator={address}: it is host:port, of process 0")
  with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed ones do not count
    try:
      listener.bind(("", int(port)))
    except (OSError, OverflowError) as error:
      raise OSError(
        f"--coordinator={address}: process 0 cannot listen on port {port}: {error}. Another run on"
        " this machine may use it: end that run, or choose another port for all processes."
      ) from error


def _number(name: str, value: int | None) -> int | None:
  text = os.environ.get(f"BIGALIGN_{name.upper()}") or None
  if value is not None or text is None:
    return value
  if not text.isdecimal():
    raise ValueError(f"BIGALIGN_{name.upper()}={text!r} is not a number")
  return int(text)


def _add_flags(variable: str, flags: tuple[str, ...]) -> None:
  """Appends to an environment variable the flags that it does not set yet."""
  new = _not_set(variable, flags)
  os.environ[variable] = " ".join([os.environ.get(variable, "").strip(), *new]).strip()


def _not_set(variable: str, flags: tuple[str, ...]) -> list[str]:
  """Those of the flags that an environment variable does not set yet."""
  held = os.environ.get(variable, "").strip()
  if held and not held.startswith(("-", "'", '"')):
    # XLA takes a text that is not a flag for the name of a file of flags, and reads nothing else.
    logging.warning("%s=%s names a file, so these flags are not set: %s", variable, held, flags)
    return []
  given = {_flag_name(word) for word in held.split()}
  return [flag for flag in flags if not {_flag_name(flag), f"no{_flag_name(flag)}"} & given]


def _flag_name(word: str) -> str:
  """The name of a flag: "--name=value" or "-name", which may be in quotation marks."""
  return word.strip("'\"").lstrip("-").split("=")[0]


def _platforms() -> str:
  return os.environ.get("JAX_PLATFORMS", "")


def _tpu() -> bool:
  """Whether this is a TPU host, by its devices and packages: asking JAX would initialise it."""
  has = bool(_tpu_devices()) and importlib.util.find_spec("libtpu") is not None
  return has and ("tpu" in _platforms() or not _platforms())


def _tpu_devices() -> list[str]:
  # /dev/vfio/vfio alone is a module of the kernel without a device.
  return [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]


def _may_be_tpu() -> bool:
  """Whether JAX should look for a TPU: a container may show its chips in another way."""
  return bool(_tpu_devices() or TPU_VARIABLES & set(os.environ) or _tpu_kind())


def _tpu_kind() -> str:
  """Kind of TPU from TPU_ACCELERATOR_TYPE ("v6e-8": "v6e") or from the PCI bus; "" if unknown."""
  kind = os.environ.get("TPU_ACCELERATOR_TYPE", "").split("-")[0]
  for vendor in [] if kind else glob.glob(f"{PCI}/*/vendor"):
    if pathlib.Path(vendor).read_text().strip() == GOOGLE:
      kind = TPU_OF_PCI.get(pathlib.Path(vendor).with_name("device").read_text().strip(), "")
  return kind


def has_accelerator() -> bool:
  """Whether JAX will find a TPU or a GPU, without asking it, which would initialise the device."""
  return _tpu() or (_gpu() and bool(glob.glob("/dev/nvidia[0-9]*")))


def _gpu() -> bool:
  has = any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))
  return has and (not _platforms() or "cuda" in _platforms() or "gpu" in _platforms())


def versions() -> dict[str, str]:
  """Returns the versions of the packages that determine a run's numbers, pixels and tokens."""
  packages = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "bigalign",
    "pillow",
    "simplejpeg",
    "kornia-rs",
    "tokenizers",
    "sentencepiece",
    "freetype-py",
  )
  return {name: importlib.metadata.version(name) for name in packages}


def describe() -> dict[str, Any]:
  """Returns the platform, kind and number of devices, and the number of processes."""
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device_kind": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
  }
