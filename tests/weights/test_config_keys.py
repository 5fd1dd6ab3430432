"""Every key of a checkpoint's config is used, known to be harmless, or refused by its name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.small_checkpoints import BERT, CLIP, TEXT, VISION, folder

from bigalign import weights
from bigalign.data.loader.options import resolve_data
from bigalign.model import PIXELS
from bigalign.weights import init, open_clip, views

STUB = {x: np.zeros(1, np.float32) for x in "abc"}
VIT = dict(VISION, model_type="vit")
FAMILIES = {
  "clip": CLIP,
  "siglip": dict(CLIP, model_type="siglip"),
  "siglip2": dict(CLIP, model_type="siglip2"),
  "clip_vision_model": dict(VISION, model_type="clip_vision_model"),
  "clip_text_model": dict(TEXT, model_type="clip_text_model"),
  "siglip_vision_model": dict(VISION, model_type="siglip_vision_model"),
  "siglip_text_model": dict(TEXT, model_type="siglip_text_model"),
  "vit": VIT,
  "dinov2": {**VIT, "model_type": "dinov2", "mlp_ratio": 4},
  "dinov2_with_registers": {**VIT, "model_type": "dinov2_with_registers"},
  "dinov3_vit": dict(VISION, model_type="dinov3_vit"),
  "bert": BERT,
  "roberta": dict(BERT, model_type="roberta"),
  "mpnet": dict(BERT, model_type="mpnet", pad_token_id=1),
  "xlm-roberta": dict(BERT, model_type="xlm-roberta"),
  "vision-text-dual-encoder": dict(
    model_type="vision-text-dual-encoder", vision_config=VIT, text_config=BERT
  ),
}
for _name in ("dinov2", "dinov2_with_registers"):
  FAMILIES[_name].pop("intermediate_size", None)


def describe(tmp_path, config):
  return weights.describe(folder(tmp_path / "some", config, STUB))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["", "vision_config", "text_config"])
def test_an_unknown_key_is_refused_in_every_family(tmp_path, family, place):
  config = FAMILIES[family]
  if place and place not in config:
    return
  harmless = dict(transformers_version="5", attention_dropout=0.1, num_beams=1)
  for more, wrong in (
    (harmless, None),
    (dict(rope_scaling=2), "rope_scaling: '2' is an unknown key"),
    (dict(num_channels=4), "num_channels: '4'; known: 3"),
    (dict(quantization_config=dict(bits=4)), "quantization_config"),
  ):
    changed = {**config, place: config[place] | more} if place else config | more
    if wrong is None:
      describe(tmp_path, changed)
      continue
    with pytest.raises(ValueError, match=rf"(?s)config\.json: .*{wrong}"):
      describe(tmp_path, changed)


def test_many_unknown_keys_are_counted(tmp_path):
  with pytest.raises(ValueError, match=r"key11.* and 22 more") as error:
    describe(tmp_path, BERT | {f"key{i}": i for i in (11, *range(100, 129))})
  assert len(str(error.value)) < 700


def test_the_older_configs_of_clip_come_first(tmp_path):
  """As in transformers, which takes text_config_dict where both are given."""
  old = dict(text_config_dict=dict(TEXT, hidden_act="gelu"), vision_config_dict=None)
  model = describe(tmp_path, CLIP | old).model
  assert model["text"]["activation"] == "gelu" and model["image"]["activation"] == "quick_gelu"


@pytest.mark.parametrize(
  "vision,text,message",
  [
    (dict(qk_norm=True), {}, "vision_cfg: qk_norm: 'True'"),
    (dict(width_factor=2), {}, "vision_cfg: width_factor: '2' is an unknown key"),
    (dict(norm_kwargs=dict(eps=1e-6, bias=False)), {}, "norm_kwargs: .'bias'"),
    ({}, dict(scale_fc=True), "text_cfg: scale_fc"),
    ({}, dict(rope=True), "text_cfg: rope: 'True' is an unknown key"),
    ({}, dict(hf_model_name="roberta-base", pooler="x"), "text_cfg: pooler: 'x' is an unknown"),
    (
      dict(
        timm_model_name="vit_base_patch16_siglip_224",
        timm_pool="map",
        timm_model_kwargs=dict(act_layer="gelu", img_size=7),
      ),
      {},
      "timm_model_kwargs: .'img_size'",
    ),
    (dict(timm_model_name="vit_base_patch16_siglip_224", timm_pol="map"), {}, "timm_pol: 'map' is"),
  ],
)
def test_open_clips_keys(tmp_path, vision, text, message):
  file = tmp_path / "m.json"
  for more in ({}, dict(patch_dropout=0.5, output_tokens=True)):
    file.write_text(json.dumps(dict(embed_dim=64, vision_cfg=more, text_cfg={})))
    open_clip.model(str(file))
  file.write_text(json.dumps(dict(embed_dim=64, vision_cfg=vision, text_cfg=text)))
  with pytest.raises(ValueError, match=rf"m\.json: .*{message}"):
    open_clip.model(str(file))
  file.write_text(json.dumps(dict(embed_dim=64, vision_cfg={}, text_cfg={}, gating=1)))
  with pytest.raises(ValueError, match=r"m\.json: gating: '1' is an unknown key"):
    open_clip.model(str(file))


def pictures(tmp_path, preprocessor=None, preprocess_cfg=None):
  """A checkpoint of an image tower with a file of its preprocessing."""
  path = folder(tmp_path / "some", VIT, STUB)
  if preprocessor is not None:
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  if preprocess_cfg is not None:
    (path / "config.json").unlink()
    model = dict(embed_dim=4, vision_cfg=dict(layers=1), text_cfg=dict(layers=1))
    config = dict(model_cfg=model, preprocess_cfg=preprocess_cfg)
    (path / "open_clip_config.json").write_text(json.dumps(config))
  return path


HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
SHORTEST = dict(size=dict(shortest_edge=20), crop_size=dict(height=16, width=16))
BILINEAR = dict(resize="squash", interpolation="bilinear")
BICUBIC = dict(resize="shortest", interpolation="bicubic")


@pytest.mark.parametrize(
  "files,expected",
  [
    (dict(preprocessor=HALF), BILINEAR),
    (dict(preprocessor=HALF | dict(size=dict(height=16, width=16))), BILINEAR),
    (dict(preprocessor=HALF | dict(size=16, do_center_crop=False)), BILINEAR),
    (
      dict(preprocessor=HALF | SHORTEST | dict(do_center_crop=True, resample=3)),
      dict(resize="shortest", resize_edge=20, interpolation="bicubic"),
    ),
    (
      dict(preprocessor=HALF | dict(size=16, crop_size=16, do_center_crop=True, resample=2)),
      dict(resize="shortest", interpolation="bilinear"),
    ),
    (dict(preprocess_cfg=dict(size=16, resize_mode="shortest")), BICUBIC),
    (
      dict(preprocess_cfg=dict(size=[16, 16], resize_mode="squash", interpolation="bilinear")),
      dict(resize="squash", interpolation="bilinear"),
    ),
  ],
)
def test_the_view_of_images_is_the_checkpoints(tmp_path, files, expected, caplog):
  path = pictures(tmp_path, **files)
  model = dict(image=dict(init=str(path)))
  data = dict(image_size=16, tokenizer=dict(name="byte", length=4))
  filled = init.completed(model, data).data
  assert {k: v for k, v in filled.items() if k not in data} == expected
  assert not [x for x in caplog.records if x.levelname == "WARNING"]
  resolve_data(filled)
  ours = dict(data, resize="longest", interpolation="bicubic")
  assert init.completed(model, ours).data == ours  # what the config says is kept
  warned = " ".join(x.getMessage() for x in caplog.records if x.levelname == "WARNING")
  assert ("config.data.resize is 'longest', but" in warned) == ("resize" in expected)
  assert ("interpolation is 'bicubic', but" in warned) == ("bilinear" in expected.values())


def test_the_size_of_images_is_the_checkpoints(tmp_path, caplog):
  """Of the image processor, else of the tower's config; an npz has no file that states it."""
  squash = HALF | dict(size=dict(height=24, width=24))
  for name in ("stated", "none"):
    (tmp_path / name).mkdir()
  for folder_, files, file in (
    (tmp_path / "stated", dict(preprocessor=squash), "preprocessor_config.json"),
    (tmp_path, dict(preprocessor=HALF), "config.json"),
    (tmp_path / "none", {}, "config.json"),
  ):
    size = 24 if files.get("preprocessor") == squash else 16
    model = dict(image=dict(init=str(pictures(folder_, **files))))
    assert init.completed(model, {}).data["image_size"] == size
    assert init.completed(model, dict(image_size=None)).data["image_size"] == size
    shown = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert bool(shown) == (not files) and all("no such file" in x for x in shown)
    assert init.completed(model, dict(image_size=32)).data["image_size"] == 32
    text = " ".join(x.getMessage() for x in caplog.records if x.levelname == "WARNING")
    assert "config.data.image_size is 32, but" in text and f"{file} states {size}" in text
    caplog.clear()
  assert views.with_size(None, [16, 16], "") == views.View("", {}, 16, "")
  assert views.with_size(None, [16, 24], "") is None
  full = dict(image_size=32, resize="squash", resize_edge=None, interpolation="bicubic")
  assert views.differences(views.View("", {}, 16, ""), full) == []


