"""ResNets for CIFAR and MobileNetV2: the real weights on real photos, in a step, on a mesh."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.shipped import load

from bigalign import sharding, tree, weights
from bigalign.config import resolve_config
from bigalign.data.image.decode import decode
from bigalign.data.image.transforms import eval_image
from bigalign.data.sources.base import open_source
from bigalign.model import PIXELS
from bigalign.program import init_on_mesh, layout, make_program
from bigalign.run import flops
from bigalign.step import data_position, train_step
from bigalign.towers import TOWERS, mobilenet
from bigalign.weights import transfer

KEY = jax.random.key(0)
FILES = {
  "resnet20_cifar10": dict(name="resnet_cifar", depth=20),
  "resnet56_cifar10": dict(name="resnet_cifar", depth=56),
  "mobilenetv2_1.0_224_imagenet": dict(name="mobilenet_v2"),
}


def make(checkpoint):
  """(tower, {path: array}) of a file."""
  options = {**checkpoint.model["image"], "dtype": "float32"}
  tower = TOWERS[options.pop("name")](**options).build()
  shapes = jax.eval_shape(tower.init, KEY, jnp.zeros((1, 32, 32, 3)))["params"]
  return tower, checkpoint.load(tree.flatten(shapes, "image_tower/"))


def pooling(checkpoint, batch):
  """A function of n uint8 images: [n, D] float32, what the tower makes of `batch` at a time."""
  tower, flat = make(checkpoint)
  params = tree.unflatten(tree.subtree(flat, "image_tower/"))
  mean, std = (
    np.asarray(x, np.float32)[None, None, None] * 255 for x in PIXELS[checkpoint.model["pixels"]]
  )
  apply = jax.jit(lambda params, x: tower.apply({"params": params}, (x - mean) / std).pooled)

  def pooled(images):
    # The last part is as large as the others, because each size would be compiled.
    filled = np.pad(images, [(0, -len(images) % batch), (0, 0), (0, 0), (0, 0)])
    parts = np.split(filled, len(filled) // batch)
    return np.concatenate([apply(params, x.astype(np.float32)) for x in parts])[: len(images)]

  return pooled


@pytest.mark.parametrize("file", FILES)
def test_theirs_ours_theirs(data_root, file):
  """Every key has its place, but for those of the classifier; to the bit."""
  checkpoint = weights.describe(data_root / "weights" / f"{file}.npz")
  assert checkpoint.model["image"] == FILES[file]
  _, flat = make(checkpoint)
  back = dict(transfer.write(checkpoint.layout, flat))
  left = checkpoint.tensors.keys() - back.keys()
  assert len(left) == 2 and all(key.startswith(("linear.", "top/")) for key in left), left
  for key, x in back.items():
    theirs = checkpoint.tensors.read(key)
    assert x.dtype == theirs.dtype
    np.testing.assert_array_equal(x, theirs, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("depth,top1", [(20, 0.818), (56, 0.842)])
def test_resnets_name_cifar(data_root, depth, top1):
  """With the classifier of the file, on 1,000 test photos: the accuracy known of these files."""
  source = open_source(str(data_root / "cifar10/test/*.tar"))
  samples = [source[i] for i in range(len(source))]
  checkpoint = weights.describe(data_root / f"weights/resnet{depth}_cifar10.npz")
  z = pooling(checkpoint, 1000)(np.stack([decode(x["image"]) for x in samples]))
  kernel, bias = (checkpoint.tensors.read(f"linear.{x}") for x in ("weight", "bias"))
  found = (z @ kernel.T + bias).argmax(1) == np.array([x["label"] for x in samples])
  assert len(found) == 1000 and found.mean() == pytest.approx(top1, abs=1e-9)


# t2i R@1, R@5, R@10, i2t R@1, R@5 of a ridge regression on these features, as published with them.
RIDGE = {
  "coco2k": (0.256, 0.592, 0.748, 0.204, 0.528),
  "flickr8k": (0.260, 0.554, 0.681, 0.212, 0.496),
}


def words(text):
  return re.findall(r"[a-z]+", text.lower())


def tfidf(texts, idf):
  """[n, len(idf)]: unit vectors of texts by {word: weight}."""
  counts = (collections.Counter(words(text)) for text in texts)
  rows = np.array([[count[w] * x for w, x in idf.items()] for count in counts])
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def captioned(data_root, split, pooled):
  """(features [n, 1280], captions, the image of each) of a split."""
  source = open_source(str(data_root / split / "*.tar"), captions=("json.captions", "txt"))
  samples = [source[i] for i in range(len(source))]
  images = np.stack([eval_image(decode(x["image"]), size=224) for x in samples])
  captions = [text for x in samples for text in x["captions"]]
  owner = np.repeat(np.arange(len(samples)), [len(x["captions"]) for x in samples])
  return pooled(images).astype(np.float64), captions, owner


def recalls(scores, owner):
  """As RIDGE, of scores [images, captions]."""
  rank = (scores > scores[owner, np.arange(len(owner))][None]).sum(0)
  hits = owner[np.argsort(-scores, 1)] == np.arange(len(scores))[:, None]
  return *((rank < k).mean() for k in (1, 5, 10)), *(hits[:, :k].any(1).mean() for k in (1, 5))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_mobilenet_features_name_what_captions_do(data_root):
  """A ridge regression to tf-idf, in closed form, has the recall that is known of these features.

  The reference's recipe is not told. How words are weighted, features scaled and how strong the
  ridge is were chosen by us, so this shows that the features carry what the reference's did, not
  that the same numbers come out: ours are within 0.05, 1.5 standard errors of 250 images.
  """
  checkpoint = weights.describe(data_root / "weights/mobilenetv2_1.0_224_imagenet.npz")
  pooled = pooling(checkpoint, 64)
  parts = [captioned(data_root, f"{name}/train", pooled) for name in RIDGE]
  x = np.concatenate([z for z, _, _ in parts])
  captions = [text for _, texts, _ in parts for text in texts]
  owner = np.concatenate([parts[0][2], parts[1][2] + len(parts[0][0])])
  df = collections.Counter(word for text in captions for word in {*words(text)})
  idf = {w: np.log((1 + len(captions)) / (1 + n)) + 1 for w, n in sorted(df.items()) if n > 1}
  rows = tfidf(captions, idf)
  y = np.zeros((len(x), len(idf)))
  np.add.at(y, owner, rows)
  y /= np.bincount(owner)[:, None]  # an image's captions are averaged
  mean, std = x.mean(0)[None], x.std(0)[None] + 1e-6
  x = (x - mean) / std
  ridge = np.linalg.solve(x.T @ x + 1e4 * np.eye(x.shape[1]), x.T @ (y - y.mean(0)[None]))
  for name, reference in RIDGE.items():
    z, texts, owner = captioned(data_root, f"{name}/val", pooled)
    guess = (z - mean) / std @ ridge
    guess /= np.linalg.norm(guess, axis=1, keepdims=True)
    found = recalls(guess @ (tfidf(texts, idf) - rows.mean(0)[None]).T, owner)
    np.testing.assert_allclose(found, reference, atol=0.05, err_msg=name)


@pytest.mark.parametrize(
  "options,size,parameters,products",
  [
    (dict(name="resnet_cifar", depth=20), 32, 0.27e6, 40.6e6),
    (dict(name="resnet_cifar", depth=56), 32, 0.85e6, 125.5e6),
    # Of the published 3.4 and 300 million, 1.28 and 1.28 are the classifier's; the depthwise
    # convolutions, 20 million, are no products to us.
    (dict(name="mobilenet_v2"), 224, 2.2e6, 279e6),
  ],
)
def test_towers_have_the_published_sizes(options, size, parameters, products):
  options = dict(options)
  tower = TOWERS[options.pop("name")](**options).build()
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(tower.init, KEY, image)
  learned = [x.size for k, x in tree.flatten(shapes).items() if not k.endswith(("mean", "var"))]
  assert sum(learned) == pytest.approx(parameters, rel=0.02)
  assert flops.count(tower.apply, shapes, image) == pytest.approx(2 * products, rel=0.02)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_is_a_grouped_convolution(stride):
  """With rows even and columns odd, where TensorFlow's padding differs."""
  x, kernel = jax.random.normal(KEY, (2, 8, 9, 4)), jax.random.normal(KEY, (3, 3, 4))
  params = {"params": {"kernel": kernel, "bias": jnp.zeros(4)}}
  expected = jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None],
    (stride, stride),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=4,
  )
  found = jax.jit(mobilenet.Depthwise(stride, jnp.float32).apply)(params, x)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture
