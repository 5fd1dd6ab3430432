"""A model of ours for torch_model.txt, a PyTorch module that holds what other libraries cannot."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import einops
import numpy as np

from bigalign.model import PIXELS
from bigalign.towers.text import Text
from bigalign.towers.vit import ViT, sincos2d
from bigalign.weights.fit import Arrays, Subject

SOURCE = pathlib.Path(__file__).with_name("torch_model.txt")
# Axes of ours -> torch's, by the end of a path; the first that fits.
_RULES = (
  (r"attn/(query|key|value)/kernel$", "d h k -> (h k) d"),
  (r"attn/(query|key|value)/bias$", "h k -> (h k)"),
  (r"attn/out/kernel$", "h k d -> d (h k)"),
  (r"^image_tower/embedding/kernel$", "p q c d -> d c p q"),
  (r"/kernel$", "i o -> o i"),
)


def reasons(it: Subject) -> list[str]:
  """Why the module cannot hold a model, with the keys of the config; none if it can."""
  image, text = it.model.image_tower, it.model.text_tower
  found = [
    f"config.model.{side}.name: no {type(tower).__name__} in it"
    for side, tower, kind in (("image", image, ViT), ("text", text, Text))
    if type(tower) is not kind
  ]
  if type(image) is ViT:
    if image.stem != "patch":
      found.append(f"config.model.image.stem={image.stem!r}, there 'patch'")
    if image.positions == "rope":
      found.append("config.model.image.positions='rope', there 'learned' or 'sincos2d'")
  for side in ("image", "text"):
    projector = type(getattr(it.model, f"{side}_projector")).__name__
    if projector in ("PatchesAndClass", "Tokens"):
      found.append(f"config.model.{side}_projector.name: no {projector} in it")
  if it.data.get("resize", "squash") == "longest":
    found.append("config.data.resize='longest', there 'squash' or 'shortest'")
  return found


def config(it: Subject) -> dict[str, Any]:
  """config.json: the arguments of the module's classes."""
  image, text, size = it.model.image_tower, it.model.text_tower, it.data["image_size"]
  mean, std = PIXELS[it.model.pixels]
  block = ("heads", "hidden", "activation", "epsilon", "biases", "gated", "mlp_bias", "layer_scale")
  return dict(
    image_tower=dict(
      image_size=size, extra=image.class_token + image.registers,
      **{k: getattr(image, k) for k in (
        "patch", "width", "depth", "pool", "class_position", "pre_norm", "patch_bias"
      )},
      block={k: image.block[k] for k in block},
    ),
    text_tower=dict(
      **{k: getattr(text, k) for k in (
        "vocab_size", "length", "width", "depth", "pool", "eos", "mask_padding"
      )},
      causal=text.block["causal"],
      block={k: text.block[k] for k in block if k in text.block},
    ),
    image_projector=_projector(
      it.model.image_projector, image.width * (1 + (image.pool == "cls+mean"))
    ),
    text_projector=_projector(it.model.text_projector, text.width),
    preprocess=dict(size=size, resize=it.data.get("resize", "squash"), mean=mean, std=std),
  )


def _projector(module: Any, width: int) -> dict[str, Any]:
  name, dim = type(module).__name__.lower(), module.dim
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
  image = it.model.image_tower
  if image.positions == "sincos2d":
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
