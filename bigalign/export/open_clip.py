"""The format open_clip: two towers as a model of open_clip."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from bigalign import tree
from bigalign.export.base import (
  Contents,
  Format,
  Reasons,
  TrainedModel,
  projector_name,
  requirement,
)
from bigalign.export.fit import Family, Fitted, first_fit
from bigalign.model import PIXELS
from bigalign.weights import timm

# timm's SigLIP trunks. A name determines width, depth, heads, patch, image size and activation.
_TRUNKS = tuple(
  f"vit_{size}_siglip_{pixels}"
  for size, sides in {
    "base_patch16": (224, 256, 384, 512),
    "base_patch32": (256,),
    "large_patch16": (256, 384, 512),
    "so400m_patch14": (224, 378, 384),
    "so400m_patch16": (256, 384, 512),
    "giantopt_patch16": (256, 384),
  }.items()
  for pixels in sides
)


def _act(activation: str) -> dict[str, Any]:
  """The option for an activation that is not open_clip's default."""
  return {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}


def _text(trained: TrainedModel) -> dict[str, Any]:
  """A text_cfg."""
  options = trained.text
  pool = dict(pool_type=options.pool)
  if options.pool == "eos":
    pool = dict(pool_type="eos", eos_id=trained.end_id)
  elif options.pool not in ("argmax", "last"):
    pool = dict(pool_type="argmax")
  files: dict[str, Any] = dict(hf_tokenizer_name="tokenizer.json")
  spec = trained.tokenizer.spec
  if spec["name"] == "clip":
    clean = "canonicalize" if spec["canonicalize"] else "lower" if spec["lower"] else "whitespace"
    files = dict(tokenizer_kwargs=dict(clean=clean))
  projector = trained.model.text_projector
  return dict(
    context_length=options.length,
    vocab_size=options.vocab_size,
    width=options.sizes.width,
    heads=options.sizes.heads,
    layers=options.sizes.depth,
    mlp_ratio=options.sizes.hidden / options.sizes.width,
    no_causal_mask=not options.causal,
    pad_id=trained.tokenizer.pad,
    proj_type="none" if projector_name(projector) == "identity" else "linear",
    proj_bias=getattr(projector, "bias", False),
    norm_kwargs=dict(eps=options.epsilon),
    **_act(options.activation),
    **pool,
    **files,
  )


def _model(vision: dict[str, Any], trained: TrainedModel) -> dict[str, Any]:
  """A model_cfg."""
  config = dict(
    embed_dim=trained.model.text_projector.dim, vision_cfg=vision, text_cfg=_text(trained)
  )
  if "b" in trained.arrays:
    config["init_logit_bias"] = -10
  return config


def _vit(trained: TrainedModel) -> dict[str, Any]:
  """The model_cfg with open_clip's own ViT."""
  options = trained.image
  vision = dict(
    image_size=trained.data.image_size,
    layers=options.sizes.depth,
    width=options.sizes.width,
    head_width=options.sizes.width // options.sizes.heads,
    mlp_ratio=options.sizes.hidden / options.sizes.width,
    patch_size=options.patch,
    no_ln_pre=not options.pre_norm,
    norm_kwargs=dict(eps=options.epsilon),
    **_act(options.activation),
  )
  if options.layer_scale is not None:
    vision["ls_init_value"] = options.layer_scale
  quick = "quick_gelu" in (options.activation, trained.text.activation)
  return _model(vision, trained) | dict(quick_gelu=quick)


def _trunk(trained: TrainedModel) -> dict[str, Any]:
  """The model_cfg with the most similar trunk of timm: by width, depth, patch, then image size."""
  options, size = trained.image, trained.data.image_size

  def distance(name: str) -> tuple[bool, ...]:
    trunk = timm.named(name)
    return (
      trunk.width != options.sizes.width,
      trunk.depth != options.sizes.depth,
      trunk.patch != options.patch,
      not name.endswith(f"_{size}"),
    )

  name = min(_TRUNKS, key=distance)
  vision = dict(timm_model_name=name, timm_pool="map", timm_proj="none", image_size=size)
  return _model(vision, trained) | dict(custom_text=True)


def _bias(trained: TrainedModel) -> dict[str, Any]:
  """The key by which the reader knows that there is a logit bias."""
  return {"logit_bias": None} if "b" in trained.arrays else {}


def _custom(trained: TrainedModel) -> dict[str, Any]:
  """The keys by which the reader knows a CustomTextCLIP."""
  return {"text.": None} | _bias(trained)


def _coca_towers(trained: TrainedModel) -> dict[str, Any]:
  """The model_cfg with CoCa's towers."""
  options, config = trained.image, _vit(trained)
  config["vision_cfg"] |= dict(
    attentional_pool=True,
    attn_pooler_queries=options.queries,
    attn_pooler_heads=options.query_heads,
  )
  config["text_cfg"] |= dict(embed_cls=trained.text.pool == "class")
  return config | dict(custom_text=True)


