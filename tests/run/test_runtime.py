"""Settings made before the first device is used, on simulated machines."""

from __future__ import annotations

import fnmatch
import os
import platform
import subprocess
import sys
import types

import jax
import pytest

from bigalign.run import runtime

VMEM = "--xla_tpu_scoped_vmem_limit_kib"


@pytest.fixture
def tpu(monkeypatch, tmp_path):
  """A TPU host without chips on its bus yet; returns the folder of PCI devices."""
  monkeypatch.setattr(runtime, "_tpu", lambda: True)
  monkeypatch.setattr(runtime, "_gpu", lambda: False)
  monkeypatch.setattr(runtime, "PCI", str(tmp_path))
  monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
  return tmp_path


def plug_in(folder, vendor, device):
  slot = folder / f"0000:00:{len(list(folder.iterdir())):02}.0"
  slot.mkdir()
  (slot / "vendor").write_text(vendor + "\n")
  (slot / "device").write_text(device + "\n")


def flags_of(variable):
  runtime.setup(cache=None)
  return dict(flag.split("=") for flag in os.environ[variable].split())


@pytest.mark.parametrize(
  "device,expected", [("0x006f", "98304"), ("0x0063", None), ("0xffff", None)]
)
def test_the_kind_of_tpu_is_read_from_the_pci_bus(tpu, device, expected):
  plug_in(tpu, "0x1234", "0x006f")  # another maker's
  plug_in(tpu, "0x1ae0", device)
  found = flags_of("LIBTPU_INIT_ARGS")
  assert found.get(VMEM) == expected
  assert found["--xla_enable_async_all_gather"] == "true"  # every kind


@pytest.mark.parametrize("kind,expected", [("v6e-8", "98304"), ("v5litepod-16", None)])
def test_the_accelerator_type_comes_first(tpu, monkeypatch, kind, expected):
  plug_in(tpu, "0x1ae0", "0x006f")
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", kind)
  assert flags_of("LIBTPU_INIT_ARGS").get(VMEM) == expected


@pytest.mark.parametrize("mine", [None, "/mine"])
def test_a_compilation_cache_of_the_user_is_kept(tpu, monkeypatch, mine):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: jax.config.values[name] for name in names}
  try:
    jax.config.update("jax_compilation_cache_dir", mine)
    runtime.setup(cache="/ours")
    assert jax.config.values["jax_compilation_cache_dir"] == (mine or "/ours")
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


@pytest.mark.parametrize("before,after", [(1.0, 0.0), (30.0, 30.0)])  # JAX's default, a user's
def test_the_compilation_cache_keeps_programs_that_compile_fast(tpu, before, after):
  name = "jax_persistent_cache_min_compile_time_secs"
  of_the_tests = jax.config.values[name]
  try:
    jax.config.update(name, before)
    runtime.setup(cache=None)
    assert jax.config.values[name] == after
  finally:
    jax.config.update(name, of_the_tests)


def test_settings_of_the_user_are_kept(tpu, monkeypatch):
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
  monkeypatch.setenv("LIBTPU_INIT_ARGS", f"{VMEM}=5")
  assert flags_of("LIBTPU_INIT_ARGS")[VMEM] == "5"


@pytest.mark.parametrize(
  "held,added",
  [
    ("--xla_enable_async_all_gather_of_others=false", True),  # the beginning of another name
    ("--other=--xla_enable_async_all_gather", True),  # a value
    ("--xla_enable_async_all_gather=false", False),
    ("-xla_enable_async_all_gather", False),
    ("--noxla_enable_async_all_gather --xla_b=1", False),
    ("'--xla_enable_async_all_gather=false'", False),
    ("", True),
  ],
)
def test_flags_are_compared_by_their_whole_names(tpu, monkeypatch, held, added):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", held)
  runtime.setup(cache=None)
  words = os.environ["LIBTPU_INIT_ARGS"].split()
  assert ("--xla_enable_async_all_gather=true" in words) == added
  assert words[: len(held.split())] == held.split()


def test_options_of_a_compilation_are_the_flags_that_the_user_has_not_set(monkeypatch):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", f"{VMEM}=5 --noxla_enable_async_all_gather")
  of_v6e, of_v5e = runtime.libtpu_options("v6e"), runtime.libtpu_options("v5e")
  assert VMEM.removeprefix("--") not in of_v6e and "xla_enable_async_all_gather" not in of_v6e
  assert of_v6e["xla_tpu_overlap_compute_collective_tc"] == "true"
  assert of_v5e["xla_jf_crs_combiner_threshold_in_bytes"] == "4194304"
  assert of_v6e.items() < of_v5e.items()
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "/flags.txt")
  assert runtime.libtpu_options("v5e") == {}


def test_a_file_of_flags_is_kept(tpu, monkeypatch, caplog):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "/flags.txt")
  runtime.setup(cache=None)
  assert os.environ["LIBTPU_INIT_ARGS"] == "/flags.txt"
  assert "LIBTPU_INIT_ARGS=/flags.txt names a file" in caplog.text


