"""Layouts of Hugging Face's CLIPModel, CLIPVisionModel and CLIPTextModel."""

from __future__ import annotations

from typing import Any

from bigalign.weights import table
from bigalign.weights.layout import Layout, Shapes, activation, call, join, sizes
from bigalign.weights.table import Row

UNUSED = r"position_ids$"


def encoder(ours: str, theirs: str, layers: int) -> list[Row]:
  """Rows of pre-norm blocks with the keys of CLIP and SigLIP."""
  block, other = f"{ours}encoder/block_{{}}/", f"{theirs}encoder.layers.{{}}."
  return [
    *table.norm(f"{block}ln1", f"{other}layer_norm1", layers),
    *table.attention(
      f"{block}attn", f"{other}self_attn.", ("q_proj", "k_proj", "v_proj", "out_proj"), layers
    ),
    *table.norm(f"{block}ln2", f"{other}layer_norm2", layers),
    *table.dense(f"{block}mlp/fc1", f"{other}mlp.fc1", layers),
    *table.dense(f"{block}mlp/fc2", f"{other}mlp.fc2", layers),
  ]


def vision(
  prefix: str,
  *,
  hidden_size: int = 768,
  intermediate_size: int = 3072,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 12,
  image_size: int = 224,
  patch_size: int = 32,
  hidden_act: str = "quick_gelu",
  layer_norm_eps: float = 1e-5,
  **_: Any,
) -> Layout:
  """The layout of a vision_config; the defaults are Hugging Face's."""
  ours, embeddings = "image_tower/", f"{prefix}embeddings."
  options = dict(
    name="vit",
    patch=patch_size,
    patch_bias=False,
    pool="cls",
    class_position=True,
    pre_norm=True,
    activation=activation(hidden_act),
    epsilon=layer_norm_eps,
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size),
  )
  rows = (
    Row(f"{ours}extra_tokens", f"{embeddings}class_embedding", "d -> 1 1 d"),
    *table.conv(f"{ours}embedding", f"{embeddings}patch_embedding", bias=False),
    Row(
      (f"{ours}class_position", f"{ours}positions"),
      f"{embeddings}position_embedding.weight",
      "n d -> 1 n d",
      resize="bicubic",
    ),
    *table.norm(f"{ours}ln_pre", f"{prefix}pre_layrnorm"),  # sic
    *encoder(ours, prefix, num_hidden_layers),
    *table.norm(f"{ours}encoder/ln", f"{prefix}post_layernorm"),
  )
  return Layout({"image": options, "pixels": "clip"}, rows, UNUSED, data={"image_size": image_size})


def text(
  prefix: str,
  *,
  hidden_size: int = 512,
  intermediate_size: int = 2048,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 8,
  max_position_embeddings: int = 77,
  vocab_size: int = 49408,
  hidden_act: str = "quick_gelu",
  layer_norm_eps: float = 1e-5,
  eos_token_id: int | None = 49407,
  **_: Any,
) -> Layout:
  """The layout of a text_config; the defaults are Hugging Face's."""
  ours, embeddings = "text_tower/", f"{prefix}embeddings."
  # Older configs have a wrong eos_token_id, 2; those models pool the token with the highest id.
  pool = dict(pool="argmax") if eos_token_id in (None, 2) else dict(pool="eos", eos=eos_token_id)
  options = dict(
    name="text",
    vocab_size=vocab_size,
    length=max_position_embeddings,
    causal=True,
    activation=activation(hidden_act),
    epsilon=layer_norm_eps,
    **pool,
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size),
  )
  rows = (
    Row(f"{ours}embedding", f"{embeddings}token_embedding.weight"),
    Row(f"{ours}positions", f"{embeddings}position_embedding.weight", "n d -> 1 n d"),
    *encoder(ours, prefix, num_hidden_layers),
    *table.norm(f"{ours}encoder/ln", f"{prefix}final_layer_norm"),
  )
  return Layout({"text": options}, rows, UNUSED, data={"length": max_position_embeddings})


def clip(
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  vision_config: Any = None,
  text_config: Any = None,
  vision_config_dict: Any = None,
  text_config_dict: Any = None,
  projection_dim: int = 512,
  **_: Any,
) -> Layout:
  """The layout of CLIPModel; as in transformers, an old "_dict" comes before the other config."""
  vision_name = "vision_config" if vision_config_dict is None else "vision_config_dict"
  text_name = "text_config" if text_config_dict is None else "text_config_dict"
  image_keys = vision_config if vision_config_dict is None else vision_config_dict
  text_keys = text_config if text_config_dict is None else text_config_dict
  return join(
    call(vision, image_keys or {}, f"{where}: {vision_name}", "vision_model."),
    call(text, text_keys or {}, f"{where}: {text_name}", "text_model."),
    Layout({}, projections()),
    embed_dim=projection_dim,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
  )


def projections() -> tuple[Row, ...]:
  """Rows of the projections and the scale, with the keys of CLIP and VisionTextDualEncoder."""
  return (
    *table.dense("image_projector/out", "visual_projection", bias=False),
    *table.dense("text_projector/out", "text_projection", bias=False),
    Row("t", "logit_scale"),
  )


def clip_vision(
  shapes: Shapes, where: str, prefix: str, *, projection_dim: int = 512, **config: Any
) -> Layout:
  """The layout of CLIPVisionModel, with or without its projection."""
  inner = find_prefix(shapes, f"{prefix}vision_model.") or prefix
  layout = call(vision, config, where, inner)
  return _projected(layout, shapes, prefix, "image", "visual_projection", projection_dim)


def clip_text(
  shapes: Shapes, where: str, prefix: str, *, projection_dim: int = 512, **config: Any
) -> Layout:
  """The layout of CLIPTextModel, with or without its projection."""
  inner = find_prefix(shapes, f"{prefix}text_model.") or prefix
  layout = call(text, config, where, inner)
  return _projected(layout, shapes, prefix, "text", "text_projection", projection_dim)


def _projected(
  layout: Layout, shapes: Shapes, prefix: str, side: str, key: str, dim: int
) -> Layout:
  """The layout with the tower's own projection, if it has one; a tower of a pair has none."""
  if prefix or f"{key}.weight" not in shapes:
    return layout
  rows = tuple(table.dense(f"{side}_projector/out", key, bias=False))
  return join(layout, Layout({}, rows), embed_dim=dim, **{f"{side}_projector": dict(name="linear")})


def find_prefix(shapes: Shapes, *prefixes: str) -> str:
  """The first of the prefixes that a key has, else ""; towers are saved with or without one."""
  return next((x for x in prefixes if any(key.startswith(x) for key in shapes)), "")
