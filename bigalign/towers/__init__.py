"""The registry of towers: a tower maps a batch of images or texts to a TowerOutput."""

from __future__ import annotations

from bigalign.towers.base import TowerOutput
from bigalign.towers.bert import BertOptions
from bigalign.towers.features import FeaturesOptions
from bigalign.towers.mobilenet import MobilenetOptions
from bigalign.towers.naflex import NaflexOptions
from bigalign.towers.resnet import ResnetOptions
from bigalign.towers.text import TextOptions
from bigalign.towers.vit import VitOptions

__all__ = ["TOWERS", "TowerOutput"]

# name of a tower: the class of its options, whose fields are the keys in the config.
TOWERS = dict(
  vit=VitOptions,
  naflex=NaflexOptions,
  resnet_cifar=ResnetOptions,
  mobilenet_v2=MobilenetOptions,
  text=TextOptions,
  bert=BertOptions,
  features=FeaturesOptions,
)
