"""A model of ours for torch_model.txt, a PyTorch module that holds what other libraries cannot."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import einops
import numpy as np

from bigalign.export.fit import Arrays, Subject
from bigalign.model import PIXELS
from bigalign.projectors import READ_TOKENS, Tokens
from bigalign.towers import mobilenet
from bigalign.towers.bert import Bert, buckets
from bigalign.towers.features import Features
from bigalign.towers.text import Text
from bigalign.towers.vit import ViT, sincos2d

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
    if type(tower) not in kinds
  ]
  if type(image) is ViT:
    if image.stem != "patch":
      found.append(f"config.model.image.stem={image.stem!r}, there 'patch'")
    if image.positions == "rope":
      found.append("config.model.image.positions='rope', there 'learned' or 'sincos2d'")
  if it.data.get("resize", "squash") == "longest":
    found.append("config.data.resize='longest', there 'squash' or 'shortest'")
  return found


def config(it: Subject) -> dict[str, Any]:
  """config.json: the arguments of the module's classes."""
  image, text, size = it.model.image_tower, it.model.text_tower, it.data["image_size"]
  mean, std = PIXELS[it.model.pixels]
  both = image.width * (2 if getattr(image, "pool", "") == "cls+mean" else 1)
  return dict(
    image_tower=IMAGE[type(image)](image, size),
    text_tower=TEXT[type(text)](text),
    image_projector=_projector(it.model.image_projector, both),
    text_projector=_projector(it.model.text_projector, text.width),
    preprocess=dict(size=size, resize=it.data.get("resize", "squash"), mean=mean, std=std),
  )


def _some(of: Any, *names: str) -> dict[str, Any]:
  return {name: getattr(of, name) for name in names}


def _block(tower: Any, *names: str) -> dict[str, Any]:
  return {k: tower.block[k] for k in names if k in tower.block}


_PRE_NORM = (
  "heads",
  "hidden",
  "activation",
  "epsilon",
  "biases",
  "gated",
  "mlp_bias",
  "layer_scale",
)


def _vit(image: ViT, size: int) -> dict[str, Any]:
  return dict(
    name="vit",
    image_size=size,
    extra=image.class_token + image.registers,
    **_some(image, "patch", "width", "depth", "pool", "class_position", "pre_norm", "patch_bias"),
    block=_block(image, *_PRE_NORM),
  )


def _mobilenet(image: mobilenet.MobileNetV2, size: int) -> dict[str, Any]:
  del size  # any
  return dict(name="mobilenet_v2", stem=mobilenet.STEM, stages=mobilenet.STAGES, width=image.width)


def _text(text: Text) -> dict[str, Any]:
  return dict(
    name="text",
    causal=text.block["causal"],
    block=_block(text, *_PRE_NORM),
    **_some(text, "vocab_size", "length", "width", "depth", "pool", "eos", "mask_padding"),
  )


def _bert(text: Bert) -> dict[str, Any]:
  return dict(
    name="bert",
    relative=bool(text.buckets),
    block=_block(text, "heads", "hidden", "activation", "epsilon"),
    **_some(
      text, "vocab_size", "length", "width", "depth", "types", "pad", "skip_padding", "pool", "unit"
    ),
  )


IMAGE: dict[type, Any] = {ViT: _vit, mobilenet.MobileNetV2: _mobilenet}
TEXT: dict[type, Any] = {Text: _text, Bert: _bert, Features: lambda _: dict(name="features")}


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
  image, text = it.model.image_tower, it.model.text_tower
  if type(text) is Bert and text.buckets:
    biases = arrays["text_tower/relative"][buckets(text.length, text.buckets)]
    arrays["text_tower/relative"] = einops.rearrange(biases, "n m h -> 1 h n m")
  if type(image) is ViT and image.positions == "sincos2d":
    side = it.data["image_size"] // image.patch
    arrays["image_tower/positions"] = sincos2d(side, side, image.width)[None]
  found = {}
  for path, x in arrays.items():
    stacked = "/blocks/" in path
    for i, layer in enumerate(x) if stacked else ((0, x),):
      name = path.replace("/blocks/", f"/block_{i}/")
      rule = next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)
      name = re.sub(r"/(kernel|scale)$", "/weight", name)
      name = re.sub(r"^text_tower/embedding$", "text_tower/embedding/weight", name)
      found[name.replace("/", ".")] = einops.rearrange(layer, rule) if rule else layer
  return found
