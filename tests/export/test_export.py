"""Folders for other libraries, written and read back with none of them; what they cannot hold."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers.shipped import load
from helpers.small_models import (
  BERT,
  CLIP,
  CLIP_LOSS,
  PLAIN,
  ROBERTA,
  SIGLIP,
  SIGLIP_LOSS,
  SIZE,
  make_run,
  pieces_for,
  word_pieces,
)
from PIL import Image

import bigalign
from bigalign import tree, weights
from bigalign.data.image.decode import decode
from bigalign.export import check, hugging_face, main, model_card, open_clip
from bigalign.export.fit import fit
from bigalign.export.formats import prepare
from bigalign.losses import LossTerms, logit_head
from bigalign.model import make_model
from bigalign.options import resolve_value


@pytest.fixture
def pieces(tmp_path):
  return word_pieces(tmp_path)


def read_logits(path, trained, images, texts):
  """What `weights` reads from a folder, on our own pixels and ids."""
  checkpoint = weights.describe(path)
  sides = {k: {**checkpoint.model[k], "dtype": "float32"} for k in ("image", "text")}
  model = make_model(**{**checkpoint.model, **sides, "pixels": trained.model.pixels})
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.uint8)
  ids = jax.ShapeDtypeStruct((1, trained.tokenizer.length), jnp.int32)
  shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0), image, ids)["params"])
  found = {row.ours for row in checkpoint.layout.rows} & {"t", "b"}
  arrays = checkpoint.load(shapes | {x: jax.ShapeDtypeStruct((), jnp.float32) for x in found})
  return main.logits(trained._replace(model=model, arrays=arrays), images, texts)


@pytest.fixture
def no_torch(monkeypatch):
  monkeypatch.setattr(check, "missing", lambda kind: ["torch"] if kind != "npz" else [])


@pytest.mark.parametrize(
  "kind, model, loss, family",
  [
    ("hf", CLIP, CLIP_LOSS, "CLIPModel"),
    pytest.param("hf", PLAIN, CLIP_LOSS, "VisionTextDualEncoderModel", marks=pytest.mark.slow),
    pytest.param(
      "hf", BERT, CLIP_LOSS, "VisionTextDualEncoderModel with BERT", marks=pytest.mark.slow
    ),
    pytest.param(
      "hf", ROBERTA, CLIP_LOSS, "VisionTextDualEncoderModel with BERT", marks=pytest.mark.slow
    ),
    pytest.param("hf", SIGLIP, SIGLIP_LOSS, "SiglipModel", marks=pytest.mark.slow),
    pytest.param("open_clip", CLIP, CLIP_LOSS, "open_clip's CLIP", marks=pytest.mark.slow),
    ("open_clip", PLAIN, SIGLIP_LOSS, "open_clip's CLIP"),
    pytest.param("npz", SIGLIP, SIGLIP_LOSS, "big_vision's two_towers", marks=pytest.mark.slow),
  ],
)
def test_a_folder_holds_the_run(kind, model, loss, family, tmp_path, no_torch):
  """Read back without the library that it is for, it gives the run's logits."""
  tokenizer = dict(name="byte", length=16) if model is SIGLIP else pieces_for(model, tmp_path)
  run = make_run(tmp_path, model, loss, tokenizer)
  out, _ = main.export(run, kind, tmp_path / "out/folder", license="cc0-1.0")
  assert json.loads((out / "bigalign.json").read_text())["family"] == family
  trained = main.trained_model(run)
  images, texts = main.sample_images(), ["a cat", "photo of a dog", "x" * 30]
  ours = main.logits(trained, images, texts)
  assert np.ptp(ours, 0).min() > 1e-2 and np.ptp(ours, 1).min() > 1e-2, "inputs are told apart"
  theirs = read_logits(out / "model.npz" if kind == "npz" else out, trained, images, texts)
  np.testing.assert_allclose(theirs, ours, atol=2e-5 * np.abs(ours).max())
  made = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
  for text, row, real in zip(texts[:2], *trained.tokenizer.encode_batch(texts)):
    assert made.encode(text).ids == row[real].tolist()
  card = (out / "README.md").read_text()
  for words in ("license: cc0-1.0", "samples seen | 12 ", "| val/x | 0.625 |", '"glyphs"'):
    assert words in card
  assert not list(out.parent.glob(".*")), "the temporary folder is gone"


