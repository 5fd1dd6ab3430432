"""The configs in docs/heads.md are those that its text names."""

from __future__ import annotations

import re

import pytest
from helpers.shipped import ROOT, load

from bigalign import losses, tree
from bigalign.config import resolve_config
from bigalign.options import plain

TEXT = (ROOT / "docs" / "heads.md").read_text()
BLOCKS = [x for x in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if x.startswith("c.")]

# What a config has to hold to be the recipe of a paper, by the name that the text has for it.
RECIPES = {
  "Perception Encoder": {
    "loss/mask_regularization/every": 16,
    "loss/mask_regularization/ratio": 0.4,
  },
  "CapPa": {"loss/caption/parallel": 0.75, "frozen": "^model/text"},
  "LocCa": {"loss/caption/tasks": True, "data/locations/field": "json.regions"},
  "OpenVision 2": {"loss/caption_fused/keep": 0.35, "loss/caption_fused/weight": 2.0},
  "SuperClass": {"loss/superclass/weight": 1.0, "model/image/pool": "mean"},
  "iBOT++": {"loss/ibot/form": "all", "twin/paths": "^heads/ibot/"},
  "TIPS": {"loss/clip/texts": "per_class_token", "loss/ibot/ratio": 0.75},
  "EVA": {"loss/token_distill/mask": "blocks", "loss/token_distill/ratio": 0.41},
  "UTA": {"loss/token_distill/hidden_by": "drop", "loss/token_distill/space": "embeddings"},
  "Locality alignment": {"loss/token_distill/hidden_from": "teacher", "twin/decay": 1.0},
  "FG-CLIP": {"loss/region_phrase/own_negatives": 5.0, "data/regions/negatives": 10},
}


ALONE = (
  "CapPa",
  "OpenVision 2",
  "SuperClass",
  "UTA",
  "Locality alignment",
)  # without a contrastive loss


def resolved(block):
  """{path: value} of the config that a block makes of `tiny`; no checkpoint is read."""
  c = load("tiny")
  with c.unlocked(), c.ignore_type():
    exec(block, {"c": c})
    if "init" in c.model:
      c.model = load("tiny").model
    c.teacher = None
  config = resolve_config(c)
  losses.make_loss(config.loss)
  return tree.flatten(plain(config))


@pytest.fixture(scope="module")
def configs():
  return [resolved(block) for block in BLOCKS]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_config(name, configs):
  assert name in TEXT
  found = [x for x in configs if RECIPES[name].items() <= x.items()]
  assert found
  for config in found if name in ALONE else []:
    assert len({path.split("/")[1] for path in config if path.startswith("loss/")}) == 1
