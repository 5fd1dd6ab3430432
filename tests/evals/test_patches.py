"""Segmentation and retrieval of regions by a model that sees colours; measures by hand."""

from __future__ import annotations

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce
from helpers.small_shards import write_tar
from PIL import Image

from bigalign import sharding, tree
from bigalign.data.loader.options import resolve_data
from bigalign.evals.embed import Context
from bigalign.evals.regions import region_retrieval
from bigalign.evals.segmentation import confusion, measures, read_labels, segmentation
from bigalign.losses.heads import prompter
from bigalign.model import make_model
from bigalign.sphere import unit
from bigalign.towers.base import TowerOutput

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
NAMES = ("r", "g", "b")


def png(array, palette=False) -> bytes:
  file = io.BytesIO()
  image = Image.fromarray(array)
  if palette:
    image = image.convert("P") if array.ndim == 3 else image
    image.putpalette([5, 5, 5] * 256)
  image.save(file, "png")
  return file.getvalue()


def context(batch_size=16):
  """A model whose embedding of a patch is its colour, and of a class name its colour."""
  data = resolve_data(dict(image_size=32, tokenizer=dict(name="byte", length=8)))
  words = data.make_tokenizer().encode_batch([*NAMES])[0]

  def embed_text(params, ids, mask):
    same = (ids[:, None, :] == jnp.asarray(words)[None]).all(-1)
    return same.astype(jnp.float32)

  def embed_patches(params, image):
    colours = reduce(image.astype(jnp.float32), "b (h p) (w q) c -> b (h w) c", "mean", p=8, q=8)
    return unit(colours)

  def embed_image(params, image):
    return jnp.ones((len(image), 3))

  return Context(
    "val", embed_image, embed_text, sharding.make_mesh(), data, embed_patches=embed_patches
  )


def shard(folder, member, **changes):
  """Two images in halves of colours, wider than high, and their labels; a file of class names."""
  halves = np.zeros((16, 48), np.int32), np.ones((16, 48), np.int32)
  halves[0][:, 24:] = 2
  halves[1][8:] = 0
  members = []
  for i, classes in enumerate(halves):
    members.append((f"{i}.jpg", png(COLOURS[classes])))
    members.append((f"{i}.{member}", png((classes + 1).astype(np.uint8), palette=True)))
  (folder / "classes.txt").write_text("\n".join(NAMES))
  given = dict(source=write_tar(folder / "val.tar", members), classnames=f"{folder}/classes.txt")
  return given | dict(templates=["{c}"], first=1, batch_size=8) | changes


def test_a_model_of_colours_finds_them_all(tmp_path):
  """Images that are wider than high, whose borders are those of patches."""
  found = segmentation(context(), **shard(tmp_path, "seg.png"))(None)
  assert found["val/val-segmentation-mean_iou"] == 1
  assert found["val/val-segmentation-pixel_accuracy"] == 1
  assert found["val/val-segmentation-num_samples"] == 2
  assert found["val/val-segmentation-num_classes"] == 3


def test_the_first_images_are_shown_with_their_labels_and_what_was_found(tmp_path):
  shown = segmentation(context(), **shard(tmp_path, "seg.png")).examples(None, 1)
  assert shown.names == [*NAMES] and shown.images.shape == (1, 32, 32, 3)
  assert (shown.labels[:, :, :16] == 0).all() and (shown.labels[:, :, 16:] == 2).all()
  np.testing.assert_array_equal(shown.found, shown.labels)
  assert np.abs(shown.images - COLOURS[shown.labels].astype(int)).max() < 90  # a border is smoothed
  assert len(segmentation(context(), **shard(tmp_path, "seg.png")).examples(None, 9).images) == 2


def test_labels_of_another_class_lower_the_measures(tmp_path):
  given = shard(tmp_path, "seg.png", first=0)  # 1, 2, 3: the last has no class
  with pytest.raises(ValueError, match=r"val\.source: sample .*: the value 3 has no class"):
    segmentation(context(), **given)(None)
  given["ignore"] = 3
  found = segmentation(context(), **given)(None)
  assert found["val/val-segmentation-mean_iou"] == 0


def test_a_sample_without_labels_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"sample val.tar/0: it has no 'seg.png'"):
    segmentation(context(), **shard(tmp_path, "mask.png"))(None)
  assert segmentation(context(), **shard(tmp_path, "mask.png", labels="mask.png"))(None)