@pytest.mark.slow
def test_a_naflex_run_becomes_siglip_2(tmp_path):
  """Compared with transformers where it is installed, from pictures of several aspects."""
  image = dict(name="naflex", patch=8, grid=3, **SIZE)
  model = dict(SIGLIP, image=image)
  tokenizer = dict(name="byte", length=16)
  with pytest.raises(ValueError, match="naflex must be set"):
    main.export(make_run(tmp_path, model, SIGLIP_LOSS, tokenizer), "hf", tmp_path / "squares")
  naflex = dict(lengths=(6, 12), patch=8)
  run = make_run(tmp_path, model, SIGLIP_LOSS, tokenizer, naflex=naflex)
  out, difference = main.export(run, "hf", tmp_path / "folder")
  assert difference is None or difference < check.TOLERANCE
  assert json.loads((out / "bigalign.json").read_text())["family"] == "Siglip2Model"
  assert "PreTrainedTokenizerFast.from_pretrained" in (out / "README.md").read_text()
  loaded, trained = bigalign.load(out), main.trained_model(run)
  images = main.sample_images()
  np.testing.assert_allclose(
    loaded.logits(images, ["a cat"]), main.logits(trained, images, ["a cat"]), atol=1e-3
  )
  for kind in ("open_clip", "npz", "torch"):
    with pytest.raises(ValueError, match=r"image\.name must be"):
      main.export(run, kind, tmp_path / kind)


@pytest.mark.parametrize(
  "kind,model,loss",
  [
    pytest.param("hf", SIGLIP, SIGLIP_LOSS, marks=pytest.mark.slow),
    pytest.param("npz", SIGLIP, SIGLIP_LOSS, marks=pytest.mark.slow),
    pytest.param("open_clip", PLAIN, CLIP_LOSS, marks=pytest.mark.slow),
    pytest.param("hf", CLIP, CLIP_LOSS, marks=pytest.mark.slow),
  ],
)
def test_a_tower_longer_than_its_texts_is_cut(kind, model, loss, tmp_path, no_torch):
  """open_clip pads texts to the length of the tower, and SigLIP sees padding."""
  length = 6
  tokenizer = (
    dict(name="byte", length=length) if model is SIGLIP else dict(word_pieces(tmp_path), length=6)
  )
  run = make_run(tmp_path, model, loss, tokenizer)
  trained = main.trained_model(run)
  assert trained.text.length == length
  assert trained.arrays["text_tower/positions"].shape[1] == length
  images, texts = main.sample_images(), ["a cat", "photo of a dog", "x" * 30]
  options = run.config.model
  sides = (dataclasses.replace(x, dtype="float32") for x in (options.image, options.text))
  model = dataclasses.replace(options, **dict(zip(("image", "text"), sides))).build()
  arrays = trained.arrays | tree.subtree(run.params, "model/")
  ours = main.logits(trained, images, texts)
  whole = main.logits(trained._replace(model=model, arrays=arrays), images, texts)
  np.testing.assert_allclose(ours, whole, atol=2e-5 * np.abs(ours).max())
  out, _ = main.export(run, kind, tmp_path / "out/folder")
  path = out / "model.npz" if kind == "npz" else out
  checkpoint = weights.describe(path)
  assert checkpoint.layout.data["length"] == checkpoint.model["text"]["length"] == length
  theirs = read_logits(path, trained, images, texts)
  np.testing.assert_allclose(theirs, ours, atol=2e-5 * np.abs(ours).max())


@pytest.mark.slow
def test_the_card_names_the_pipeline_only_where_it_works(tmp_path, no_torch):
  """transformers pads every SigLIP to 64 tokens."""
  for length, model, loss, works in (
    (16, SIGLIP, SIGLIP_LOSS, False),
    (64, {**SIGLIP, "text": {**SIGLIP["text"], "length": 64}}, SIGLIP_LOSS, True),
    (8, CLIP, CLIP_LOSS, True),
  ):
    tokenizer = dict(name="byte", length=length) if length > 8 else word_pieces(tmp_path)
    run = make_run(tmp_path, model, loss, tokenizer)
    out, _ = main.export(run, "hf", tmp_path / f"out/{length}")
    card = (out / "README.md").read_text()
    assert ("pipeline_tag: zero-shot-image-classification" in card) == works
    assert ("to 64 tokens, and this model needs 16" in card) == (not works)


