"""Evaluators that read stores find what they find from pixels and words."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store

from bigalign import sharding
from bigalign.data.files import checksums
from bigalign.data.image.decode import decode
from bigalign.data.loader.options import Stores, resolve_data
from bigalign.data.samples.ids import class_key
from bigalign.evals import make_evaluators
from bigalign.evals.zeroshot import fill

SIZE, LENGTH, WIDTH, COUNT = 8, 12, 12, 19
DATA = resolve_data(
  dict(image_size=SIZE, resize="squash", tokenizer=dict(name="byte", length=LENGTH))
)
NAMES, TEMPLATES = ("ant", "bee", "cat"), ("a {c}", "one {c}.")
DRAWS = np.random.default_rng(0)
PARAMS = {name: DRAWS.normal(size=(WIDTH, 6)).astype(np.float32) for name in ("image", "text")}
PIXELS = DRAWS.normal(size=(SIZE * SIZE * 3, WIDTH)).astype(np.float32)
IDS = DRAWS.normal(size=(259, WIDTH)).astype(np.float32)


def pooled_image(image):
  return (image.reshape(len(image), -1) / np.float32(255) - np.float32(0.5)) @ PIXELS


def pooled_text(ids, mask):
  place = 1 + jnp.arange(ids.shape[1]) / 10
  return jnp.einsum("bld,bl->bd", jnp.asarray(IDS)[ids], mask * place[None])


def unit(z):
  return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


@jax.jit
def embed_image(params, image):
  is_vector = jnp.issubdtype(image.dtype, jnp.floating)
  return unit((image if is_vector else pooled_image(image)) @ params["image"])


@jax.jit
def embed_text(params, text, mask):
  is_vector = jnp.issubdtype(text.dtype, jnp.floating)
  return unit((text if is_vector else pooled_text(text, mask)) @ params["text"])


def tokens(texts):
  return DATA.make_tokenizer().encode_batch(texts)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
  """Shards of which sample 3 does not decode and sample 5 has no caption, and their stores."""
  folder = tmp_path_factory.mktemp("stored")
  members, images, texts = [], {}, {}
  for i in range(COUNT):
    captions = [] if i == 5 else [f"text {n} of {i}" for n in range(1 + i % 2)]
    image, key = b"no image" if i == 3 else picture(i), f"val.tar/{i:03}"
    members += [
      (f"{i:03}.jpg", image),
      (f"{i:03}.cls", str(i % 3).encode()),
      (f"{i:03}.json", json.dumps(dict(captions=captions)).encode()),
    ]
    if i != 3:
      images[key] = np.asarray(pooled_image(DATA.evaluation_view(decode(image))[None]))[0]
    if captions:
      texts[key] = np.asarray(pooled_text(*tokens(captions)))
  labels = {key: int(key[-3:]) % 3 for key in images}
  return dict(
    source=write_tar(folder / "val.tar", members),
    image=write_store(folder / "image", images, labels=labels),
    text=write_store(folder / "text", texts),
  )


def measured(data=DATA, **options):
  evaluators = make_evaluators(
    dict(val=dict(batch_size=8, **options)),
    embed_image=embed_image,
    embed_text=embed_text,
    mesh=sharding.make_mesh(),
    data=data,
  )
  return evaluators["val"](PARAMS)


@pytest.mark.parametrize(
  "stored", [("image",), ("text",), ("image", "text")], ids=lambda sides: "-".join(sides)
)
def test_retrieval_from_stores_is_that_from_pixels_and_words(val, stored):
  source = val["source"] if len(stored) < 2 else ""
  stores = {f"{side}_store": val[side] for side in stored}
  found = measured(type="retrieval", source=source, fields=("json.captions",), **stores)
  expected = measured(type="retrieval", source=val["source"], fields=("json.captions",))
  assert expected["val/num_samples"] == COUNT - 2 and expected["val/num_captions"] == COUNT - 2 + 7
  # The store has no row of the image that does not decode, so nothing is left out of it.
  expected["val/rejected"] -= stored == ("image", "text")
  assert found == expected


def test_geometry_from_stores_is_that_from_pixels_and_words(val):
  stores = {f"{side}_store": val[side] for side in ("image", "text")}
  found = measured(type="geometry", **stores)
  expected = measured(type="geometry", source=val["source"], fields=("json.captions",))
  same = {name for name in expected if "linsep" not in name}  # its split is by place
  assert len(same) > 10 and expected["val/num_samples"] == COUNT - 2
  for name in same:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def prompts(folder, names, templates=TEMPLATES):
  vectors = {
    class_key(i, name): np.asarray(pooled_text(*tokens([fill(t, name) for t in templates])))
    for i, name in enumerate(names)
  }
  return write_store(folder, vectors)


@pytest.mark.parametrize("images", ["pixels", "joined", "alone"])
def test_zeroshot_from_stores_is_that_from_pixels_and_words(val, images, tmp_path):
  (tmp_path / "names.txt").write_text("\n".join(NAMES))
  options = dict(type="zeroshot", classnames=str(tmp_path / "names.txt"))
  expected = measured(source=val["source"], templates=TEMPLATES, **options)
  options |= dict(class_store=prompts(tmp_path / "classes", NAMES))
  options |= {} if images == "alone" else dict(source=val["source"])
  options |= {} if images == "pixels" else dict(image_store=val["image"])
  found = measured(**options)
  assert expected["val/val-zeroshot-val-num_samples"] == COUNT - 1
  if images == "alone":  # the store has no row of the image that does not decode
    del expected["val/val-zeroshot-val-rejected"]
  assert found == expected


def test_stores_that_cannot_be_evaluated_are_named(val, tmp_path):
  def fails(message, **options):
    with pytest.raises(ValueError, match=message):
      measured(**options)

  kind = dict(type="retrieval")
  fails("config.evals.val: give a source, or else image_store$", **kind, text_store=val["text"])
  fails("give a source, or else image_store and text_store", **kind)
  fails("has no effect", **kind, source="x", image_store=val["image"], text_store=val["text"])
  (tmp_path / "names.txt").write_text("\n".join(NAMES))
  options = dict(type="zeroshot", classnames=str(tmp_path / "names.txt"), image_store=val["image"])
  fails(
    "class_store=.* has no prompt of 1 of 3 classes .*cat",
    **options,
    class_store=prompts(tmp_path / "two", NAMES[:2]),
  )


def test_vectors_made_another_way_than_those_of_training_are_named(val, tmp_path, caplog):
  for name, more in (("same", {}), ("other", dict(weights="b"))):
    folder = tmp_path / name
    shutil.copytree(val["text"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["header"] |= more
    (folder / "manifest.json").write_text(json.dumps(checksums.seal(manifest)))
    trained = dataclasses.replace(DATA, stores=Stores(text=str(folder)))
    caplog.clear()
    measured(trained, type="retrieval", image_store=val["image"], text_store=val["text"])
    text = "text_store=" + val["text"] + " holds vectors that were made another way"
    assert (text in caplog.text) == (name == "other") == ("['weights'] differ" in caplog.text)
