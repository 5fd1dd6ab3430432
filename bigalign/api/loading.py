"""Loads a model from a run or from the files of other libraries: bigalign.load."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigalign import checks
from bigalign.api.checkpoints import in_dtype, load_checkpoint
from bigalign.api.image_inputs import View
from bigalign.api.model import Model
from bigalign.captions import Captioner, of_config
from bigalign.config import Config, resolve_config
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.evaluate import Run, open_run
from bigalign.export import main
from bigalign.losses.logit_head import of_losses
from bigalign.model import DualEncoder
from bigalign.options import plain
from bigalign.program import make_embed, make_program
from bigalign.projectors import Identity
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


# Options of config.data for a side without a tower: the smallest, because its inputs are not read.
UNREAD: dict[str, dict[str, Any]] = dict(
  image=dict(image_size=1), text=dict(tokenizer=dict(name="byte", length=2))
)


def as_run(model: Model, address: str, *, one_tower: bool = False) -> Run:
  """The model in the files of another library as a run, with the least config that describes it.

  Args:
    model: of load_checkpoint.
    address: of the files.
    one_tower: whether a model may have one tower. Its other side then takes stored vectors of the
      width of the embeddings, and cannot embed anything.

  Raises:
    ValueError: for a model without a tower that it needs, or with a text tower without a tokenizer.
  """
  lacking = _lacking(model)
  if lacking and not one_tower:
    raise ValueError(f"{address} has no {lacking[0]} tower; a model with two towers is needed")
  if model.tokenizer is None and "text" not in lacking:
    raise ValueError(
      f"{address} has no tokenizer, which its text tower needs; put its files into the folder"
    )
  loss = "siglip" if model.head.sigmoid else "clip"
  # Nothing is trained with it: evaluation, export and `init` read the model and the data.
  values: dict[str, Any] = {name: dict(model.config[name]) for name in ("data", "model")}
  for side in lacking:
    values["data"] |= UNREAD[side]
    values["model"] |= {
      side: dict(name="features", width=model.embed_dim),
      f"{side}_projector": dict(name="identity"),
    }
  values |= dict(seed=0, total_steps=1, batch_size=2, log_every=1, checkpoint_every=0)
  values |= dict(loss={loss: {}}, optimizer=dict(lr=0.0))
  config = resolve_config(values)
  params: dict[str, Any] = {f"model/{k}": x for k, x in model.params.items() if "/" in k}
  head = {"t": np.log(model.head.scale), **({"b": model.head.bias} if model.head.sigmoid else {})}
  for name, value in head.items():
    params[f"loss/{loss}/{name}"] = model.params.get(name, np.float32(value))
  embed = make_embed(make_program(config, dataset_size=1).model, config.loss)
  meta = {
    "dataset_size": 1,
    "samples_seen": 0,
    "data": "",
    "revision": "",
    "config": plain(config),
  }
  folder = pathlib.Path(address).expanduser().absolute()
  return Run(folder, 0, config, meta, model.mesh, params, {}, embed, str(folder))


def whole_encoder(model: Model) -> DualEncoder:
  """The encoder of a model; a side without a tower takes stored vectors, as of `as_run`."""
  parts: dict[str, Any] = {}
  for side in _lacking(model):
    parts[f"{side}_tower"] = FeaturesOptions(width=model.embed_dim).build()
    parts[f"{side}_projector"] = Identity(dim=model.embed_dim)
  return model.encoder.clone(**parts) if parts else model.encoder


def _lacking(model: Model) -> list[str]:
  """The sides without a tower."""
  return [x for x in ("image", "text") if getattr(model.encoder, f"{x}_tower") is None]


def open_any(path: str | os.PathLike[str], step: int | str | None) -> Run:
  """The run in a folder, at a step (None: the latest), or as_run of other files.

  Raises:
    ValueError: for a step of files that are not a run.
  """
  address = os.fspath(path)
  if is_run(address):
    return open_step(address, step)
  return as_run(load(address, None if step == "latest" else step), address, one_tower=True)


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