def test_open_clips_longest_is_read(tmp_path):
  for fill in ({}, dict(fill_color=0)):
    path = pictures(tmp_path, preprocess_cfg=dict(size=16, resize_mode="longest", **fill))
    assert weights.describe(path).view.options == dict(BICUBIC, resize="longest")


@pytest.mark.parametrize("section", [None, {}, "statistics", dict(resize_mode=None)])
def test_what_open_clip_leaves_out_is_its_default(tmp_path, caplog, section):
  """Its models on the hub that are older than resize_mode state the statistics alone."""
  mean, std = PIXELS["clip"]
  config = dict(mean=mean, std=std) if section == "statistics" else section
  path = pictures(tmp_path, preprocess_cfg=config or {})
  if section is None:
    file = path / "open_clip_config.json"
    file.write_text(json.dumps(dict(model_cfg=json.loads(file.read_text())["model_cfg"])))
  checkpoint = weights.describe(path)
  assert checkpoint.view.options == BICUBIC and checkpoint.model["pixels"] == "clip"
  model = dict(image=dict(init=str(path)))
  data = init.completed(model, {}).data
  assert data == BICUBIC | dict(image_size=224)
  assert not [x for x in caplog.records if x.levelname == "WARNING"]
  (line,) = init.completed(model, dict(resize="squash")).differences
  assert "is 'squash'" in line and "preprocess_cfg leaves it out, which means 'shortest'" in line
  was = dict(image_size=224, resize="squash", interpolation="bicubic")
  record = dict(model=model, config=dict(model=model, data=was))
  assert init.completed(model, {}, record).data == was  # a run keeps the view with which it began


