"""Makes torchvision importable where its wheel is for CUDA and torch is not.

There is no wheel of torchvision for CPUs on the package index. Its Python part is all that
open_clip's transforms need; two operators that are then missing are declared, as imports of
torchvision look for them. The wheel lies in a folder of its own, which `make open-clip` fills: in
site-packages, without the declarations, it would break every import of a model of transformers.
"""

from __future__ import annotations

import pathlib
import sys

FOLDER = pathlib.Path(sys.prefix) / "torchvision-without-torch"


def enable():
  """Declares the operators and puts the folder at the end of the path; once per process."""
  import torch

  if not FOLDER.is_dir() or str(FOLDER) in sys.path:
    return
  global _LIBRARY  # the declarations live as long as this
  _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
  _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  sys.path.append(str(FOLDER))
