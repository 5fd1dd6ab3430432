"""Layouts of Hugging Face's vision towers: ViT, DINOv2 (with registers, SwiGLU), DINOv3."""

from __future__ import annotations

import functools
from typing import Any

from bigalign.weights import table
from bigalign.weights.clip import find_prefix
from bigalign.weights.layout import Layout, Shapes, activation, sizes
from bigalign.weights.table import Row

OURS = "image_tower/"
BLOCK = f"{OURS}encoder/block_{{}}/"
_QKVO = ("attention.query", "attention.key", "attention.value", "output.dense")


def _positions(theirs: str, method: str) -> Row:
  """Positions of the class token and of the patches; `method` resizes the latter."""
  return Row((f"{OURS}class_position", f"{OURS}positions"), theirs, "1 n d -> 1 n d", resize=method)


def _pooler(key: str, shapes: Shapes) -> tuple[str, list[Row]]:
  """("pooler", its rows) if the checkpoint has a pooler, else ("cls", no rows)."""
  if f"{key}.weight" not in shapes:
    return "cls", []
  return "pooler", [row._replace(optional=True) for row in table.dense(f"{OURS}pooler", key)]


def vit(
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  hidden_size: int = 768,
  intermediate_size: int = 3072,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 12,
  image_size: int = 224,
  patch_size: int = 16,
  hidden_act: str = "gelu",
  layer_norm_eps: float = 1e-12,
  qkv_bias: bool = True,
  pooler_act: str = "tanh",
  mlp_ratio: Any = None,
  **_: Any,
) -> Layout:
  """The layout of ViTModel, without the classifier of a ViTForImageClassification.

  ViTModel ignores `mlp_ratio`, which exports of earlier versions have.
  """
  if pooler_act != "tanh":
    raise ValueError(f"pooler_act: {pooler_act!r}; known: 'tanh'")
  prefix = prefix or find_prefix(shapes, "vit.")
  biases = "qkvo" if qkv_bias else "o"
  other, n = f"{prefix}encoder.layer.{{}}.", num_hidden_layers
  pool, pooler = _pooler(f"{prefix}pooler.dense", shapes)
  rows = (
    Row(f"{OURS}extra_tokens", f"{prefix}embeddings.cls_token"),
    *table.conv(f"{OURS}embedding", f"{prefix}embeddings.patch_embeddings.projection"),
    _positions(f"{prefix}embeddings.position_embeddings", "bicubic"),
    *table.norm(f"{BLOCK}ln1", f"{other}layernorm_before", n),
    *table.attention(f"{BLOCK}attn", f"{other}attention.", _QKVO, n, biases),
    *table.norm(f"{BLOCK}ln2", f"{other}layernorm_after", n),
    *table.dense(f"{BLOCK}mlp/fc1", f"{other}intermediate.dense", n),
    *table.dense(f"{BLOCK}mlp/fc2", f"{other}output.dense", n),
    *table.norm(f"{OURS}encoder/ln", f"{prefix}layernorm"),
    *pooler,
  )
  options = dict(
    name="vit",
    patch=patch_size,
    pool=pool,
    class_token=True,
    class_position=True,
    biases=biases,
    activation=activation(hidden_act),
    epsilon=layer_norm_eps,
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size),
  )
  return Layout(
    {"image": options, "pixels": "half"},
    rows,
    r"^classifier\.|mask_token$",
    data={"image_size": image_size},
  )


def _tokens(prefix: str, registers: int) -> Row:
  """Class token and registers."""
  keys = (f"{prefix}embeddings.cls_token", f"{prefix}embeddings.register_tokens")
  if not registers:
    return Row(f"{OURS}extra_tokens", keys[0])
  return Row(f"{OURS}extra_tokens", keys, "1 n d -> 1 n d")


def _scales(other: str, layers: int) -> list[Row]:
  """Rows of LayerScale."""
  return [Row(f"{BLOCK}scale{i}", f"{other}layer_scale{i}.lambda1", layers=layers) for i in (1, 2)]


def _gated(other: str, layers: int) -> list[Row]:
  """Rows of DINOv2's SwiGLU, whose gate and input are one matrix."""
  first = tuple(f"{BLOCK}mlp/{name}" for name in ("gate", "fc1"))
  return [
    Row(
      tuple(f"{x}/kernel" for x in first),
      f"{other}mlp.weights_in.weight",
      "(s o) i -> s i o",
      layers,
    ),
    Row(tuple(f"{x}/bias" for x in first), f"{other}mlp.weights_in.bias", "(s o) -> s o", layers),
    *table.dense(f"{BLOCK}mlp/fc2", f"{other}mlp.weights_out", layers),
  ]