@pytest.mark.parametrize(
  "family,given,options,size",
  [
    ("clip", {}, dict(BICUBIC, resize_edge=None), 16),
    ("clip_vision_model", dict(size=None, do_center_crop=None, resample=None), BICUBIC, 16),
    ("clip", dict(crop_size=dict(height=96, width=96)), dict(BICUBIC, resize_edge=224), 96),
    ("clip", dict(size=dict(shortest_edge=20), crop_size=16), dict(BICUBIC, resize_edge=20), 16),
    ("clip", dict(size=dict(height=8, width=8)), dict(BICUBIC, resize="squash"), 8),
    ("siglip", {}, dict(BICUBIC, resize="squash"), 16),
    ("siglip_vision_model", dict(resample=2), BILINEAR, 16),
    ("vit", {}, BILINEAR, 16),
    ("vit", dict(size=24), BILINEAR, 24),
    ("vit", dict(image_processor_type="CLIPImageProcessorFast"), BICUBIC, 16),
    ("vit", dict(image_processor_type="OtherImageProcessor", size=24), {}, 16),
    ("dinov2", {}, BICUBIC, 224),
    ("dinov2_with_registers", dict(size=dict(shortest_edge=256)), dict(resize_edge=256), 224),
    ("dinov3_vit", {}, BILINEAR, 224),
  ],
)
def test_what_transformers_leaves_out_is_the_default_of_its_class(
  tmp_path, family, given, options, size
):
  path = folder(tmp_path / "some", FAMILIES[family], STUB)
  (path / "preprocessor_config.json").write_text(json.dumps(given))
  view = weights.describe(path).view
  assert view.size == size and not view.missing
  if family == "dinov2_with_registers":
    options = dict(BICUBIC, **options)
  assert {k: v for k, v in view.options.items() if v is not None} == {
    k: v for k, v in options.items() if v is not None
  }
  if not given:
    assert {*view.left_out} == {*view.options}


@pytest.mark.parametrize(
  "family,used",
  [
    ("clip", BICUBIC),
    ("siglip_vision_model", dict(BICUBIC, resize="squash")),
    ("dinov2", BICUBIC),
    ("vit", BILINEAR),
    ("vision-text-dual-encoder", {}),
  ],
)
def test_a_view_that_no_file_states_is_shown(tmp_path, caplog, family, used):
  model = dict(init=str(folder(tmp_path / "some", FAMILIES[family], STUB)))
  model = model if "text_config" in FAMILIES[family] else dict(image=model)
  tokenizer = dict(tokenizer=dict(name="byte", length=4))
  found = init.completed(model, tokenizer)
  views_ = {k: v for k, v in found.data.items() if k in ("resize", "interpolation")}
  assert views_ == used and "config.data.resize" not in " ".join(found.differences)
  shown = dict(resize="squash", interpolation="bicubic") | used
  (line,) = [x.getMessage() for x in caplog.records if "preprocessor_config" in x.getMessage()][-1:]
  assert "preprocessor_config.json: no such file" in line
  assert f"resize={shown['resize']!r} and interpolation={shown['interpolation']!r}" in line
  caplog.clear()
  given = dict(tokenizer, resize="longest", interpolation="bicubic")
  differences = init.completed(model, given).differences  # no file states another one
  shown = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
  assert "resize" not in " ".join((*differences, *shown))


