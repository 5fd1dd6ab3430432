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


def provided(batch: Iterable[str], model: DualEncoder | None = None) -> set[str]:
  """The fields of a batch and the features that a model computes from them, for check_needs."""
  fields = {*batch}
  tower = getattr(getattr(model, "image_tower", None), "options", None)
  if getattr(tower, "class_tokens", 1) > 1:
    fields |= {"zimgs"}
  fields |= {name for name in FEATURES if "image" in fields or not name.endswith("img")}
  return fields | read_as(fields)


def read_as(fields: Iterable[str]) -> set[str]:
  """The names under which losses read fields of the batch: the fields and what is made of them."""
  made = {"text_second": "ztxt_second", "texts_kind": "ztxts", "teacher_txts": "teacher_txt"}
  made |= {name: f"z{name}" for name in ("query", "document")}
  made |= {name: f"{name}_stored" for name in ("teacher_img", "teacher_txt")}
  return {*fields, *(name for field, name in made.items() if field in fields)}


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
      `pairs`; zimgs [B, K, E], of an image tower with K class tokens, of which zimg is the first.
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
      if img.others is not None:
        feats["zimgs"] = self._class_tokens(feats["zimg"], img)
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
    self,
    image: Images,
    hidden: tuple[jax.Array, jax.Array] | None = None,
    kept: jax.Array | None = None,
  ) -> TowerOutput:
    """[B, H, W, 3] uint8 -> the output of the image tower; `hidden` and `kept` as of ViT.

    Raises:
      ValueError: if one of them is given and the tower is not a ViT.
    """
    return self._image_tower(image, False, _vit_options(self.image_tower, "model", hidden, kept))

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
    return projected_patches(self.image_projector, output)

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

  def _class_tokens(self, first: jax.Array, out: TowerOutput) -> jax.Array:
    """[B, K, E], unit norm: the embeddings of all class tokens, by one projector.

    Args:
      first: [B, E], of the first one.
      out: of the image tower.

    Raises:
      ValueError: if the projector does not take single vectors.
    """
    assert out.others is not None, "the caller has checked it"
    if isinstance(self.image_projector, READ_TOKENS):
      raise ValueError(
        "config.model.image.class_tokens: each class token is projected by itself, which needs an"
        " image projector of one vector, such as 'linear'"
      )
    projected = rows_projected(self.image_projector, out.others)
    return jnp.concatenate([first[:, None], unit(sharding.constrain_batch(projected))], 1)

  def _normalized(self, pixels: jax.Array) -> jax.Array:
    """[B, …, 3] uint8 -> the same in float32, as the image tower takes them."""
    return normalized(pixels, self.pixels)

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


def normalized(pixels: jax.Array, name: str) -> jax.Array:
  """[B, …, 3] uint8 -> the same in float32, with the mean and the deviation of PIXELS[name]."""
  mean, std = (np.asarray(x, np.float32) * 255 for x in PIXELS[name])
  return (pixels.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]


def rows_projected(projector: nn.Module, rows: jax.Array) -> jax.Array:
  """[B, N, D] -> [B, N, E]: each vector by itself, by a projector of single vectors."""
  flat = rearrange(rows, "b n d -> (b n) d")
  embedded = projector(TowerOutput(flat, flat[:, None][:, :0]), False)
  projected: jax.Array = rearrange(embedded, "(b n) e -> b n e", b=len(rows))
  return projected


def projected_patches(projector: nn.Module, output: TowerOutput) -> jax.Array:
  """See DualEncoder.projected_patches."""
  tokens = output.tokens
  if isinstance(projector, Blocks):
    patches: jax.Array = projector.rows(output)[:, 1:]
    return patches
  if isinstance(projector, READ_TOKENS) or output.pooled.shape[-1] != tokens.shape[-1]:
    raise ValueError(
      "Single patches are compared with texts, which needs an image projector of one vector, or"
      " 'blocks', and a pooled vector as wide as a patch (not pool='cls+mean')"
    )
  return rows_projected(projector, tokens)


def _vit_options(tower: nn.Module, where: str, hidden: Any, kept: Any) -> dict[str, Any]:
  """The arguments `hidden` and `kept` of a ViT that are given.

  Raises:
    ValueError: if there are any, and the tower, of config.<where>, is not a ViT.
  """
  given = {k: x for k, x in (("hidden", hidden), ("kept", kept)) if x is not None}
  if given and not isinstance(tower, ViT):
    raise ValueError(
      "config.loss has a term that hides patches from the image tower, which needs"
      f" config.{where}.image.name='vit'"
    )
  return given


