"""Two towers, two projectors, unit norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import config, sharding, sphere
from bigalign.projectors import PROJECTORS
from bigalign.towers import TOWERS, TowerOutput

# Pixel statistics in [0, 1] by name.
PIXELS = {
  "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# What DualEncoder returns to the losses; mask_txt too where the text tower masks padding.
FEATURES = ("zimg", "ztxt", "raw_img", "raw_txt", "tokens_img", "tokens_txt")


def provided(batch: Iterable[str]) -> set[str]:
  """Fields of a batch -> those, and the features that a model makes of them."""
  fields = {*batch, *FEATURES}
  return fields | {"ztxt_second"} if "text_second" in fields else fields


def unit(x: jax.Array) -> jax.Array:
  """[..., E] -> unit L2 norm, float32; zero stays zero, with a finite gradient."""
  return sphere.unit(x.astype(jnp.float32))


class DualEncoder(nn.Module):
  """An image tower and a text tower that meet on the unit sphere.

  Where a method takes images or texts it also takes floating-point vectors: what the tower would
  make of them, from an embedding store, pooled [B, D], or with its tokens [B, 1 + T, D], as
  `with_tokens_image` and `with_tokens_text` give them. Only the projector is left to do then.
  """

  image_tower: nn.Module
  text_tower: nn.Module
  image_projector: nn.Module
  text_projector: nn.Module
  pixels: str

  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
    second: tuple[jax.Array, jax.Array] | None = None,
  ) -> dict[str, jax.Array]:
    """What losses read: zimg, ztxt [B, E]; raw_*, the same before the norm; tokens_*, mask_txt.

    With `second`, other texts [B, L] and their mask, also ztxt_second [B, E].
    """
    raw_img, img = self._image(image, train)
    raw_txt, txt = self._text(text, mask, train)
    feats = {
      "zimg": unit(raw_img),
      "ztxt": unit(raw_txt),
      "raw_img": raw_img,
      "raw_txt": raw_txt,
      "tokens_img": img.tokens,
      "tokens_txt": txt.tokens,
    }
    if second is not None:
      feats["ztxt_second"] = self.embed_text(*second, train=train)
    return feats if txt.mask is None else {**feats, "mask_txt": txt.mask}

  def embed_image(self, image: jax.Array, train: bool = False) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, E], unit norm, float32."""
    return unit(self._image(image, train)[0])

  def embed_text(
    self, text: jax.Array, mask: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """[B, L] int32, mask [B, L] bool (True = no padding) -> [B, E], unit norm, float32."""
    return unit(self._text(text, mask, train)[0])

  def pooled_image(self, image: jax.Array) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, D], what the projector gets; float32."""
    return self._image_tower(image, False).pooled.astype(jnp.float32)

  def pooled_text(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, L] int32, mask [B, L] bool -> [B, D], what the projector gets; float32."""
    return self._text_tower(text, mask, False).pooled.astype(jnp.float32)

  def with_tokens_image(self, image: jax.Array) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, 1 + T, D]: the pooled vector, then the tokens; float32."""
    return _rows(self._image_tower(image, False))

  def with_tokens_text(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, L] int32, mask [B, L] bool -> [B, 1 + L, D]; padding is zero, float32."""
    return _rows(self._text_tower(text, mask, False))

  def _image_tower(self, image: jax.Array, train: bool) -> TowerOutput:
    if jnp.issubdtype(image.dtype, jnp.floating):
      return _stored(image)
    mean, std = (np.asarray(x, np.float32) * 255 for x in PIXELS[self.pixels])
    x = sharding.constrain_batch(image).astype(jnp.float32)
    x = (x - mean[None, None, None]) / std[None, None, None]
    return self.image_tower(x, train=train)

  def _text_tower(self, text: jax.Array, mask: jax.Array | None, train: bool) -> TowerOutput:
    if jnp.issubdtype(text.dtype, jnp.floating):
      return _stored(text)
    return self.text_tower(sharding.constrain_batch(text), mask, train=train)

  def _image(self, image: jax.Array, train: bool) -> tuple[jax.Array, TowerOutput]:
    out = self._image_tower(image, train)
    return sharding.constrain_batch(self.image_projector(out, train)), out

  def _text(
    self, text: jax.Array, mask: jax.Array | None, train: bool
  ) -> tuple[jax.Array, TowerOutput]:
    out = self._text_tower(text, mask, train)
    return sharding.constrain_batch(self.text_projector(out, train)), out


def _rows(out: TowerOutput) -> jax.Array:
  """A tower's output as a row of an embedding store that holds tokens, [B, 1 + T, D] float32."""
  if out.pooled.shape[-1] != out.tokens.shape[-1]:
    raise ValueError(
      f"the pooled vector is {out.pooled.shape[-1]} wide, a token {out.tokens.shape[-1]}, and a"
      " store of tokens has one width: choose another config.model.image.pool"
    )
  tokens = out.tokens.astype(jnp.float32)
  if out.mask is not None:
    tokens = jnp.where(out.mask[..., None], tokens, 0.0)
  return jnp.concatenate([out.pooled.astype(jnp.float32)[:, None], tokens], 1)


def _stored(vectors: jax.Array) -> TowerOutput:
  """What a store holds as a tower's output: [B, D] without tokens, or [B, 1 + T, D] with them."""
  vectors = sharding.constrain_batch(sphere)
  if vectors.ndim == 2:
    return TowerOutput(vectors, vectors[:, None][:, :0])
  tokens = vectors[:, 1:]
  # No token of a tower is zero throughout: its last layer is a norm.
  return TowerOutput(vectors[:, 0], tokens, (tokens != 0).any(-1))


def without_remat(model: DualEncoder) -> DualEncoder:
  """The same model with towers that keep every activation."""
  towers = {name: getattr(model, name) for name in ("image_tower", "text_tower")}
  forgetful = {k: x for k, x in towers.items() if getattr(x, "remat", "none") != "none"}
  return model.clone(**{name: tower.clone(remat="none") for name, tower in forgetful.items()})


def make_model(
  *,
  image: Mapping[str, Any],
  text: Mapping[str, Any],
  embed_dim: int,
  image_projector: Mapping[str, Any] | None = None,
  text_projector: Mapping[str, Any] | None = None,
  pixels: str = "half",
) -> DualEncoder:
  """A dual encoder from a config's `model`.

  Args:
    image, text: dict(name="vit", …), dict(name="text", …): a tower and its options.
    embed_dim: E, the width of the shared space.
    image_projector, text_projector: dict(name="linear", …), one of PROJECTORS; linear if None.
    pixels: normalisation of the image, on the device: "half" (SigLIP), "clip", "imagenet".

  Raises:
    ValueError, TypeError: for an unknown name or option, with the known ones.
  """
  config.choose(PIXELS, pixels, "config.model.pixels")

  def make(registry: Mapping[str, Any], given: Mapping[str, Any], where: str, **fixed: Any) -> Any:
    options = dict(given)
    factory = config.choose(registry, options.pop("name", ""), f"{where}.name")
    return config.call(factory, options, where, **fixed)

  linear = {"name": "linear"}
  return DualEncoder(
    image_tower=make(TOWERS, image, "config.model.image"),
    text_tower=make(TOWERS, text, "config.model.text"),
    image_projector=make(
      PROJECTORS, image_projector or linear, "config.model.image_projector", dim=embed_dim
    ),
    text_projector=make(
      PROJECTORS, text_projector or linear, "config.model.text_projector", dim=embed_dim
    ),
    pixels=pixels,
  )