def test_the_cards_code_reads_alpha_and_16_bits_as_the_run(tmp_path):
  rng = np.random.default_rng(0)
  code = model_card._IMAGES.partition("```python\n")[2].partition("```")[0]
  names: dict = {}
  exec(code, names)
  for image in (
    Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8)),
    Image.fromarray(rng.integers(0, 2**16, (8, 8), np.uint16)),
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)),
  ):
    file = io.BytesIO()
    image.save(file, "png")
    ours = decode(file.getvalue())
    theirs = names["as_trained"](Image.open(io.BytesIO(file.getvalue())))
    np.testing.assert_array_equal(np.asarray(theirs), ours)
    assert image.mode == "RGB" or (np.asarray(image.convert("RGB")) != ours).any()


def test_the_filter_of_images_is_that_of_the_run(tmp_path, no_torch):
  run = make_run(tmp_path, CLIP, CLIP_LOSS, word_pieces(tmp_path))
  data = dataclasses.replace(run.config.data, interpolation="bilinear")
  trained = main.trained_model(run)._replace(data=data)
  assert prepare("hf", trained).files["preprocessor_config.json"]["resample"] == 2
  config = prepare("open_clip", trained).files["open_clip_config.json"]
  assert config["preprocess_cfg"]["interpolation"] == "bilinear"
  with pytest.raises(ValueError, match=r"config\.data\.interpolation must be 'bicubic'"):
    prepare("torch", trained)


def test_masked_padding_is_asked_for_by_the_tokenizer(tmp_path, no_torch):
  """SigLIP's classes hide padding where there is a mask, and only there."""
  for masked in (False, True):
    model = {**SIGLIP, "text": {**SIGLIP["text"], "mask_padding": masked}}
    run = make_run(tmp_path, model, SIGLIP_LOSS, dict(name="byte", length=16))
    made = prepare("hf", main.trained_model(run))
    asked = made.files["tokenizer_config.json"]["model_input_names"]
    assert asked == ["input_ids", "attention_mask"][: 1 + masked]


@pytest.mark.parametrize(
  "first, pad, skip, asked",
  [
    ("[PAD] [UNK]", 0, False, 0),
    ("[UNK] [PAD]", 0, False, 1),  # the mask hides padding, whatever the tower takes for it
    ("[UNK] [PAD]", 1, True, 1),
    ("[UNK] [PAD]", 0, True, None),  # its positions count from the tower's
  ],
)
def test_padding_is_one_token_in_all_files_of_bert(first, pad, skip, asked, tmp_path):
  model = {**BERT, "text": {**BERT["text"], "pad": pad, "skip_padding": skip}}
  trained = main.trained_model(make_run(tmp_path, model, CLIP_LOSS, word_pieces(tmp_path, first)))
  if asked is None:
    with pytest.raises(ValueError, match=r"text\.pad=0, but the tokenizer pads with 1"):
      prepare("hf", trained)
    return
  files = prepare("hf", trained).files
  about, made = files["tokenizer_config.json"], files["tokenizer.json"]
  assert files["config.json"]["text_config"]["pad_token_id"] == asked
  assert made["model"]["vocab"][about["pad_token"]] == asked
  assert about["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
  "changes, reason",
  [
    (dict(pool="mean"), "config.model.text.pool must be 'pooler' (yours: 'mean')"),
    (dict(pool="mean"), "Formats that can: torch, sentence-transformers (the text side)"),
    (dict(unit=True), "config.model.text.unit must be False (yours: True)"),
    (dict(types=0), "config.model.text.types must be 1 (yours: 0)"),
    (dict(buckets=32), "pad_token_id: 0; MPNet pads with 1"),
  ],
)
def test_texts_of_bert_that_the_pair_cannot_hold(changes, reason, tmp_path, pieces):
  model = {**BERT, "text": {**BERT["text"], **changes}}
  with pytest.raises(ValueError, match=re.escape(reason)):
    prepare("hf", main.trained_model(make_run(tmp_path, model, CLIP_LOSS, pieces)))


