"""The format torch: a PyTorch module for models that no other library holds.

torch_model.txt is the source of the module; the folder has it as model.py.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import numpy as np
from absl import logging
from PIL import Image

from bigalign import tree
from bigalign.export.base import (
  DOWNLOADED,
  Arrays,
  Contents,
  Format,
  Reasons,
  TrainedModel,
  projector_name,
  requirement,
  tower_name,
)
from bigalign.model import PIXELS
from bigalign.projectors import PROJECTORS
from bigalign.towers import mobilenet
from bigalign.towers.base import TransformerOptions
from bigalign.towers.bert import BertOptions, buckets
from bigalign.towers.features import FeaturesOptions
from bigalign.towers.mobilenet import MobilenetOptions
from bigalign.towers.text import POOLS as TEXT_POOLS
from bigalign.towers.text import TextOptions
from bigalign.towers.vit import POOLS, VitOptions, sincos2d
from bigalign.weights.files import open_tensors

SOURCE = pathlib.Path(__file__).with_name("torch_model.txt")
# (regular expression of a path, our axes -> torch's); the first match counts.
_RULES = (
  (r"attn/(query|key|value)/kernel$", "d h k -> (h k) d"),
  (r"attn/(query|key|value)/bias$", "h k -> (h k)"),
  (r"attn/out/kernel$", "h k d -> d (h k)"),
  (r"^image_tower/embedding/kernel$", "p q c d -> d c p q"),
  (r"^image_tower/stem/kernel$", "h w c d -> d c h w"),
  (r"/depthwise/kernel$", "h w c -> c 1 h w"),
  (r"/kernel$", "i o -> o i"),
)


def _prepare(trained: TrainedModel) -> Contents | Reasons:
  """The contents of the folder, or why the module cannot hold the model."""
  family = "the PyTorch module in model.py"
  wrong = _reasons(trained)
  if wrong:
    return {family: wrong}
  try:
    tokenizer = {} if trained.vector_shape else trained.tokenizer_files()
  except ValueError as error:
    return {family: [str(error)]}
  files = {"model.py": SOURCE.read_text(), "config.json": _config(trained), **tokenizer}
  return Contents(family, {"model.safetensors": functools.partial(_state, trained)}, files)


def _reasons(trained: TrainedModel) -> list[str]:
  """Why the module cannot hold the model, with the keys of the config; empty if it can."""
  image = trained.image
  wrong = [
    requirement(f"config.model.{side}.name", tower_name(options), *names)
    for side, options, names in (
      ("image", image, _IMAGE_TOWERS),
      ("text", trained.text, _TEXT_TOWERS),
    )
    if tower_name(options) not in names
  ]
  for side in ("image", "text"):
    name = projector_name(getattr(trained.model, f"{side}_projector"))
    if name == "blocks":
      known = sorted({*PROJECTORS} - {name})
      wrong.append(requirement(f"config.model.{side}_projector.name", name, *known))
  if isinstance(trained.text, TextOptions) and trained.text.pool == "class":
    pools = [pool for pool in TEXT_POOLS if pool != "class"]
    wrong.append(requirement("config.model.text.pool", "class", *pools))
  if isinstance(image, VitOptions):
    if image.stem != "patch":
      wrong.append(requirement("config.model.image.stem", image.stem, "patch"))
    if image.pool == "queries":
      pools = [pool for pool in POOLS if pool != "queries"]
      wrong.append(requirement("config.model.image.pool", "queries", *pools))
    if image.positions == "rope":
      wrong.append(requirement("config.model.image.positions", "rope", "learned", "sincos2d"))
  if trained.data.resize == "longest":
    wrong.append(requirement("config.data.resize", "longest", "squash", "shortest"))
  if trained.data.interpolation != "bicubic":
    wrong.append(requirement("config.data.interpolation", trained.data.interpolation, "bicubic"))
  return wrong


def _config(trained: TrainedModel) -> dict[str, Any]:
  """config.json: the arguments of the module's classes."""
  image, text, model, data = trained.image, trained.text, trained.model, trained.data
  mean, std = PIXELS[model.pixels]
  pooled_width = image.token_width * (2 if getattr(image, "pool", "") == "cls+mean" else 1)
  return dict(
    image_tower=_IMAGE_TOWERS[tower_name(image)](image, data.image_size),
    text_tower=_TEXT_TOWERS[tower_name(text)](text),
    image_projector=_projector(model.image_projector, pooled_width),
    text_projector=_projector(model.text_projector, text.token_width),
    preprocess=dict(size=data.image_size, resize=data.resize, edge=data.edge, mean=mean, std=std),
  )


