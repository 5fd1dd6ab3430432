"""What bigalign.load returns: embeddings, probabilities and similarities of a run."""

from __future__ import annotations

import concurrent.futures
import io
import time

import jax
import numpy as np
import pytest
from PIL import Image

import bigalign
from bigalign.api.image_inputs import View
from bigalign.api.model import _on_all
from bigalign.data.image.reading import ImageReading
from bigalign.evaluate import open_run
from bigalign.losses import LossTerms
from bigalign.losses.logit_head import LogitHead, of_losses, scalars
from bigalign.options import resolve_value


@pytest.fixture(scope="module")
def model(run_folder):
  return bigalign.load(run_folder)


def encoded(image, kind="png"):
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


@pytest.mark.slow
def test_a_run_embeds_as_its_evaluators_do(run_folder, model, pictures):
  run = open_run(run_folder)
  squares = np.stack([run.config.data.evaluation_view(np.asarray(x)) for x in pictures])
  padded = np.concatenate([squares, squares[:3]])
  with jax.set_mesh(run.mesh):
    zimg = np.asarray(run.embed["embed_image"](run.params, padded))[: len(pictures)]
    ids, mask = run.config.data.make_tokenizer().encode_batch(["a cat", "ä dog"] * 4)
    ztxt = np.asarray(run.embed["embed_text"](run.params, ids, mask))[:2]
  np.testing.assert_allclose(model.embed_images(pictures), zimg, atol=1e-6)
  np.testing.assert_allclose(model.embed_texts(["a cat", "ä dog"]), ztxt, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(zimg, axis=1), 1, atol=1e-6)
  np.testing.assert_allclose(model.similarity(pictures, ["a cat"]), zimg @ ztxt[:1].T, atol=1e-6)
  assert model.config["total_steps"] == 2 and "images of 32 pixels, texts of 48 tokens" in repr(
    model
  )


@pytest.mark.slow
def test_images_of_every_kind_have_the_same_embedding(model, pictures, tmp_path):
  image = pictures[0]
  image.save(tmp_path / "a.png")
  pixels = np.asarray(image)
  kinds = [
    image,
    str(tmp_path / "a.png"),
    tmp_path / "a.png",
    encoded(image),
    memoryview(encoded(image)),
    pixels,
    jax.numpy.asarray(pixels),
    image.convert("RGBA"),
  ]
  z = model.embed_images(kinds)
  assert z.shape == (8, 64) and z.dtype == np.float32
  np.testing.assert_array_equal(z, np.repeat(z[:1], 8, axis=0))
  for one in (image, tmp_path / "a.png", encoded(image), pixels, pixels[None]):
    np.testing.assert_allclose(model.embed_images(one), z[:1], atol=1e-6)
  grey = image.convert("L")
  np.testing.assert_array_equal(model.preprocess(grey), model.preprocess(np.asarray(grey)))


def test_the_number_of_images_does_not_change_an_embedding(model, pictures):
  """13 images on 8 devices, in batches of every kind; a generator has no length."""
  many = [pictures[i % 5].rotate(i) for i in range(13)]
  z = model.embed_images(many)
  for size in (1, 8, 13, 1000):
    found = model.embed_images((x for x in many), batch_size=size)
    np.testing.assert_allclose(found, z, atol=1e-6)
  assert model.embed_images([]).shape == model.embed_texts([]).shape == (0, 64)


