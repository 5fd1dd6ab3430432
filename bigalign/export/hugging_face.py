"""The format hf: two towers as a model of transformers."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from bigalign import tree
from bigalign.export.base import Format, TrainedModel, requirement
from bigalign.export.fit import Family, Fitted, first_fit
from bigalign.model import PIXELS
from bigalign.towers.base import TransformerOptions
from bigalign.towers.bert import BertOptions
from bigalign.weights.layout import ACTIVATIONS

# {our name of an activation: Hugging Face's}
_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}


def _sizes(options: TransformerOptions) -> dict[str, Any]:
  """The options of a tower that every config of transformers has."""
  return dict(
    hidden_size=options.sizes.width,
    intermediate_size=options.sizes.hidden,
    num_hidden_layers=options.sizes.depth,
    num_attention_heads=options.sizes.heads,
    hidden_act=_ACTIVATIONS[options.activation],
    layer_norm_eps=options.epsilon,
  )


def _vision(model_type: str, trained: TrainedModel) -> dict[str, Any]:
  """A vision_config."""
  return dict(
    model_type=model_type,
    image_size=trained.data.image_size,
    patch_size=trained.image.patch,
    **_sizes(trained.image),
  )


def _text(model_type: str, trained: TrainedModel) -> dict[str, Any]:
  """A text_config."""
  return dict(
    model_type=model_type,
    vocab_size=trained.text.vocab_size,
    max_position_embeddings=trained.text.length,
    bos_token_id=None,
    eos_token_id=trained.end_id,
    pad_token_id=trained.tokenizer.pad,
    **_sizes(trained.text),
  )


def _clip(trained: TrainedModel) -> dict[str, Any]:
  """The config of CLIPModel."""
  width = trained.model.image_projector.dim
  return dict(
    model_type="clip",
    architectures=["CLIPModel"],
    dtype="float32",
    projection_dim=width,
    vision_config=_vision("clip_vision_model", trained) | dict(projection_dim=width),
    text_config=_text("clip_text_model", trained) | dict(projection_dim=width),
  )


def _siglip(trained: TrainedModel) -> dict[str, Any]:
  """The config of SiglipModel."""
  return dict(
    model_type="siglip",
    architectures=["SiglipModel"],
    dtype="float32",
    vision_config=_vision("siglip_vision_model", trained),
    text_config=_text("siglip_text_model", trained)
    | dict(projection_size=trained.model.text_projector.dim),
  )


def _siglip2(trained: TrainedModel) -> dict[str, Any]:
  """The config of Siglip2Model.

  Raises:
    ValueError: if the run's images are squares, which its processor does not make.
  """
  if not trained.data.naflex:
    raise ValueError("config.data.naflex must be set: transformers keeps the aspect of images")
  vision = _vision("siglip2_vision_model", trained) | dict(num_patches=trained.image.grid**2)
  del vision["image_size"]
  return _siglip(trained) | dict(
    model_type="siglip2",
    architectures=["Siglip2Model"],
    vision_config=vision,
    text_config=_text("siglip2_text_model", trained)
    | dict(projection_size=trained.model.text_projector.dim),
  )


def bert(trained: TrainedModel) -> dict[str, Any]:
  """The config of BERT, RoBERTa (positions from `pad` on) or MPNet (buckets of distances).

  Raises:
    ValueError: if positions are counted from another token than the tokenizer's padding.
  """
  options, pad = trained.text, trained.tokenizer.pad
  if options.skip_padding and options.pad != pad:
    raise ValueError(f"config.model.text.pad={options.pad}, but the tokenizer pads with {pad}")
  kind = "mpnet" if options.buckets else "roberta" if options.skip_padding else "bert"
  skipped = pad + 1 if options.skip_padding else 0
  return dict(
    model_type=kind,
    vocab_size=options.vocab_size,
    max_position_embeddings=options.length + skipped,
    type_vocab_size=max(options.types, 1),  # BERT and RoBERTa always add a token type
    pad_token_id=pad,
    **_sizes(options),
  )


def _dual(text: Callable[[TrainedModel], dict[str, Any]], trained: TrainedModel) -> dict[str, Any]:
  """The config of VisionTextDualEncoderModel: DINOv2's ViT, or the plain one with a pooler."""
  options = trained.image
  kind = "dinov2_with_registers" if options.registers else "dinov2"
  kind = "vit" if options.pool == "pooler" else kind
  vision = _vision(kind, trained)
  if kind != "vit":
    vision |= dict(mlp_ratio=round(options.sizes.hidden / options.sizes.width))
  if options.registers:
    vision |= dict(num_register_tokens=options.registers)
  return dict(
    model_type="vision-text-dual-encoder",
    architectures=["VisionTextDualEncoderModel"],
    dtype="float32",
    projection_dim=trained.model.image_projector.dim,
    vision_config=vision,
    text_config=text(trained),
  )


def _poolers(trained: TrainedModel) -> dict[str, None]:
  """The keys by which the reader knows that a tower is pooled by a pooler."""
  sides = {
    "vision": trained.image.pool == "pooler",
    "text": isinstance(trained.text, BertOptions),
  }
  return {f"{side}_model.pooler.dense.weight": None for side, has in sides.items() if has}


