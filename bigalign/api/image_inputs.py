"""Images as people hold them: PIL images, paths, bytes and arrays become the squares of a model."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import threading
from collections.abc import Iterable, Sequence, Sized
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from bigalign.data.image import frames
from bigalign.data.image.decode import from_pillow
from bigalign.data.image.reading import ImageReading
from bigalign.data.samples.rejects import Rejected

# A PIL image, the path or the bytes of a file, or uint8 [H, W, 3], [H, W, 1] or [H, W].
OneImage: TypeAlias = Image.Image | str | os.PathLike[str] | bytes | np.ndarray
# Of a model of frames also the frames of one sample: a list of images, or uint8 [T, H, W, 3].
OneSample: TypeAlias = OneImage | Sequence[OneImage]
# One image, several of any kind, or uint8 [N, H, W, 3].
Images: TypeAlias = OneImage | Iterable[OneSample]

# Pillow reads the pixels of an open file when they are first needed, which two threads must not do
# at once. Images cannot be keys of a dict, so that each has one of these locks.
_LOCKS = [threading.Lock() for _ in range(64)]


class View(NamedTuple):
  """How an image becomes the square, or the patches, that an image tower sees.

  Args:
    reading: size, resize, filter and colours, the options of config.data.
  """

  reading: ImageReading

  def __call__(self, image: OneSample) -> Any:
    """Returns uint8 [S, S, 3], or the Patches of the image; of a model of frames [F, S, S, 3].

    Raises:
      Rejected: for anything that is not a whole image.
      OSError: for a file that cannot be read.
      TypeError: for another kind of object.
    """
    options = self.reading.frames
    if options is None:
      pixels = self._pixels(image)  # type: ignore[arg-type]
    elif isinstance(image, list | tuple):
      if not image:
        raise Rejected("no_image", "the sample has no frame")
      single = self._replace(reading=dataclasses.replace(self.reading, frames=None))
      chosen = frames.numbers(len(image), options.count)
      known = {i: single._pixels(image[i]) for i in {*chosen}}
      pixels = [known[i] for i in chosen]
    else:
      found = self._pixels(image)  # type: ignore[arg-type]
      pixels = found if isinstance(found, list) else [found] * options.count
    return self.reading.evaluation_view(pixels)

  def _pixels(self, image: OneImage) -> Any:
    """uint8 [H, W, 3]; a list of frames if the reading has some."""
    if isinstance(image, Image.Image):
      with _LOCKS[(id(image) >> 6) % len(_LOCKS)]:
        return from_pillow(image, **self.reading.colours)
    if isinstance(image, str | os.PathLike):
      image = pathlib.Path(image).expanduser().read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
      return self.reading.decode(bytes(image))
    if is_array(image):
      return self.reading.decode(np.asarray(image))
    raise TypeError(
      f"{type(image).__name__} is not an image; known: a PIL image, the path or the bytes of a"
      " file, a uint8 array [H, W, 3]"
    )

  def numbered(self, number: int, image: OneSample) -> Any:
    """`__call__` for an image of several, whose errors name it by its number and path."""
    path = f" ({os.fspath(image)})" if isinstance(image, str | os.PathLike) else ""
    try:
      return self(image)
    except Rejected as error:
      raise ValueError(f"images[{number}]{path}: {error}") from error
    except FileNotFoundError as error:
      raise FileNotFoundError(f"images[{number}]{path}: no such file") from error
    except OSError as error:
      raise OSError(f"images[{number}]{path}: {error.strerror or error}") from error
    except TypeError as error:
      raise TypeError(f"images[{number}]: {error}") from error


def is_array(value: Any) -> bool:
  """Whether a value is an array of numpy, JAX or PyTorch."""
  return hasattr(value, "__array__") and hasattr(value, "dtype")


def listed(images: Images) -> tuple[Iterable[OneSample], int | None]:
  """Returns the single images, and their number if it is known.

  >>> listed("cat.jpg")
  (['cat.jpg'], 1)
  >>> listed(np.zeros((2, 4, 4, 3), np.uint8))[1]
  2
  """
  if isinstance(images, Image.Image | str | os.PathLike | bytes | bytearray | memoryview):
    return [images], 1  # type: ignore[list-item]
  if is_array(images):
    array = np.asarray(images)
    if array.ndim == 4:
      return array, len(array)
    if array.ndim in (2, 3):
      return [array], 1
    raise ValueError(f"an array of shape {array.shape}; images are [H, W, 3] or [N, H, W, 3]")
  if isinstance(images, dict) or not isinstance(images, Iterable):
    raise TypeError(
      f"{type(images).__name__} does not hold images; known: an image, a list or an iterator of"
      " them, an array [N, H, W, 3]"
    )
  return images, len(images) if isinstance(images, Sized) else None
