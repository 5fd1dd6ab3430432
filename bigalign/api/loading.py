"""Loads a model from a run or from the files of other libraries: bigalign.load."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from bigalign import checks
from bigalign.api.image_inputs import View
from bigalign.api.logits import of_losses
from bigalign.api.model import Model
from bigalign.evaluate import open_run
from bigalign.export import main
from bigalign.model import DualEncoder
from bigalign.options import plain
from bigalign.run import runtime
from bigalign.towers.base import DTYPES
from bigalign.towers.features import FeaturesOptions


def load(
  path: str | os.PathLike[str],
  step: int | str | None = None,
  ema: bool = False,
  *,
  dtype: str = "float32",
) -> Model:
  """Loads a model that embeds images and texts.

  Preprocessing and tokenizer are those with which the model was trained, as its files state them.

  Args:
    path: the --workdir of a run, local or gs://…
    step: of a run, which checkpoint: a number, "latest" or "best"; None: the latest.
    ema: of a run, whether to use the running averages of the parameters (config.ema).
    dtype: in which the towers compute. "bfloat16" is faster on accelerators and differs in
      the third digit.

  Raises:
    FileNotFoundError: for a path that does not exist, or a step without a checkpoint.
    ValueError: for files that cannot be read, with the file and the key; for averages of a run that
      keeps none.
  """
  checks.known("dtype", dtype, DTYPES)
  runtime.setup()
  return _run(os.fspath(path), "latest" if step is None else step, ema, dtype)


def _run(path: str, step: int | str, ema: bool, dtype: str) -> Model:
  """The model of a run."""
  run = open_run(path, step)
  trained = main.trained_model(run, ema)
  data = run.config.data
  has_texts = not isinstance(run.config.model.text, FeaturesOptions)
  has_images = not isinstance(run.config.model.image, FeaturesOptions)
  return Model(
    source=f"{path} at step {run.step}",
    encoder=in_dtype(trained.model, dtype),
    params=trained.arrays,
    config=plain(run.config),
    head=of_losses(run.ema if ema else run.params, run.config.loss),
    view=View(data) if has_images else None,
    tokenizer=trained.tokenizer if has_texts else None,
    embed_dim=run.config.model.embed_dim,
    export=functools.partial(main.export, run, ema=ema),
    mesh=run.mesh,
  )


def in_dtype(encoder: DualEncoder, dtype: str) -> DualEncoder:
  """The encoder with towers that compute in another dtype."""
  towers: dict[str, Any] = {name: getattr(encoder, name) for name in ("image_tower", "text_tower")}
  changed = {
    name: tower.clone(options=dataclasses.replace(tower.options, dtype=dtype))
    for name, tower in towers.items()
    if tower is not None and hasattr(tower.options, "dtype")
  }
  return encoder.clone(**changed)