FAMILIES = (
  Family("CLIPModel", "clip", ("vit", "text"), _clip),
  Family("SiglipModel", "siglip", ("vit", "text"), _siglip, masks=True),
  Family(
    "VisionTextDualEncoderModel",
    "vision-text-dual-encoder",
    ("vit", "text"),
    functools.partial(_dual, functools.partial(_text, "clip_text_model")),
    _poolers,
  ),
  Family(
    "VisionTextDualEncoderModel with BERT",
    "vision-text-dual-encoder",
    ("vit", "bert"),
    functools.partial(_dual, bert),
    _poolers,
  ),
  Family("Siglip2Model", "siglip2", ("naflex", "text"), _siglip2, masks=True),
)


def _files(fitted: Fitted, trained: TrainedModel) -> dict[str, Any]:
  """Config, image processor and tokenizer; the image processor has the run's evaluation length.

  Raises:
    ValueError: if transformers cannot make the same images or token ids.
  """
  size, resize = trained.data.image_size, trained.data.resize
  processors: dict[str, dict[str, Any]] = {
    "squash": dict(image_processor_type="SiglipImageProcessor", size=dict(height=size, width=size)),
    "shortest": dict(
      image_processor_type="CLIPImageProcessor",
      size=dict(shortest_edge=trained.data.edge),
      do_center_crop=True,
      crop_size=dict(height=size, width=size),
    ),
  }
  if resize not in processors:
    raise ValueError(requirement("config.data.resize", resize, *processors))
  mean, std = PIXELS[trained.model.pixels]
  interpolation = trained.data.interpolation
  if trained.data.naflex:
    interpolation = "bilinear"
    processors[resize] = dict(
      image_processor_type="Siglip2ImageProcessor",
      max_num_patches=trained.data.naflex.length,
      patch_size=trained.data.naflex.patch,
    )
  processor = dict(
    do_convert_rgb=True,
    do_resize=True,
    resample=int(Image.Resampling[interpolation.upper()]),
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=mean,
    image_std=std,
    **processors[resize],
  )
  return {
    "config.json": fitted.config,
    "preprocessor_config.json": processor,
    **trained.tokenizer_files(),
  }


def _compute(
  folder: pathlib.Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> np.ndarray:
  """The logits of AutoModel, for the inputs of AutoProcessor."""
  import torch
  import transformers

  model, info = transformers.AutoModel.from_pretrained(
    folder, local_files_only=True, output_loading_info=True
  )
  missing, unexpected = (sorted(info[name]) for name in ("missing_keys", "unexpected_keys"))
  if missing or unexpected:
    raise ValueError(
      f"{folder}: missing {tree.shown(missing)}, unexpected {tree.shown(unexpected)}"
    )
  # torchvision resizes differently from Pillow, which the run's evaluation uses.
  loaded = dict(local_files_only=True, backend="pil")
  texts_as = dict(padding="max_length", truncation=True, return_tensors="pt")
  if isinstance(model, transformers.Siglip2Model):
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **loaded)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    inputs = {
      **processor(images=list(images), return_tensors="pt"),
      **tokenizer(list(texts), **texts_as),
    }
  else:
    processor = transformers.AutoProcessor.from_pretrained(folder, **loaded)
    inputs = processor(text=list(texts), images=list(images), **texts_as)
  with torch.inference_mode():
    return np.asarray(model.eval()(**inputs).logits_per_image)


_USAGE = """```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("DIR")
processor = AutoProcessor.from_pretrained("DIR", backend="pil")
inputs = processor(text=["a cat", "a dog"], images=Image.open("x.jpg"), padding="max_length",
                   truncation=True, return_tensors="pt")
logits = model(**inputs).logits_per_image
```

`backend="pil"`: if torchvision is installed, transformers resizes images with it by default, and
the pixels differ slightly from those of the run's evaluation.

`padding="max_length"`: {padding}
"""

# AutoProcessor would take Gemma's tokenizer, 256 patches of 16 pixels and 64 tokens for any folder.
_USAGE_SIGLIP2 = """```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, PreTrainedTokenizerFast

model = AutoModel.from_pretrained("DIR")
processor = AutoImageProcessor.from_pretrained("DIR", backend="pil")
tokenizer = PreTrainedTokenizerFast.from_pretrained("DIR")
images = processor(images=Image.open("x.jpg"), return_tensors="pt")
texts = tokenizer(["a cat", "a dog"], padding="max_length", truncation=True, return_tensors="pt")
logits = model(**images, **texts).logits_per_image
```

`AutoProcessor` has a tokenizer and sizes of its own for SigLIP 2. `backend="pil"`: if
torchvision is there, transformers resizes images with it by default, and the pixels differ
slightly from those of the run's evaluation.

`padding="max_length"`: {padding}
"""

FORMAT = Format(
  name="hf",
  prepare=functools.partial(first_fit, FAMILIES, "model.safetensors", _files),
  compute=_compute,
  packages=("torch", "transformers"),
  library="transformers",
  tags=("safetensors",),
  usage=lambda trained: _USAGE_SIGLIP2 if trained.data.naflex else _USAGE,
)
