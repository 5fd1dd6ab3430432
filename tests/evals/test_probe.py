"""Evaluators that train classifiers: from stores and from images, against scikit-learn."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marks import slow_unless
from helpers.small_stores import write_store
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from test_evals import DATA, Tiny, embed_text, make

from bigalign import sharding
from bigalign.data.files import checksums
from bigalign.evals import EvalOptions, embed, features, knn, make_evaluators, named_files, probe
from bigalign.evals.chance import chance
from bigalign.options import Component, resolve_value
from bigalign.towers.base import TowerOutput

D, K, TRAIN, TEST = 10, 5, 150, 61


def clusters(count, seed):
  random = np.random.default_rng(seed)
  label = np.concatenate([np.arange(K), random.integers(0, K, count - K)])
  centre = np.random.default_rng(9).normal(size=(K, D))
  x = centre[label] + 1.2 * random.normal(size=(count, D)) + 1
  return x.astype(np.float32).astype(np.float64), label  # scikit-learn computes in their dtype


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """{name: (folder of a store, vectors, labels)}."""
  folder, found = tmp_path_factory.mktemp("stores"), {}
  for name, count, seed in (("train", TRAIN, 0), ("more", 40, 1), ("test", TEST, 2)):
    x, label = clusters(count, seed)
    keys = [f"{name}/{i:03}" for i in range(count)]
    written = write_store(folder / name, dict(zip(keys, x)), labels=dict(zip(keys, label.tolist())))
    found[name] = (written, x, label)
  return found


def options_of(stores, kind, **more):
  return (
    dict(type=kind, train_store=stores["train"][0], test_store=stores["test"][0], batch_size=20)
    | more
  )


def measured(stores, kind, *, axes=None, **more):
  found = make("x", options_of(stores, kind, **more), **(axes or {}))({})
  assert all(name.startswith(f"val/x-{kind}-") for name in found)
  return {name.removeprefix(f"val/x-{kind}-"): value for name, value in found.items()}


MESHES, IDS = [dict(devices=jax.devices()[:1]), dict(data=2, fsdp=2, tensor=2)], ["one", "eight"]
both = pytest.mark.parametrize("axes", MESHES, ids=IDS)
SIZES = dict(num_samples=TEST, num_classes=K, num_train=TRAIN)


def of(theirs, x, label):
  """The measures of a fitted classifier of scikit-learn."""
  by_class = [(theirs.predict(x[label == k]) == k).mean() for k in np.unique(label)]
  return dict(top1=theirs.score(x, label), mean_per_class_recall=np.mean(by_class), top5=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("axes", slow_unless(MESHES, lambda axes: "devices" in axes), ids=IDS)
def test_a_linear_probe_of_stores_is_that_of_scikit_learn(stores, axes):
  (_, x, label), (_, more, of_more), (_, z, wanted) = stores.values()
  found = measured(
    stores, "linear_probe", axes=axes, validation_store=stores["more"][0], tolerance=1e-5
  )
  best = found["penalty"]

  def theirs(penalty, x, label):
    return LogisticRegression(C=1 / penalty, tol=1e-7, max_iter=10000).fit(x, label)

  assert found["validation"] == theirs(best, x, label).score(more, of_more)
  assert found["validation"] >= max(
    theirs(10.0**decade, x, label).score(more, of_more) for decade in (0, 2, 4)
  )
  both, labels = np.concatenate([x, more]), np.concatenate([label, of_more])
  expected = of(theirs(best, both, labels), z, wanted) | SIZES | dict(num_train=TRAIN + 40)
  found = {name: found[name] for name in (*expected,)}
  assert found == pytest.approx(expected, abs=1e-9) and 0.4 < found["top1"] < 0.95


@pytest.mark.slow
@both
def test_the_penalty_may_be_given_and_is_chosen_by_held_out_images_otherwise(stores, axes):
  (_, x, label), _, (_, z, wanted) = stores.values()
  found = measured(stores, "linear_probe", axes=axes, penalty=2.0, tolerance=1e-6)
  theirs = LogisticRegression(C=0.5, tol=1e-7, max_iter=10000).fit(x, label)
  expected = of(theirs, z, wanted) | SIZES | dict(penalty=2.0, iterations=found["iterations"])
  assert found == pytest.approx(expected, abs=1e-9)
  ridge = measured(stores, "ridge", axes=axes, penalty=2.0)
  theirs = RidgeClassifier(alpha=2.0).fit(x, label)
  assert ridge == pytest.approx(of(theirs, z, wanted) | SIZES | dict(penalty=2.0), abs=1e-9)
  chosen = measured(stores, "ridge", axes=axes, holdout=0.3, seed=1)
  assert chosen["penalty"] != 2.0 and 0.4 < chosen["validation"] < 1
  theirs = RidgeClassifier(alpha=chosen["penalty"]).fit(x, label)
  assert chosen["top1"] == pytest.approx(theirs.score(z, wanted), abs=1e-9)


@both
def test_nearest_neighbours_of_stores_are_those_of_scikit_learn(stores, axes):
  (_, x, label), _, (_, z, wanted) = stores.values()
  theirs = KNeighborsClassifier(
    20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
  ).fit(x, label)
  expected = of(theirs, z, wanted) | SIZES
  assert measured(stores, "knn", axes=axes) == pytest.approx(expected, abs=1e-9)
  one = KNeighborsClassifier(1).fit(normalize(x), label)
  found = measured(stores, "knn", axes=axes, neighbours=1)
  assert found["top1"] == pytest.approx(one.score(normalize(z), wanted))


@both
@pytest.mark.parametrize("several", [False, True], ids=["one_class", "several_classes"])
def test_votes_of_a_low_temperature_are_not_lost(axes, several):
  """The cosine of the nearest image is about 0.4: exp((0.4 - 1) / 0.004) is 0 in float32."""
  random = np.random.default_rng(5)
  x, z = random.normal(size=(3, 16, 48)), random.normal(size=(2, 8, 48))
  label, wanted = random.integers(0, K, (3, 16)), random.integers(0, K, (2, 8))
  rows = [features.flat(a) for a in (x, z, label)]
  cosine = normalize(rows[1]) @ normalize(rows[0]).T
  weight = np.exp((cosine - cosine.max(1, keepdims=True)) / 0.004)
  weight *= cosine >= np.sort(cosine, 1)[:, -6:-5]
  share = weight @ np.eye(K)[rows[2]] / weight.sum(1, keepdims=True)
  mesh = sharding.make_mesh(**axes)

  def on_mesh(x, label):
    target = np.eye(K, dtype=bool)[label] if several else label.astype(np.int32)
    own = features.Features(x.astype(np.float32), target, np.ones(label.shape, bool))
    return jax.device_put(own, jax.NamedSharding(mesh, features.ROWS))

  with jax.set_mesh(mesh):
    found = knn.vote(
      on_mesh(x, label), on_mesh(z, wanted), neighbours=6, classes=K, temperature=np.float32(0.004)
    )
  if several:
    np.testing.assert_allclose(features.flat(np.asarray(found)), share, atol=1e-4)
  else:
    ranks = embed.places(jnp.asarray(share), jnp.asarray(features.flat(wanted)))
    np.testing.assert_array_equal(features.flat(np.asarray(found)) == 0, np.asarray(ranks) == 0)


@both
def test_few_shots_are_fits_to_a_few_images_of_each_class(stores, axes):
  (_, x, label), _, (_, z, wanted) = stores.values()
  found = measured(
    stores, "few_shot", axes=axes, shots=(4, 1), seeds=3, penalty=0.5, tolerance=1e-6
  )
  padded = features.Rows(label, np.ones(TRAIN, bool), 0)
  for k in (1, 4):
    scores = []
    for seed in range(3):
      few = probe.draw(padded, K, 4, seed)[:, :k].ravel()
      theirs = LogisticRegression(C=2, tol=1e-7, max_iter=10000).fit(x[few], label[few])
      scores.append(theirs.score(z, wanted))
    half = 4.302653 * np.std(scores, ddof=1) / np.sqrt(3)  # Student's quantile for 3 values
    assert found[f"{k}_shots-top1"] == pytest.approx(np.mean(scores))
    assert found[f"{k}_shots-top1_interval"] == pytest.approx(half, rel=1e-5)
  assert found["4_shots-top1"] > found["1_shots-top1"] > 1 / K
  assert SIZES.items() <= found.items() and found["seeds"] == 3
  guess = chance({f"val/x-few_shot-{name}": value for name, value in found.items()})
  assert guess["val/x-few_shot-4_shots-top1"] == 1 / K


def test_the_penalty_of_few_shots_is_chosen_by_further_images(stores):
  found = measured(stores, "few_shot", shots=(2,), seeds=1)
  assert "2_shots-top1_interval" not in found and found["2_shots-top1"] > 1 / K
  with pytest.raises(
    ValueError, match=r"x\.train: \d of 5 classes have fewer images than 30 shots, "
  ):
    measured(stores, "few_shot", shots=(2, 30))


class Labelled(Tiny):
  """Images without rejects, whose classes differ in brightness."""

  def __init__(self, n, seed, classes=3):
    super().__init__(n=n, captions=1, seed=seed, broken=(), silent=())
    self.classnames = self.classnames[:classes]
    self.labels = np.arange(n) % classes
    self.images = (self.images // 3 + self.labels[:, None, None, None] * 20).astype(np.uint8)


class Several(Labelled):
  """Images with the sets of classes `sets`."""

  def __getitem__(self, i):
    return super().__getitem__(i) | dict(label_set=self.sets[i])


@pytest.fixture
def images(monkeypatch):
  """The sources "train" and "test"."""
  sources = dict(train=Labelled(40, 0), test=Labelled(21, 1))
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: sources[spec])
  return sources


PROJECTION = np.random.default_rng(3).normal(size=(48, 4)).astype(np.float32)


def tower(params, image):
  return image.reshape(len(image), -1).astype(jnp.float32) / 255


@jax.jit
def image_output(params, image):
  return TowerOutput(tower(params, image), None)


@jax.jit
def projected(params, image):
  return tower(params, image) @ PROJECTION


def evaluators(options, *, output=image_output, embed_image=projected):
  return make_evaluators(
    options,
    embed_image=embed_image,
    embed_text=embed_text,
    mesh=sharding.make_mesh(),
    data=DATA,
    image_output=output,
  )


FROM_IMAGES = dict(type="ridge", train="train", test="test", penalty=1.0, batch_size=16)


def test_features_are_those_before_the_projection_unless_asked(images):
  x, z = (np.asarray(tower(None, images[name].images)) for name in ("train", "test"))

  def score(x, z):
    theirs = RidgeClassifier(alpha=1.0).fit(x, images["train"].labels)
    return theirs.score(z, images["test"].labels)

  run = evaluators(dict(a=FROM_IMAGES, b=FROM_IMAGES | dict(projected=True)))
  before, after = run["a"](1)["val/a-ridge-top1"], run["b"](1)["val/b-ridge-top1"]
  assert before == pytest.approx(score(x, z)) != after
  assert after == pytest.approx(score(x @ PROJECTION, z @ PROJECTION))
  only = evaluators(dict(a=FROM_IMAGES), output=None)["a"](1)
  assert only["val/a-ridge-top1"] == after  # a model that gives no features has embeddings


def test_evaluators_of_the_same_images_read_and_embed_them_once(images):
  calls = []

  def count(params, image):
    calls.append(len(image))
    return image_output(params, image)

  params = {}
  both = dict(a=FROM_IMAGES, b=dict(type="knn", train="train", test="test", batch_size=16))
  together = {
    k: v for run in evaluators(both, output=count).values() for k, v in run(params).items()
  }
  assert len(calls) == 3 + 2  # batches of 40 and 21 images
  apart = {}
  for name in both:
    apart |= evaluators({name: both[name]}, output=count)[name](params)
  assert len(calls) == 3 * (3 + 2) and together == apart


@pytest.mark.slow
def test_images_that_cannot_be_read_or_have_nan_are_counted(images, caplog):
  images["train"].broken, images["test"].broken = (3, 4), (5,)

  @jax.jit
  def with_nan(params, image):
    z = tower(params, image)
    return TowerOutput(jnp.where(jnp.arange(len(z))[:, None] == 1, jnp.nan, z), None)

  found = evaluators(dict(a=FROM_IMAGES), output=with_nan)["a"](1)
  assert found["val/a-ridge-rejected"] == 1 and found["val/a-ridge-train_rejected"] == 2
  assert found["val/a-ridge-num_samples"] == 20 and found["val/a-ridge-num_train"] == 38
  assert "config.evals.a.train: 3 of 38 images have features that are NaN" in caplog.text
  used, kept = np.arange(40) % 16 != 1, np.arange(21) % 16 != 1
  used[[3, 4]], kept[5] = False, False
  x, z = (np.asarray(tower(None, images[name].images)) for name in ("train", "test"))
  labels, wanted = images["train"].labels, images["test"].labels
  theirs = RidgeClassifier(alpha=1.0).fit(x[used], labels[used])
  hits = (theirs.predict(z[kept]) == wanted[kept]).sum()
  assert found["val/a-ridge-top1"] == pytest.approx(hits / 20)  # of 18 and 2 with NaN

  def nothing(params, image):
    return TowerOutput(jnp.full((len(image), 4), jnp.nan), None)

  for kind in ("linear_probe", "knn", "ridge"):
    options = dict(type=kind, train="train", test="test", batch_size=16)
    assert evaluators(dict(a=options), output=nothing)["a"](1)[f"val/a-{kind}-top1"] == 0


def test_several_classes_are_measured_by_the_average_precision(images):
  random, names = np.random.default_rng(0), ("ant", "bee", "cat")
  for source in images.values():
    source.dataset_type, source.classnames = "multilabel", names
    source.sets = np.eye(3, dtype=bool)[source.labels] | (random.random((len(source), 3)) < 0.2)
    source.__class__ = Several
  options = dict(train="train", test="test", batch_size=16)
  run = evaluators(
    {
      kind: options | dict(type=kind, **more)
      for kind, more in dict(linear_probe=dict(penalty=1.0), ridge={}, knn={}).items()
    }
  )
  x, z = (np.asarray(tower(None, images[name].images)) for name in ("train", "test"))
  theirs = OneVsRestClassifier(LogisticRegression(C=1.0, tol=1e-7, max_iter=10000))
  scores = theirs.fit(x, images["train"].sets).decision_function(z)
  expected = average_precision_score(images["test"].sets, scores, average="macro")
  for kind, one in run.items():
    found = one(1)[f"val/{kind}-{kind}-mean_average_precision"]
    assert 0.5 < found <= 1
    if kind == "linear_probe":
      assert found == pytest.approx(expected, abs=1e-9)
  with pytest.raises(ValueError, match=r"config\.evals\.a: images with several classes cannot be"):
    evaluators(dict(a=options | dict(type="few_shot")))
  images["train"].sets[:, 1] = False
  with pytest.raises(ValueError, match=r"a\.train: 1 of 3 classes have no image: \['bee'\]"):
    evaluators(dict(a=options | dict(type="knn")))["a"](1)
  images["test"].dataset_type = ""
  with pytest.raises(ValueError, match=r"only those of \['config\.evals\.a\.train'\] have several"):
    evaluators(dict(a=options | dict(type="knn")))


def test_what_cannot_be_classified_is_named(images, stores, tmp_path):
  def fails(message, **more):
    options = {k: v for k, v in (FROM_IMAGES | more).items() if v is not None}
    with pytest.raises(ValueError, match=message):
      evaluators(dict(a=options))["a"](1)

  fails(r"config\.evals\.a\.train: name a source with labels, or train_store", train=None)
  fails(r"config\.evals\.a\.penalty=0\.0 must be above 0", penalty=0.0)
  fails(r"config\.evals\.a\.holdout=1\.0 must be between 0 and 0\.9", holdout=1.0)
  fails(r"a\.holdout=0\.01: no class has enough training images", penalty=None, holdout=0.01)
  knn = dict(type="knn", penalty=None)
  fails(r"a\.neighbours=41: there are 40 training images", **knn, neighbours=41)
  fails(r"a\.shots=\(0, 4\) must be", type="few_shot", shots=(4, 0))
  fails(
    r"features of several widths.*'config\.evals\.a\.train': 10.*test': 48",
    train=None,
    train_store=stores["train"][0],
  )
  (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
  few = dict(classnames=str(tmp_path / "names.txt"))
  fails(r"a\.train: 2 of 5 classes have no image: \['dog', 'eel'\]", **few)
  images["test"].labels[:2] = 7
  fails(r"a\.test: 2 of 21 images have a label outside the 3 class names; the largest is 7")
  images["test"].labels[:2] = -1
  fails(r"a\.test: 2 of 21 images have no label")
  images["train"].classnames, images["test"].labels[:2] = (), 8
  fails(r"a\.test: 2 of 21 .* outside those of config\.evals\.a\.train, 0 to 2; the largest is 8")
  images["train"].broken = range(40)
  fails(r"a\.train: all 40 samples are rejected")


def test_names_of_classes_that_differ_are_named(images, tmp_path):
  first = images["train"].classnames
  images["test"].classnames = (first[0], first[2], first[1])
  message = (
    r"a\.train and config\.evals\.a\.test have other class names, 3 and 3: label 1 is 'bee' and"
    r" 'cat'\. .*config\.evals\.a\.classnames"
  )
  with pytest.raises(ValueError, match=message):
    evaluators(dict(a=FROM_IMAGES))
  images["more"], images["test"].classnames = Labelled(9, 2), first
  images["more"].classnames = (*first, "dog")
  with pytest.raises(ValueError, match=r"a\.validation .*, 3 and 4: label 3 is None and 'dog'"):
    evaluators(dict(a=FROM_IMAGES | dict(penalty=None, validation="more")))
  (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
  options = FROM_IMAGES | dict(penalty=None, validation="more", classnames=f"{tmp_path}/names.txt")
  assert 0 < evaluators(dict(a=options))["a"](1)["val/a-ridge-top1"] <= 1


def test_stores_of_two_towers_are_not_compared(stores, tmp_path):
  rows = {f"t/{i}": np.ones(D) for i in range(K)}
  other = write_store(tmp_path / "other", rows, labels={f"t/{i}": i for i in range(K)})
  manifest = json.loads((pathlib.Path(other) / "manifest.json").read_text())
  manifest["header"] |= dict(weights="b", projected=True)
  (pathlib.Path(other) / "manifest.json").write_text(json.dumps(checksums.seal(manifest)))
  with pytest.raises(ValueError, match=r"x\.train_store and .*x\.test_store hold vectors.*weights"):
    measured(stores, "knn", test_store=other)
  with pytest.raises(ValueError, match=r"x\.test_store=.* holds embeddings, after the projector"):
    measured(stores, "knn", test_store=other, projected=True)


def test_class_names_of_probes_are_files_that_a_run_keeps(tmp_path):
  (tmp_path / "names.txt").write_text("ant\n")
  names = str(tmp_path / "names.txt")
  evals = resolve_value(
    EvalOptions,
    dict(a=dict(type="knn", classnames=names), b=dict(type="ridge")),
    "config.evals",
  )
  assert all(isinstance(x, Component) for x in evals.values())
  assert named_files(evals) == {("a", "classnames"): tmp_path / "names.txt"}


TWO = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from bigalign.run import runtime
runtime.connect()
import test_probe as t
found = t.all_of(json.loads(sys.argv[3]))
path = pathlib.Path(sys.argv[2]) / f"{t.jax.process_index()}.json"
path.write_text(json.dumps([t.jax.process_count(), t.jax.device_count(), found]))
"""


