"""The dual encoder: two towers, two projectors, unit norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from bigalign import checks, sharding, sphere
from bigalign.data.image.naflex import Patches
from bigalign.options import DEFAULTS, Also, Choose, Component, resolve
from bigalign.projectors import PROJECTORS, READ_TOKENS, Blocks
from bigalign.towers import TOWERS, TowerOutput, attention
from bigalign.towers.base import TransformerOptions
from bigalign.towers.naflex import NaFlex
from bigalign.towers.vit import ViT

Images: TypeAlias = jax.Array | Patches

# Pixel statistics in [0, 1] by name.
PIXELS = {
  "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# How a config names a projector; its input width comes from the tower, its output width from E.
PROJECTOR = Choose(PROJECTORS, fixed=("dim", "parent", "name"), default="linear")

# What DualEncoder returns to the losses, and mask_txt if the text tower masks padding.
FEATURES = ("zimg", "ztxt", "raw_img", "raw_txt", "tokens_img", "tokens_txt")


def provided(batch: Iterable[str]) -> set[str]:
  """The fields of a batch and the features that a model computes from them, for check_needs."""
  fields = {*batch}
  fields |= {name for name in FEATURES if "image" in fields or not name.endswith("img")}
  made = {"text_second": "ztxt_second", "texts_kind": "ztxts", "teacher_txts": "teacher_txt"}
  made |= {name: f"z{name}" for name in ("query", "document")}
  made |= {name: f"{name}_stored" for name in ("teacher_img", "teacher_txt")}
  return fields | {feature for field, feature in made.items() if field in fields}


def unit(x: jax.Array) -> jax.Array:
  """[..., E] -> unit L2 norm, float32; zero stays zero, with gradient zero."""
  return sphere.unit(x.astype(jnp.float32))


class DualEncoder(nn.Module):
  """An image tower and a text tower whose projectors map to one unit sphere.

  Each method that takes images or texts also takes floating-point vectors: the output of the tower
  from an embedding store, pooled [B, D] or with tokens [B, 1 + T, D], as `with_tokens_image` and
  `with_tokens_text` compute it. Then only the projector is applied.

  Images may be Patches where the image tower takes images of any aspect ratio, or [B, F, H, W, 3],
  F frames of each sample: the embedding is then the mean of their projected vectors, scaled to unit
  norm, and the output of the tower is the mean of the pooled vectors, and the tokens of all frames.

  Args:
    image_tower: [B, H, W, 3] -> TowerOutput.
    text_tower: [B, L] ids -> TowerOutput.
    image_projector: TowerOutput -> [B, E].
    text_projector: TowerOutput -> [B, E].
    pixels: a key of PIXELS.
  """

  image_tower: nn.Module
  text_tower: nn.Module
  image_projector: nn.Module
  text_projector: nn.Module
  pixels: str

  def __call__(
    self,
    image: Images | None,
    text: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
    second: tuple[jax.Array, jax.Array] | None = None,
    others: tuple[jax.Array, jax.Array] | None = None,
    pairs: tuple[jax.Array, ...] | None = None,
  ) -> dict[str, jax.Array]:
    """The features that losses read.

    Args:
      image: [B, H, W, 3] or [B, F, H, W, 3] uint8, or Patches; None for texts alone: the image
        tower does not run, and there are no features of images.
      text: [B, L] int32.
      mask: [B, L] bool, True for a token that is not padding.
      train: whether dropout is applied.
      second: other texts [B, L] and their mask.
      others: all texts but the first of each image [B, M - 1, L] and their mask, of
        config.data.texts; () if `text` is the only one.
      pairs: queries [B, L], their mask, documents and their mask, of config.data.text_pairs.

    Returns:
      zimg, ztxt [B, E], unit norm; raw_img, raw_txt [B, E], before the norm; these are float32,
      whatever the projectors compute in. pooled_img [B, D], tokens_img and tokens_txt, in the dtype
      of the towers; mask_txt if the text tower masks padding; ztxt_second [B, E] with `second`;
      ztxts [B, M, E], all texts of each image, with `others`; zquery and zdocument [B, E] with
      `pairs`.
    """
    feats: dict[str, jax.Array] = {}
    if image is not None:
      raw_img, img = self._image(image, train)
      feats |= {
        "zimg": unit(raw_img),
        "raw_img": raw_img.astype(jnp.float32),
        "pooled_img": img.pooled,
        "tokens_img": img.tokens,
      }
    if others:
      assert mask is not None, "the data gives both"
      text, mask = (
        rearrange(jnp.concatenate([x[:, None], y], 1), "b m ... -> (b m) ...")
        for x, y in zip((text, mask), others)
      )
    raw_txts, txts = self._text(text, mask, train)
    count = 1 + others[0].shape[1] if others else 1

    def first(x: jax.Array) -> jax.Array:
      return x if count == 1 else rearrange(x, "(b m) ... -> b m ...", m=count)[:, 0]

    raw_txt, txt = first(raw_txts), jax.tree.map(first, txts)
    feats |= {
      "ztxt": unit(raw_txt),
      "raw_txt": raw_txt.astype(jnp.float32),
      "tokens_txt": txt.tokens,
    }
    if others is not None:
      feats["ztxts"] = rearrange(unit(raw_txts), "(b m) e -> b m e", m=count)
    if second is not None:
      feats["ztxt_second"] = self.embed_text(*second, train=train)
    if pairs is not None:
      query, query_mask, document, document_mask = pairs
      feats["zquery"] = self.embed_text(query, query_mask, train)
      feats["zdocument"] = self.embed_text(document, document_mask, train)
    return feats if txt.mask is None else {**feats, "mask_txt": txt.mask}

  def embed_image(self, image: Images, train: bool = False) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, E], unit norm, float32."""
    return unit(self._image(image, train)[0])

  def embed_text(
    self, text: jax.Array, mask: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """[B, L] int32, mask [B, L] bool (True = no padding) -> [B, E], unit norm, float32."""
    return unit(self._text(text, mask, train)[0])

  def pooled_image(self, image: Images) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, D], the input of the projector, float32."""
    return self._image_tower(image, False).pooled.astype(jnp.float32)

  def pooled_text(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, L] int32, mask [B, L] bool -> [B, D], the input of the projector, float32."""
    return self._text_tower(text, mask, False).pooled.astype(jnp.float32)

  def with_tokens_image(self, image: Images) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, 1 + T, D]: the pooled vector, then the tokens; float32."""
    return _rows(self._image_tower(image, False))

  def with_tokens_text(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, L] int32, mask [B, L] bool -> [B, 1 + L, D]; padding is zero, float32."""
    return _rows(self._text_tower(text, mask, False))

  def image_output(
    self, image: Images, hidden: tuple[jax.Array, jax.Array] | None = None
  ) -> TowerOutput:
    """[B, H, W, 3] uint8 -> the output of the image tower; `hidden` as of ViT.

    Raises:
      ValueError: if `hidden` is given and the tower is not a ViT.
    """
    if hidden is not None and not isinstance(self.image_tower, ViT):
      raise ValueError(
        "config.loss has a term that hides patches from the image tower, which needs"
        " config.model.image.name='vit'"
      )
    return self._image_tower(image, False, {} if hidden is None else {"hidden": hidden})

  def text_output(self, text: jax.Array, mask: jax.Array | None = None) -> TowerOutput:
    """[B, L] int32, mask [B, L] bool -> the output of the text tower."""
    return self._text_tower(text, mask, False)

  def project_image(self, output: TowerOutput) -> jax.Array:
    """The output of the image tower -> [B, E], before the norm."""
    projected: jax.Array = self.image_projector(output, False)
    return projected

  def projected_patches(self, output: TowerOutput) -> jax.Array:
    """The output of the image tower -> [B, N, K], its patches in the space of the embeddings.

    K is E, and E / 2 with the projector `blocks`, for the second half of an embedding.

    Raises:
      ValueError: if the projector takes more than one token.
    """
    tokens, projector = output.tokens, self.image_projector
    if isinstance(projector, Blocks):
      patches: jax.Array = projector.rows(output)[:, 1:]
      return patches
    if isinstance(projector, READ_TOKENS) or output.pooled.shape[-1] != tokens.shape[-1]:
      raise ValueError(
        "Single patches are compared with texts, which needs an image projector of one vector, or"
        " 'blocks', and a pooled vector as wide as a patch (not pool='cls+mean')"
      )
    flat = rearrange(tokens, "b n d -> (b n) d")
    embedded = projector(TowerOutput(flat, flat[:, None][:, :0]), False)
    patches = rearrange(embedded, "(b n) e -> b n e", b=len(tokens))
    return patches

  def embed_patches(self, image: jax.Array) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, N, K], unit norm, float32; see projected_patches."""
    return unit(self.projected_patches(self.image_output(image)))

  def project_text(self, output: TowerOutput) -> jax.Array:
    """The output of the text tower -> [B, E], before the norm."""
    projected: jax.Array = self.text_projector(output, False)
    return projected

  def _image_tower(
    self, image: Images, train: bool, options: Mapping[str, Any] = {}
  ) -> TowerOutput:
    out: TowerOutput
    if frames := _frames(image):
      return _over_frames(self._image_tower(_flat(image), train, options), frames)
    if isinstance(image, Patches):
      if not isinstance(self.image_tower, NaFlex):
        raise ValueError("config.data.naflex needs config.model.image.name='naflex'")
      pixels, mask, shapes = image
      colours = rearrange(sharding.constrain_batch(pixels), "b n (p c) -> b n p c", c=3)
      x = rearrange(self._normalized(colours), "b n p c -> b n (p c)")
      out = self.image_tower(x, mask, shapes, train=train)
      return out
    if jnp.issubdtype(image.dtype, jnp.floating):
      return _stored(image)
    pixels_in = self._normalized(sharding.constrain_batch(image))
    out = self.image_tower(pixels_in, train=train, **options)
    return out

  def _normalized(self, pixels: jax.Array) -> jax.Array:
    """[B, …, 3] uint8 -> the same in float32, as the image tower takes them."""
    mean, std = (np.asarray(x, np.float32) * 255 for x in PIXELS[self.pixels])
    return (pixels.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]

  def _text_tower(self, text: jax.Array, mask: jax.Array | None, train: bool) -> TowerOutput:
    if jnp.issubdtype(text.dtype, jnp.floating):
      return _stored(text)
    out: TowerOutput = self.text_tower(sharding.constrain_batch(text), mask, train=train)
    return out

  def _image(self, image: Images, train: bool) -> tuple[jax.Array, TowerOutput]:
    if frames := _frames(image):
      projected, out = self._image(_flat(image), train)
      return mean_over_frames(projected, frames), _over_frames(out, frames)
    out = self._image_tower(image, train)
    return sharding.constrain_batch(self.image_projector(out, train)), out

  def _text(
    self, text: jax.Array, mask: jax.Array | None, train: bool
  ) -> tuple[jax.Array, TowerOutput]:
    out = self._text_tower(text, mask, train)
    return sharding.constrain_batch(self.text_projector(out, train)), out


def _frames(image: Images) -> int:
  """F of [B, F, H, W, 3]; 0 of single images."""
  return 0 if isinstance(image, Patches) or image.ndim < 5 else image.shape[1]


def _flat(image: Any) -> jax.Array:
  """[B, F, H, W, 3] -> [B F, H, W, 3]."""
  flat: jax.Array = rearrange(image, "b f h w c -> (b f) h w c")
  return flat


def mean_over_frames(x: jax.Array, frames: int) -> jax.Array:
  """[B F, D] -> [B, D], the mean over frames, in float32 at least."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return rearrange(wide, "(b f) d -> b f d", f=frames).mean(1)


