"""mteb evaluates loaded models on local tasks, and finds what our own evaluators find."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
from helpers import peer_models, peer_sets
from helpers.small_shards import write_tar
from PIL import Image
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score, v_measure_score

import bigalign
from bigalign.evals import adapters

COUNT = 40  # mteb rounds to five digits, which changes no multiple of 1 / 40 or of 1 / 200
TRAIN = 40
PROMPT = "a photo of a {c}."
SHARED = {"accuracy": "top1", "recall": "mean_per_class_recall"}

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "mteb"))),
    reason="torch or mteb is not installed: the extra mteb",
  ),
  pytest.mark.filterwarnings("ignore:.*ill-defined"),  # its precision, of a class never found
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return peer_models.run_and_export(tmp_path_factory.mktemp("models"), COUNT)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  """The folders of the sets to test on, and the pattern of the images to train on."""
  root = tmp_path_factory.mktemp("sets")
  classes, captions, _ = peer_sets.write(root, COUNT)
  members = []
  for i, (image, label) in enumerate(peer_sets.labelled(COUNT, TRAIN)):
    members += [(f"t{i:04}.jpg", image), (f"t{i:04}.cls", str(label).encode())]
  return classes, captions, write_tar(root / "train.tar", members)


def pictures(samples):
  return [Image.open(io.BytesIO(image)) for image, _ in samples]


def stored(samples):
  """A column of mteb's datasets, which would write PIL images of JPEG files once more as JPEG."""
  return [dict(bytes=image, path=None) for image, _ in samples]


def tasks():
  """{kind: a task of mteb}, whose data is in memory."""
  from datasets import Dataset, DatasetDict
  from datasets import Image as Column
  from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskZeroShotClassification,
  )
  from mteb.abstasks.task_metadata import TaskMetadata

  test, train = peer_sets.labelled(0, COUNT), peer_sets.labelled(COUNT, TRAIN)
  captioned = peer_sets.captioned(COUNT)
  texts = [text for _, captions in captioned for text in captions]

  def described(name, type, category, modalities, main_score):
    return TaskMetadata(
      name=name,
      description="local",
      dataset=dict(path="local/local", revision="1"),
      type=type,
      category=category,
      modalities=modalities,
      main_score=main_score,
      eval_langs=["eng-Latn"],
      eval_splits=["test"],
    )

  def split(samples, **more):
    return Dataset.from_dict(dict(image=stored(samples), **more)).cast_column("image", Column())

  def labelled(samples):
    return split(samples, label=[k for _, k in samples])

  class Local:
    def load_data(self, **options):
      self.dataset = self.made()
      self.data_loaded = True

  class ZeroShot(Local, AbsTaskZeroShotClassification):
    # "text" first, as in the tasks of mteb: in the other order it swaps images and texts.
    metadata = described(
      "LocalZeroShot", "ZeroShotClassification", "i2t", ["text", "image"], "accuracy"
    )

    def made(self):
      return DatasetDict(test=labelled(test))

    def get_candidate_labels(self):
      return [PROMPT.format(c=name) for name in peer_sets.names()]

  class Probe(Local, AbsTaskClassification):
    metadata = described("LocalProbe", "ImageClassification", "i2c", ["image"], "accuracy")
    input_column_name = "image"
    n_experiments, samples_per_label = 1, TRAIN  # all images, once

    def made(self):
      return DatasetDict(test=labelled(test), train=labelled(train))

  class Clusters(Local, AbsTaskClusteringLegacy):  # as its CIFAR10Clustering
    metadata = described("LocalClusters", "ImageClustering", "i2c", ["image"], "nmi")
    input_column_name, label_column_name = "image", "label"

    def made(self):
      return DatasetDict(test=labelled(test))

  def retrieval(direction):
    images = split(captioned, id=[f"i{i}" for i in range(COUNT)])
    ids = [f"t{i}" for i in range(len(texts))]
    captions = Dataset.from_dict(dict(id=ids, text=texts))
    positive = {f"i{i}": {f"t{5 * i + k}": 1 for k in range(5)} for i in range(COUNT)}
    if direction == "t2i":
      positive = {text: {image: 1} for image, own in positive.items() for text in own}

    class Retrieval(Local, AbsTaskRetrieval):
      metadata = described(
        f"Local{direction}Retrieval",
        "Any2AnyRetrieval",
        direction,
        ["text", "image"],
        "ndcg_at_10",
      )

      def made(self):
        both = [captions, images] if direction == "t2i" else [images, captions]
        parts = dict(zip(("queries", "corpus"), both))
        return dict(default=dict(test=dict(parts, relevant_docs=positive, top_ranked=None)))

    return Retrieval()

  class Similarity(Local, AbsTaskSTS):
    metadata = described("LocalSTS", "STS", "t2t", ["text"], "cosine_spearman")

    def made(self):
      pairs = dict(sentence1=texts[::5], sentence2=texts[1::5], score=gold().tolist())
      return DatasetDict(test=Dataset.from_dict(pairs))

  return [ZeroShot(), Probe(), Clusters(), retrieval("t2i"), retrieval("i2t"), Similarity()]


