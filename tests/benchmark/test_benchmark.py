"""bigalign benchmark: what it measures, what its table and its JSON say, and what they do not."""

from __future__ import annotations

import json
import os
import pathlib
import re
import socket
import types

import jax
import pytest
from helpers.shipped import load

from bigalign.benchmark import main, measure
from bigalign.plan import calibrate, variants
from bigalign.run import runtime, tables

STEP = dict(
  seconds_per_step=0.62,
  least_seconds_per_step=0.6,
  images_per_second=2048 / 0.62,
  flops_per_second=1e14,
  mfu=0.41,
  peak_bytes_per_chip=9.5e9,
  compile_seconds=30.0,
)
RESULT = dict(
  config="siglip_b16",
  device=dict(platform="tpu", device_kind="TPU v5 lite", devices=8, processes=1),
  host=dict(cores=112, system="Linux x86_64"),
  plan=dict(batch_size=2048, peak_bytes_per_chip=9.1e9, seconds_per_step=[0.75, 0.44]),
  step=STEP,
  embed=dict(images_per_second=9000.0, texts_per_second=20_000.0),
  loader=dict(workers=16, read_per_second=50_000.0, images_per_second=6606.5),
  evaluation=dict(pairs=256, seconds=0.5, pairs_per_second=512.0),
)


def rows(result):
  """{first cell: other cells} of the table."""
  lines = tables.text(main.table(result)).splitlines()
  return {cells[0]: cells[1:] for x in lines if (cells := re.split(r"  +", x.strip()))[1:]}


def test_the_table_shows_what_was_measured_next_to_the_plan():
  found = rows(RESULT)
  assert found["siglip_b16, batch 2,048, 8 x TPU v5 lite"] == ["measured", "planned"]
  assert found["time of a step"] == ["620 ms", "440 ms to 750 ms"]
  assert found["images per second"] == ["3,303", "2,731 to 4,655"]
  assert found["memory of a device"] == ["9.50 GB", "9.10 GB"]
  assert found["share of the peak (MFU)"] == ["41.0%"]
  assert found["loader / step, 1 or more is enough"] == ["2.00"]
  assert found["retrieval of 256 pairs, with the start of workers"] == ["500 ms"]


def test_what_a_machine_does_not_report_is_left_out_of_the_table():
  plan = dict(batch_size=2048, peak_bytes_per_chip=9.1e9)
  step = STEP | dict(mfu=None, peak_bytes_per_chip=None)
  found = rows(RESULT | dict(plan=plan, step=step, embed={}, evaluation={}))
  assert found["time of a step"] == ["620 ms"]
  assert found["useful work per second"] == ["100 TFLOP"]
  absent = ("share of the peak", "memory of a device", "embedding", "retrieval")
  assert not [row for row in found if row.startswith(absent)]


@pytest.mark.parametrize(
  "config, batch, expected",
  [
    (dict(batch_size=16_384, topology="v5e:8x8"), None, 2048),
    (dict(batch_size=512, topology="v5e:1x1"), None, 4096),
    (dict(batch_size=16, topology="v5e:8x8"), None, 8),
    (dict(batch_size=512), None, 512),
    (dict(batch_size=16_384, topology="v5e:8x8"), 64, 64),
  ],
)
def test_a_device_gets_as_many_pairs_as_on_the_topology_of_the_config(config, batch, expected):
  assert variants.for_devices(config, batch, 8)["batch_size"] == expected


@pytest.mark.parametrize("accelerator, name", [(False, "quickstart"), (True, "siglip_b16")])
def test_the_machine_chooses_the_config_if_none_is_named(accelerator, name, monkeypatch):
  monkeypatch.setattr(runtime, "has_accelerator", lambda: accelerator)
  assert main.with_config(["x", "--batch=8"]) == ["x", "--batch=8", f"--config={name}"]
  for given in (["x", "--config=tiny"], ["x", "--config", "tiny"]):
    assert main.with_config([*given, "--config.seed=1"]) == [*given, "--config.seed=1"]
  load(name)


@pytest.mark.parametrize(
  "kind, coords, slices, expected",
  [
    ("v5e", [(x, y, 0) for x in range(2) for y in range(4)], [0] * 8, "v5e:2x4"),
    ("v4", [(x, y, z) for x in range(2) for y in range(2) for z in range(2)], [0] * 8, "v4:2x2x2"),
    ("v6e", [(x, y, 0) for x in range(2) for y in range(2)] * 2, [0] * 4 + [1] * 4, "v6e:2x2*2"),
  ],
)
def test_the_slice_is_named_by_the_places_of_its_chips(kind, coords, slices, expected, monkeypatch):
  devices = [types.SimpleNamespace(coords=place, slice_index=i) for place, i in zip(coords, slices)]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  assert measure._topology(kind) == expected


def test_made_up_photos_and_their_index_are_removed(monkeypatch):
  monkeypatch.setattr(measure, "write_photos", lambda folder: f"{folder}/*.tar")
  before = os.environ.get("BIGALIGN_INDEX")
  with measure.photos() as pattern:
    folder = pathlib.Path(pattern).parent
    assert folder.is_dir() and os.environ["BIGALIGN_INDEX"] == f"{folder}/index"
  assert not folder.exists() and os.environ.get("BIGALIGN_INDEX") == before


@pytest.mark.slow
def test_a_small_config_is_measured_on_this_machine_and_the_json_names_no_place(
  tmp_path, monkeypatch
):
  """The file can be pasted: neither paths nor the host are in it, and a plan could read it."""
  monkeypatch.setattr(measure, "PHOTOS", 8)
  config = load("tiny").to_dict() | {"ema": 0.0}
  found = main.benchmark(config, name="tiny", batch=8, seconds=0.01)
  text = json.dumps(found)
  for private in (socket.gethostname(), str(pathlib.Path.home()), os.getcwd(), "/tmp", "0.tar"):
    assert private not in text
  step, plan = found["step"], found["plan"]
  assert step["seconds_per_step"] >= step["least_seconds_per_step"] > 0
  assert step["images_per_second"] == pytest.approx(8 / step["seconds_per_step"])
  assert plan["batch_size"] == 8 and plan["peak_bytes_per_chip"] > plan["parameters"] * 4
  assert found["embed"]["texts_per_second"] > 0 < found["loader"]["images_per_second"]
  assert found["evaluation"]["pairs"] == 8 and rows(found)
  file = tmp_path / "mine.json"
  file.write_text(text)
  with pytest.raises(ValueError, match="it was measured on cpu, and plans are for TPUs"):
    calibrate.read(file, "v5e", lambda *_: {})


def test_a_step_that_does_not_fit_says_what_to_give():
  config = types.SimpleNamespace(batch_size=65_536)
  said = r"65,536 pairs does not fit .* --batch=N"
  with pytest.raises(ValueError, match=said), measure.fitting(config):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), measure.fitting(config):
    raise jax.errors.JaxRuntimeError("INTERNAL: another error")
