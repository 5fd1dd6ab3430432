"""How images are read: the same options for training, evaluation, embedding, report and export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from bigalign.data.image import transforms
from bigalign.data.image.decode import decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReading:
  """How the bytes of an image become the square that a model sees.

  Args:
    image_size: pixels per side of the square. image_size, resize, resize_edge and interpolation
      come from the pretrained checkpoint of the image tower, if the config leaves them out.
    resize: how evaluation, which does not augment, resizes: "squash" to the square, as SigLIP;
      "shortest" edge to the size, then the centre, as CLIP; "longest" edge to the size, then black
      bars.
    resize_edge: pixels of the shorter edge with resize="shortest", before the centre crop to
      image_size; None: image_size. DINOv2 and SAIL resize to 256 and crop to 224.
    interpolation: filter of evaluation's resize, "bicubic", or "bilinear" as Hugging Face's ViT.
    apply_exif: rotate images as their EXIF orientation says, in training and evaluation. Off by
      default, as in img2dataset, open_clip and big_vision: images that img2dataset wrote have lost
      the tag or are compared with theirs; turn it on for photos as cameras write them.
  """

  image_size: int
  resize: str = "squash"
  resize_edge: int | None = None
  apply_exif: bool = False
  interpolation: str = "bicubic"

  def __post_init__(self) -> None:
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

  def decode(
    self,
    data: bytes | np.ndarray,
    *,
    shrink: Callable[[int, int], int] | None = None,
    pillow_rgb: bool = False,
  ) -> np.ndarray:
    """One image as uint8 [H, W, 3]; raises Rejected for anything that is not a whole image."""
    return decode(data, shrink=shrink, apply_exif=self.apply_exif, pillow_rgb=pillow_rgb)

  def evaluation_view(self, image: np.ndarray, *, margin: str = "round") -> np.ndarray:
    """uint8 [H, W, 3] -> [image_size, image_size, 3], without randomness.

    Args:
      image: the pixels.
      margin: how the centre of a crop is rounded: see transforms.eval_image.
    """
    return transforms.eval_image(
      image,
      size=self.image_size,
      resize=self.resize,
      edge=self.edge,
      bilinear=self.interpolation == "bilinear",
      margin=margin,
    )

  def preprocessing(self) -> dict[str, Any]:
    """What the vectors of an image tower depend on, besides the model: {option: value}."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(ImageReading)}
    if self.interpolation == "bicubic":  # stores from before this option remain valid
      del values["interpolation"]
    if self.resize == "longest":  # halves were rounded otherwise before
      values["rounding"] = "open_clip"
    return values
