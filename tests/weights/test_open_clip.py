"""open_clip's own model descriptions as ours."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.tower_oracles import CASES, ROOT, describe

from bigalign.model import make_model
from bigalign.weights import open_clip

TEXT = dict(context_length=64, vocab_size=32_000, width=768, heads=12, layers=12)


def write(path, embed_dim=512, text=TEXT, **vision):
  path.write_text(json.dumps(dict(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text)))
  return str(path)


@pytest.mark.parametrize("case", [x for x in CASES if x.startswith("oc_")])
def test_a_description_is_that_of_its_weights(case, tmp_path):
  """open_clip's own towers are said whole by their JSON: with and without weights alike."""
  config = json.loads((ROOT / case / "open_clip_config.json").read_text())["model_cfg"]
  file = tmp_path / "model.json"
  file.write_text(json.dumps(config))
  if "timm_model_name" in config["vision_cfg"]:
    with pytest.raises(ValueError, match=r"model\.json: vision_cfg: timm_model_name: 'vit_tiny"):
      open_clip.model(str(file))
  else:
    assert open_clip.model(str(file)) == describe(case).model


def test_towers_of_timm_by_name(tmp_path):
  """Sizes and activations of models whose configs are code in timm."""

  def image(name, **options):
    options = dict(timm_pool="", timm_proj="none") | options
    file = write(tmp_path / "m.json", timm_model_name=name, **options)
    model = open_clip.model(file)
    make_model(**model)
    return model["image"]

  siglip = image("vit_so400m_patch14_siglip_384", timm_pool="map")
  assert (siglip["width"], siglip["depth"], siglip["heads"], siglip["patch"]) == (1152, 27, 16, 14)
  assert round(siglip["width"] * siglip["mlp_ratio"]) == 4304
  assert siglip["activation"] == "gelu" and siglip["pool"] == "map"
  assert image("vit_giantopt_patch16_siglip_256")["activation"] == "gelu_tanh"
  clip = image("vit_base_patch32_clip_quickgelu_224", timm_pool="token", timm_proj=None)
  assert clip["activation"] == "quick_gelu" and clip["pre_norm"] and clip["epsilon"] == 1e-5
  assert not clip["patch_bias"] and clip["class_position"]
  dino = image("vit_giant_patch14_reg4_dinov2")
  assert dino["gated"] and dino["registers"] == 4 and not dino["class_position"]
  assert round(dino["width"] * dino["mlp_ratio"]) == 4096


@pytest.mark.parametrize(
  "vision,text,message",
  [
    (dict(layers=[3, 4, 6, 3], patch_size=None), TEXT, "layers: .3, 4, 6, 3.; a ResNet"),
    (dict(timm_model_name="convnext_base"), TEXT, "timm_model_name: 'convnext_base'; known"),
    (dict(attentional_pool="cascade"), TEXT, "attentional_pool: 'cascade' is not supported"),
    (dict(width="768"), TEXT, "vision_cfg.width='768' is of type str"),
    ({}, dict(hf_model_name="google/mt5-base"), "hf_model_name, hf_pooler_type: 'google/mt5-base'"),
    ({}, dict(hf_model_name="some-bert"), "hf_model_name, without weights: unknown 'some-bert'"),
    ({}, dict(TEXT, final_ln_after_pool=True), "final_ln_after_pool: True is not supported"),
  ],
)
def test_what_has_no_tower_here_is_named(tmp_path, vision, text, message):
  with pytest.raises(ValueError, match=rf"(?s)m\.json: .*{message}"):
    open_clip.model(write(tmp_path / "m.json", text=text, **vision))


def test_names_are_those_of_an_installed_open_clip(tmp_path, monkeypatch):
  """Found beside its code, which is not run: importing it would need torch."""
  package = tmp_path / "open_clip"
  (package / "model_configs").mkdir(parents=True)
  (package / "__init__.py").write_text("raise ImportError('no torch')")
  write(package / "model_configs/ViT-S-7.json", layers=2, width=128, patch_size=7)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, "open_clip", raising=False)
  model = open_clip.model("ViT-S-7")
  assert model["image"]["heads"] == 2 and model["text"]["causal"] and model["embed_dim"] == 512
  with pytest.raises(FileNotFoundError, match="'ViT-S-8' is neither a JSON file nor a model of an"):
    open_clip.model("ViT-S-8")