def _dinov2(
  resize: str,
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  hidden_size: int = 768,
  mlp_ratio: float = 4,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 12,
  image_size: int = 224,
  patch_size: int = 14,
  num_register_tokens: int = 0,
  hidden_act: str = "gelu",
  layer_norm_eps: float = 1e-6,
  layerscale_value: float = 1.0,
  qkv_bias: bool = True,
  use_swiglu_ffn: bool = False,
  use_mask_token: bool = True,
  intermediate_size: Any = None,
  **_: Any,
) -> Layout:
  """The layout of Dinov2Model or Dinov2WithRegistersModel, which ignore intermediate_size."""
  biases = "qkvo" if qkv_bias else "o"
  other, n = f"{prefix}encoder.layer.{{}}.", num_hidden_layers
  hidden = int(hidden_size * mlp_ratio)
  mlp = [
    *table.dense(f"{BLOCK}mlp/fc1", f"{other}mlp.fc1", n),
    *table.dense(f"{BLOCK}mlp/fc2", f"{other}mlp.fc2", n),
  ]
  if use_swiglu_ffn:
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    mlp = _gated(other, n)
  rows = (
    _tokens(prefix, num_register_tokens),
    *table.conv(f"{OURS}embedding", f"{prefix}embeddings.patch_embeddings.projection"),
    _positions(f"{prefix}embeddings.position_embeddings", resize),
    *table.norm(f"{BLOCK}ln1", f"{other}norm1", n),
    *table.attention(f"{BLOCK}attn", f"{other}attention.", _QKVO, n, biases),
    *_scales(other, n),
    *table.norm(f"{BLOCK}ln2", f"{other}norm2", n),
    *mlp,
    *table.norm(f"{OURS}encoder/ln", f"{prefix}layernorm"),
  )
  options = dict(
    name="vit",
    patch=patch_size,
    pool="cls",
    class_position=True,
    registers=num_register_tokens,
    biases=biases,
    gated=use_swiglu_ffn,
    layer_scale=layerscale_value,
    epsilon=layer_norm_eps,
    activation="silu" if use_swiglu_ffn else activation(hidden_act),
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, hidden),
  )
  zeros = {f"{prefix}embeddings.mask_token": (1, hidden_size)} if use_mask_token else {}
  return Layout(
    {"image": options, "pixels": "imagenet"},
    rows,
    r"^classifier\.",
    zeros,
    {"image_size": image_size},
  )


dinov2 = functools.partial(_dinov2, "bicubic")
dinov2_with_registers = functools.partial(_dinov2, "bicubic_antialias", num_register_tokens=4)


def dinov3(
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  hidden_size: int = 384,
  intermediate_size: int = 1536,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 6,
  image_size: int = 224,
  patch_size: int = 16,
  num_register_tokens: int = 0,
  hidden_act: str = "gelu",
  layer_norm_eps: float = 1e-5,
  layerscale_value: float = 1.0,
  rope_theta: float = 100.0,
  query_bias: bool = True,
  key_bias: bool = False,
  value_bias: bool = True,
  proj_bias: bool = True,
  mlp_bias: bool = True,
  use_gated_mlp: bool = False,
  **_: Any,
) -> Layout:
  """The layout of DINOv3ViTModel; its layers are "layer.0", in some files "model.layer.0"."""
  has_bias = zip("qkvo", (query_bias, key_bias, value_bias, proj_bias))
  biases = "".join(name for name, has in has_bias if has)
  layer = find_prefix(shapes, f"{prefix}model.layer.", f"{prefix}layer.") or f"{prefix}layer."
  other, n = f"{layer}{{}}.", num_hidden_layers
  mlp = {"fc1": "up_proj", "fc2": "down_proj"} | ({"gate": "gate_proj"} if use_gated_mlp else {})
  rows = (
    _tokens(prefix, num_register_tokens),
    *table.conv(f"{OURS}embedding", f"{prefix}embeddings.patch_embeddings"),
    *table.norm(f"{BLOCK}ln1", f"{other}norm1", n),
    *table.attention(
      f"{BLOCK}attn", f"{other}attention.", ("q_proj", "k_proj", "v_proj", "o_proj"), n, biases
    ),
    *_scales(other, n),
    *table.norm(f"{BLOCK}ln2", f"{other}norm2", n),
    *(
      row
      for name, theirs in mlp.items()
      for row in table.dense(f"{BLOCK}mlp/{name}", f"{other}mlp.{theirs}", n, bias=mlp_bias)
    ),
    *table.norm(f"{OURS}encoder/ln", f"{prefix}norm"),
  )
  options = dict(
    name="vit",
    patch=patch_size,
    pool="cls",
    positions="rope",
    rope_theta=rope_theta,
    registers=num_register_tokens,
    biases=biases,
    mlp_bias=mlp_bias,
    gated=use_gated_mlp,
    layer_scale=layerscale_value,
    activation=activation(hidden_act),
    epsilon=layer_norm_eps,
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size),
  )
  zeros = {f"{prefix}embeddings.mask_token": (1, 1, hidden_size)}
  if not num_register_tokens:
    zeros[f"{prefix}embeddings.register_tokens"] = (1, 0, hidden_size)
  return Layout(
    {"image": options, "pixels": "imagenet"}, rows, "", zeros, {"image_size": image_size}
  )
