"""CLIP_benchmark's folders: what lies outside the shards is read too."""

from __future__ import annotations

import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_shards import write_tar
from PIL import Image

from bigalign import sharding
from bigalign.data.loader.options import resolve_data
from bigalign.data.sources.webdataset import WebDataset
from bigalign.evals.embed import Context, most_captions
from bigalign.evals.zeroshot import average_precision, zeroshot

FIVE = "one dog\na dog, running\nline\u2028inside\n\n two dogs \r\nfive"


@pytest.fixture
def root(tmp_path):
  """A folder with two shards of three samples."""
  file = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(file, "png")
  (tmp_path / "test").mkdir()
  for shard in range(2):
    names = [f"s{shard}{i}" for i in range(3)]
    texts = {f"{name}.txt": FIVE.encode() for name in names}
    images = {f"{name}.png": file.getvalue() for name in names}
    members = dict(sorted((images | texts).items()))
    write_tar(tmp_path / f"test/{shard}.tar", [*members.items()])
  (tmp_path / "test/nshards.txt").write_text("2")
  return tmp_path


def test_each_line_of_a_retrieval_dataset_is_a_caption(root):
  (root / "dataset_type.txt").write_text("Retrieval\n")
  source = WebDataset(f"{root}/test/*.tar")
  captions = ("one dog", "a dog, running", "line\u2028inside", "two dogs", "five")
  assert [source[i]["captions"] for i in range(6)] == [captions] * 6
  assert most_captions(source) == 5


def test_a_text_of_several_lines_is_noticed_once(root, caplog):
  source = WebDataset(f"{root}/test/*.tar")
  assert len(source[0]["captions"]) == len(source[1]["captions"]) == 1
  texts = [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]
  assert len(texts) == 1 and "has 6 lines and is read as one caption" in texts[0]


def test_the_number_of_shards_is_that_of_nshards_txt(root, caplog):
  pattern = f"{root}/test/*.tar"
  (root / "test/nshards.txt").write_text("1\n")
  assert len(WebDataset(pattern)) == 3
  assert any("left out 1 shards, ['1.tar']" in x.getMessage() for x in caplog.records)
  (root / "test/nshards.txt").write_text("4")
  with pytest.raises(ValueError, match=r"states 4 shards, but 2 are missing: .'2.tar', '3.tar'"):
    WebDataset(pattern)
  assert len(WebDataset(f"{root}/test/0.tar")) == 3  # some shards by name
  (root / "test/nshards.txt").write_text("many")
  with pytest.raises(ValueError, match=r"nshards\.txt: 'many' is not a number of shards"):
    WebDataset(pattern)


def test_an_unknown_kind_is_named(root):
  (root / "dataset_type.txt").write_text("detection")
  with pytest.raises(ValueError, match=r"dataset_type\.txt: 'detection'; known"):
    WebDataset(f"{root}/test/*.tar")


def npy(values):
  file = io.BytesIO()
  np.save(file, values)
  return file.getvalue()


def multilabel(folder, label_sets, *, seed=0):
  """A multilabel dataset of random 2x2 images, in shards of five; returns the images."""
  images = np.random.default_rng(seed).integers(0, 256, (len(label_sets), 2, 2, 3), np.uint8)
  for shard in range(-(-len(images) // 5)):
    members = []
    for i in range(shard * 5, min(shard * 5 + 5, len(images))):
      file = io.BytesIO()
      Image.fromarray(images[i]).save(file, "png")
      members.append((f"s{i:03}.png", file.getvalue()))
      if label_sets[i] is not None:
        members.append((f"s{i:03}.npy", label_sets[i]))
    write_tar(folder / f"test/{shard}.tar", members)
  (folder / "dataset_type.txt").write_text("multilabel\n")
  return images


NAMES = ("ant", "bee", "cat", "dog")


@jax.jit
def embed_image(params, image):
  z = image.reshape(len(image), -1) / 255 - 0.5
  return z / jnp.linalg.norm(z, axis=1, keepdims=True)


@jax.jit
def embed_text(params, ids, mask):
  z = jax.nn.one_hot(ids, 259)[:, :3].sum(1) @ params
  return z / jnp.linalg.norm(z, axis=1, keepdims=True)


PARAMS = np.random.default_rng(1).normal(size=(259, 12)).astype(np.float32)


def evaluator(folder, **options):
  data = resolve_data(dict(image_size=2, tokenizer=dict(name="byte", length=4)))
  context = Context("voc", embed_image, embed_text, sharding.make_mesh(), data)
  options = dict(templates=["{c}"], batch_size=8) | options
  return zeroshot(context, source=f"{folder}/test/*.tar", **options)


def theirs(scores, targets):
  """The mean over classes of the average precision, step by step as in CLIP_benchmark."""
  values = []
  for k in range(scores.shape[1]):
    hits, precisions = 0, []
    for rank, i in enumerate(np.argsort(-scores[:, k]), 1):
      if targets[i, k]:
        hits += 1
        precisions.append(hits / rank)
    values.append(sum(precisions) / max(hits, 1))
  return np.mean(values)


@pytest.mark.parametrize("dtype", ["float32", ">i8", "bool"])
def test_multilabel_is_the_mean_average_precision_of_the_classes(tmp_path, dtype, caplog):
  targets = np.random.default_rng(2).random((23, 4)) < 0.4
  targets[:, 2], targets[3] = False, False  # a class that no image has, an image without a class
  images = multilabel(tmp_path, [npy(row.astype(dtype)) for row in targets])
  (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
  metrics = evaluator(tmp_path)(PARAMS)
  ids = np.array([[ord(c) + 3 for c in name] for name in NAMES])
  scores = embed_image(None, images) @ embed_text(PARAMS, ids, ids > 0).T
  assert metrics.keys() == {
    f"val/voc-zeroshot-val-{name}"
    for name in ("mean_average_precision", "num_samples", "num_classes")
  }
  value = metrics["val/voc-zeroshot-val-mean_average_precision"]
  assert value == pytest.approx(theirs(np.asarray(scores), targets), abs=1e-6) and 0 < value < 1
  assert metrics["val/voc-zeroshot-val-num_samples"] == 23
  assert any("classes without images: 1 of 4" in x.getMessage() for x in caplog.records)
  assert "['cat']" in caplog.text


def test_multilabel_samples_without_labels_are_refused(tmp_path, caplog):
  (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
  good = npy(np.float32([1, 0, 0, 1]))
  multilabel(tmp_path / "a", [good, None, b"no array", good])
  (tmp_path / "a/classnames.txt").write_text("\n".join(NAMES))
  with pytest.raises(ValueError, match=r"multilabel, but 2 of 4 samples have no KEY.npy of 4"):
    evaluator(tmp_path / "a")(PARAMS)
  assert "s002.npy: not an .npy file" in caplog.text
  multilabel(tmp_path / "b", [good, npy(np.float32([1, 0, 1]))])
  (tmp_path / "b/classnames.txt").write_text("\n".join(NAMES))
  with pytest.raises(ValueError, match=r"s001\.npy has 3 numbers.* but there are 4 class names"):
    evaluator(tmp_path / "b")(PARAMS)


def test_the_order_of_images_with_equal_scores_does_not_matter():
  scores = np.float32([[1, 1], [1, 2], [1, np.nan], [1, 0]])
  positive = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], bool)
  for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
    # Of four equal scores one is positive; of the two positives one has the best score, one none.
    np.testing.assert_allclose(average_precision(scores[order], positive[order]), [1 / 4, 1 / 2])
