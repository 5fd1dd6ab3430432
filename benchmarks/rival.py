"""Imports open_clip, to compare with."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

# Where `make open-clip` puts a torchvision, which is read if no other one is installed.
TORCHVISION = pathlib.Path(sys.prefix) / "torchvision-without-torch"


def import_open_clip() -> None:
  """Imports open_clip. Over a CPU torch, defines the two operators that torchvision lacks.

  Raises:
    ImportError: if it or what it needs is not installed; says how to install it.
  """
  try:
    import torch

    if not importlib.util.find_spec("torchvision") and TORCHVISION.is_dir():
      sys.path.append(str(TORCHVISION))
    try:
      import open_clip
    except RuntimeError as error:
      if "torchvision::nms" not in str(error):
        raise
      global library  # the operators exist as long as this object does
      library = torch.library.Library("torchvision", "FRAGMENT")
      library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
      library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
      import open_clip  # noqa: F401
  except ImportError as error:
    raise ImportError(f"open_clip cannot be imported: {error}") from error
