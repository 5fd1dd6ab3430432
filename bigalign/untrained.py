"""Parameters that no run trained, written as a run: merged models, maps in closed form."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigalign import sharding
from bigalign.checkpoint import revision
from bigalign.config import Config, Twin, originals, tokenizer_digest, tokenizer_files
from bigalign.options import plain
from bigalign.program import layout, make_program
from bigalign.run import copies, runtime
from bigalign.run.provenance import write_config


def alone(config: Config) -> Config:
  """A config whose checkpoint holds all parameters together: no stages, averages, frozen parts.

  Without images the image side would be frozen, so the data of a run on texts alone has images.
  """
  data = dataclasses.replace(config.data, images=True)
  return dataclasses.replace(config, data=data, stages=(), ema=0.0, twin=Twin(), frozen="")


def write_run(
  folder: pathlib.Path,
  config: Config,
  params: Mapping[str, Any],
  record: Mapping[str, Any],
  *,
  step: int = 0,
) -> None:
  """Writes a run with one checkpoint, without an optimizer.

  evaluate, export, bigalign.load and config.model.init read it; it cannot be resumed.

  Args:
    folder: of the run; new or empty.
    config: of `alone`.
    params: {path: array} of all parameters; others are left out.
    record: what config.json says besides the config and where it was written: `model` as it is
      written in a config, `dataset_size`, `samples_seen`, `data`, and how the parameters were made.
    step: of the checkpoint.
  """
  program = make_program(config, dataset_size=record["dataset_size"])
  shapes, shardings = layout(program, sharding.make_mesh(), config.rules)
  placed = {
    path: jax.device_put(np.asarray(params[path], x.dtype), shardings.trainable[path])
    for path, x in shapes.trainable.items()
  }
  copied = copies.read(originals(config))
  meta = {
    **record,
    "config": plain(config),
    "revision": revision(),
    "versions": runtime.versions(),
    "hardware": runtime.describe(),
    "tokenizer": tokenizer_digest(config),
    "tokenizer_files": tokenizer_files(config),
    "copies": copied.record,
    "step": step,
  }
  folder.mkdir(parents=True, exist_ok=True)
  copies.write(copied, folder)
  clock = {"step": jax.device_put(np.int32(step), shardings.step)}
  with config.keep.make(workdir=folder) as checkpoints:
    checkpoints.save(step, {"trainable": placed, "clock": clock}, meta, {})
  (folder / "metrics.jsonl").touch()  # which export and report read
  write_config(folder, meta)