def _coca(trained: TrainedModel) -> dict[str, Any]:
  """The model_cfg with CoCa's towers and decoder.

  Raises:
    ValueError: for a decoder that open_clip does not have.
  """
  config, decoder = _coca_towers(trained), trained.losses["coca"]
  width = trained.text.sizes.width
  quick = "quick_gelu" in (trained.image.activation, trained.text.activation)
  activation = "quick_gelu" if quick else "gelu"
  wrong = [
    requirement(key, ours, theirs)
    for key, ours, theirs in (
      ("config.loss.coca.mlp_ratio", decoder.option("mlp_ratio"), 4.0),
      ("config.loss.coca.activation", decoder.option("activation"), activation),
      ("config.loss.coca.epsilon", decoder.option("epsilon"), 1e-5),
      ("config.model.image.query_width", trained.image.token_width, width),
    )
    if ours != theirs
  ]
  if wrong:
    raise ValueError("; ".join(wrong))
  for part in ("vision_cfg", "text_cfg"):
    config[part]["output_tokens"] = True
  config["multimodal_cfg"] = dict(
    context_length=trained.text.length,
    vocab_size=trained.text.vocab_size,
    width=width,
    heads=decoder.option("heads"),
    layers=decoder.option("depth"),
  )
  return config


FAMILIES = (
  Family("open_clip's CLIP", "open_clip", ("vit", "text"), _vit, _bias),
  Family(
    "open_clip's CustomTextCLIP with timm's SigLIP trunk",
    "open_clip",
    ("vit", "text"),
    _trunk,
    _custom,
  ),
)
COCA = Family("open_clip's CoCa", "open_clip", ("vit", "text"), _coca, _custom, heads=("coca",))
COCA_TOWERS = Family(
  "open_clip's CustomTextCLIP with CoCa's towers",
  "open_clip",
  ("vit", "text"),
  _coca_towers,
  _custom,
)


def _prepare(trained: TrainedModel) -> Contents | Reasons:
  """The contents of the folder, or why no family can hold the model."""
  families: tuple[Family, ...] = FAMILIES
  if getattr(trained.image, "pool", "") == "queries":
    families = (COCA if tree.subtree(trained.heads, "heads/coca/") else COCA_TOWERS,)
  return first_fit(families, "open_clip_model.safetensors", _files, trained)


def _files(fitted: Fitted, trained: TrainedModel) -> dict[str, Any]:
  """Config and tokenizer.

  Raises:
    ValueError: if open_clip cannot make the same images or token ids.
  """
  mean, std = PIXELS[trained.model.pixels]
  data, tokenizer = trained.data, trained.tokenizer
  if data.resize == "shortest" and data.edge != data.image_size:
    raise ValueError(
      f"config.data: images are resized to {data.edge} pixels and cropped to {data.image_size};"
      " open_clip resizes to the size of the crop"
    )
  preprocess = dict(
    size=data.image_size,
    mode="RGB",
    mean=mean,
    std=std,
    interpolation=data.interpolation,
    resize_mode=data.resize,
    fill_color=0,
  )
  config = {"model_cfg": fitted.config, "preprocess_cfg": preprocess}
  own = {} if tokenizer.spec["name"] == "clip" else trained.tokenizer_files()
  spaced, plain = tokenizer.encode_batch(["  a \t b ", "a b"])[0]
  if (spaced != plain).any():
    raise ValueError(
      f"config.data.tokenizer {tokenizer.spec['name']!r} distinguishes kinds of white space, which"
      " open_clip replaces by single spaces first"
    )
  return {"open_clip_config.json": config, **own}


def _compute(
  folder: pathlib.Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> np.ndarray:
  """The logits of open_clip, with its own preprocessing and tokenizer."""
  import open_clip
  import torch

  name = f"local-dir:{folder}"
  model, _, preprocess = open_clip.create_model_and_transforms(name)
  tokenizer = open_clip.get_tokenizer(name)
  pixels = torch.stack([preprocess(image) for image in images])
  with torch.inference_mode():
    image, text = model.eval().encode_image(pixels), model.encode_text(tokenizer(list(texts)))
    cosines = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
    logits = model.logit_scale.exp() * cosines
    if model.logit_bias is not None:
      logits = logits + model.logit_bias
  return np.asarray(logits)


_USAGE = """```python
import open_clip
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
logits, _ = model.eval().get_logits(preprocess(Image.open("x.jpg"))[None], tokenizer(["a cat"]))
```
"""
# CoCa has no get_logits.
_COCA_USAGE = """```python
import open_clip
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
image, text = preprocess(Image.open("x.jpg"))[None], tokenizer(["a cat"])
out = model.eval()(image, text)
logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
of_words = out["logits"]  # of each next token of the text, by the decoder of captions
```
"""


def _usage(trained: TrainedModel) -> str:
  """The part of the model card that shows how to load the folder."""
  return _COCA_USAGE if tree.subtree(trained.heads, "heads/coca/") else _USAGE


FORMAT = Format(
  name="open_clip",
  prepare=_prepare,
  compute=_compute,
  packages=("torch", "torchvision", "open_clip"),
  library="open_clip",
  tags=("safetensors",),
  usage=_usage,
  on_hub=("local-dir:DIR", "hf-hub:REPO"),
)
