"""A student sees the very views of images that its teachers saw, with their vectors."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest
from helpers.batches import data_options
from helpers.hosts import assert_equal_on_hosts
from helpers.shipped import load
from helpers.small_checkpoints import CLIP, clip_keys
from helpers.small_checkpoints import folder as checkpoint
from helpers.small_shards import picture, write_tar
from PIL import Image

from bigalign import sharding
from bigalign.config import resolve_config
from bigalign.data.stores.reader import Store
from bigalign.frozen.reinforce import reinforce
from bigalign.frozen.towers import load_towers
from bigalign.inputs import open_data

COUNT, VIEWS, B = 24, 3, 16
CROP = dict(scale=(0.1, 0.6), flip=0.5)
# Draws of every kind: of the crop, of operations, of colours.
AUGMENT = dict(
  CROP,
  rand_augment={},
  grayscale=0.2,
  color_jitter=dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
)


def shards(path, *, size=(200, 160)) -> str:
  """Images large enough for a decoder to shrink them, each with two captions."""
  members = []
  for i in range(COUNT):
    members += [(f"{i:03d}.jpg", picture(i, size=size))]
    members += [(f"{i:03d}.json", f'{{"captions": ["word{i % 8}", "word{(i + 1) % 8}"]}}'.encode())]
  return write_tar(path / "0.tar", members)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  made = tmp_path_factory.mktemp("reinforced")
  checkpoint(made / "clip", CLIP, clip_keys())
  shards(made)
  (made / "words.txt").write_text(" ".join(f"word{i}" for i in range(8)))
  return made


def teacher(root) -> dict:
  c = load("tiny").to_dict()
  c["model"] = dict(init=str(root / "clip"))
  c["data"] = dict(
    source=f"{root}/0.tar",
    image_size=16,
    captions=("json.captions",),
    tokenizer=dict(name="words", vocabulary=str(root / "words.txt"), length=6),
    augment=AUGMENT,
    workers=0,
  )
  return c | dict(evals={}, frozen="")


@pytest.fixture(scope="module")
def stores(root):
  return reinforce(teacher(root), root / "a", views=VIEWS, seed=7, batch_size=8, dtype="float32")


def student(root, stores, **changes) -> dict:
  a = {side: str(folder) for side, folder in stores.items()}
  return teacher(root)["data"] | dict(teachers=dict(a=a)) | changes


def take(data: dict, count: int = 3) -> dict[str, np.ndarray]:
  inputs = open_data(data_options(**data))
  with contextlib.closing(
    inputs.batches(rejected_log="", batch_size=B, rows=np.arange(B), seed=1)
  ) as batches:
    some = [next(batches) for _ in range(count)]
  return {name: np.concatenate([batch[name] for batch in some]) for name in some[0]}


@pytest.mark.slow
def test_the_teacher_says_of_the_students_pixels_what_the_store_says(root, stores):
  image = Store(stores["image"])
  assert len(image) == COUNT * VIEWS and len(Store(stores["text"])) == 2 * COUNT
  batch = take(student(root, stores))
  values = teacher(root)
  towers = load_towers(
    values, resolve_config(values), ["image", "text"], COUNT, dtype="float32", projected=True
  )
  mesh = towers.mesh
  with jax.set_mesh(mesh):
    on_mesh = sharding.global_batch(
      mesh,
      {name: batch[name] for name in ("image", "text", "text_mask")},
      np.arange(len(batch["image"])),
      len(batch["image"]),
    )
    z = np.asarray(towers.run["image"](on_mesh["image"]))
    texts = np.asarray(towers.run["text"](on_mesh["text"], on_mesh["text_mask"]))
  np.testing.assert_allclose(batch["teacher_img"], z, atol=2e-6)
  np.testing.assert_allclose(batch["teacher_txt"], texts, atol=2e-6)
  # Each image is seen in several views, which differ.
  first = batch["image_id"][:, 1] == batch["image_id"][0, 1]
  every = {row.tobytes() for row in batch["teacher_img"]}
  assert first.sum() >= 1 and len(every) > COUNT, "other views are drawn later"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_views_are_equal_on_any_hosts_and_workers_and_after_a_resume(root, stores, hosts, workers):
  assert_equal_on_hosts(student(root, stores), hosts, workers)


def test_a_larger_student_sees_the_same_crops(root, tmp_path):
  """Without operations such as sharpening, which depend on the size."""
  values = teacher(root)
  values["data"]["augment"] = CROP
  image = reinforce(values, tmp_path / "a", views=VIEWS, batch_size=8, sides=("image",))
  small, large = (
    take(student(root, image, augment=CROP, image_size=size), 1)["image"] for size in (16, 32)
  )
  for a, b in zip(small, large):
    resized = np.asarray(Image.fromarray(b).resize((16, 16), Image.Resampling.BOX))
    assert np.abs(resized.astype(int) - a).mean() < 6
    other = np.abs(np.roll(resized, 5, 1).astype(int) - a).mean()
    assert other > np.abs(resized.astype(int) - a).mean()


def test_the_same_command_goes_on_and_another_seed_is_refused(root, stores):
  before = Store(stores["image"]).fingerprint
  again = reinforce(teacher(root), root / "a", views=VIEWS, seed=7, batch_size=8, dtype="float32")
  assert Store(again["image"]).fingerprint == before
  with pytest.raises(ValueError, match="reinforced"):
    reinforce(teacher(root), root / "a", views=VIEWS, seed=8, batch_size=8, dtype="float32")


def test_views_of_other_options_are_an_error(root, stores):
  with pytest.raises(ValueError, match=r"scale=\[0\.1, 0\.6\] there, \[0\.2, 0\.6\] here"):
    open_data(data_options(**student(root, stores, augment=AUGMENT | dict(scale=(0.2, 0.6)))))
  with pytest.raises(ValueError, match="apply_exif=False there, True here"):
    open_data(data_options(**student(root, stores, apply_exif=True)))


def test_images_of_another_size_are_rejected(root, stores, tmp_path):
  other = shards(tmp_path, size=(100, 80))
  data = student(root, stores, source=other, stop_at_bad_shard=False)
  with pytest.raises(ValueError, match="the teacher saw an image of 160 x 200 pixels"):
    take(data, 1)