def test_a_bad_image_is_named(model, pictures, tmp_path):
  whole = encoded(pictures[0], "jpeg")
  (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r"images\[2\] \(.*cut\.jpg\): "):
    model.embed_images([pictures[0], whole, tmp_path / "cut.jpg"])
  with pytest.raises(FileNotFoundError, match=r"images\[1\] \(nope\.jpg\): no such file"):
    model.embed_images([pictures[0], "nope.jpg"])
  with pytest.raises(TypeError, match=r"images\[0\]: int is not an image"):
    model.embed_images([3])
  with pytest.raises(ValueError, match=r"images\[0\]: .*float32, expected uint8"):
    model.embed_images(np.zeros((2, 8, 8, 3), np.float32))
  with pytest.raises(OSError, match=r"images\[0\] .*: "):
    model.preprocess(tmp_path)
  with pytest.raises(TypeError, match=r"texts\[1\] is of type NoneType"):
    model.embed_texts(["a", None])
  lazy = Image.open(io.BytesIO(whole[: len(whole) // 2]))  # Pillow reads the pixels later
  with pytest.raises(ValueError, match=r"images\[0\]: truncated"):
    model.embed_images(lazy)


def test_an_open_file_is_read_by_one_thread_at_a_time(pictures):
  """A list may hold an image twice, and Pillow reads its pixels when they are first needed."""
  image = Image.open(io.BytesIO(encoded(pictures[0])))
  read, now, most = image.load, [], []

  def load():
    now.append(1)
    most.append(len(now))
    time.sleep(0.002)
    now.pop()
    return read()

  image.load = load
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    squares = list(pool.map(View(ImageReading(image_size=8)), [image] * 8))
  assert len(most) >= 8 and max(most) == 1
  np.testing.assert_array_equal(squares, [squares[0]] * 8)


def test_a_process_reads_its_rows_of_a_batch(model, pictures, monkeypatch):
  """The first half of the eight rows is another's; images fill the end of the batch."""
  made = []

  def stop(mesh, batch, rows, size):
    made.append(batch["image"])
    raise InterruptedError

  monkeypatch.setattr("bigalign.sharding.host_rows", lambda mesh, size: np.arange(size // 2, size))
  monkeypatch.setattr("bigalign.sharding.global_batch", stop)
  for own in (2, 1):
    with pytest.raises(InterruptedError):
      model.embed_images(["nope.jpg"] * 4 + pictures[:own])
    kept = pictures[:own] + pictures[:1] * (4 - own)
    np.testing.assert_array_equal(made.pop(), model.preprocess(kept))


def test_an_error_of_one_process_ends_all(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  gathered = "jax.experimental.multihost_utils.process_allgather"
  monkeypatch.setattr(gathered, lambda failed: np.asarray([failed, False]))
  assert _on_all(lambda: {"image": 1}) == {"image": 1}

  def broken():
    raise ValueError("images[3]: truncated")

  with pytest.raises(ValueError, match="truncated"):
    _on_all(broken)
  monkeypatch.setattr(gathered, lambda failed: np.asarray([failed, True]))
  with pytest.raises(RuntimeError, match="process 1 of the run could not read"):
    _on_all(lambda: {"image": 1})


def test_texts_share_batches_with_texts_of_their_length(model, monkeypatch):
  texts = [f"{'x' * (13 * i % 31)} ä" for i in range(20)]
  alone = np.concatenate([model.embed_texts(text) for text in texts])
  shapes, embed = [], model._embed_text

  def record(params, ids, mask):
    shapes.append(ids.shape)
    return embed(params, ids, mask)

  monkeypatch.setattr(model, "_embed_text", record)
  z = model.embed_texts(texts, batch_size=8)
  np.testing.assert_allclose(z, alone, rtol=0, atol=1e-6)
  assert shapes == [(8, 16), (8, 32), (8, 48)]  # of 48 positions
  iterated = model.embed_texts(iter(texts), batch_size=8)  # in their own order
  np.testing.assert_allclose(iterated, alone, rtol=0, atol=1e-6)
  assert shapes[3:] == [(8, 48), (8, 32), (8, 48)]
  with pytest.raises(TypeError, match=r"texts\[1\] is of type int"):
    model.embed_texts(["a long text", 5, "b"], batch_size=8)


def test_each_process_cuts_texts_to_the_longest_of_all(model, monkeypatch):
  made = []

  def stop(mesh, batch, rows, size):
    made.append(batch["ids"])
    raise InterruptedError

  monkeypatch.setattr("bigalign.sharding.global_batch", stop)
  for rows in (range(4), range(4, 8)):
    own = np.asarray(rows)
    monkeypatch.setattr("bigalign.sharding.host_rows", lambda mesh, size, own=own: own)
    with pytest.raises(InterruptedError):
      model.embed_texts(["x"] * 7 + ["a text of 23 characters"])
  assert [x.shape for x in made] == [(4, 24), (4, 24)]
  assert (made[0] > 0).sum() == 4 * 2 and (made[1] > 0).sum() == 3 * 2 + 24


def test_probabilities_follow_the_loss(model, pictures):
  scale, bias = np.exp(np.asarray(model.params["t"])), np.asarray(model.params["b"])
  cosines = model.similarity(pictures, ["a cat", "a dog", "x"])
  np.testing.assert_allclose(
    model.classify(pictures, ["a cat", "a dog", "x"]),
    1 / (1 + np.exp(-(scale * cosines + bias))),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    model.logits(pictures, "x")[:, 0], scale * cosines[:, 2] + bias, rtol=1e-5
  )
  z = model.embed_images(pictures)
  names, templates = ["cat", "dog"], ["a {}.", "the {c}"]
  means = [model.embed_texts([f"a {x}.", f"the {x}"]).mean(0) for x in names]
  classes = np.stack([x / np.linalg.norm(x) for x in means])
  np.testing.assert_allclose(model.embed_classes(names, templates), classes, atol=1e-6)
  np.testing.assert_allclose(
    model.classify(z, names, templates), model.head.probabilities(z @ classes.T), rtol=1e-4
  )
  assert model.classify(pictures, ["cat"], "simple").shape == (5, 1)
  with pytest.raises(ValueError, match="templates: unknown 'photo'"):
    model.classify(pictures, ["cat"], "photo")


def test_softmax_and_sigmoid():
  cosines = np.float32([[1.0, 0.5], [-1.0, -1.0]])
  found = LogitHead(1000.0, 0.0, False).probabilities(cosines)
  np.testing.assert_allclose(found, [[1, 0], [0.5, 0.5]], atol=1e-6)
  found = LogitHead(1000.0, 0.0, True).probabilities(cosines)
  np.testing.assert_allclose(found, [[1, 1], [0, 0]], atol=1e-6)
  assert LogitHead(1.0, 0.0, False).probabilities(np.zeros((2, 0))).shape == (2, 0)


@pytest.mark.parametrize(
  "loss, params, head",
  [
    (dict(siglip={}), {"loss/siglip/t": 0.0, "loss/siglip/b": -3.0}, LogitHead(1.0, -3.0, True)),
    (
      dict(clip=dict(b_init=-10.0)),
      {"loss/clip/t": 0.0, "loss/clip/b": 0.5},
      LogitHead(1, 0.5, False),
    ),
    (dict(sogclr=dict(tau=0.05)), {}, LogitHead(20.0, 0.0, False)),
    (dict(sogclr={}, sail={}), {"loss/sail/t": 0.0, "loss/sail/b": 1.0}, LogitHead(1.0, 1.0, True)),
    (dict(albef_itc={}), {"loss/albef_itc/temperature": 0.5}, LogitHead(2.0, 0.0, False)),
    (dict(clip_gap=dict(t_init=100.0, t_learned=False)), {}, LogitHead(100.0, 0.0, False)),
    (
      dict(matryoshka=dict(base="siglip")),
      {"loss/matryoshka/t": 0.0, "loss/matryoshka/b": -1.0},
      LogitHead(1.0, -1.0, True),
    ),
    (
      dict(matryoshka=dict(base="siglip", dims=(8, 64), shared=False)),
      {
        "loss/matryoshka/d64/t": 0.0,
        "loss/matryoshka/d64/b": -2.0,
        "loss/matryoshka/d8/t": 1.0,
        "loss/matryoshka/d8/b": -1.0,
      },
      LogitHead(1.0, -2.0, True),
    ),
    (
      dict(matryoshka=dict(base="sogclr", base_options=dict(tau=0.05), dims=(8, 64))),
      {},
      LogitHead(20.0, 0.0, False),
    ),
    (dict(matryoshka=dict(base="clip_gap")), {}, LogitHead(100.0, 0.0, False)),
  ],
)
def test_scale_bias_and_kind_of_each_loss(loss, params, head):
  terms = resolve_value(LossTerms, loss, "config.loss")
  learned = {k: np.float32(x) for k, x in params.items()}
  assert of_losses(learned, terms) == head
  arrays = scalars(learned, terms)
  np.testing.assert_allclose(np.exp(arrays["t"]), head.scale, rtol=1e-6)
  assert arrays.get("b", 0) == head.bias


@pytest.mark.slow
def test_apply_is_pure(model, pictures):
  images, (ids, mask) = model.preprocess(pictures), model.tokenize(["a cat", "a dog"])
  out = jax.jit(model.apply)(model.params, images, ids, mask)
  np.testing.assert_allclose(out["zimg"], model.embed_images(pictures), atol=1e-6)
  np.testing.assert_allclose(
    out["logits"], model.logits(pictures, ["a cat", "a dog"]), rtol=1e-5, atol=1e-5
  )
  gradient = jax.jit(jax.grad(lambda p: model.apply(p, images, ids, mask)["logits"].sum()))(
    model.params
  )
  assert gradient.keys() == model.params.keys()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_steps_and_averages(run_folder, model, pictures):
  first, mean = bigalign.load(run_folder, step=1), bigalign.load(run_folder, ema=True)
  z = model.embed_images(pictures)
  for other in (first, mean):
    assert np.abs(other.embed_images(pictures) - z).max() > 1e-5
  with pytest.raises(FileNotFoundError, match="1, 2"):
    bigalign.load(run_folder, step=7)


@pytest.mark.slow
def test_half_precision_is_near(run_folder, model, pictures):
  fast = bigalign.load(run_folder, dtype="bfloat16")
  difference = np.abs(fast.embed_images(pictures) - model.embed_images(pictures)).max()
  assert 1e-6 < difference < 3e-2
