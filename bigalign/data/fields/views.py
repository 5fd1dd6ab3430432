"""More crops of the same image, under names that heads read: config.data.views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np

from bigalign.data.fields.base import Draws, Sample, Spec
from bigalign.data.image import transforms
from bigalign.data.image.transforms import train_image
from bigalign.options import Call, Component


def several(*, count: int = 1, size: int = 0) -> None:
  """The options of a group of views next to those of config.data.augment.

  Args:
    count: V, the number of views.
    size: pixels per side of a view; 0: config.data.image_size.
  """


Views = Mapping[
  str, Annotated[Component, Call(train_image, fixed=("image", "rng", "size"), shared=several)]
]


def _size(view: Component, image_size: int) -> int:
  return int(view.option("size") or image_size)


def _augment(view: Component) -> dict[str, object]:
  return {name: x for name, x in view.options.items() if name not in ("count", "size")}


def spec(views: Views, image_size: int) -> Spec:
  """The arrays of all views.

  Raises:
    ValueError: for a count below 1, or a size below 0.
  """
  arrays = {}
  for name, view in views.items():
    count, given, size = view.option("count"), view.option("size"), _size(view, image_size)
    if count < 1 or given < 0:
      raise ValueError(
        f"config.data.views.{name}: count={count}, size={given}; a count is at least"
        " 1, and a size above 0, or 0 for config.data.image_size"
      )
    if view.option("crop") == "evaluation":
      raise ValueError(
        f"config.data.views.{name}.crop='evaluation' is for config.data.augment; known here:"
        " 'random_resized', 'center', 'squash'"
      )
    arrays[f"view/{name}"] = ((count, size, size, 3), np.dtype(np.uint8))
  return arrays


def shrink(views: Views, image_size: int, height: int, width: int) -> int:
  """By how much a JPEG may be reduced when it is decoded for all views: see transforms.shrink."""
  return min(
    (
      transforms.shrink(height, width, size=_size(view, image_size), **_augment(view))  # type: ignore[arg-type]
      for view in views.values()
    ),
    default=8,
  )


class ImageViews:
  """The views of an image, as a field: "view/NAME" [V, S, S, 3] uint8.

  Each group of views draws for itself, so a group does not change the views of another one.

  Args:
    views: {name: options}.
    image_size: config.data.image_size.
  """

  def __init__(self, views: Views, image_size: int):
    self._views, self._image_size = views, image_size
    self.spec = spec(views, image_size)

  def read(self, sample: Sample, draws: Draws) -> dict[str, np.ndarray]:
    """{"view/NAME": [V, S, S, 3]} of a sample."""
    views = {}
    for name, view in self._views.items():
      rng, size, options = draws.of(f"view/{name}"), _size(view, self._image_size), _augment(view)
      views[f"view/{name}"] = np.stack(
        [
          train_image(sample.record["image"], rng, size=size, **options)  # type: ignore[arg-type]
          for _ in range(view.option("count"))
        ]
      )
    return views

  def stack(self, values: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{"view/NAME": [b, V, S, S, 3]}."""
    return {name: np.stack([one[name] for one in values]) for name in self.spec}