def _over_frames(out: TowerOutput, frames: int) -> TowerOutput:
  """The output of a tower of [B F, ...] as one of [B, ...]."""
  tokens = rearrange(out.tokens, "(b f) n d -> b (f n) d", f=frames)
  mask = None if out.mask is None else rearrange(out.mask, "(b f) n -> b (f n)", f=frames)
  return TowerOutput(mean_over_frames(out.pooled, frames).astype(out.pooled.dtype), tokens, mask)


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
  """Stored vectors as a tower's output: [B, D] without tokens, or [B, 1 + T, D] with them."""
  vectors = sharding.constrain_batch(vectors)
  if vectors.ndim == 2:
    return TowerOutput(vectors, vectors[:, None][:, :0])
  tokens = vectors[:, 1:]
  # A tower's last layer is a norm, so a token that is all zeros is padding.
  return TowerOutput(vectors[:, 0], tokens, (tokens != 0).any(-1))


def without_remat(model: DualEncoder) -> DualEncoder:
  """The same model with towers that keep every activation and add no token for cuDNN."""
  towers = {name: getattr(model, name) for name in ("image_tower", "text_tower")}
  changed = {}
  for name, tower in towers.items():
    options = tower.options
    if getattr(options, "remat", "none") != "none":
      options = dataclasses.replace(options, remat="none")
    if (
      isinstance(options, TransformerOptions) and options.attention_on(attention.device()) != "xla"
    ):
      options = dataclasses.replace(options, attention="xla")
    changed[name] = tower.clone(options=options)
  return model.clone(**changed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerWeights:
  """Options of a tower in a config file that name pretrained weights: see weights/init.py.

  Args:
    init: folder or file of a pretrained checkpoint, or folder of a run, which gives the options of
      the tower and its weights; options next to it replace those of the checkpoint.
    step: of a run, which checkpoint: a number, "latest" or "best".
    ema: whether the running averages of a run are taken.
    parts: regular expression of the parameters that are taken; "": all.
    fresh: regular expression of the parameters that keep their random initial values.
    drop: regular expression of the tensors of the checkpoint that may be left out.
  """

  init: str = ""
  step: int | str = "latest"
  ema: bool = False
  parts: str = ""
  fresh: str = ""
  drop: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelWeights(TowerWeights):
  """The same for the whole model.

  Args:
    open_clip: name of an architecture of open_clip, which gives the sizes but no weights.
  """

  open_clip: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
  """A dual encoder.

  Args:
    image: name and options of the image tower.
    text: name and options of the text tower.
    embed_dim: E, the width of the shared space.
    image_projector: name and options of the projector of images; linear if not given.
    text_projector: name and options of the projector of texts; linear if not given.
    pixels: normalisation of the image, on the device: "half" (SigLIP), "clip", "imagenet".
  """

  image: Annotated[Any, Choose(TOWERS), Also(TowerWeights)]
  text: Annotated[Any, Choose(TOWERS), Also(TowerWeights)]
  embed_dim: int
  image_projector: Annotated[Component, PROJECTOR] = DEFAULTS
  text_projector: Annotated[Component, PROJECTOR] = DEFAULTS
  pixels: str = "half"

  def __post_init__(self) -> None:
    checks.choose(PIXELS, self.pixels, "config.model.pixels")

  def build(self) -> DualEncoder:
    """The model, without parameters."""
    return DualEncoder(
      image_tower=self.image.build(),
      text_tower=self.text.build(),
      image_projector=self.image_projector.make(dim=self.embed_dim),
      text_projector=self.text_projector.make(dim=self.embed_dim),
      pixels=self.pixels,
    )


def make_model(**values: Any) -> DualEncoder:
  """A dual encoder from the plain values of a config's `model`: see ModelOptions.

  Raises:
    ValueError, TypeError: for an unknown name or option, with the known ones.
  """
  options: ModelOptions = resolve(ModelOptions, values, "config.model")
  return options.build()
