"""The programs as functions: they return what the programs print.

In a run of several processes, call jax.distributed.initialize() first, as JAX demands.
"""

from __future__ import annotations

import inspect
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from ml_collections import ConfigDict

from bigalign.api.loading import open_any, open_step
from bigalign.config import setup_runtime
from bigalign.evaluate import data_evals
from bigalign.evaluate import evaluate as run_evaluators
from bigalign.export.main import export as write_folder
from bigalign.frozen.embed import SIDES, summary
from bigalign.frozen.embed import embed as write_stores
from bigalign.options import plain
from bigalign.plan.main import CACHE, predict
from bigalign.run import progress, runtime
from bigalign.run.configs import config_name, load_config
from bigalign.train import train as train_in

Config: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | ConfigDict


def train(
  config: Config,
  overrides: Mapping[str, Any] | None = None,
  *,
  workdir: str | os.PathLike[str] | None = None,
  allow_config_change: bool = False,
  **options: Any,
) -> str:
  """Trains a model; continues from the newest checkpoint in the folder of the run.

  Args:
    config: the name of a shipped config, the path of a config file, or the config.
    overrides: {option: value}, such as {"optimizer.lr": 3e-4}.
    workdir: folder of the run, local or gs://…; None: runs/NAME, after the config.
    allow_config_change: continue although the config of the run in the folder differs.
    **options: overrides too: total_steps=100, optimizer__lr=3e-4.

  Returns:
    The folder of the run, for bigalign.load.

  Raises:
    TypeError, ValueError, FileNotFoundError …: as of bigalign.train.train.
  """
  _check_script("train")
  values = _values(config, overrides, options)
  if workdir is None:
    if not isinstance(config, str | os.PathLike):
      raise TypeError("train() of a config without a name needs workdir=, the folder of the run")
    workdir = f"runs/{config_name(config)}"
  setup_runtime(values)
  folder = os.path.expanduser(workdir)
  train_in(values, folder, allow_config_change=allow_config_change)
  return folder