def test_the_config_of_clip_becomes_a_model_of_clip(tmp_path, pieces):
  shipped = load("clip_b16").to_dict()["model"]
  for side in ("image", "text"):
    shipped[side] |= dict(width=16, depth=1, heads=2)
  shipped["image"] |= dict(patch=8)
  shipped["text"] |= dict(vocab_size=9, length=8)
  files = prepare("hf", main.trained_model(make_run(tmp_path, shipped, CLIP_LOSS, pieces))).files
  assert files["config.json"]["architectures"] == ["CLIPModel"]


REFUSED = [
  ("hf", {}, SIGLIP_LOSS, "the format has no place for its logit bias", "open_clip, torch"),
  (
    "hf",
    {"text/pool": "mean"},
    CLIP_LOSS,
    "config.model.text.pool must be 'eos' (yours: 'mean')",
    "torch",
  ),
  (
    "hf",
    {"image_projector/name": "mlp"},
    CLIP_LOSS,
    "config.model.image_projector.name must be 'linear' (yours: 'mlp')",
    "torch",
  ),
  (
    "hf",
    {"text/causal": False},
    CLIP_LOSS,
    "config.model.text.causal must be True (yours: False)",
    "torch",
  ),
  (
    "open_clip",
    {"image/activation": "gelu"},
    CLIP_LOSS,
    "config.model.text.activation",
    "hf, torch",
  ),
  (
    "open_clip",
    {"text/mask_padding": True, "text/causal": False},
    CLIP_LOSS,
    "config.model.text.mask_padding must be False (yours: True)",
    "torch",
  ),
  (
    "npz",
    {},
    CLIP_LOSS,
    "config.model.image.pool must be 'map' (yours: 'cls')",
    "hf, open_clip, torch",
  ),
  (
    "torch",
    {"image/positions": "rope", "image/class_position": False},
    CLIP_LOSS,
    "config.model.image.positions must be 'learned' or 'sincos2d' (yours: 'rope')",
    "",
  ),
  *(
    (
      kind,
      {"image/pool": "queries", "image/class_token": True, "text/pool": "class"}
      | {"image/queries": 3, "image/query_heads": 2},
      CLIP_LOSS,
      f"config.model.{side}.pool must be",
      "",
    )
    for kind in ("torch", "hf")
    for side in ("image", "text")
  ),
  (
    "open_clip",
    {"image/pool": "queries", "image/class_token": True, "image/query_heads": 2}
    | {"image/query_width": 12, "text/pool": "class"},
    CLIP_LOSS,
    "config.model.text.shifted_mask must be True (yours: False)",
    "",
  ),
]


@pytest.mark.parametrize("kind, changes, loss, reason, others", REFUSED)
def test_what_a_format_cannot_hold(kind, changes, loss, reason, others, tmp_path, pieces):
  """The config's key, and the formats that can."""
  model = tree.unflatten({**tree.flatten(CLIP), **changes})
  run = make_run(tmp_path, model, loss, pieces)
  with pytest.raises(ValueError) as error:
    main.export(run, kind, tmp_path / "out")
  lines = str(error.value).splitlines()
  assert reason in str(error.value) and f"--format={kind}" in lines[0]
  assert lines[-1] == (f"Formats that can: {others}" if others else "No other format can.")
  assert not (tmp_path / "out").exists()


def test_an_end_that_clip_models_take_for_another_is_refused(tmp_path):
  """CLIPModel reads the highest id where eos_token_id is 2, as the byte tokenizer's is."""
  model = {**CLIP, "text": {**CLIP["text"], "vocab_size": 259}}
  run = make_run(tmp_path, model, CLIP_LOSS, dict(name="byte", length=8))
  with pytest.raises(ValueError, match=r"text\.pool must be 'argmax' \(yours: 'eos'\)"):
    main.export(run, "hf", tmp_path / "out")


