"""Two towers of ours as open_clip's and big_vision's models: the configs that `fit` compares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigalign.export.fit import Family, Subject
from bigalign.towers.text import Text
from bigalign.towers.vit import ViT
from bigalign.weights import timm

# timm's SigLIP trunks; a name gives width, depth, heads, patch, image size and activation at once.
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
  return {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}


def _text(subject: Subject) -> dict[str, Any]:
  tower = subject.model.text_tower.options
  pool = dict(pool_type=tower.pool)
  if tower.pool == "eos":
    pool = dict(pool_type="eos", eos_id=subject.end)
  elif tower.pool not in ("argmax", "last"):
    pool = dict(pool_type="argmax")
  files: dict[str, Any] = dict(hf_tokenizer_name="tokenizer.json")
  if subject.tokenizer.spec["name"] == "clip":
    files = {}
    spec = subject.tokenizer.spec
    clean = "canonicalize" if spec["canonicalize"] else "lower" if spec["lower"] else "whitespace"
    files = dict(tokenizer_kwargs=dict(clean=clean))
  return dict(
    context_length=tower.length,
    vocab_size=tower.vocab_size,
    width=tower.sizes.width,
    heads=tower.sizes.heads,
    layers=tower.sizes.depth,
    mlp_ratio=tower.sizes.hidden / tower.sizes.width,
    no_causal_mask=not tower.causal,
    pad_id=subject.tokenizer.pad,
    proj_type="none" if type(subject.model.text_projector).__name__ == "Identity" else "linear",
    proj_bias=getattr(subject.model.text_projector, "bias", False),
    norm_kwargs=dict(eps=tower.epsilon),
    **_act(tower.activation),
    **pool,
    **files,
  )


def _open_clip(vision: dict[str, Any], subject: Subject) -> dict[str, Any]:
  config = dict(
    embed_dim=subject.model.text_projector.dim, vision_cfg=vision, text_cfg=_text(subject)
  )
  if "b" in subject.arrays:
    config["init_logit_bias"] = -10
  return config


def _vit(subject: Subject) -> dict[str, Any]:
  tower = subject.model.image_tower.options
  vision = dict(
    image_size=subject.data.image_size,
    layers=tower.sizes.depth,
    width=tower.sizes.width,
    head_width=tower.sizes.width // tower.sizes.heads,
    mlp_ratio=tower.sizes.hidden / tower.sizes.width,
    patch_size=tower.patch,
    no_ln_pre=not tower.pre_norm,
    norm_kwargs=dict(eps=tower.epsilon),
    **_act(tower.activation),
  )
  if tower.layer_scale is not None:
    vision["ls_init_value"] = tower.layer_scale
  quick = "quick_gelu" in (tower.activation, subject.model.text_tower.options.activation)
  return _open_clip(vision, subject) | dict(quick_gelu=quick)


def _trunk(subject: Subject) -> dict[str, Any]:
  """The trunk of timm that is nearest: of this size, else of this patch, else the first."""
  tower, size = subject.model.image_tower.options, subject.data.image_size

  def far(name: str) -> tuple[bool, ...]:
    x = timm.named(name)
    return (
      x.width != tower.sizes.width,
      x.depth != tower.sizes.depth,
      x.patch != tower.patch,
      not name.endswith(f"_{size}"),
    )

  vision = dict(
    timm_model_name=min(_TRUNKS, key=far), timm_pool="map", timm_proj="none", image_size=size
  )
  return _open_clip(vision, subject) | dict(custom_text=True)


def _bias(subject: Subject) -> dict[str, Any]:
  return {"logit_bias": None} if "b" in subject.arrays else {}


def _custom(subject: Subject) -> dict[str, Any]:
  return {"text.": None} | _bias(subject)


OPEN_CLIP = (
  Family("open_clip's CLIP", "open_clip", (ViT, Text), _vit, _bias),
  Family(
    "open_clip's CustomTextCLIP with timm's SigLIP trunk", "open_clip", (ViT, Text), _trunk, _custom
  ),
)


def _two_towers(subject: Subject) -> dict[str, jax.ShapeDtypeStruct]:
  """{key: shape} of what a big_vision npz is known by."""
  image, text = subject.model.image_tower.options, subject.model.text_tower.options
  side = subject.data.image_size // image.patch
  found: dict[str, tuple[int, ...]] = {
    "params/img/embedding/kernel": (image.patch, image.patch, 3, image.sizes.width),
    "params/img/pos_embedding": (1, side * side, image.sizes.width),
    "params/txt/Embed_0/embedding": (text.vocab_size, text.sizes.width),
    "params/txt/pos_embedding": (1, text.length, text.sizes.width),
    "params/txt/head/kernel": (text.sizes.width, subject.model.text_projector.dim),
    **{f"params/{name}": (1,) for name in ("t", "b") if name in subject.arrays},
  }
  for start, tower in (("img/Transformer", image), ("txt/Encoder_0", text)):
    for i in range(tower.sizes.depth):
      block = f"params/{start}/encoderblock_{i}"
      found |= {
        f"{block}/MultiHeadDotProductAttention_0/query/kernel": (
          tower.sizes.width,
          tower.sizes.heads,
          tower.sizes.width // tower.sizes.heads,
        ),
        f"{block}/MlpBlock_0/Dense_0/kernel": (tower.sizes.width, tower.sizes.hidden),
      }
  return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in found.items()}


BIG_VISION = (
  Family("big_vision's two_towers", "big_vision", (ViT, Text), lambda subject: {}, _two_towers),
)
