"""Two towers of ours as Hugging Face's models: the configs that `fit` compares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bigalign.export.fit import HF_ACTIVATIONS, Family, Subject
from bigalign.towers.base import TransformerOptions
from bigalign.towers.bert import Bert
from bigalign.towers.text import Text
from bigalign.towers.vit import ViT


def _sizes(options: TransformerOptions) -> dict[str, Any]:
  return dict(
    hidden_size=options.sizes.width,
    intermediate_size=options.sizes.hidden,
    num_hidden_layers=options.sizes.depth,
    num_attention_heads=options.sizes.heads,
    hidden_act=HF_ACTIVATIONS[options.activation],
    layer_norm_eps=options.epsilon,
  )


def _vision(kind: str, subject: Subject) -> dict[str, Any]:
  tower = subject.model.image_tower.options
  return dict(
    model_type=kind, image_size=subject.data.image_size, patch_size=tower.patch, **_sizes(tower)
  )


def _text(kind: str, subject: Subject) -> dict[str, Any]:
  tower = subject.model.text_tower.options
  return dict(
    model_type=kind,
    vocab_size=tower.vocab_size,
    max_position_embeddings=tower.length,
    bos_token_id=None,
    eos_token_id=subject.end,
    pad_token_id=subject.tokenizer.pad,
    **_sizes(tower),
  )


def _clip(subject: Subject) -> dict[str, Any]:
  width = subject.model.image_projector.dim
  return dict(
    model_type="clip",
    architectures=["CLIPModel"],
    dtype="float32",
    projection_dim=width,
    vision_config=_vision("clip_vision_model", subject) | dict(projection_dim=width),
    text_config=_text("clip_text_model", subject) | dict(projection_dim=width),
  )


def _siglip(subject: Subject) -> dict[str, Any]:
  return dict(
    model_type="siglip",
    architectures=["SiglipModel"],
    dtype="float32",
    vision_config=_vision("siglip_vision_model", subject),
    text_config=_text("siglip_text_model", subject)
    | dict(projection_size=subject.model.text_projector.dim),
  )


def bert(subject: Subject) -> dict[str, Any]:
  """BERT, or its kin that counts positions from `pad` (RoBERTa) or knows distances (MPNet).

  Raises:
    ValueError: if positions are counted from another token than the tokenizer's padding.
  """
  tower, pad = subject.model.text_tower.options, subject.tokenizer.pad
  if tower.skip_padding and tower.pad != pad:
    raise ValueError(f"config.model.text.pad={tower.pad}, but the tokenizer pads with {pad}")
  kind = "mpnet" if tower.buckets else "roberta" if tower.skip_padding else "bert"
  skipped = pad + 1 if tower.skip_padding else 0
  return dict(
    model_type=kind,
    vocab_size=tower.vocab_size,
    max_position_embeddings=tower.length + skipped,
    type_vocab_size=max(tower.types, 1),  # BERT and RoBERTa always look a type up
    pad_token_id=pad,
    **_sizes(tower),
  )


def _dual(text: Callable[[Subject], dict[str, Any]], subject: Subject) -> dict[str, Any]:
  """A plain ViT beside a text tower: DINOv2's is the one that is read by its class token."""
  tower = subject.model.image_tower.options
  kind = "dinov2_with_registers" if tower.registers else "dinov2"
  kind = "vit" if tower.pool == "pooler" else kind
  vision = _vision(kind, subject) | dict(mlp_ratio=round(tower.sizes.hidden / tower.sizes.width))
  if tower.registers:
    vision |= dict(num_register_tokens=tower.registers)
  return dict(
    model_type="vision-text-dual-encoder",
    architectures=["VisionTextDualEncoderModel"],
    dtype="float32",
    projection_dim=subject.model.image_projector.dim,
    vision_config=vision,
    text_config=text(subject),
  )


def _poolers(subject: Subject) -> dict[str, None]:
  """The keys by which a reader knows that BERT, or ViT, is read by its pooler."""
  sides = {
    "vision": subject.model.image_tower.options.pool == "pooler",
    "text": isinstance(subject.model.text_tower, Bert),
  }
  return {f"{side}_model.pooler.dense.weight": None for side, has in sides.items() if has}


FAMILIES = (
  Family("CLIPModel", "clip", (ViT, Text), _clip),
  Family("SiglipModel", "siglip", (ViT, Text), _siglip, masks=True),
  Family(
    "VisionTextDualEncoderModel",
    "vision-text-dual-encoder",
    (ViT, Text),
    functools.partial(_dual, functools.partial(_text, "clip_text_model")),
    _poolers,
  ),
  Family(
    "VisionTextDualEncoderModel with BERT",
    "vision-text-dual-encoder",
    (ViT, Bert),
    functools.partial(_dual, bert),
    _poolers,
  ),
)
