"""A model of ours for torch_model.txt, a PyTorch module that holds what other libraries cannot."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import einops
import numpy as np

from bigalign import tree
from bigalign.export.fit import Arrays, Subject
from bigalign.model import PIXELS
from bigalign.projectors import READ_TOKENS, Tokens
from bigalign.towers import mobilenet
from bigalign.towers.base import TransformerOptions
from bigalign.towers.bert import BertOptions, buckets
from bigalign.towers.features import FeaturesOptions
from bigalign.towers.mobilenet import MobilenetOptions
from bigalign.towers.text import TextOptions
from bigalign.towers.vit import VitOptions, sincos2d

SOURCE = pathlib.Path(__file__).with_name("torch_model.txt")
# Axes of ours -> torch's, by the end of a path; the first that fits.
_RULES = (
  (r"attn/(query|key|value)/kernel$", "d h k -> (h k) d"),
  (r"attn/(query|key|value)/bias$", "h k -> (h k)"),
  (r"attn/out/kernel$", "h k d -> d (h k)"),
  (r"^image_tower/embedding/kernel$", "p q c d -> d c p q"),
  (r"^image_tower/stem/kernel$", "h w c d -> d c h w"),
  (r"/depthwise/kernel$", "h w c -> c 1 h w"),
  (r"/kernel$", "i o -> o i"),
)


def reasons(it: Subject) -> list[str]:
  """Why the module cannot hold a model, with the keys of the config; none if it can."""
  image, text = it.model.image_tower, it.model.text_tower
  found = [
    f"config.model.{side}.name: no {type(tower).__name__} in it"
    for side, tower, kinds in (("image", image, IMAGE), ("text", text, TEXT))
    if type(tower.options) not in kinds
  ]
  options = image.options
  if isinstance(options, VitOptions):
    if options.stem != "patch":
      found.append(f"config.model.image.stem={options.stem!r}, there 'patch'")
    if options.positions == "rope":
      found.append("config.model.image.positions='rope', there 'learned' or 'sincos2d'")
  if it.data.resize == "longest":
    found.append("config.data.resize='longest', there 'squash' or 'shortest'")
  return found


def config(it: Subject) -> dict[str, Any]:
  """config.json: the arguments of the module's classes."""
  image, text = it.model.image_tower.options, it.model.text_tower.options
  size = it.data.image_size
  mean, std = PIXELS[it.model.pixels]
  both = image.token_width * (2 if getattr(image, "pool", "") == "cls+mean" else 1)
  return dict(
    image_tower=IMAGE[type(image)](image, size),
    text_tower=TEXT[type(text)](text),
    image_projector=_projector(it.model.image_projector, both),
    text_projector=_projector(it.model.text_projector, text.token_width),
    preprocess=dict(size=size, resize=it.data.resize, edge=it.data.edge, mean=mean, std=std),
  )


def _some(options: Any, *names: str) -> dict[str, Any]:
  return {name: getattr(options, name) for name in names}


def _transformer(options: TransformerOptions, *of_blocks: str) -> dict[str, Any]:
  """Sizes and the arguments of the blocks, which can be more options than all towers share."""
  width, depth, heads, hidden = options.sizes
  block = dict(heads=heads, hidden=hidden, **_some(options, "activation", "epsilon", *of_blocks))
  return dict(width=width, depth=depth, block=block)


def _vit(options: VitOptions, size: int) -> dict[str, Any]:
  return dict(
    name="vit",
    image_size=size,
    extra=options.extra_tokens,
    **_some(options, "patch", "pool", "class_position", "pre_norm", "patch_bias"),
    **_transformer(options, "biases", "gated", "mlp_bias", "layer_scale"),
  )


def _mobilenet(options: MobilenetOptions, size: int) -> dict[str, Any]:
  del size  # any
  width = options.token_width
  return dict(name="mobilenet_v2", stem=mobilenet.STEM, stages=mobilenet.STAGES, width=width)


def _text(options: TextOptions) -> dict[str, Any]:
  return dict(
    name="text",
    **_some(options, "causal", "vocab_size", "length", "pool", "eos", "mask_padding"),
    **_transformer(options),
  )


def _bert(options: BertOptions) -> dict[str, Any]:
  return dict(
    name="bert",
    relative=bool(options.buckets),
    **_some(options, "vocab_size", "length", "types", "pad", "skip_padding", "pool", "unit"),
    **_transformer(options),
  )


# By the class of a tower's options: the arguments of the module's class.
IMAGE: dict[type, Any] = {VitOptions: _vit, MobilenetOptions: _mobilenet}
TEXT: dict[type, Any] = {
  TextOptions: _text,
  BertOptions: _bert,
  FeaturesOptions: lambda options: dict(name="features"),
}


def _projector(module: Any, width: int) -> dict[str, Any]:
  name, dim = type(module).__name__.lower(), module.dim
  if isinstance(module, READ_TOKENS):
    name = "tokens" if isinstance(module, Tokens) else "patches_and_class"
    return dict(name=name, width=width, dim=dim, hidden=module.hidden or dim)
  if name == "identity":
    return dict(name=name)
  if name == "linear":
    return dict(name=name, width=width, dim=dim, bias=module.bias)
  if name == "residual":
    return dict(name=name, width=width, dim=dim, hidden=module.hidden or dim)
  if name == "gated":
    return dict(name=name, width=width, dim=dim, hidden=module.ratio * width)
  out_bias = module.bias if module.out_bias is None else module.out_bias
  hidden = module.hidden or (width + dim) // 2
  return dict(name=name, width=width, dim=dim, hidden=hidden, bias=module.bias, out_bias=out_bias)


def state(it: Subject) -> Arrays:
  """The module's state_dict."""
  arrays = {"b": np.zeros((), np.float32), **it.arrays}
  image, text = it.model.image_tower.options, it.model.text_tower.options
  if isinstance(text, BertOptions) and text.buckets:
    biases = arrays["text_tower/relative"][buckets(text.length, text.buckets)]
    arrays["text_tower/relative"] = einops.rearrange(biases, "n m h -> 1 h n m")
  if isinstance(image, VitOptions) and image.positions == "sincos2d":
    side = it.data.image_size // image.patch
    arrays["image_tower/positions"] = sincos2d(side, side, image.sizes.width)[None]
  tensors = {}
  for path, x in arrays.items():
    layers = (
      {tree.layer_path(path, i): layer for i, layer in enumerate(x)}
      if tree.is_stacked(path)
      else {path: x}
    )
    for name, layer in layers.items():
      rule = next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)
      name = re.sub(r"/(kernel|scale)$", "/weight", name)
      name = re.sub(r"^text_tower/embedding$", "text_tower/embedding/weight", name)
      tensors[name.replace("/", ".")] = einops.rearrange(layer, rule) if rule else layer
  return tensors
