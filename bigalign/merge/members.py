"""The models that are merged, as runs at one step; and the folder of a merged model."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from bigalign import tree
from bigalign.api.checkpoints import load_checkpoint
from bigalign.api.loading import as_run
from bigalign.evaluate import Run, open_run
from bigalign.merge.average import Arrays
from bigalign.options import plain
from bigalign.program import make_program
from bigalign.untrained import alone, write_run
from bigalign.weights.runs import is_run


def opened(address: str, step: int | str = "latest", ema: bool = False) -> Run:
  """A model as a run without averages, whose parameters are those that are merged.

  Args:
    address: a run, or a folder or file of another library, as of bigalign.load.
    step: of a run: a number, "latest" or "best".
    ema: of a run: its running averages.

  Raises:
    FileNotFoundError: for a path that does not exist, or a step without a checkpoint.
    ValueError: for averages of a run that keeps none, and for files of one tower.
  """
  if is_run(address):
    run = open_run(address, step)
    if ema and not run.ema:
      raise ValueError(f"ema (--ema): {address} keeps no averages (config.ema)")
    return run._replace(params=run.ema if ema else run.params, ema={})
  path = pathlib.Path(address).expanduser()
  if not path.exists():
    raise FileNotFoundError(f"{address}: no such file or folder")
  return as_run(load_checkpoint(path, dtype="float32", tokenizer=None), address)


def on_host(run: Run) -> Arrays:
  """The parameters of a run by path, each layer by itself, as float32 if they are bfloat16."""
  arrays: Arrays = {}
  for path, x in run.params.items():
    array = np.asarray(x)
    if array.dtype.name == "bfloat16":  # of frozen parameters
      array = array.astype(np.float32)
    if tree.is_stacked(path):
      arrays |= {tree.layer_path(path, i): layer for i, layer in enumerate(array)}
    else:
      arrays[path] = array
  return arrays


def as_in(shapes: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
  """Arrays of `on_host`, with layers stacked where `shapes` (by path) have them stacked."""
  return {
    path: np.stack([arrays[tree.layer_path(path, i)] for i in range(x.shape[0])])
    if tree.is_stacked(path)
    else arrays[path]
    for path, x in shapes.items()
  }


def write(out: str | pathlib.Path, run: Run, arrays: Arrays, about: Mapping[str, Any]) -> None:
  """Writes a merged model as the folder of a run with one checkpoint, which holds no optimizer.

  Args:
    out: the folder; new or empty.
    run: whose config, tokenizer and evaluators the folder gets.
    arrays: the parameters, as of `on_host`.
    about: how they were made, for the record.

  Raises:
    FileExistsError: if the folder is not empty.
  """
  folder = pathlib.Path(out).expanduser().absolute()
  check_new(folder)
  config = alone(run.config)
  program = make_program(config, dataset_size=run.meta["dataset_size"])
  record = {**run.meta, "model": plain(config.model), "merged": dict(about)}
  write_run(folder, config, as_in(program.params, arrays), record, step=run.step)
  logging.info("%s: written, at step %d", folder, run.step)


def check_new(folder: pathlib.Path) -> None:
  """Raises FileExistsError if the folder is not new or empty."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f"{folder} (--out) exists and is not an empty folder; choose another")