def all_of(folders):
  stores = {name: (folder,) for name, folder in folders.items()}
  found = {}
  for kind, more in dict(
    linear_probe=dict(validation_store=folders["more"], penalty=1.0),
    ridge={},
    knn={},
    few_shot=dict(shots=(2,), seeds=2, penalty=1.0),
  ).items():
    found[kind] = measured(stores, kind, **more)
  found["linear_probe"].pop("iterations")  # sums in another order
  return found


@pytest.mark.slow
def test_two_processes_find_what_one_finds(stores, tmp_path):
  (tmp_path / "two.py").write_text(TWO)
  folders = {name: folder for name, (folder, *_) in stores.items()}
  here = pathlib.Path(__file__).parent
  root = here.parents[1]
  subprocess.run(
    [
      *("bash", str(root / "launch/local.sh"), "-n", "2", "-d", "4", "-o", str(tmp_path), "--"),
      *(sys.executable, str(tmp_path / "two.py"), str(here), str(tmp_path), json.dumps(folders)),
    ],
    check=True,
    timeout=300,
    env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
  )
  expected = all_of(folders)
  for process in range(2):
    processes, devices, found = json.loads((tmp_path / f"{process}.json").read_text())
    assert (processes, devices) == (2, 8)
    assert found == {kind: pytest.approx(x, abs=1e-9) for kind, x in expected.items()}
