"""How images are read: the same options for training, evaluation, embedding, report and export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.image import frames, naflex, transforms
from bigalign.data.image.decode import decode
from bigalign.data.image.frames import FrameOptions
from bigalign.data.image.naflex import NaflexOptions, Patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReading:
  """How the bytes of an image become the square that a model sees, or its patches.

  Args:
    image_size: pixels per side of the square. image_size, resize, resize_edge and interpolation
      come from the pretrained checkpoint of the image tower, if the config leaves them out. With
      `naflex`, only config.data.views use it.
    resize: how evaluation, which does not augment, resizes: "squash" to the square, as SigLIP;
      "shortest" edge to the size, then the centre, as CLIP; "longest" edge to the size, then black
      bars.
    resize_edge: pixels of the shorter edge with resize="shortest", before the centre crop to
      image_size; None: image_size. DINOv2 and SAIL resize to 256 and crop to 224.
    interpolation: filter of evaluation's resize, "bicubic", or "bilinear" as Hugging Face's ViT.
    crop_rounding: how the offset of evaluation's centre crop is rounded: "round" half to even, as
      torchvision; "floor", as Hugging Face.
    pillow_rgb: convert all modes as Pillow's convert("RGB") does, which open_clip calls: the
      colours of transparent pixels stay, and 16 bits are cut off at 255. False: transparent pixels
      are blended with white, and 16 bits are scaled to 8.
    apply_exif: rotate images as their EXIF orientation says, in training and evaluation. Off by
      default, as in img2dataset, open_clip and big_vision: images that img2dataset wrote have lost
      the tag or are compared with theirs; turn it on for photos as cameras write them.
    naflex: patches that keep the aspect ratio, for the tower "naflex"; None: squares.
    frames: several images of a sample, whose embeddings are averaged; None: one image.
  """

  image_size: int
  resize: str = "squash"
  resize_edge: int | None = None
  apply_exif: bool = False
  interpolation: str = "bicubic"
  crop_rounding: str = "round"
  pillow_rgb: bool = False
  naflex: NaflexOptions | None = None
  frames: FrameOptions | None = None

  def __post_init__(self) -> None:
    if self.naflex and self.frames:
      raise ValueError(
        "config.data.naflex makes patches of one image, but config.data.frames reads several; leave"
        " one of them out"
      )
    if self.naflex:
      for name, default in (("resize", "squash"), ("interpolation", "bicubic")):
        if getattr(self, name) != default:
          raise ValueError(
            f"config.data.{name}={getattr(self, name)!r} has no effect with config.data.naflex,"
            " which resizes to patches with a bilinear filter; leave it out"
          )
    if self.image_size < 1:
      raise ValueError(f"config.data.image_size={self.image_size}: at least 1")
    if self.resize_edge is not None and self.resize != "shortest":
      raise ValueError(
        f"config.data.resize_edge={self.resize_edge} has an effect with resize='shortest' only, and"
        f" resize={self.resize!r}"
      )
    if self.interpolation not in ("bicubic", "bilinear"):
      raise ValueError(
        f"config.data.interpolation={self.interpolation!r}; known: 'bicubic', 'bilinear'"
      )
    if self.crop_rounding not in ("round", "floor"):
      raise ValueError(f"config.data.crop_rounding={self.crop_rounding!r}; known: 'round', 'floor'")
    if self.edge < self.image_size:
      raise ValueError(
        f"config.data.resize_edge={self.resize_edge} is smaller than image_size={self.image_size},"
        " the size of the crop"
      )
    self.evaluation_view(np.zeros((2, 2, 3), np.uint8))  # refuses an unknown `resize`

  @property
  def edge(self) -> int:
    """Pixels of the shorter edge before the centre crop of resize="shortest"."""
    return self.resize_edge or self.image_size

  @property
  def colours(self) -> dict[str, bool]:
    """The options of decode.decode that do not depend on the use of the image."""
    return dict(apply_exif=self.apply_exif, pillow_rgb=self.pillow_rgb)

  def decode(
    self,
    data: Any,
    *,
    shrink: Callable[[int, int], int] | None = None,
    rng: np.random.Generator | None = None,
  ) -> Any:
    """One image as uint8 [H, W, 3]; raises Rejected for anything that is not a whole image.

    With `frames`, a list of those that are seen, drawn by `rng`; `data` is then as of frames.read.
    """
    options = dict(shrink=shrink, **self.colours)
    if self.frames:
      return frames.read(data, self.frames.count, rng, **options)
    return decode(data, **options)  # type: ignore[arg-type]

  def evaluation_view(self, image: np.ndarray | list[np.ndarray]) -> Any:
    """uint8 [H, W, 3] -> [image_size, image_size, 3], or Patches, without randomness.

    Args:
      image: the pixels; a list of F frames becomes [F, image_size, image_size, 3].
    """
    if isinstance(image, list):
      return np.stack([self.evaluation_view(one) for one in image])
    if self.naflex:
      return naflex.patches(image, patch=self.naflex.patch, most=self.naflex.length)
    return transforms.eval_image(
      image,
      size=self.image_size,
      resize=self.resize,
      edge=self.edge,
      bilinear=self.interpolation == "bilinear",
      rounding=self.crop_rounding,
    )

  @property
  def spec(self) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{field of a batch: (shape without the batch axis, dtype)} of the views of images."""
    if not self.naflex:
      count = (self.frames.count,) if self.frames else ()
      return {"image": ((*count, self.image_size, self.image_size, 3), np.uint8)}
    n, pixels = self.naflex.length, 3 * self.naflex.patch**2
    parts = (((n, pixels), np.uint8), ((n,), np.bool_), ((2,), np.int32))
    return dict(zip(naflex.FIELDS, parts))

  def blank(self, count: int) -> dict[str, np.ndarray]:
    """The fields of black images, which the tower can embed too."""
    fields = {name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in self.spec.items()}
    if self.naflex:
      fields["image_mask"][:, 0] = True
      fields["image_shapes"][:] = 1
    return fields

  def stacked(self, views: Sequence[Any]) -> Any:
    """Views of single images as one batch: an array, or Patches."""
    if not views:
      return naflex.of_fields(self.blank(0))
    if not self.naflex:
      return np.stack(views)
    return Patches(*(np.stack(part) for part in zip(*views)))

  def shown(self, batch: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """uint8 [H, W, 3]: the view of one image of a batch, for people; frames side by side."""
    if self.frames and batch["image"].ndim == 5:
      return np.concatenate(batch["image"][row], axis=1)
    if not self.naflex:
      square: np.ndarray = batch["image"][row]
      return square
    one = Patches(*(batch[name][row] for name in naflex.FIELDS))
    return naflex.joined(one, patch=self.naflex.patch)

  def preprocessing(self) -> dict[str, Any]:
    """What the vectors of an image tower depend on, besides the model: {option: value}."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(ImageReading)}
    del values["naflex"], values["frames"]  # stores from before these options remain valid
    if self.frames:
      values["frames"] = self.frames.count
    if self.naflex:
      return dict(
        apply_exif=self.apply_exif, patches=self.naflex.length, patch_size=self.naflex.patch
      )
    # Stores from before these options remain valid.
    for name in ("interpolation", "crop_rounding", "pillow_rgb"):
      if values[name] == ImageReading.__dataclass_fields__[name].default:
        del values[name]
    if self.resize == "longest":  # halves were rounded otherwise before
      values["rounding"] = "open_clip"
    return values
