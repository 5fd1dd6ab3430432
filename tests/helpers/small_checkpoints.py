"""Small checkpoints of random numbers, as other libraries write them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree, weights
from bigalign.towers import TOWERS
from bigalign.weights import files, transfer

TEXT = dict(
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=6,
  vocab_size=11,
  projection_dim=4,
)
VISION = dict(
  hidden_size=12,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=3,
  image_size=16,
  patch_size=4,
)
CLIP = dict(model_type="clip", projection_dim=4, text_config=TEXT, vision_config=VISION)
BERT = dict(TEXT, model_type="bert")
SIGLIP = dict(VISION, model_type="siglip_vision_model")
PICTURE = jnp.zeros((1, 16, 16, 3))
IDS = jnp.zeros((1, 6), jnp.int32)


def save(file, arrays, **about):
  """A safetensors file."""
  header, data = ({"__metadata__": about} if about else {}), b""
  for key, x in arrays.items():
    kind = {np.dtype(v): k for k, v in files.DTYPES.items()}[x.dtype]
    start = len(data)
    data += np.ascontiguousarray(x).tobytes()
    header[key] = dict(dtype=kind, shape=list(x.shape), data_offsets=[start, len(data)])
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def clip_keys(seed=0):
  """A CLIP as Hugging Face saves it, of random numbers."""
  rng = np.random.default_rng(seed)

  def block(p, d, h):
    names = {f"{p}layer_norm{i}.{x}": (d,) for i in (1, 2) for x in ("weight", "bias")}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      names |= {f"{p}self_attn.{name}.weight": (d, d), f"{p}self_attn.{name}.bias": (d,)}
    return names | {
      f"{p}mlp.fc1.weight": (h, d),
      f"{p}mlp.fc1.bias": (h,),
      f"{p}mlp.fc2.weight": (d, h),
      f"{p}mlp.fc2.bias": (d,),
    }

  def norm(p, d):
    return {f"{p}.weight": (d,), f"{p}.bias": (d,)}

  v, t = "vision_model.", "text_model."
  shapes = {
    f"{v}embeddings.class_embedding": (12,),
    f"{v}embeddings.patch_embedding.weight": (12, 3, 4, 4),
    f"{v}embeddings.position_embedding.weight": (17, 12),
    f"{t}embeddings.token_embedding.weight": (11, 8),
    f"{t}embeddings.position_embedding.weight": (6, 8),
    "visual_projection.weight": (4, 12),
    "text_projection.weight": (4, 8),
    "logit_scale": (),
    **norm(f"{v}pre_layrnorm", 12),
    **norm(f"{v}post_layernorm", 12),
    **norm(f"{t}final_layer_norm", 8),
  }
  for i in range(2):
    shapes |= block(f"{v}encoder.layers.{i}.", 12, 20) | block(f"{t}encoder.layers.{i}.", 8, 12)
  return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def folder(path, config, arrays):
  path.mkdir(exist_ok=True)
  (path / "config.json").write_text(json.dumps(config))
  save(path / "model.safetensors", arrays, format="pt")
  return path


def bert_keys(config, prefix="", norm=("weight", "bias")):
  """A BERT as written from a table of our own towers, with the old names of norms."""
  canonical = weights.LAYOUTS["bert"](
    {}, "", "", **{k: v for k, v in config.items() if k not in ("model_type", "projection_dim")}
  )
  tower = dict(canonical.model["text"])
  made = TOWERS[tower.pop("name")](**tower, dtype="float32").build()
  params = jax.jit(made.init)(jax.random.key(1), IDS)["params"]
  ours = tree.flatten(params, "text_tower/")
  keys = dict(transfer.write(canonical, ours))
  return ours, {
    prefix
    + (
      k.replace("LayerNorm.weight", f"LayerNorm.{norm[0]}").replace(
        "LayerNorm.bias", f"LayerNorm.{norm[1]}"
      )
    ): x
    for k, x in keys.items()
  }