class Teacher(nn.Module):
  """A frozen image tower whose tokens heads read as a target: config.teacher.

  Args:
    image_tower: [B, S, S, 3] -> TowerOutput.
    image_projector: TowerOutput -> [B, E]; None: the teacher has no space of embeddings.
    pixels: a key of PIXELS: the images of a batch are uint8, so that each tower normalises them
      with its own numbers.
    image_size: pixels per side of the images that it gets; 0: so many that its patches are those of
      the model.
  """

  image_tower: nn.Module
  image_projector: nn.Module | None
  pixels: str
  image_size: int = 0

  def __call__(
    self,
    images: jax.Array,
    patches: int,
    *,
    hidden: jax.Array | None = None,
    projected: bool = False,
  ) -> jax.Array:
    """The tokens of images.

    Args:
      images: [B, S, S, 3] uint8, as the model sees them.
      patches: of the model, per side of an image.
      hidden: [B, N] bool, patches whose embedding is 0; None: none.
      projected: whether each token goes through the projector.

    Returns:
      [B, N, D], after the last layer norm; [B, N, E] if projected.

    Raises:
      ValueError: for a projector that is missing or takes more than one vector.
    """
    places = None
    if hidden is not None:
      places = (hidden, jnp.zeros((self.image_tower.options.token_width,), jnp.float32))
    options = _vit_options(self.image_tower, "teacher", places, None)
    output = self._output(images, patches, options)
    if not projected:
      return output.tokens
    if self.image_projector is None:
      raise ValueError(
        "config.loss compares embeddings with those of config.teacher, which has no projector; set"
        " config.teacher.embed_dim and an init that holds one, or space='tokens'"
      )
    return projected_patches(self.image_projector, output)

  def initialise(self, images: jax.Array, patches: int) -> None:
    """Calls every layer once, to be used with `init`."""
    output = self._output(images, patches, {})
    if self.image_projector is not None:
      self.image_projector(output, False)

  def size(self, patches: int) -> int:
    """Pixels per side of the images that it gets; `patches` as of a call.

    Raises:
      ValueError: if it has no patches, and its size is not given.
    """
    patch = getattr(self.image_tower.options, "patch", 0)
    if not self.image_size and not (patch and patches):
      raise ValueError(
        "config.teacher.image_size=0 needs a teacher and a model with patches; set it to the size"
        " of the teacher's images"
      )
    return self.image_size or patch * patches

  def _output(self, images: jax.Array, patches: int, options: Mapping[str, Any]) -> TowerOutput:
    if images.ndim != 4 or jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f"config.teacher reads single images of pixels, not {images.dtype}{[*images.shape]}; leave"
        " out config.data.frames, naflex or stores.image"
      )
    size = self.size(patches)
    x = sharding.constrain_batch(images)
    if x.shape[1:3] != (size, size):
      shape = (len(x), size, size, 3)
      x = jax.image.resize(x.astype(jnp.float32), shape, "cubic", antialias=True)
      x = jnp.clip(x, 0, 255)  # cubic weights overshoot at edges
    output: TowerOutput = self.image_tower(normalized(x, self.pixels), train=False, **options)
    return output


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
  if out.others is not None:
    raise ValueError("config.model.image.class_tokens: not with config.data.frames")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
  """A frozen image tower that losses with layers read as a teacher.

  Its weights come from `init`. It is not trained, not averaged, has no optimizer state, and is in
  no export; its parameters have the paths teacher/….

  Args:
    image: name and options of the tower.
    pixels: normalisation of its images, which may differ from that of the model: "half" (SigLIP),
      "clip", "imagenet".
    image_size: pixels per side to which it gets the images of the batch; 0: so many that its
      patches are those of the model.
    embed_dim: width of its embeddings; 0: it has no projector, and losses read its tokens alone.
    image_projector: name and options of its projector; linear if not given.
  """

  image: Annotated[Any, Choose(TOWERS)]
  pixels: str = "half"
  image_size: int = 0
  embed_dim: int = 0
  image_projector: Annotated[Component, PROJECTOR] = DEFAULTS

  def __post_init__(self) -> None:
    checks.choose(PIXELS, self.pixels, "config.teacher.pixels")
    checks.between("config.teacher", 0, image_size=self.image_size, embed_dim=self.embed_dim)

  def build(self, patches: int) -> Teacher:
    """The teacher, without parameters; its learned positions are those of these patches.

    Args:
      patches: of the model, per side of the image.
    """
    tower = self.image.build()
    projector = self.image_projector.make(dim=self.embed_dim) if self.embed_dim else None
    teacher = Teacher(
      image_tower=tower, image_projector=projector, pixels=self.pixels, image_size=self.image_size
    )
    if getattr(tower, "grid", ()) is None:
      side = teacher.size(patches) // self.image.patch
      teacher = teacher.clone(image_tower=tower.clone(grid=(side, side)))
    return teacher


def make_model(**values: Any) -> DualEncoder:
  """A dual encoder from the plain values of a config's `model`: see ModelOptions.

  Raises:
    ValueError, TypeError: for an unknown name or option, with the known ones.
  """
  options: ModelOptions = resolve(ModelOptions, values, "config.model")
  return options.build()
