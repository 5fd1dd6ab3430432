"""Pretrained towers: checkpoints of other projects as options and arrays of our model.

checkpoint = weights.describe("…/siglip-base-patch16-224")
model = make_model(**checkpoint.model)
shapes = tree.flatten(jax.eval_shape(model.init, …)["params"])
params = checkpoint.load(shapes)
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from bigalign.weights import (
  bert,
  big_vision,
  clip,
  conv,
  dual,
  files,
  open_clip,
  pixels,
  siglip,
  transfer,
  views,
  vision,
  wrappers,
)
from bigalign.weights.layout import Layout, call

# {model_type of a Hugging Face config: its layout}
_HUGGING_FACE: dict[str, Callable[..., Layout]] = dict(
  clip=clip.clip,
  clip_vision_model=clip.clip_vision,
  clip_text_model=clip.clip_text,
  siglip=siglip.siglip,
  siglip_vision_model=siglip.siglip_vision,
  siglip_text_model=siglip.siglip_text,
  siglip2=siglip.siglip2,
  siglip2_vision_model=siglip.siglip2_vision,
  siglip2_text_model=siglip.siglip_text,
  vit=vision.vit,
  dinov2=vision.dinov2,
  dinov2_with_registers=vision.dinov2_with_registers,
  dinov3_vit=vision.dinov3,
  bert=bert.bert,
  roberta=bert.roberta,
  mpnet=bert.mpnet,
)
_HUGGING_FACE["xlm-roberta"] = bert.roberta
LAYOUTS: dict[str, Callable[..., Layout]] = _HUGGING_FACE | {
  "vision-text-dual-encoder": functools.partial(dual.vision_text, _HUGGING_FACE),
  "open_clip": open_clip.open_clip,
  "big_vision": big_vision.big_vision,
  "resnet_cifar": conv.resnet_cifar,
  "mobilenet_v2": conv.mobilenet_v2,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint whose keys and config are known; no tensor has been read.

  Args:
    path: its file or folder.
    kind: its name in LAYOUTS.
    tensors: {key: file, shape and dtype}.
    layout: its options and table of keys.
    view: of images, as its files state it; None if they do not, or without an image tower.
  """

  path: pathlib.Path
  kind: str
  tensors: files.Tensors
  layout: Layout
  view: views.View | None = None

  @property
  def model(self) -> Mapping[str, Any]:
    """Options as in config.model: "image", "text", "embed_dim" …, as far as it has them."""
    return self.layout.model

  def load(self, shapes: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """{path: array} for each path of `shapes`; see transfer.read for the options and errors."""
    return dict(transfer.read(self.tensors, self.layout, shapes, **options))


def describe(
  path: str | pathlib.Path,
  *,
  image: Mapping[str, Any] | None = None,
  text: Mapping[str, Any] | None = None,
) -> Checkpoint:
  """Identifies a checkpoint by its keys and configs. Reads no tensor.

  Args:
    path: a folder of Hugging Face, sentence-transformers or open_clip; a .safetensors file or the
      index of its shards, with the config next to it; a .npz file of big_vision, of a ResNet for
      CIFAR or of MobileNetV2, which its keys identify.
    image: options of the image tower that replace the checkpoint's, such as dict(pool="mean"), or
      that the checkpoint does not give: dict(heads=3) for open_clip's timm towers.
    text: the same for the text tower, such as heads of open_clip's Hugging Face towers.

  Raises:
    FileNotFoundError: if the file does not exist, or no config is next to it.
    ValueError: for a checkpoint that cannot be read, with the file and the key.
  """
  path = pathlib.Path(path)
  folder = path if path.is_dir() else path.parent
  sentence = (folder / "modules.json").is_file()
  inside = folder / dual.transformer(folder) if sentence else folder
  tensors = wrappers.unwrapped(files.open_tensors(inside if path.is_dir() else path))
  kind, where, config = _config(inside, tensors)
  extra = dict(image=dict(image or {}), text=dict(text or {}))
  if kind == "open_clip":
    config = _with_heads(config, where, extra)

  def make(some: files.Tensors) -> Layout:
    layout = call(LAYOUTS[kind], config, where, some, where, "")
    _check_depth(layout, some, where)
    return layout

  tensors, layout = wrappers.fitted(tensors, make)
  tensors = wrappers.with_scalars(tensors, layout)
  if sentence and "text" in layout.model:
    tensors, layout = dual.sentence(folder, tensors, layout)
  model = dict(layout.model)
  view = None
  if "pixels" in model:
    section = views.preprocessing(inside, kind)
    model["pixels"] = pixels.stated(section) or model["pixels"]
    by_config = "" if tensors.path.suffix == ".npz" else where
    view = views.with_size(views.stated(section), layout.data.get("image_size"), by_config)
  for side, options in extra.items():
    if options and side not in model:
      raise ValueError(f"{where}: {side}={options}: the checkpoint has no {side} tower")
    if side in model:
      model[side] = {**model[side], **options}
  return Checkpoint(path, kind, tensors, dataclasses.replace(layout, model=model), view)


def load(
  path: str | pathlib.Path,
  shapes: Mapping[str, Any],
  *,
  image: Mapping[str, Any] | None = None,
  text: Mapping[str, Any] | None = None,
  **options: Any,
) -> dict[str, Any]:
  """{path: array} for each path of `shapes`; see `describe` and transfer.read."""
  return describe(path, image=image, text=text).load(shapes, **options)


def _config(folder: pathlib.Path, tensors: files.Tensors) -> tuple[str, str, Mapping[str, Any]]:
  """(name in LAYOUTS, the config's file and place for errors, the config)."""
  file = tensors.path
  if file.suffix == ".npz":
    return conv.npz_kind(tensors), str(file), {}
  where = folder / "open_clip_config.json"
  both = (folder / "config.json").is_file()
  # Some folders hold the same weights twice, with the keys of both libraries.
  if where.is_file() and (file.name.startswith("open_clip") or not both):
    config = files.read_json(where).get("model_cfg")
    return "open_clip", f"{where}: model_cfg", config
  where = folder / "config.json"
  if not where.is_file():
    raise FileNotFoundError(
      f"{where}: no such file; {file.name} needs a config.json or open_clip_config.json next to it"
    )
  config = files.read_json(where)
  kind = config.get("model_type")
  if not isinstance(kind, str) or kind not in _HUGGING_FACE | LAYOUTS:
    raise ValueError(f"{where}: model_type: unknown {str(kind)[:80]!r}; known: {sorted(LAYOUTS)}")
  return kind, str(where), config


def _with_heads(config: Any, where: str, extra: dict[str, dict[str, Any]]) -> Any:
  """open_clip's config with the number of heads that the caller gives.

  Only towers of timm and Hugging Face need it: the config of open_clip's own ones states it.
  """
  if not isinstance(config, Mapping):
    raise ValueError(f"{where}: must be an object")
  config = dict(config)
  sides = (("image", "vision_cfg", "timm_model_name"), ("text", "text_cfg", "hf_model_name"))
  for side, name, borrowed in sides:
    given = config.get(name)
    if "heads" in extra[side] and isinstance(given, Mapping) and borrowed in given:
      config[name] = {**given, "heads": extra[side]["heads"]}
  return config


def _check_depth(layout: Layout, tensors: files.Tensors, where: str) -> None:
  """Raises ValueError for more layers than the file can have: a config may ask for millions."""
  deepest = max((row.layers for row in layout.rows), default=0)
  if deepest > max(len(tensors), max((x.shape[0] for x in tensors.values() if x.shape), default=0)):
    raise ValueError(
      f"{where}: num_hidden_layers: {deepest}, but the file has only {len(tensors)} tensors"
    )