def _some(options: Any, *names: str) -> dict[str, Any]:
  """Some options by name."""
  return {name: getattr(options, name) for name in names}


def _transformer(options: TransformerOptions, *of_blocks: str) -> dict[str, Any]:
  """Width, depth, and the arguments of the blocks, with the options `of_blocks` among them."""
  width, depth, heads, hidden = options.sizes
  block = dict(heads=heads, hidden=hidden, **_some(options, "activation", "epsilon", *of_blocks))
  return dict(width=width, depth=depth, block=block)


def _vit(options: VitOptions, size: int) -> dict[str, Any]:
  """Arguments of VisionTransformer."""
  position: bool | int = options.class_position
  if options.class_tokens > 1:
    position = options.class_tokens if position else False
    logging.info(
      "config.model.image.class_tokens=%d: the module returns the embedding of the first class"
      " token; it holds the others too, whose embeddings are for training alone",
      options.class_tokens,
    )
  return dict(
    name="vit",
    image_size=size,
    extra=options.extra_tokens,
    class_position=position,
    **_some(options, "patch", "pool", "pre_norm", "patch_bias"),
    **_transformer(options, "biases", "gated", "mlp_bias", "layer_scale"),
  )


def _mobilenet(options: MobilenetOptions, size: int) -> dict[str, Any]:
  """Arguments of MobileNetV2."""
  width = options.token_width
  return dict(name="mobilenet_v2", stem=mobilenet.STEM, stages=mobilenet.STAGES, width=width)


def _text(options: TextOptions) -> dict[str, Any]:
  """Arguments of TextTransformer."""
  return dict(
    name="text",
    **_some(options, "causal", "vocab_size", "length", "pool", "eos", "mask_padding"),
    **_transformer(options),
  )


def _features(options: FeaturesOptions) -> dict[str, Any]:
  """Arguments of Vectors: none."""
  return dict(name="features")


def _bert(options: BertOptions) -> dict[str, Any]:
  """Arguments of Bert."""
  return dict(
    name="bert",
    relative=bool(options.buckets),
    **_some(options, "vocab_size", "length", "types", "pad", "skip_padding", "pool", "unit"),
    **_transformer(options),
  )


# {tower: function that returns the arguments of the module's class}
_IMAGE_TOWERS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
  "vit": _vit,
  "mobilenet_v2": _mobilenet,
}
_TEXT_TOWERS: dict[str, Callable[[Any], dict[str, Any]]] = {
  "text": _text,
  "bert": _bert,
  "features": _features,
}


def _projector(module: Any, width: int) -> dict[str, Any]:
  """Arguments of a projector of pooled vectors of a width."""
  name, dim = projector_name(module), module.dim
  if name == "identity":
    return dict(name=name)
  arguments = dict(name=name, width=width, dim=dim)
  if name == "linear":
    return arguments | dict(bias=module.bias)
  if name == "gated":
    return arguments | dict(hidden=module.ratio * width)
  if name != "mlp":
    return arguments | dict(hidden=module.hidden or dim)
  out_bias = module.bias if module.out_bias is None else module.out_bias
  hidden = module.hidden or (width + dim) // 2
  return arguments | dict(hidden=hidden, bias=module.bias, out_bias=out_bias)


