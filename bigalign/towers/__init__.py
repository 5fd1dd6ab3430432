"""The registry of towers; a tower maps a batch to a TowerOutput."""

from __future__ import annotations

from bigalign.towers.base import TowerOutput
from bigalign.towers.bert import bert
from bigalign.towers.features import features
from bigalign.towers.mobilenet import mobilenet_v2
from bigalign.towers.naflex import naflex
from bigalign.towers.resnet import resnet_cifar
from bigalign.towers.text import text
from bigalign.towers.vit import vit

__all__ = ["TOWERS", "TowerOutput"]

TOWERS = dict(
  vit=vit,
  naflex=naflex,
  resnet_cifar=resnet_cifar,
  mobilenet_v2=mobilenet_v2,
  text=text,
  bert=bert,
  features=features,
)