def shallow(monkeypatch):
  """MobileNetV2 of three blocks, one of each kind: a whole one is compiled for minutes."""
  monkeypatch.setattr(mobilenet, "STAGES", mobilenet.STAGES[:2])


def program(name):
  c = load("tiny").to_dict()
  c["batch_size"] = 16
  depth = dict(depth=8) if name == "resnet_cifar" else {}
  c["model"]["image"] = dict(name=name, dtype="float32", **depth)
  c["model"]["text"].update(width=32, depth=1)
  return make_program(resolve_config(c), dataset_size=100)


def step(made, mesh):
  """A state, what one step makes of it, and the step's metrics, on the host."""
  _, shardings = layout(made, mesh)
  rows = sharding.host_rows(mesh, 16)
  rng = np.random.default_rng(0)
  host = {
    k: rng.integers(0, 2 if k == "text_mask" else 200, shape).astype(dtype)
    for k, (shape, dtype) in made.spec.items()
  }
  replicated = sharding.replicated_sharding(mesh)
  update = jax.jit(
    functools.partial(train_step, program=made),
    out_shardings=(shardings, replicated, replicated),
  )
  with jax.set_mesh(mesh):
    born = init_on_mesh(made, shardings)
    batch = sharding.global_batch(mesh, {k: x[rows] for k, x in host.items()}, rows, 16)
    after, metrics, _ = update(born, batch, data_position(0, 16))
    return jax.device_get((born.trainable, after.trainable, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_cifar", "mobilenet_v2"])
def test_a_step_on_a_mesh_is_that_of_one_device(name, shallow):
  made = program(name)
  one = step(made, sharding.make_mesh(devices=jax.devices()[:1]))
  many = step(made, sharding.make_mesh(data=2, fsdp=4))
  born, after, metrics = many
  np.testing.assert_allclose(metrics["loss"], one[2]["loss"], rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], one[2]["grad_norm"], rtol=1e-4)
  for path, x in after.items():
    fixed = path.endswith(("bn1/mean", "bn1/var", "bn2/mean", "bn2/var"))
    assert np.array_equal(x, born[path]) == fixed, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_cifar", "mobilenet_v2"])
def test_remat_computes_blocks_again(name, shallow):
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(TOWERS[name]().build().init, KEY, image)

  def work(remat):
    tower = TOWERS[name](remat=remat).build()
    return flops.count(jax.grad(lambda p, x: tower.apply(p, x).pooled.sum()), shapes, image)

  # In bfloat16. Of what "dots" keeps, the residual network has nothing, MobileNetV2 nothing else.
  assert work("full") > work("none")
  assert work("dots") == work("none" if name == "mobilenet_v2" else "full")


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: TOWERS["resnet_cifar"](depth=18), r"depth=18: must be 6 n \+ 2"),
    (lambda: TOWERS["resnet_cifar"](remat="some"), "image.remat: unknown 'some'"),
    (lambda: TOWERS["mobilenet_v2"](dtype="half"), "image.dtype: unknown 'half'"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
