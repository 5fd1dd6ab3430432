"""Folders of transformers: bigalign.load against the library, from PIL images and strings."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil

import numpy as np
import pytest
from helpers.small_shards import picture, write_tar
from helpers.small_tokenizers import write_pieces
from PIL import Image

import bigalign

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="torch or transformers is not installed: the extra interop",
  ),
]
TOLERANCE = 2e-5
LENGTH = 16
TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(TOWER, max_position_embeddings=LENGTH)
VISION = dict(TOWER, image_size=32, patch_size=8)
SQUARE = {"height": 32, "width": 32}
TEXTS = [
  "The CAT, the dog!",
  "café",
  "a very long text about the cat and the dog and so on and on",
  "two dogs_running",
  "x",
  "",
]


def random_model(model, scale=2.0, bias=None):
  """The model with matrices of random numbers, ready to be called."""
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for x in model.parameters():
      if x.ndim > 1:
        x.normal_(0, 0.2)
    model.logit_scale.fill_(scale)
    if bias is not None:
      model.logit_bias.fill_(bias)
  return model.eval()


def write_clip(folder):
  import tokenizers
  import transformers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
  pieces = [*alphabet, *(f"{x}</w>" for x in alphabet), *(a + b for a, b in merges)]
  pieces += ["<|startoftext|>", "<|endoftext|>"]
  tokenizer = transformers.CLIPTokenizer(
    vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=LENGTH
  )
  ids = dict(bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1)
  config = transformers.CLIPConfig(
    text_config=dict(TEXT, vocab_size=len(pieces), pad_token_id=len(pieces) - 1, **ids),
    vision_config=VISION,
    projection_dim=12,
  )
  images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE)
  random_model(transformers.CLIPModel(config)).save_pretrained(folder)
  transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
  return folder


def write_siglip(folder):
  import transformers

  texts = ["the cat and the dog", "a photo of a cat, on the beach!", "two dogs running", "café"]
  pieces = write_pieces(folder.with_name("pieces"), texts, 60)
  tokenizer = transformers.SiglipTokenizer(str(pieces), model_max_length=LENGTH)
  ids = dict(pad_token_id=1, eos_token_id=1, bos_token_id=2)
  config = transformers.SiglipConfig(
    text_config=dict(TEXT, vocab_size=tokenizer.vocab_size, projection_size=16, **ids),
    vision_config=VISION,
  )
  images = transformers.SiglipImageProcessorPil(size=SQUARE)
  random_model(transformers.SiglipModel(config), bias=-3.0).save_pretrained(folder)
  transformers.SiglipProcessor(images, tokenizer).save_pretrained(folder)
  return folder


def write_siglip_without_mask(folder):
  """As the released models: their tokenizer gives no mask, so that attention sees padding."""
  write_siglip(folder)
  file = folder / "tokenizer_config.json"
  settings = json.loads(file.read_text())
  file.write_text(json.dumps({**settings, "model_input_names": ["input_ids"]}))
  return folder


PATCHES = 21


def write_siglip2(folder):
  """SigLIP 2 with NaFlex: patches of pictures in their own aspect."""
  import transformers

  letters = [*"abcdefghijklmnopqrstuvwxyz,!_é", "\u2581", *map("<0x{:02X}>".format, range(256))]
  pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, "th", "ca", "the", "cat"]
  merges = [("t", "h"), ("c", "a"), ("th", "e"), ("ca", "t")]
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  tokenizer = transformers.Siglip2Tokenizer(
    vocabulary, merges, model_max_length=LENGTH, padding_side="right"
  )
  ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
  config = transformers.Siglip2Config(
    text_config=dict(TEXT, vocab_size=len(pieces), projection_size=16, **ids),
    vision_config=dict(TOWER, patch_size=8, num_patches=16),
  )
  images = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=PATCHES)
  random_model(transformers.Siglip2Model(config), bias=-3.0).save_pretrained(folder)
  transformers.Siglip2Processor(images, tokenizer).save_pretrained(folder)
  return folder


def write_vision_text(folder):
  import transformers

  letters = "abcdefghijklmnopqrstuvwxyz"
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", ",", "two"]
  words += [*letters, *(f"##{x}" for x in letters)]
  vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
  tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=LENGTH)
  pair = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
    transformers.ViTConfig(**VISION),
    transformers.BertConfig(**TEXT, vocab_size=len(tokenizer)),
    projection_dim=12,
  )
  images = transformers.ViTImageProcessorPil(size=SQUARE)
  random_model(transformers.VisionTextDualEncoderModel(pair)).save_pretrained(folder)
  transformers.VisionTextDualEncoderProcessor(images, tokenizer).save_pretrained(folder)
  return folder


KINDS = dict(
  clip=(write_clip, True, False),
  siglip=(write_siglip, "max_length", True),
  siglip_without_mask=(write_siglip_without_mask, "max_length", True),
  vision_text=(write_vision_text, True, False),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers(kind, pictures, tmp_path, monkeypatch):
  import torch
  import transformers

  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  torch.set_num_threads(1)
  write, padding, sigmoid = KINDS[kind]
  folder = write(tmp_path / "folder")
  images = [*pictures, pictures[0].convert("L")] if kind != "vision_text" else pictures
  if kind != "vision_text":  # ViT's processor takes three channels only
    transparent = pictures[1].convert("RGBA")
    transparent.putalpha(pictures[1].convert("L"))
    images = [*images, transparent]
  processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
  inputs = processor(
    images=images,
    text=TEXTS,
    padding=padding,
    truncation=True,
    max_length=LENGTH,
    return_tensors="pt",
  )
  with torch.inference_mode():
    theirs = transformers.AutoModel.from_pretrained(folder)(**inputs)
  model = bigalign.load(folder)
  zimg, ztxt = model.embed_images(images), model.embed_texts(TEXTS)
  np.testing.assert_allclose(zimg, theirs.image_embeds, atol=TOLERANCE)
  np.testing.assert_allclose(ztxt, theirs.text_embeds, atol=TOLERANCE)
  assert np.ptp(zimg, 0).max() > 0.1 and np.ptp(ztxt, 0).max() > 0.1, "inputs are told apart"
  logits = theirs.logits_per_image
  expected = logits.sigmoid() if sigmoid else logits.softmax(1)
  np.testing.assert_allclose(model.classify(images, TEXTS), expected, atol=TOLERANCE)


def test_siglip_2_sees_pictures_in_their_own_aspect(pictures, tmp_path, monkeypatch):
  import torch
  import transformers

  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  torch.set_num_threads(1)
  texts = TEXTS[:-1]  # this tokenizer adds no end, so an empty text would have no token
  folder = write_siglip2(tmp_path / "folder")
  processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
  # The processor has 256 patches of 16 pixels, whatever its image processor says.
  inputs = processor(
    images=pictures,
    text=texts,
    padding="max_length",
    truncation=True,
    max_length=LENGTH,
    return_tensors="pt",
    max_num_patches=PATCHES,
    patch_size=8,
  )
  with torch.inference_mode():
    theirs = transformers.AutoModel.from_pretrained(folder)(**inputs)
  model = bigalign.load(folder)
  patches = model.preprocess(pictures)
  shapes = patches.shapes.tolist()
  assert shapes == inputs["spatial_shapes"].tolist() and len({(a, b) for a, b in shapes}) > 2
  ours = (patches.pixels / 127.5 - 1) * patches.mask[..., None]
  np.testing.assert_allclose(ours, inputs["pixel_values"], atol=TOLERANCE)
  zimg, ztxt = model.embed_images(pictures), model.embed_texts(texts)
  np.testing.assert_allclose(zimg, theirs.image_embeds, atol=TOLERANCE)
  np.testing.assert_allclose(ztxt, theirs.text_embeds, atol=TOLERANCE)
  assert np.ptp(zimg, 0).max() > 0.1, "pictures are told apart"


def test_clip_inside_sentence_transformers(pictures, tmp_path):
  """The folders clip-ViT-…: one module, which is a CLIP of transformers."""
  folder = write_clip(tmp_path / "outer/0_CLIPModel")
  about = dict(idx=0, name="0", path=folder.name, type="sentence_transformers.models.CLIPModel")
  (folder.parent / "modules.json").write_text(json.dumps([about]))
  shutil.copytree(folder, tmp_path / "inner")
  inner, outer = bigalign.load(tmp_path / "inner"), bigalign.load(folder.parent)
  np.testing.assert_array_equal(outer.embed_images(pictures), inner.embed_images(pictures))
  np.testing.assert_array_equal(outer.embed_texts(TEXTS), inner.embed_texts(TEXTS))


def test_one_tower(pictures, tmp_path):
  """A folder may hold the image side only."""
  import torch
  import transformers

  config = transformers.Dinov2Config(**VISION)
  tower = transformers.Dinov2Model(config).eval()
  tower.save_pretrained(tmp_path / "dino")
  images = transformers.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=SQUARE)
  images.save_pretrained(tmp_path / "dino")
  model = bigalign.load(tmp_path / "dino")
  with torch.inference_mode():
    out = tower(images(pictures, return_tensors="pt")["pixel_values"]).pooler_output
  expected = torch.nn.functional.normalize(out)
  np.testing.assert_allclose(model.embed_images(pictures), expected, atol=TOLERANCE)
  with pytest.raises(ValueError, match="has no text tower with a tokenizer"):
    model.embed_texts("a cat")
  with pytest.raises(ValueError, match="has no text tower"):
    model.save(tmp_path / "out")


@pytest.mark.slow
def test_a_folder_with_an_image_tower_is_evaluated(tmp_path):
  """By images alone; what needs texts is an error that says so."""
  import transformers

  transformers.Dinov2Model(transformers.Dinov2Config(**VISION)).save_pretrained(tmp_path / "dino")
  images = transformers.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=SQUARE)
  images.save_pretrained(tmp_path / "dino")
  members, drawn = [], [picture(i) for i in range(12)]
  for i, content in enumerate(drawn):
    members += [(f"{i}.jpg", content), (f"{i}.cls", str(i % 3).encode()), (f"{i}.txt", b"a cat")]
  source = write_tar(tmp_path / "val.tar", members)
  evals = dict(
    alike=dict(type="image_retrieval", source=source),
    near=dict(type="knn", train=source, test=source, neighbours=1),
  )
  found = bigalign.evaluate(tmp_path / "dino", evals=evals)
  opened = [Image.open(io.BytesIO(content)) for content in drawn]
  zimg = bigalign.load(tmp_path / "dino").embed_images(opened)
  alike = zimg @ zimg.T - 9 * np.eye(12)
  expected = np.mean(alike.argmax(1) % 3 == np.arange(12) % 3)
  assert found["val/alike/image_to_image_R@1"] == pytest.approx(expected)
  assert found["val/near-knn-top1"] == 1, "each image is its own neighbour"
  with pytest.raises(ValueError, match="stored vectors"):
    bigalign.evaluate(tmp_path / "dino", retrieval=source)
