"""Layouts of convolutional towers as npz: CIFAR's ResNets (torch), MobileNetV2 (TF-slim)."""

from __future__ import annotations

import re

from bigalign.weights.layout import Layout, Shapes
from bigalign.weights.table import Row, rows
from bigalign.weights.timm import depth

OURS = "image_tower/"
_RESNET, _MOBILENET = r"layer\d+\.\d+\.conv\d\.weight$", r"expanded_conv_\d+/"


def npz_kind(shapes: Shapes) -> str:
  """The name in LAYOUTS of an npz, which its keys identify; big_vision's if no other."""
  for name, pattern in (("resnet_cifar", _RESNET), ("mobilenet_v2", _MOBILENET)):
    if any(re.match(pattern, key) for key in shapes):
      return name
  return "big_vision"


def resnet_cifar(shapes: Shapes, where: str, prefix: str) -> Layout:
  """The layout of ResNet-20, 32, 44 …, without `linear`, the classifier."""
  blocks = depth(shapes, "layer1.")
  stages = (
    row
    for stage in (1, 2, 3)
    for conv in (1, 2)
    for row in _normed(f"{OURS}stage_{stage}_block_{{}}/", f"layer{stage}.{{}}.", conv, blocks)
  )
  return Layout(
    {"image": dict(name="resnet_cifar", depth=6 * blocks + 2), "pixels": "imagenet"},
    (*_normed(OURS, "", 1), *stages),
    r"^linear\.",
    data={"image_size": 32},
  )


def _normed(ours: str, theirs: str, number: int, layers: int = 0) -> list[Row]:
  """Rows of a convolution without bias and of the batch norm after it."""
  norm = dict(scale="weight", bias="bias", mean="running_mean", var="running_var")
  kernel = {f"conv{number}/kernel": (f"conv{number}.weight", "o i h w -> h w i o")}
  statistics = {f"bn{number}/{k}": (f"bn{number}.{v}", "") for k, v in norm.items()}
  return rows(ours, theirs, kernel | statistics, layers)


def mobilenet_v2(shapes: Shapes, where: str, prefix: str) -> Layout:
  """The layout of MobileNetV2 of width 1.0, batch norm folded in, without `top`, the classifier."""
  wide, depthwise, narrow = "o h w i -> h w i o", "1 h w c -> h w c", "o 1 1 i -> i o"
  convs = [("stem", "Conv2d_0_0", wide), ("head", "Conv2d_18_1", narrow)]
  for i in range(1, 18):
    for name, rule in (("expand", narrow), ("depthwise", depthwise), ("project", narrow)):
      if (i, name) != (1, "expand"):
        convs.append((f"bottleneck_{i}/{name}", f"expanded_conv_{i}/{name}", rule))
  table = (
    Row(f"{OURS}{ours}/{leaf}", f"{theirs}/{leaf}", rule if leaf == "kernel" else "")
    for ours, theirs, rule in convs
    for leaf in ("kernel", "bias")
  )
  return Layout(
    {"image": dict(name="mobilenet_v2"), "pixels": "half"},
    tuple(table),
    r"^top/",
    data={"image_size": 224},
  )
