"""Metrics can be read back to the bit, also after a kill and a resume."""

from __future__ import annotations

import errno
import io
import json
import math
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from bigalign.run import metrics
from bigalign.run.metrics import MetricWriter, TrainingProgress, is_wall_clock, read_metrics


def bits(x):
  return struct.pack(">d", x)


def test_floats_read_back_to_the_bit(tmp_path):
  values = {
    "a": 0.1 + 0.2,
    "b": 5e-324,
    "c": 1.7976931348623157e308,
    "d": -0.0,
    "e": 1e16,
    "f": float(np.float32(0.1)),
    "g": 1 / 3,
    "h": math.inf,
    "i": -math.inf,
    "j": math.nan,
  }
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(7, values)
  (row,) = read_metrics(tmp_path)
  assert row.pop("step") == 7
  assert {n: bits(x) for n, x in row.items()} == {n: bits(x) for n, x in values.items()}


def test_every_line_is_strict_json(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, {"train/loss": math.nan, "n": 3})

  def refuse(word):
    raise AssertionError(f"{word} is not JSON")

  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line, parse_constant=refuse) == {"step": 0, "train/loss": "nan", "n": 3}


def test_takes_arrays_of_one_element_and_refuses_others(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"a": jnp.float32(0.1), "b": np.int64(3), "c": jnp.bfloat16(0.5)})
    with pytest.raises(TypeError, match=r"'grads'.*\(2,\)"):
      writer.write(2, {"grads": np.zeros(2)})
    with pytest.raises(TypeError, match="'name'"):
      writer.write(2, {"name": "siglip"})
  (row,) = read_metrics(tmp_path)  # rejected rows are not written
  assert row == {"step": 1, "a": float(np.float32(0.1)), "b": 3, "c": 0.5}
  assert isinstance(row["b"], int)


def test_resume_cuts_later_rows_and_keeps_the_others_unchanged(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    for step in range(0, 50, 10):
      writer.write(step, {"train/loss": 1 / (step + 3), "worst": -math.inf})
      writer.write(step, {"val/num_samples": step})
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with MetricWriter(tmp_path, tensorboard=False, resume_step=20) as writer:
    for step in range(30, 50, 10):
      writer.write(step, {"train/loss": 1 / (step + 3), "worst": -math.inf})
      writer.write(step, {"val/num_samples": step})
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_loses_no_older_rows(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, {"a": 1.0})
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, {"a": 2.0})
  assert read_metrics(tmp_path) == [{"step": 0, "a": 2.0}]
  assert read_metrics(tmp_path / "metrics.jsonl.old") == [{"step": 0, "a": 1.0}]


def test_a_line_cut_short_by_a_kill_is_dropped_and_a_broken_one_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "a": 0.5}\n{"step": 2, "a": 0.')
  assert read_metrics(path) == [{"step": 1, "a": 0.5}]
  with MetricWriter(tmp_path, tensorboard=False, resume_step=5) as writer:
    writer.write(6, {"a": 1.0})
  assert read_metrics(path) == [{"step": 1, "a": 0.5}, {"step": 6, "a": 1.0}]
  path.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2.*JSON"):
    read_metrics(path)
  path.write_text('{"loss": 1}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:1.*'step'"):
    read_metrics(path)
  path.write_text('{"step": 1, "a": "NaN"}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:1.*'NaN'"):
    read_metrics(path)
  with pytest.raises(FileNotFoundError, match="training run"):
    read_metrics(tmp_path / "other.jsonl")


def test_tensorboard_gets_event_files_and_the_purge_step(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(3, {"val/text_to_image_R@1": 0.5, "n": 3})
  (file,) = (tmp_path / "tensorboard").iterdir()
  assert b"val/text_to_image_R@1" in file.read_bytes()


def test_tensorboard_loads_neither_torch_nor_clients_of_object_stores(tmp_path, monkeypatch):
  hidden = ("tensorboardX", "torch", "boto3", "google.cloud.storage")
  for name in [x for x in sys.modules if x in hidden or x.split(".")[0] in hidden]:
    monkeypatch.delitem(sys.modules, name)
  searched = []

  def find_spec(name, *_):
    searched.append(name)

  finder = types.SimpleNamespace(find_spec=find_spec)
  monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
  MetricWriter(tmp_path).close()
  assert "tensorboardX.event_file_writer" in searched
  assert not {"torch", "boto3", "google.cloud.storage"} & {*searched, *sys.modules}
  assert "torch" not in sys.modules  # whoever needs it later can import it


def test_a_full_disk_is_an_error_of_the_write_that_meets_it(tmp_path, monkeypatch):
  """TensorBoard's own thread would die of it, and the eleventh row would wait for ever."""
  with pytest.raises(OSError, match="No space left"), MetricWriter(tmp_path) as writer:
    writer.write(1, {"a": 1.0})

    def full(*_):
      raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
      patch.setattr(writer._tensorboard._py_recordio_writer, "flush", full)
      for step in range(2, 30):
        writer.write(step, {"a": 1.0})


def test_only_process_zero_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  out = io.StringIO()
  with MetricWriter(tmp_path) as writer, TrainingProgress(10, stream=out) as progress:
    writer.write(1, {"a": 1.0})
    progress.log(1, {"train/loss": 1.0})
  assert not list(tmp_path.iterdir())
  assert not out.getvalue()


def test_a_missing_wandb_is_an_error_and_an_existing_run_is_resumed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ImportError, match=r"bigalign\[wandb\]"):
    MetricWriter(tmp_path, wandb={})
  starts, rows = [], []
  run = types.SimpleNamespace(
    id="abc", log=rows.append, finish=lambda: None, define_metric=lambda *a, **k: None
  )
  fake = types.SimpleNamespace(init=lambda **options: starts.append(options) or run)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for step in (1, 2):
    with MetricWriter(
      tmp_path, tensorboard=False, wandb={"project": "p"}, resume_step=step - 1
    ) as writer:
      writer.write(step, {"a": 1.0})
  assert rows == [{"step": 1, "a": 1.0}, {"step": 2, "a": 1.0}]
  assert "id" not in starts[0] and starts[1]["id"] == "abc" and starts[1]["project"] == "p"


def test_names_of_wall_clock_metrics():
  assert all(
    map(
      is_wall_clock,
      (
        "train/batch_time",
        "train/data_time",
        "perf/mfu",
        "train/samples_per_second",
        "train/samples_per_second_per_gpu",
      ),
    )
  )
  assert not any(
    map(is_wall_clock, ("train/loss", "train/samples_seen", "val/num_samples", "perf"))
  )


def test_progress_prints_plain_lines_where_there_is_no_terminal():
  out = io.StringIO()
  with TrainingProgress(280, start=20, stream=out) as progress:
    progress.reach(39)
    progress.log(40, {"train/loss": 5.12345, "train/samples_per_second": 12345.6, "perf/mfu": 0.5})
    progress.log(280, {"train/loss": 1.0})
    progress.log(
      280,
      {"val/image_to_text_R@1": 0.25, "val/num_samples": 1000, "ema/val/image_to_text_R@1": 0.5},
    )
  lines = out.getvalue().splitlines()
  assert lines[0].startswith("step  40/280  loss 5.1235  images/s 12,346  0:00:0")
  assert lines[1:] == [
    "step 280/280  loss 1.0000",
    "step 280",
    "  val/image_to_text_R@1  0.2500  ema 0.5000",
    "  val/num_samples        1,000",
  ]