def test_a_processor_of_transformers_5_is_read(tmp_path):
  """It has the image processor in processor_config.json."""
  clip = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=2)
  path = pictures(tmp_path)
  config = dict(image_processor=clip, processor_class="CLIPProcessor")
  (path / "processor_config.json").write_text(json.dumps(config))
  checkpoint = weights.describe(path)
  assert checkpoint.model["pixels"] == "imagenet"
  assert checkpoint.view.options == BILINEAR
  config["image_processor"] = dict(clip, resample=0)
  (path / "processor_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"processor_config\.json: image_processor: resample: '0'"):
    weights.describe(path)


def test_a_resumed_run_keeps_its_view(tmp_path):
  path = pictures(tmp_path, dict(HALF, size=16, crop_size=16, do_center_crop=True))
  model, data = dict(image=dict(init=str(path))), dict(image_size=16)
  was = dict(data, resize="squash", resize_edge=None)
  record = dict(model=model, config=dict(model=model, data=was))
  assert init.completed(model, data, record).data["resize"] == "squash"
  assert init.completed(model, data).data["resize"] == "shortest"
  was |= dict(resize="shortest", resize_edge=20, interpolation="bilinear")
  kept = {k: was[k] for k in ("image_size", "resize", "resize_edge", "interpolation")}
  for given in (data, {}, dict(resize_edge=None), dict(image_size=None, interpolation=None)):
    assert init.completed(model, given, record).data == kept
  given = dict(data, resize="squash")  # a change of the config; the edge is not one of "squash"
  squashed = init.completed(model, given, record).data
  assert squashed == {k: {**kept, **given}[k] for k in kept if k != "resize_edge"}


def test_a_bilinear_view_is_pillows():
  from PIL import Image

  image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
  data = dict(image_size=16, tokenizer=dict(name="byte", length=4))
  theirs = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
  ours = resolve_data(dict(data, interpolation="bilinear"))
  np.testing.assert_array_equal(ours.evaluation_view(image), theirs)
  assert ours.preprocessing()["interpolation"] == "bilinear"
  assert "interpolation" not in resolve_data(data).preprocessing()  # as stores recorded it
  with pytest.raises(ValueError, match=r"config\.data\.interpolation='nearest'; known"):
    resolve_data(dict(data, interpolation="nearest"))


@pytest.mark.parametrize(
  "files,message",
  [
    (dict(preprocess_cfg=dict(resize_mode="widest")), "preprocess_cfg: resize_mode: 'widest'"),
    (dict(preprocess_cfg=dict(resize_mode="longest", fill_color=128)), "with fill_color=128"),
    (dict(preprocess_cfg=dict(interpolation="nearest")), "interpolation: 'nearest'; known"),
    (dict(preprocess_cfg=dict(size=[16, 24])), r"size: .16, 24. is not a square"),
    (dict(preprocess_cfg=dict(mode="L")), "mode: 'L'"),
    (dict(preprocess_cfg=dict(blur=1)), "'blur': '1': unknown keys"),
    (dict(preprocessor=HALF | dict(resample=0)), "resample: '0'; known"),
    (dict(preprocessor=HALF | dict(size=dict(longest_edge=16))), "size: .*longest_edge"),
    (dict(preprocessor=HALF | dict(do_pad=True)), "do_pad: True"),
    (dict(preprocessor=HALF | dict(do_normalize=False)), "do_normalize: false"),
    (dict(preprocessor=HALF | dict(rescale_factor=1.0)), "rescale_factor: 1.0"),
    (dict(preprocessor=HALF | dict(crop_pct=0.9)), "'crop_pct': '0.9': unknown keys"),
    (dict(preprocessor=HALF | dict(SHORTEST, do_center_crop=False)), "do_center_crop: false"),
  ],
)
def test_a_view_that_cannot_be_given_is_named(tmp_path, files, message):
  with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
    weights.describe(pictures(tmp_path, **files))