def test_gpus_are_deterministic_when_asked(monkeypatch):
  monkeypatch.setattr(runtime, "_tpu", lambda: False)
  monkeypatch.setattr(runtime, "_gpu", lambda: True)
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
  assert "--xla_gpu_deterministic_ops" not in flags_of("XLA_FLAGS")
  runtime.setup(cache=None, deterministic=True)
  assert "--xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"]
  assert "--xla_gpu_autotune_level=0" not in os.environ["XLA_FLAGS"]


# A machine without a TPU, as far as runtime looks at it.
WITHOUT_TPU = """
from absl import logging
import jax
from bigalign.run import runtime
runtime.glob.glob = lambda pattern: []
logging.set_verbosity(logging.INFO)
logging.use_absl_handler()
runtime.setup(cache=None)
print(jax.devices()[0].platform)
"""


@pytest.mark.slow
def test_libtpu_says_nothing_on_a_machine_without_a_tpu():
  removed = {"JAX_PLATFORMS", *runtime.TPU_VARIABLES}
  env = {name: value for name, value in os.environ.items() if name not in removed}
  ended = subprocess.run(
    [sys.executable, "-c", WITHOUT_TPU], capture_output=True, text=True, env=env, check=True
  )
  assert ended.stderr == "" and ended.stdout in ("cpu\n", "gpu\n")


@pytest.mark.parametrize(
  "paths,variables,platforms,skips",
  [
    ([], {}, "", True),
    (["/dev/vfio/vfio"], {}, "", True),
    (["/dev/accel0"], {}, "", False),
    (["/dev/vfio/0"], {}, "", False),
    ([], {"TPU_ACCELERATOR_TYPE": "v6e-8"}, "", False),
    ([], {}, "tpu", False),
    ([], {}, "cpu", False),
  ],
)
def test_tpus_are_looked_for_where_they_may_be(monkeypatch, paths, variables, platforms, skips):
  for name in ("JAX_PLATFORMS", *runtime.TPU_VARIABLES):
    monkeypatch.delenv(name, raising=False)
  for name, value in {**variables, "LIBTPU_INIT_ARGS": "--before"}.items():
    monkeypatch.setenv(name, value)
  if platforms:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
  skipped = []
  monkeypatch.setattr(
    runtime.glob, "glob", lambda pattern: [x for x in paths if fnmatch.fnmatch(x, pattern)]
  )
  monkeypatch.setattr(runtime, "_gpu", lambda: False)
  monkeypatch.setattr(runtime, "skip_tpu", lambda: skipped.append(True))
  monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(
    runtime.jax, "config", types.SimpleNamespace(values={"jax_platforms": platforms})
  )
  runtime.setup(cache=None)
  assert bool(skipped) == skips


@pytest.mark.parametrize(
  "given, connects, warns",
  [
    (dict(SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="3"), True, False),  # srun
    (dict(SLURM_NTASKS="8"), False, True),  # a shell of salloc
    (
      dict(SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0"),
      False,
      True,
    ),  # a script of sbatch
    (dict(SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1"), False, True),  # a shell on the first node
    (dict(SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1"), False, False),
    ({}, False, False),
  ],
)
def test_only_processes_that_srun_started_wait_for_others(
  given, connects, warns, monkeypatch, caplog
):
  for name in [name for name in os.environ if name.startswith(("SLURM_", "BIGALIGN_"))]:
    monkeypatch.delenv(name)
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(runtime, "_tpu", lambda: False)
  called = []
  monkeypatch.setattr(runtime, "_initialize", lambda **given: called.append(given))
  with caplog.at_level("WARNING"):
    runtime.connect()
  assert called == [{}] * connects
  assert ("srun did not start this process" in caplog.text) == warns


PAGE_FAULTS = """
import resource
import numpy as np
from bigalign.run import runtime
runtime.keep_freed_memory()
for _ in range(2):
  np.ones(16 << 20)  # 128 MiB
print(-resource.getrusage(resource.RUSAGE_SELF).ru_minflt, end="")
for _ in range(8):
  np.ones(16 << 20)
print("+" + str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
@pytest.mark.parametrize("mine", ["", "glibc.malloc.mmap_max=65536"])
def test_freed_memory_is_used_again(mine):
  ended = subprocess.run(
    [sys.executable, "-c", PAGE_FAULTS],
    capture_output=True,
    text=True,
    env={**os.environ, "GLIBC_TUNABLES": mine},
    check=True,
  )
  before, after = map(int, ended.stdout.removeprefix("-").split("+"))
  # 8 arrays of 32,768 pages of 4 KiB, unless the kernel gives larger pages.
  assert (after - before > 500) == bool(mine)


@pytest.mark.parametrize(
  "gpu,tpu,expected", [(False, False, True), (True, False, False), (False, True, False)]
)
def test_only_programs_on_the_cpu_keep_freed_memory(monkeypatch, gpu, tpu, expected):
  calls = []
  monkeypatch.setattr(runtime, "_gpu", lambda: gpu)
  monkeypatch.setattr(runtime, "_tpu", lambda: tpu)
  monkeypatch.setattr(runtime, "keep_freed_memory", lambda: calls.append(1))
  monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
  runtime.setup(cache=None)
  assert bool(calls) == expected
