"""Settings made before the first device is used, on simulated machines."""

from __future__ import annotations

import os

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