def test_open_clip_cleans_texts_before_a_tokenizer_sees_them(tmp_path):
  model = {**CLIP, "text": {**CLIP["text"], "vocab_size": 259}}
  run = make_run(tmp_path, model, CLIP_LOSS, dict(name="byte", length=8))
  with pytest.raises(ValueError, match="'byte' distinguishes kinds of white space"):
    main.export(run, "open_clip", tmp_path / "out")


def test_a_bias_is_put_where_it_has_a_place(tmp_path, pieces):
  """The bias of patches is added to their positions; what only they have is zeros and ones."""
  trained = main.trained_model(make_run(tmp_path, PLAIN, CLIP_LOSS, pieces))
  made = fit(open_clip.FAMILIES[0], trained)
  assert "image_tower/embedding/bias" not in made.arrays
  expected = trained.arrays["image_tower/positions"] + trained.arrays["image_tower/embedding/bias"]
  np.testing.assert_array_equal(made.arrays["image_tower/positions"], expected)
  assert not made.arrays["image_tower/class_position"].any()
  scale = fit(hugging_face.FAMILIES[2], trained).arrays["image_tower/encoder/blocks/scale1"]
  np.testing.assert_array_equal(scale, np.ones_like(scale))


@pytest.mark.slow
def test_no_folder_is_left_where_logits_differ(tmp_path, pieces, monkeypatch):
  run = make_run(tmp_path, CLIP, CLIP_LOSS, pieces)
  monkeypatch.setattr(check, "possible", lambda kind: True)
  for wrong in (1e-3, float("nan")):
    monkeypatch.setattr(check, "difference", lambda folder, x=wrong: x)
    with pytest.raises(ValueError, match="differ from the run's"):
      main.export(run, "hf", tmp_path / "out/folder")
  assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_holds_something_is_not_touched(tmp_path, pieces):
  run = make_run(tmp_path, CLIP, CLIP_LOSS, pieces)
  (tmp_path / "full").mkdir()
  (tmp_path / "full/thesis.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="full"):
    main.export(run, "hf", tmp_path / "full")
  assert (tmp_path / "full/thesis.txt").read_text() == "mine"
  with pytest.raises(ValueError, match=r"--ema.*config\.ema"):
    main.export(run, "hf", tmp_path / "other", ema=True)


def test_a_folder_of_another_hand_is_not_compared(tmp_path, capsys):
  with pytest.raises(SystemExit) as left:
    main.main(["--check", str(tmp_path)])
  assert left.value.code == 1 and "bigalign.json: no such file" in capsys.readouterr().err


def test_a_check_without_its_library_says_what_to_install(tmp_path, no_torch):
  (tmp_path / "bigalign.json").write_text('{"format": "hf"}')
  with pytest.raises(ModuleNotFoundError, match=r"needs torch: pip install 'bigalign\[interop\]'"):
    check.difference(tmp_path)


@pytest.mark.slow
def test_averages_are_another_model(tmp_path, pieces, no_torch):
  run = make_run(tmp_path, CLIP, CLIP_LOSS, pieces)
  other = make_run(tmp_path, CLIP, CLIP_LOSS, pieces, seed=1)
  out, _ = main.export(run._replace(ema=other.params), "hf", tmp_path / "out", ema=True)
  trained, images, texts = main.trained_model(other), main.sample_images(), ["a cat", "a dog"]
  expected = main.logits(trained, images, texts)
  found = read_logits(out, trained, images, texts)
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_the_scale_is_that_of_the_first_term_that_learns_one():
  def scalars(params, **losses):
    terms = resolve_value(LossTerms, losses, "config.loss")
    return logit_head.scalars({k: np.float32(x) for k, x in params.items()}, terms)

  params = {"loss/siglip/t": 1, "loss/siglip/b": -3, "loss/clip/t": 2}
  assert scalars(params, sogclr={}, siglip={}, clip={}) == {"t": 1, "b": -3}
  found = scalars({"loss/albef_itc/temperature": 0.1}, albef_itc={})
  np.testing.assert_allclose(np.exp(found["t"]), 10, rtol=1e-6)
  found = scalars({}, sogclr=dict(tau=0.05))
  np.testing.assert_allclose(np.exp(found["t"]), 20, rtol=1e-6)
