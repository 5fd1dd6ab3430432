"""Models from files: folders of other libraries, and what `bigalign export` writes."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from bigalign import sharding, tree, weights
from bigalign.api.image_inputs import View
from bigalign.api.model import Model
from bigalign.data.image.reading import ImageReading
from bigalign.data.loader.options import resolve_data
from bigalign.data.text import stated
from bigalign.data.text.tokenizers import Tokenizer, make_tokenizer
from bigalign.export import main, model_card, torch_module
from bigalign.export.base import TrainedModel
from bigalign.inputs import check_ids
from bigalign.losses.logit_head import LogitHead
from bigalign.model import PROJECTOR, DualEncoder, ModelOptions
from bigalign.options import Choose, Component, plain, plain_value, resolve, resolve_value
from bigalign.towers import TOWERS
from bigalign.towers.text import TextOptions
from bigalign.weights import Checkpoint, views
from bigalign.weights import tokenizer as stated_tokenizer
from bigalign.weights.files import read_json
from bigalign.weights.init import with_view

_SIDES = ("image", "text")
_TOWER = Annotated[Any, Choose(TOWERS)]
_HEAD = ("t", "b")  # log of the logit scale, and bias
_MASK = "attention_mask"


def load_checkpoint(
  path: pathlib.Path, *, dtype: str, tokenizer: Mapping[str, Any] | None
) -> Model:
  """The model in the files of another library, or in an exported folder.

  Args:
    path: a folder or file, as of weights.describe; a file of an exported folder stands for it.
    dtype: in which the towers compute.
    tokenizer: options as config.data.tokenizer, for files that hold none; None: that of the files.

  Raises:
    FileNotFoundError, ValueError: for files that cannot be read, with the file and the key.
    ValueError: for a tokenizer besides that of an exported PyTorch module.
  """
  about = exported_facts(path)
  if about and not path.is_dir():
    path = path.parent
  if about.get("format") == "torch":
    if tokenizer is not None:
      raise ValueError(
        f"tokenizer: {path} has the tokenizer of its run; the argument is for files without one"
      )
    return _torch_module(path, about, dtype)
  file = path / "model.npz" if about.get("format") == "npz" else path
  checkpoint = _masked(weights.describe(file), about)
  data = _data(checkpoint, about, tokenizer)
  encoder, written = _encoder(checkpoint.model, dtype)
  mesh = sharding.make_mesh()
  shapes = _shapes(encoder, data, dict(checkpoint.model.get("text", {})).get("length", 1))
  found = {row.ours for row in checkpoint.layout.rows}
  shapes |= {name: jax.ShapeDtypeStruct((), jnp.float32) for name in _HEAD if name in found}
  everywhere = dict.fromkeys(shapes, sharding.replicated_sharding(mesh))
  params = checkpoint.load(shapes, shardings=everywhere)
  return _model(
    path,
    about,
    encoder=encoder,
    params=params,
    config={"model": written, "data": data},
    head=_head(params, about, checkpoint.kind),
    view=_view(data, checkpoint.kind) if "image" in checkpoint.model else None,
    clean=_cleaning(checkpoint) if "text" in checkpoint.model and tokenizer is None else None,
    mesh=mesh,
  )


def _torch_module(path: pathlib.Path, about: Mapping[str, Any], dtype: str) -> Model:
  """The model in a folder of the format "torch", whose options are those of the run."""
  given, data = about["config"]["model"], dict(about["config"]["data"])
  options: ModelOptions = resolve(ModelOptions, given, "config.model")
  towers = {}
  for side in _SIDES:
    tower = getattr(options, side)
    towers[side] = dataclasses.replace(tower, dtype=dtype) if hasattr(tower, "dtype") else tower
  length = dict(data["tokenizer"])["length"]
  if isinstance(towers["text"], TextOptions):  # an export cuts the positions that are not used
    length = min(length, towers["text"].length)
    towers["text"] = dataclasses.replace(towers["text"], length=length)
  options = dataclasses.replace(options, **towers)
  data.pop("tokenizer")
  if (path / "tokenizer.json").is_file():
    data["tokenizer"] = dict(name="hf", path=str(path / "tokenizer.json"), length=length)
  encoder = options.build()
  inputs = getattr(towers["text"], "row_shape", None)
  shapes = _shapes(encoder, data, length, vectors=inputs)
  shapes |= {name: jax.ShapeDtypeStruct((), jnp.float32) for name in _HEAD}
  params = torch_module.read(path, shapes, towers["text"])
  kept = {x.name for x in dataclasses.fields(ImageReading)} | {"tokenizer"}
  data = {name: value for name, value in data.items() if name in kept} | _stated_view(about)
  return _model(
    path,
    about,
    encoder=encoder,
    params=params,
    config={"model": plain(options), "data": data},
    head=_head(params, about, "torch"),
    view=_view(data, "torch"),
  )


def _model(
  path: pathlib.Path,
  about: Mapping[str, Any],
  *,
  encoder: DualEncoder,
  params: Mapping[str, Any],
  config: dict[str, Any],
  **parts: Any,
) -> Model:
  """The model of a folder."""
  options = config["data"].get("tokenizer") if encoder.text_tower is not None else None
  tokenizer = make_tokenizer(**options) if options else None
  if tokenizer is not None:
    check_ids(encoder.text_tower, tokenizer, f"{path}: text", "the tokenizer")
  return Model(
    source=str(path),
    encoder=encoder,
    params=params,
    config=config,
    tokenizer=tokenizer,
    embed_dim=int(config["model"]["embed_dim"]),
    export=functools.partial(_export, path, encoder, params, config, tokenizer, parts),
    **parts,
  )


def exported_facts(path: pathlib.Path) -> dict[str, Any]:
  """The content of the bigalign.json of an exported folder; {} for another folder."""
  file = (path if path.is_dir() else path.parent) / main.ABOUT
  return dict(read_json(file)) if file.is_file() else {}


def _masked(checkpoint: Checkpoint, about: Mapping[str, Any]) -> Checkpoint:
  """The checkpoint of a SigLIP, with the mask of padding that its tokenizer asks for.

  transformers masks padding if the tokenizer gives a mask; those of released models do not.
  """
  if not checkpoint.kind.startswith("siglip") or "text" not in checkpoint.model:
    return checkpoint
  masked = about.get("config", {}).get("model", {}).get("text", {}).get("mask_padding")
  if masked is None:
    file = checkpoint.tensors.path.parent / "tokenizer_config.json"
    inputs = read_json(file).get("model_input_names", [_MASK]) if file.is_file() else []
    masked = _MASK in inputs
  model = checkpoint.model
  changed = {**model, "text": {**model["text"], "mask_padding": bool(masked)}}
  return dataclasses.replace(
    checkpoint, layout=dataclasses.replace(checkpoint.layout, model=changed)
  )


def _data(
  checkpoint: Checkpoint, about: Mapping[str, Any], tokenizer: Mapping[str, Any] | None
) -> dict[str, Any]:
  """config.data as far as the files state it: the view of images, and the tokenizer."""
  data: dict[str, Any] = {}
  trained = about.get("config", {}).get("data", {})
  if "image" in checkpoint.model:
    fields = (field.name for field in dataclasses.fields(ImageReading))
    data = {name: trained[name] for name in fields if trained.get(name) is not None}
    if not data:
      data = with_view({}, checkpoint.view) | _colours_and_crop(checkpoint.kind)
      if checkpoint.kind.startswith("siglip2"):
        data |= {"naflex": _patches(checkpoint), "image_size": checkpoint.layout.data["image_size"]}
    data |= _stated_view(about)
  if "text" in checkpoint.model:
    options = stated_tokenizer.completed(checkpoint, tokenizer)
    if options is None and trained.get("tokenizer"):
      options = trained["tokenizer"]  # a format may use a tokenizer of its library, without files
    if options:
      data["tokenizer"] = dict(options)
  return data


def _colours_and_crop(kind: str) -> dict[str, Any]:
  """What no file states: transformers rounds crops down, open_clip leaves out transparency."""
  ours = kind in ("open_clip", "big_vision", "resnet_cifar", "mobilenet_v2")
  return dict(crop_rounding="round" if ours else "floor", pillow_rgb=kind == "open_clip")


def _stated_view(about: Mapping[str, Any]) -> dict[str, Any]:
  """The same of folders that were exported before these were options of config.data."""
  names = dict(margin="crop_rounding", pillow_rgb="pillow_rgb")
  return {names[name]: value for name, value in about.get("view", {}).items()}


def _patches(checkpoint: Checkpoint) -> dict[str, Any]:
  """config.data.naflex of a checkpoint of SigLIP 2, whose processor has 256 patches by default."""
  stated = views.preprocessing(checkpoint.tensors.path.parent, checkpoint.kind)
  length = int((stated.config if stated else {}).get("max_num_patches") or 256)
  return dict(lengths=(length,), patch=checkpoint.model["image"]["patch"])


def _cleaning(checkpoint: Checkpoint) -> Callable[[str], str] | None:
  """What is done to texts first: SiglipTokenizer drops "_"; our tokenizer takes it for a space."""
  statements = stated_tokenizer.statements_of(checkpoint)
  siglip = str(stated.value(statements, "class", "")).startswith("SiglipTokenizer")
  return (lambda text: text.replace("_", "")) if siglip else None


def _view(data: Mapping[str, Any], kind: str) -> View:
  """How images become squares.

  Raises:
    ValueError: if no file states the size.
  """
  fields = {x: v for x, v in data.items() if x != "tokenizer"}
  if not fields.get("image_size"):
    raise ValueError(f"no file of this {kind} checkpoint states the size of its images")
  reading: ImageReading = resolve(ImageReading, fields, "config.data")
  return View(reading)


def _encoder(model: Mapping[str, Any], dtype: str) -> tuple[DualEncoder, dict[str, Any]]:
  """The encoder, with one tower if the checkpoint has one, and its options in plain values."""
  towers = {side: {**model[side], "dtype": dtype} for side in _SIDES if side in model}
  if len(towers) == 2:
    options: ModelOptions = resolve(ModelOptions, {**model, **towers}, "config.model")
    return options.build(), plain(options)
  ((side, given),) = towers.items()
  tower = resolve_value(_TOWER, given, f"config.model.{side}")
  width = model.get("embed_dim") or _pooled_width(tower)
  where = f"config.model.{side}_projector"
  chosen = model.get(f"{side}_projector", {"name": "identity"})
  projector: Component = resolve_value(Annotated[Component, PROJECTOR], chosen, where)
  parts: dict[str, Any] = dict.fromkeys(
    ("image_tower", "text_tower", "image_projector", "text_projector")
  )
  parts[f"{side}_tower"] = tower.build()
  parts[f"{side}_projector"] = projector.make(dim=width)
  written = {
    side: plain_value(_TOWER, tower),
    f"{side}_projector": plain(projector),
    "embed_dim": width,
    "pixels": model.get("pixels", "half"),
  }
  return DualEncoder(**parts, pixels=written["pixels"]), written


def _pooled_width(tower: Any) -> int:
  """The width of what a tower gives to its projector."""
  return int(tower.token_width) * (2 if getattr(tower, "pool", "") == "cls+mean" else 1)


def _shapes(
  encoder: DualEncoder,
  data: Mapping[str, Any],
  length: int,
  vectors: tuple[int, ...] | None = None,
) -> dict[str, Any]:
  """{path: shape} of the parameters.

  Args:
    encoder: the encoder.
    data: with the size of the images.
    length: tokens of a text.
    vectors: the shape of one text if texts are vectors.
  """
  size = int(data.get("image_size") or 1)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
  if vectors:
    ids = jax.ShapeDtypeStruct((1, *vectors), jnp.float32)
  method, inputs = "__call__", [image, ids]
  if encoder.text_tower is None:
    method, inputs = "embed_image", [image]
  elif encoder.image_tower is None:
    method, inputs = "embed_text", [ids]
  init = functools.partial(encoder.init, method=method)
  return tree.flatten(jax.eval_shape(init, jax.random.key(0), *inputs)["params"])


def _head(params: Mapping[str, Any], about: Mapping[str, Any], kind: str) -> LogitHead:
  """Scale and bias of the files; what they lack is that of the export, or of their kind."""
  exported = about.get("head", {})
  sigmoid = exported.get("sigmoid", "b" in params or kind.startswith("siglip"))
  scale = np.exp(np.asarray(params["t"])) if "t" in params else exported.get("scale", 1.0)
  bias = np.asarray(params["b"]) if "b" in params else exported.get("bias", 0.0)
  return LogitHead(float(scale), float(bias), bool(sigmoid))


def _export(
  path: pathlib.Path,
  encoder: DualEncoder,
  params: Mapping[str, Any],
  config: Mapping[str, Any],
  tokenizer: Tokenizer | None,
  parts: Mapping[str, Any],
  kind: str,
  out: pathlib.Path,
  *,
  name: str = "",
  license: str | None = None,
  datasets: Sequence[str] = (),
) -> tuple[pathlib.Path, float | None]:
  """Writes the model for another library; the arguments from `kind` on are those of an export."""
  lacking = [s for s in _SIDES if getattr(encoder, f"{s}_tower") is None]
  if lacking or tokenizer is None:
    part = f"{lacking[0]} tower" if lacking else "tokenizer"
    raise ValueError(f"{path} has no {part}, which the formats need")
  if parts.get("clean"):
    logging.warning("%s: its tokenizer drops underscores, which the new folder does not", path)
  trained = TrainedModel(
    in_dtype(encoder, "float32"),
    {key: np.asarray(x, np.float32) for key, x in params.items()},
    resolve_data({**config["data"], "tokenizer": tokenizer.spec}),
    tokenizer,
  )
  head: LogitHead = parts["head"]

  def facts(family: str) -> dict[str, Any]:
    return {
      "name": name or path.name,
      "format": kind,
      "family": family,
      "license": license,
      "datasets": [*datasets],
      "converted_from": path.name,
      "head": head._asdict(),
      "config": {**config, "loss": {"siglip" if head.sigmoid else "clip": {}}},
    }

  return main.write(trained, kind, out, facts, model_card.converted)


def in_dtype(encoder: DualEncoder, dtype: str) -> DualEncoder:
  """The encoder with towers that compute in another dtype."""
  changed = {}
  for name in ("image_tower", "text_tower"):
    tower: Any = getattr(encoder, name)
    if tower is not None and hasattr(tower.options, "dtype"):
      changed[name] = tower.clone(options=dataclasses.replace(tower.options, dtype=dtype))
  return encoder.clone(**changed)
