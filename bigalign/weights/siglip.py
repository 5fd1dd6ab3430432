"""Layouts of Hugging Face's SiglipModel, Siglip2Model (NaFlex) and their single towers."""

from __future__ import annotations

import functools
from typing import Any

from bigalign.weights import clip, table
from bigalign.weights.layout import Layout, Shapes, activation, call, join, sizes
from bigalign.weights.table import Row


def vision(
  naflex: bool,
  prefix: str,
  *,
  hidden_size: int = 768,
  intermediate_size: int = 3072,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 12,
  image_size: int = 224,
  patch_size: int = 16,
  num_patches: int = 256,
  hidden_act: str = "gelu_pytorch_tanh",
  layer_norm_eps: float = 1e-6,
  vision_use_head: bool = True,
  **_: Any,
) -> Layout:
  """The layout of a vision_config, with NaFlex patches or not; the defaults are Hugging Face's."""
  if not vision_use_head:
    raise ValueError("vision_use_head: false; a SigLIP tower needs its attention pooling")
  ours, embeddings = "image_tower/", f"{prefix}embeddings."
  options = dict(
    patch=patch_size,
    activation=activation(hidden_act),
    epsilon=layer_norm_eps,
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size),
  )
  grid = round(num_patches**0.5)
  kind = dict(name="naflex", grid=grid) if naflex else dict(name="vit", pool="map")
  key = f"{embeddings}patch_embedding"
  rows = (
    *(_patches(f"{ours}embedding", key) if naflex else table.conv(f"{ours}embedding", key)),
    Row(
      f"{ours}positions",
      f"{embeddings}position_embedding.weight",
      "n d -> 1 n d",
      resize="" if naflex else "bicubic",
    ),
    *clip.encoder(ours, prefix, num_hidden_layers),
    *table.norm(f"{ours}encoder/ln", f"{prefix}post_layernorm"),
    *head(f"{ours}map_head", f"{prefix}head."),
  )
  return Layout(
    {"image": kind | options, "pixels": "half"},
    rows,
    clip.UNUSED,
    data={"image_size": grid * patch_size if naflex else image_size},
  )


def _patches(ours: str, theirs: str) -> list[Row]:
  """Rows of a linear map of flat patches, channels last."""
  names = {"/kernel": (".weight", "d (p q c) -> p q c d"), "/bias": (".bias", "")}
  return table.rows(ours, theirs, names)


def head(ours: str, theirs: str) -> list[Row]:
  """Rows of attention pooling with torch's MultiheadAttention."""
  qkv = tuple(f"{ours}/attn/{name}" for name in ("query", "key", "value"))
  return [
    Row(f"{ours}/probe", f"{theirs}probe"),
    *table.fused(qkv, f"{theirs}attention.in_proj_weight", f"{theirs}attention.in_proj_bias"),
    Row(f"{ours}/attn/out/kernel", f"{theirs}attention.out_proj.weight", "d (h k) -> h k d"),
    Row(f"{ours}/attn/out/bias", f"{theirs}attention.out_proj.bias"),
    *table.norm(f"{ours}/ln", f"{theirs}layernorm"),
    *table.dense(f"{ours}/mlp/fc1", f"{theirs}mlp.fc1"),
    *table.dense(f"{ours}/mlp/fc2", f"{theirs}mlp.fc2"),
  ]


def text(
  prefix: str,
  *,
  hidden_size: int = 768,
  intermediate_size: int = 3072,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 12,
  max_position_embeddings: int = 64,
  vocab_size: int = 32000,
  hidden_act: str = "gelu_pytorch_tanh",
  layer_norm_eps: float = 1e-6,
  projection_size: int | None = None,
  **_: Any,
) -> Layout:
  """The layout of a text_config. Its head is our projector; attention sees padding."""
  ours, embeddings = "text_tower/", f"{prefix}embeddings."
  options = dict(
    name="text",
    vocab_size=vocab_size,
    length=max_position_embeddings,
    pool="last",
    mask_padding=False,
    activation=activation(hidden_act),
    epsilon=layer_norm_eps,
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size),
  )
  rows = (
    Row(f"{ours}embedding", f"{embeddings}token_embedding.weight"),
    Row(f"{ours}positions", f"{embeddings}position_embedding.weight", "n d -> 1 n d"),
    *clip.encoder(ours, prefix, num_hidden_layers),
    *table.norm(f"{ours}encoder/ln", f"{prefix}final_layer_norm"),
    *table.dense("text_projector/out", f"{prefix}head"),
  )
  return Layout(
    {
      "text": options,
      "embed_dim": projection_size or hidden_size,
      "text_projector": dict(name="linear", bias=True),
    },
    rows,
    clip.UNUSED,
    data={"length": max_position_embeddings},
  )


def _siglip(
  naflex: bool,
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  vision_config: Any = None,
  text_config: Any = None,
  **_: Any,
) -> Layout:
  """The layout of SiglipModel, or with NaFlex patches of Siglip2Model."""
  return join(
    call(vision, vision_config or {}, f"{where}: vision_config", naflex, "vision_model."),
    call(text, text_config or {}, f"{where}: text_config", "text_model."),
    Layout({}, (Row("t", "logit_scale", "1 ->"), Row("b", "logit_bias", "1 ->"))),
    image_projector=dict(name="identity"),
  )


def _vision(naflex: bool, shapes: Shapes, where: str, prefix: str, **config: Any) -> Layout:
  """The layout of SiglipVisionModel or Siglip2VisionModel."""
  inner = clip.find_prefix(shapes, f"{prefix}vision_model.") or prefix
  return call(vision, config, where, naflex, inner)


def siglip_text(shapes: Shapes, where: str, prefix: str, **config: Any) -> Layout:
  """The layout of SiglipTextModel, also of SigLIP 2."""
  return call(text, config, where, clip.find_prefix(shapes, f"{prefix}text_model.") or prefix)


# SigLIP 2 of a fixed resolution is saved as a SiglipModel.
siglip, siglip2 = (functools.partial(_siglip, naflex) for naflex in (False, True))
siglip_vision, siglip2_vision = (functools.partial(_vision, naflex) for naflex in (False, True))