def gold():
  """Similarities [COUNT] that somebody might have given."""
  return np.random.default_rng(0).integers(0, 6, COUNT).astype(float)


@pytest.fixture(scope="module")
def own(models, sets):
  """{metric: value} of our evaluators, of the run."""
  classes, captions, train = sets
  return bigalign.evaluate(
    models["run"],
    evals=dict(
      classes=dict(type="zeroshot", source=f"{classes}/test/0.tar", templates=[PROMPT]),
      captions=dict(type="retrieval", source=f"{captions}/test/0.tar", fields=["txt"]),
      # scikit-learn's default: C = 1.
      probe=dict(
        type="linear_probe",
        train=train,
        test=f"{classes}/test/0.tar",
        projected=True,
        penalty=1.0,
      ),
    ),
  )


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_tasks_of_mteb_agree_with_our_evaluators(models, own, kind, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  import mteb

  model = bigalign.load(models[kind])
  encoder = adapters.mteb(model)
  results = mteb.evaluate(encoder, tasks(), cache=None, co2_tracker=False, show_progress_bar=False)
  found = {x.task_name: x.scores["test"][0] for x in results.task_results}
  pairs = [(f"LocalZeroShot {x}", f"classes-zeroshot-val-{y}") for x, y in SHARED.items()]
  pairs += [(f"LocalProbe {x}", f"probe-linear_probe-{y}") for x, y in SHARED.items()]
  for k in (1, 5, 10):
    # Of five captions, one is enough: success, not the share of them that is found.
    pairs += [(f"Locali2tRetrieval hit_rate_at_{k}", f"captions/image_to_text_R@{k}")]
    pairs += [(f"Localt2iRetrieval recall_at_{k}", f"captions/text_to_image_R@{k}")]
  for theirs, ours in pairs:
    task, metric = theirs.split()
    assert found[task][metric] == pytest.approx(own[f"val/{ours}"], abs=1e-6), theirs
  first, second = (
    model.embed_texts([captions[k] for _, captions in peer_sets.captioned(COUNT)]) for k in (0, 1)
  )
  expected = spearmanr(gold(), (first * second).sum(1))[0]
  assert found["LocalSTS"]["cosine_spearman"] == pytest.approx(expected, abs=1e-6)
  samples = peer_sets.labelled(0, COUNT)
  labels = [k for _, k in samples]
  options = dict(n_clusters=len({*labels}), batch_size=500, n_init="auto", random_state=42)
  clusters = MiniBatchKMeans(**options).fit(model.embed_images([x for x, _ in samples])).labels_
  measured = dict(
    v_measure=v_measure_score(labels, clusters), ari=adjusted_rand_score(labels, clusters)
  )
  assert 0.1 < measured["v_measure"] < 0.9
  assert {name: found["LocalClusters"][name] for name in measured} == pytest.approx(
    measured, abs=1e-6
  )


def test_what_mteb_knows_of_a_model(models):
  """Its results are kept by name and revision, which is that of the weights."""
  runs = [adapters.mteb(bigalign.load(models[kind])).mteb_model_meta for kind in ("run", "run")]
  assert runs[0].name == "bigalign/run-at-step-3" and runs[0].revision == runs[1].revision
  model = bigalign.load(models["exported"])
  meta = adapters.mteb(model, name="me/mine").mteb_model_meta
  assert meta.name == "me/mine" and meta.embed_dim == 32 and meta.max_tokens == 32
  assert {*meta.modalities} == {"image", "text"} and meta.n_parameters > 1000
  path = next(iter(model.params))
  model.params[path] = model.params[path] + 1
  assert adapters.mteb(model).mteb_model_meta.revision != meta.revision


def test_a_sample_with_a_text_and_an_image_has_their_sum_in_mteb(models):
  model = bigalign.load(models["run"])
  images, texts = pictures(peer_sets.labelled(0, 5)), ["a", "few", "words", "of", "text"]
  batches = [dict(image=images[i : i + 2], text=texts[i : i + 2]) for i in range(0, 5, 2)]
  encoder = adapters.mteb(model)
  expected = model.embed_images(images) + model.embed_texts(texts)
  np.testing.assert_allclose(encoder.encode(batches, batch_size=2), expected, atol=1e-6)
  with pytest.raises(ValueError, match=r"embeds image and text; a batch has \['audio'\]"):
    encoder.encode([dict(audio=[1])])
