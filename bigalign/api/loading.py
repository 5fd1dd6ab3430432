"""Loads a model from a run or from the files of other libraries: bigalign.load."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from bigalign import checks
from bigalign.api.checkpoints import in_dtype, load_checkpoint
from bigalign.api.image_inputs import View
from bigalign.api.model import Model
from bigalign.captions import Captioner, of_config
from bigalign.config import Config
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.evaluate import Run, open_run
from bigalign.export import main
from bigalign.losses.logit_head import of_losses
from bigalign.model import DualEncoder
from bigalign.options import plain
from bigalign.run import runtime
from bigalign.towers.base import DTYPES
from bigalign.towers.features import FeaturesOptions
from bigalign.weights.runs import is_run


def load(
  path: str | os.PathLike[str],
  step: int | str | None = None,
  ema: bool = False,
  *,
  dtype: str = "float32",
  tokenizer: Mapping[str, Any] | None = None,
) -> Model:
  """Loads a model that embeds images and texts.

  Preprocessing and tokenizer are those with which the model was trained, as its files state them.

  >>> import bigalign
  >>> model = bigalign.load(run)  # run = "runs/quickstart"
  >>> model.embed_texts(["a cat", "a dog"]).shape
  (2, 64)

  Args:
    path: the --workdir of a run, local or gs://…; a folder that `bigalign export` wrote; a folder
      of Hugging Face, open_clip or sentence-transformers; a .npz file of big_vision. A folder may
      hold one tower only.
    step: of a run, which checkpoint: a number, "latest" or "best"; None: the latest.
    ema: of a run, whether to use the running averages of the parameters (config.ema).
    dtype: in which the towers compute. "bfloat16" is faster on accelerators and differs in
      the third digit.
    tokenizer: options as config.data.tokenizer, for files without a tokenizer, such as a .npz.

  Raises:
    FileNotFoundError: for a path that does not exist, or a step without a checkpoint.
    ValueError: for files that cannot be read, with the file and the key; for averages of a run that
      keeps none; for a tokenizer besides that of a run.
  """
  checks.known("dtype", dtype, DTYPES)
  runtime.setup()
  address = os.fspath(path)
  if is_run(address):
    if tokenizer is not None:
      raise ValueError(
        f"tokenizer: {address} is a run, which has its own; the argument is for files without one"
      )
    return _run(address, step, ema, dtype)
  folder = pathlib.Path(address).expanduser()
  if not folder.exists():
    raise FileNotFoundError(f"{address}: no such file or folder")
  if step is not None or ema:
    raise ValueError(f"{address} is not a run, so it has no steps and no averages")
  return load_checkpoint(folder, dtype=dtype, tokenizer=tokenizer)


def open_step(path: str | os.PathLike[str], step: int | str | None) -> Run:
  """The run in a folder, at a step; None: the latest."""
  return open_run(os.fspath(path), "latest" if step is None else step)


def _run(path: str, step: int | str | None, ema: bool, dtype: str) -> Model:
  """The model of a run."""
  run = open_step(path, step)
  trained = main.trained_model(run, ema)
  data = run.config.data
  has_texts = not isinstance(run.config.model.text, FeaturesOptions)
  has_images = not isinstance(run.config.model.image, FeaturesOptions)
  learned = run.ema if ema else run.params
  heads = {path: x for path, x in learned.items() if path.startswith("heads/")}
  return Model(
    source=f"{path} at step {run.step}",
    encoder=in_dtype(trained.model, dtype),
    params=trained.arrays,
    config=plain(run.config),
    head=of_losses(learned, run.config.loss),
    view=View(data) if has_images else None,
    tokenizer=trained.tokenizer if has_texts else None,
    embed_dim=run.config.model.embed_dim,
    export=functools.partial(_export, run.address or path, run.step, ema),
    mesh=run.mesh,
    captions=functools.partial(_captions, run.config, heads, trained.tokenizer),
  )


def _captions(
  config: Config, heads: dict[str, Any], tokenizer: Tokenizer, encoder: DualEncoder
) -> tuple[Captioner, dict[str, Any]]:
  """What writes captions with the head of a run, and the parameters of the head."""
  return of_config(config, encoder, tokenizer), heads


def _export(path: str, step: int, ema: bool, *args: Any, **options: Any) -> Any:
  """Exports a run, which is read again: a loaded model keeps the parameters only once."""
  return main.export(open_step(path, step), *args, ema=ema, **options)
