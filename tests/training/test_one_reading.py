"""Training, evaluation, embedding, report and export read images by the same options."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.shipped import load
from helpers.small_shards import picture, samples, write_tar
from PIL import Image

from bigalign.config import resolve_config
from bigalign.data.loader.evaluation import eval_batches
from bigalign.data.loader.options import resolve_data
from bigalign.data.loader.training import train_batches
from bigalign.data.sources.base import open_source
from bigalign.evaluate import open_run
from bigalign.program import layout, make_program
from bigalign.report import main as report
from bigalign.sharding import make_mesh
from bigalign.train import train

TOKENIZER = dict(name="byte", length=32)


def tiny(**data):
  """configs/tiny.py made smaller, two steps, on other data."""
  c = load("tiny").to_dict()
  c |= dict(total_steps=2, batch_size=16, log_every=1, checkpoint_every=0, evals={}, ema=0.0)
  c["model"]["image"] |= dict(width=32, depth=1)
  c["model"]["text"] |= dict(width=32, depth=1)
  c["writer"] = dict(tensorboard=False)
  c["data"] = dict(image_size=16, tokenizer=c["data"]["tokenizer"], workers=0) | data
  return c


def turned(seed, orientation):
  """A JPEG of 30 x 40 pixels whose EXIF data say that it lies on its side."""
  image = Image.open(io.BytesIO(picture(seed, size=(30, 40))))
  exif = image.getexif()
  exif[0x0112] = orientation
  file = io.BytesIO()
  image.save(file, "jpeg", exif=exif)
  return file.getvalue()


@pytest.mark.slow
def test_a_report_of_a_run_with_a_mixture(tmp_path):
  """Without evaluators the report draws training samples, of the first source of the mixture."""
  parts = [
    dict(name=name, source=write_tar(tmp_path / f"{name}.tar", samples(first, 20)))
    for name, first in (("one", 0), ("two", 20))
  ]
  train(tiny(mixture=parts), tmp_path / "run")
  run = open_run(tmp_path / "run")
  page = report.report(tmp_path / "run").read_text()
  assert "TRAINING samples" in page and "one.tar" in page and "two.tar" in page
  assert report.held_out(run.config)[0] == parts[0]["source"]


@pytest.mark.slow
def test_a_report_turns_images_as_its_run_did(tmp_path):
  """config.data.apply_exif holds for the images of the page too."""
  members = []
  for i in range(16):
    members += [(f"{i}.jpg", turned(i, 6)), (f"{i}.txt", f"picture {i}".encode())]
  source = write_tar(tmp_path / "turned.tar", members)
  images = {}
  for apply_exif in (False, True):
    workdir = tmp_path / f"run-{apply_exif}"
    train(tiny(source=source, apply_exif=apply_exif), workdir)
    images[apply_exif] = report.embed_pairs(open_run(workdir)).images
  upright = np.asarray(
    Image.open(io.BytesIO(turned(0, 1)))
    .rotate(-90, expand=True)
    .resize((16, 16), Image.Resampling.BICUBIC)
  )
  assert np.abs(images[True][0].astype(int) - upright).mean() < 3
  assert np.abs(images[False][0].astype(int) - upright).mean() > 10


def test_two_sides_of_stored_vectors_need_no_rule_of_transformers():
  """The default rules may match nothing; those that a config gives must match."""
  c = load("flame_b16").to_dict()
  c["model"] = dict(
    image=dict(name="features", width=8), text=dict(name="features", width=6), embed_dim=4
  )
  c |= dict(batch_size=16, frozen="", loss=dict(clip={}))
  config = resolve_config(c)
  program = make_program(config, dataset_size=100)
  _, shardings = layout(program, make_mesh(), config.rules)
  kernels = [f"model/{side}_projector/out/kernel" for side in ("image", "text")]
  assert sorted(shardings.trainable) == ["loss/clip/t", *kernels]
  with pytest.raises(ValueError, match=r"config\.rules: rules \['mlp'\] match no path"):
    layout(program, make_mesh(), [("mlp", ()), ("", ())])


@pytest.fixture
def photos(tmp_path):
  """Eight large images in a tar."""
  members = []
  for i in range(8):
    members += [(f"{i}.png", picture(i, size=(300 + i, 400), kind="png")), (f"{i}.txt", b"words")]
  return open_source(write_tar(tmp_path / "photos.tar", members))


def resized_and_cropped(image, edge, size):
  """torchvision's Resize(edge) and CenterCrop(size), by Pillow."""
  width, height = image.size
  short = min(width, height)
  width, height = int(edge * width / short), int(edge * height / short)
  left, top = round((width - size) / 2), round((height - size) / 2)
  resized = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(resized.crop((left, top, left + size, top + size)))


def test_resize_to_an_edge_then_crop_in_training_and_evaluation(photos):
  """256, then 224, as DINOv2's and SAIL's: both kinds of batches hold the same pixels."""
  data = resolve_data(
    dict(
      image_size=56,
      resize="shortest",
      resize_edge=64,
      tokenizer=TOKENIZER,
      shuffle=False,
      augment=dict(crop="evaluation"),
    )
  )
  where = dict(batch_size=8, rows=np.arange(8))
  (evaluated,) = eval_batches(photos, data, **where)
  trained = next(train_batches(photos, data, seed=0, stop=8, **where))
  expected = [
    resized_and_cropped(Image.open(io.BytesIO(photos[i]["image"])).convert("RGB"), 64, 56)
    for i in range(8)
  ]
  np.testing.assert_array_equal(evaluated["image"], expected)
  np.testing.assert_array_equal(trained["image"], expected)


def test_an_edge_that_has_no_effect_is_refused():
  data = dict(image_size=56, tokenizer=TOKENIZER)
  with pytest.raises(ValueError, match=r"resize_edge=64 has an effect with resize='shortest' only"):
    resolve_data(data | dict(resize_edge=64))
  with pytest.raises(ValueError, match=r"resize_edge=48 is smaller than image_size=56"):
    resolve_data(data | dict(resize="shortest", resize_edge=48))
  assert resolve_data(data).preprocessing() == dict(
    image_size=56, resize="squash", resize_edge=None, apply_exif=False
  )