def _state(trained: TrainedModel) -> Arrays:
  """The module's state_dict."""
  arrays = {"b": np.zeros((), np.float32), **trained.arrays}
  image, text = trained.image, trained.text
  if isinstance(text, BertOptions) and text.buckets:
    biases = arrays["text_tower/relative"][buckets(text.length, text.buckets)]
    arrays["text_tower/relative"] = einops.rearrange(biases, "n m h -> 1 h n m")
  if isinstance(image, VitOptions) and image.positions == "sincos2d":
    side = trained.data.image_size // image.patch
    arrays["image_tower/positions"] = sincos2d(side, side, image.sizes.width)[None]
  tensors = {}
  for path, x in arrays.items():
    layers = (
      {tree.layer_path(path, i): layer for i, layer in enumerate(x)}
      if tree.is_stacked(path)
      else {path: x}
    )
    for name, layer in layers.items():
      rule = _rule(name)
      tensors[_key(name)] = einops.rearrange(layer, rule) if rule else layer
  return tensors


def _rule(name: str) -> str | None:
  """Our axes -> torch's, of a parameter of one layer; None if they are the same."""
  return next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)


def _key(name: str) -> str:
  """The key of a parameter of one layer in the state_dict."""
  name = re.sub(r"/(kernel|scale)$", "/weight", name)
  name = re.sub(r"^text_tower/embedding$", "text_tower/embedding/weight", name)
  return name.replace("/", ".")


def read(folder: pathlib.Path, shapes: Mapping[str, Any], text: Any) -> Arrays:
  """Returns the arrays of an exported folder by path: the inverse of what an export writes.

  Args:
    folder: of the module.
    shapes: {path: shape and dtype} of the arrays.
    text: the options of the text tower.

  Raises:
    ValueError: if the file lacks an array, or has it in another shape.
  """
  tensors = open_tensors(folder / "model.safetensors")

  def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
    key = _key(name)
    if key not in tensors:
      raise ValueError(f"{tensors.path}: {key}: is missing")
    x = tensors.read(key)
    if rule := _rule(name):
      ours, theirs = (part.strip() for part in rule.split("->"))
      x = einops.rearrange(x, f"{theirs} -> {ours}", **dict(zip(ours.split(), shape)))
    if name == "text_tower/relative":
      table = np.zeros(shape, np.float32)
      table[buckets(text.length, text.buckets)] = einops.rearrange(x, "1 h n m -> n m h")
      x = table
    if x.shape != shape:
      raise ValueError(f"{tensors.path}: {key}: {list(x.shape)}, the model's: {list(shape)}")
    return x

  arrays = {}
  for path, spec in shapes.items():
    if tree.is_stacked(path):
      layers = range(spec.shape[0])
      arrays[path] = np.stack([one(tree.layer_path(path, i), spec.shape[1:]) for i in layers])
    else:
      arrays[path] = one(path, spec.shape)
  return arrays


def _compute(
  folder: pathlib.Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> np.ndarray:
  """The logits of the folder's model.py, which is run only if bigalign wrote it."""
  source = folder / "model.py"
  if source.read_text() != SOURCE.read_text():
    raise ValueError(
      f"{source}: differs from the one that this bigalign writes, so it is not run to be compared"
    )
  spec = importlib.util.spec_from_file_location("model", source)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return np.asarray(module.load(folder).logits(images, texts))


_USAGE = """`model.py` is the model in PyTorch, for you to read and change. It needs torch,
safetensors, tokenizers and Pillow.

```python
import sys

{imports}
folder = "DIR"
sys.path.insert(0, folder)
from model import load

logits = load(folder).logits([Image.open("x.jpg")], {texts})
```
"""


def _usage(trained: TrainedModel) -> str:
  """The part of the model card that shows how to load the folder."""
  imports, texts = "from PIL import Image\n", '["a cat", "a dog"]'
  if trained.vector_shape:
    imports = f"import torch\n{imports}"
    texts = f"torch.randn(2, {', '.join(map(str, trained.vector_shape))})"
  return _USAGE.replace("{imports}", imports).replace("{texts}", texts)


FORMAT = Format(
  name="torch",
  prepare=_prepare,
  compute=_compute,
  packages=("torch", "safetensors"),
  library="pytorch",
  tags=("safetensors",),
  usage=_usage,
  on_hub=DOWNLOADED,
)