def evaluate(
  run: str | os.PathLike[str],
  *,
  step: int | str | None = None,
  retrieval: str | None = None,
  fields: Sequence[str] | None = None,
  zeroshot: str | os.PathLike[str] | None = None,
  image_store: str = "",
  text_store: str = "",
  class_store: str = "",
  evals: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns the metrics of a run, {name: value}: by default those of the evaluators of its config.

  Args:
    run: the --workdir of a run, or a folder or file of another library, as of bigalign.load.
    step: of a run, which checkpoint: a number, "latest" or "best"; None: the latest.
    retrieval: shards, or another source, for retrieval.
    fields: of its captions; None: config.data.captions.
    zeroshot: folder of a CLIP_benchmark dataset, for zero-shot classification.
    image_store, text_store: folders of vectors that take the place of the images or the captions of
      `retrieval`; both, without it: of both sides.
    class_store: folder of the vectors of the prompts of the classes of `zeroshot`.
    evals: other evaluators, written as config.evals.

  Raises:
    ValueError: if the run has no evaluators and none are given.
  """
  runtime.setup()
  opened = open_any(run, step)
  folder = None if zeroshot is None else os.fspath(zeroshot)
  chosen = data_evals(retrieval, fields, folder, image_store, text_store, class_store)
  chosen |= dict(evals or {})
  if not chosen and not opened.config.evals:
    raise ValueError(f"{run} has no config.evals; give retrieval, zeroshot or evals")
  with progress.shown(jax.process_index() == 0):
    return run_evaluators(opened, chosen or None)


def embed(
  config: Config,
  out: str | os.PathLike[str],
  overrides: Mapping[str, Any] | None = None,
  *,
  towers: Sequence[str] = SIDES,
  batch_size: int = 256,
  dtype: str = "float16",
  projected: bool = False,
  tokens: bool = False,
  **options: Any,
) -> dict[str, dict[str, Any]]:
  """Runs a dataset through frozen towers and stores the embeddings.

  Args:
    config: as of `train`; its `data` and `model` are used.
    out: the stores are OUT/image and OUT/text.
    overrides: as of `train`.
    towers: which sides: "image", "text".
    batch_size: images or texts at a time, over all devices.
    dtype: of the vectors: "float16", "bfloat16" or "float32".
    projected: after the projectors, in the shared space.
    tokens: every token too, for projectors that read tokens.
    **options: as of `train`.

  Returns:
    {folder of a store: {"rows": N, "width": D, "left_out": {reason: samples}}}.
  """
  _check_script("embed")
  values = plain(_values(config, overrides, options))
  setup_runtime(values)
  with progress.shown(jax.process_index() == 0):
    folders = write_stores(
      values,
      pathlib.Path(out),
      sides=towers,
      batch_size=batch_size,
      dtype=dtype,
      projected=projected,
      tokens=tokens,
    )
  return summary(folders.values())


class Exported(NamedTuple):
  """What an export wrote.

  Args:
    folder: the folder.
    difference: the largest difference of its outputs from the run's, relative to the largest; None
      if the library of the format is not installed, so that they could not be compared.
  """

  folder: pathlib.Path
  difference: float | None


def export(
  run: str | os.PathLike[str],
  out: str | os.PathLike[str],
  format: str = "hf",
  *,
  step: int | str | None = None,
  ema: bool = False,
  heads: bool = False,
  **card: Any,
) -> Exported:
  """Writes a run as a folder for another library.

  Args:
    run: the --workdir of a run.
    out: the folder, new or empty.
    format: "hf", "open_clip", "npz" (big_vision), "torch" or "sentence-transformers".
    step: which checkpoint: a number, "latest" or "best"; None: the latest.
    ema: whether to export the averaged parameters.
    heads: whether to export the layers of losses too.
    **card: of the model card: license="apache-2.0" …, as of bigalign.export.main.export.

  Raises:
    ValueError: if the format cannot hold the model, with the reasons and the formats that can.
    FileExistsError: if the folder is not empty.
  """
  runtime.setup()
  opened = open_step(run, step)
  return Exported(*write_folder(opened, format, pathlib.Path(out), ema=ema, heads=heads, **card))


def plan(
  config: Config,
  overrides: Mapping[str, Any] | None = None,
  *,
  topology: str = "",
  batch: int | None = None,
  sweep: Sequence[str] = (),
  largest_batch: bool = False,
  samples: int = 0,
  prices: str | None = None,
  calibrate: str | os.PathLike[str] | None = None,
  cache: str | os.PathLike[str] = CACHE,
  **options: Any,
) -> dict[str, Any]:
  """Predicts memory, speed and cost of a config on a TPU slice; needs the extra `plan`.

  The train step is compiled for the slice on this machine. docs/plan.md explains the figures. JAX
  must not use an accelerator of this machine meanwhile: set JAX_PLATFORMS=cpu.

  Args:
    config: as of `train`.
    overrides: as of `train`.
    topology: "v5e:16x16", or several slices, "v5e:16x16*2"; "": config.topology.
    batch: global batch size, instead of config.batch_size.
    sweep: any of "batch", "remat", "mesh": all combinations are compiled.
    largest_batch: whether the largest batch that fits is found, by compiling.
    samples: of the dataset, for epochs and losses with per-sample state.
    prices: JSON file with the price of a chip for an hour, by kind: {"v5e": 1.2}.
    calibrate: a measured step that narrows the times: JSON of `bigalign benchmark`, or a run.
    cache: folder of earlier plans, which are reused.
    **options: as of `train`.

  Returns:
    The figures, as `bigalign plan --json` writes them.

  Raises:
    ValueError: if no topology is given.
  """
  return predict(
    plain(_values(config, overrides, options)),
    topology,
    batch=batch,
    sweeps=sweep,
    search=largest_batch,
    samples=samples,
    prices=prices,
    measured=calibrate,
    cache=pathlib.Path(cache),
  )


def _check_script(function: str) -> None:
  """Raises RuntimeError while a data worker imports the script that started it.

  Python's multiprocessing runs the script again in each worker, under the name "__mp_main__".
  """
  frame = inspect.currentframe()
  while frame is not None:
    if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__mp_main__":
      raise RuntimeError(
        f"bigalign.{function} was called again by a data worker, which imports the script that"
        ' started it. Call it below `if __name__ == "__main__":`, or set data.workers=0'
      )
    frame = frame.f_back


def _values(
  config: Config, overrides: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> ConfigDict:
  """The config with the overrides of both kinds."""
  return load_config(config, {**(overrides or {}), **options})