def test_phrases_find_their_regions(tmp_path):
  """In each half of an image is a colour; the phrase of a wrong box is not found first."""
  halves = np.zeros((16, 48), np.int32), np.ones((16, 48), np.int32)
  halves[0][:, 24:] = 2
  halves[1][8:] = 0
  left, right, top = [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 0.5]
  regions = [[(left, "r"), (right, "b")], [(top, "g")]], [[(left, "b"), (right, "r")], [(top, "g")]]
  for wrong, given in enumerate(regions):
    members = []
    for i, (classes, own) in enumerate(zip(halves, given)):
      boxes = [dict(box=box, phrase=phrase) for box, phrase in own]
      stored = json.dumps(dict(regions=boxes)).encode()
      members += [(f"{i}.jpg", png(COLOURS[classes])), (f"{i}.json", stored)]
    source = write_tar(tmp_path / f"{wrong}.tar", members)
    found = region_retrieval(context(), source=source, batch_size=8)({})
    for name in ("text_to_region", "region_to_text"):
      expected = 1 / 3 if wrong else 1
      assert found[f"val/val-regions-{name}_R@1"] == pytest.approx(expected)
      assert found[f"val/val-regions-{name}_R@5"] == 1
    assert found["val/val-regions-num_regions"] == found["val/val-regions-num_phrases"] == 3
  with pytest.raises(
    ValueError, match=r"sample .*/0: no_column: the regions of sample 0 \(json.no\) are missing"
  ):
    region_retrieval(context(), source=source, field="json.no")


@pytest.mark.slow
def test_regions_of_a_trained_prompter(tmp_path):
  """The embedding of each phrase is what the Prompter gives for its box, which pooling does not."""
  given = [("r", [0, 0, 0.5, 1]), ("g", [0.5, 0, 1, 1]), ("b", [0.25, 0.25, 0.75, 0.5])]
  regions = json.dumps(dict(regions=[dict(phrase=name, box=box) for name, box in given])).encode()
  grey = png(np.full((16, 48, 3), 127, np.uint8))  # without a colour: boxes pool to one vector
  source = write_tar(tmp_path / "0.tar", [("0.jpg", grey), ("0.json", regions)])
  tokens = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 32)), jnp.float32)
  layers = prompter.init(jax.random.key(0), tokens, 3, grounds=False)
  wanted = prompter.regions(layers, tokens, jnp.asarray([[box for _, box in given]], jnp.float32))

  def image_output(params, image):
    same = jnp.broadcast_to(tokens, (len(image), 16, 32))
    return TowerOutput(same.mean(1), same)

  def embed_text(params, ids, mask):
    return context().embed_text(params, ids, mask) @ unit(wanted[0])

  of_model = context()._replace(image_output=image_output, embed_text=embed_text)
  evaluate = region_retrieval(of_model, source=source, batch_size=8)
  found = {
    name: evaluate(tree.flatten(params, "heads/region_phrase/"))
    for name, params in (("prompter", layers), ("boxes", {}))
  }
  recalls = {name: x["val/val-regions-text_to_region_R@1"] for name, x in found.items()}
  assert recalls["prompter"] == 1 and recalls["boxes"] < 1


def test_measures_by_hand():
  counts = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
  found = measures(counts)
  np.testing.assert_allclose(found["mean_iou"], (3 / 6 + 4 / 7) / 2)
  np.testing.assert_allclose(found["pixel_accuracy"], 7 / 10)
  np.testing.assert_allclose(found["mean_class_accuracy"], (3 / 4 + 4 / 6) / 2)


def test_confusion_counts_what_is_known():
  rng = np.random.default_rng(0)
  scores, labels = rng.normal(size=(3, 4, 4, 5)), rng.integers(-1, 5, (3, 4, 4))
  found = jax.jit(confusion)(jnp.asarray(scores), jnp.asarray(labels))
  wanted = np.zeros((5, 5), int)
  for row, column in zip(labels.ravel(), scores.argmax(-1).ravel()):
    if row >= 0:
      wanted[row, column] += 1
  np.testing.assert_array_equal(found, wanted)


def test_labels_of_other_images():
  labels = np.array([[0, 1], [255, 2]], np.uint8)
  found = read_labels(png(labels), 4, 1, 255, 2)
  np.testing.assert_array_equal(found[::2, ::2], [[-1, 0], [-1, 1]])
  wide = read_labels(png(labels.astype(np.uint16) + 300), 2, 300, 0, 256)
  np.testing.assert_array_equal(wide, labels)
  for stored, said in ((b"no", "not an image"), (png(COLOURS[labels % 3]), "mode RGB")):
    with pytest.raises(ValueError, match=said):
      read_labels(stored, 4, 0, 255, 3)


@pytest.mark.slow
def test_patches_of_a_model_are_projected_as_its_images_are():
  """With mean pooling and a linear projector, the mean of the patches is the image."""
  tower = dict(name="vit", width=16, depth=1, heads=2, patch=8, pool="mean", dtype="float32")
  text = dict(name="text", width=16, depth=1, heads=2, vocab_size=9, length=4, dtype="float32")
  model = make_model(image=tower, text=text, embed_dim=8)
  image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  params = model.init(jax.random.key(0), image, np.zeros((2, 4), np.int32))
  output = model.apply(params, image, method="image_output")
  patches = model.apply(params, output, method="projected_patches")
  whole = model.apply(params, image, method="embed_image")
  np.testing.assert_allclose(unit(patches.mean(1)), whole, atol=1e-5)
  embedded = model.apply(params, image, method="embed_patches")
  np.testing.assert_allclose(embedded, unit(patches), atol=1e-6)
