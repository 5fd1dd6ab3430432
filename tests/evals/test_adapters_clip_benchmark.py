"""CLIP_benchmark evaluates loaded models, and finds what our own evaluators find."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import peer_models, peer_sets
from helpers.shipped import ROOT
from helpers.small_shards import picture
from PIL import Image

import bigalign
from bigalign.api.image_inputs import View
from bigalign.data.image import naflex
from bigalign.data.image.naflex import NaflexOptions
from bigalign.data.image.reading import ImageReading
from bigalign.evals import adapters
from bigalign.evals.embed import places
from bigalign.evals.features import measures

COUNT = 45  # divides by no batch size
NEEDED = ("torch", "clip_benchmark", "open_clip", "webdataset")

pytestmark = [
  pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)),
    reason="torch, clip_benchmark, open_clip or webdataset is not installed: the extra eval",
  ),
  pytest.mark.filterwarnings("ignore:.*pin_memory"),  # of CLIP_benchmark's loaders without a GPU
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return peer_models.run_and_export(tmp_path_factory.mktemp("models"), COUNT)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  """The folders of a classified, a captioned and a multilabel set."""
  return peer_sets.write(tmp_path_factory.mktemp("sets"), COUNT)


@pytest.fixture(scope="module")
def ours(models, sets):
  """{CLIP_benchmark's name: value} of our evaluators of the three sets, of the run."""
  classes, captions, several = sets
  found = bigalign.evaluate(
    models["run"],
    evals=dict(
      classes=dict(
        type="zeroshot", source=f"{classes}/test/0.tar", templates=list(peer_sets.TEMPLATES)
      ),
      several=dict(
        type="zeroshot", source=f"{several}/test/0.tar", templates=list(peer_sets.TEMPLATES)
      ),
      captions=dict(type="retrieval", source=f"{captions}/test/0.tar", fields=["txt"]),
    ),
  )
  names = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class_recall"}
  directions = {"image": "text_to_image", "text": "image_to_text"}
  return {
    **{theirs: found[f"val/classes-zeroshot-val-{own}"] for theirs, own in names.items()},
    "mean_average_precision": found["val/several-zeroshot-val-mean_average_precision"],
    **{
      f"{side}_retrieval_recall@{k}": found[f"val/captions/{direction}_R@{k}"]
      for side, direction in directions.items()
      for k in (1, 5, 10)
    },
  }


class Items(list):
  """A dataset as CLIP_benchmark knows it."""

  classes = peer_sets.names()


def loader(transform, samples):
  """Batches of 16 (images, targets); captions stay lists."""
  import torch

  def collate(batch):
    images, targets = zip(*batch)
    captions = isinstance(targets[0], list)
    return torch.stack(images), targets if captions else torch.as_tensor(np.array(targets))

  items = Items((transform(Image.open(io.BytesIO(image))), target) for image, target in samples)
  return torch.utils.data.DataLoader(items, batch_size=16, collate_fn=collate)


@pytest.mark.slow
def test_the_metrics_of_clip_benchmark_are_ours(models, ours, monkeypatch):
  """Of an exported folder; each side is compiled once."""
  from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

  model, traced = bigalign.load(models["exported"]), []
  apply = model.apply
  monkeypatch.setattr(model, "apply", lambda *args, **kw: traced.append(args) or apply(*args, **kw))
  clip, transform, tokenizer = adapters.clip_benchmark(model)
  classes = peer_sets.labelled(0, COUNT)
  label_sets = np.random.default_rng(0).random((COUNT, peer_sets.CLASSES)) < 0.3
  several = [(image, x.astype(np.int64)) for (image, _), x in zip(classes, label_sets)]
  given = (tokenizer, Items.classes, list(peer_sets.TEMPLATES), "cpu")
  found = {}
  for samples in (classes, several):
    found |= zeroshot_classification.evaluate(clip, loader(transform, samples), *given, amp=False)
  assert len(traced) == 2
  found |= zeroshot_retrieval.evaluate(
    clip,
    loader(transform, peer_sets.captioned(COUNT)),
    tokenizer,
    "cpu",
    amp=False,
    recall_k_list=[1, 5, 10],
  )
  assert found == pytest.approx(ours, abs=1e-6)
  assert 0 < found["acc5"] < 1 and 0 < found["text_retrieval_recall@10"] < 1


CLI = """
import sys
from unittest import mock
from helpers import torchvision_beside_cpu_torch
torchvision_beside_cpu_torch.enable()
# 100 MB that only its metrics of captioning use.
parts = ("tokenizer", "bleu", "meteor", "rouge", "cider", "spice")
for name in ("", *parts, *(f"{x}.{x}" for x in parts), "tokenizer.ptbtokenizer"):
  sys.modules[f"pycocoevalcap.{name}".strip(".")] = mock.MagicMock()
import bigalign
from bigalign.evals import adapters
adapters.register_clip_benchmark(bigalign.load)
from clip_benchmark import cli
cli.main()
"""


@pytest.mark.slow
def test_the_command_line_of_clip_benchmark_takes_a_run(models, sets, ours, tmp_path):
  root = sets[0].parent
  words = [
    *("eval", "--model_type=bigalign", f"--pretrained={models['run']}", "--model=small"),
    *("--dataset", *(f"wds/{folder.name}" for folder in sets), "--recall_k", "1", "5", "10"),
    *(f"--dataset_root={root}/{{dataset}}", f"--output={tmp_path}/{{dataset}}.json"),
    *("--no_amp", "--num_workers=0", "--batch_size=16", "--quiet"),
  ]
  done = subprocess.run(
    [sys.executable, "-c", CLI, *words],
    env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = {}
  for folder in sets:
    found |= json.loads((tmp_path / f"{folder.name}.json").read_text())["metrics"]
  assert found == pytest.approx(ours, abs=1e-6)


class Cuda(str):
  """A name of the CPU that passes CLIP_benchmark's check for a GPU."""

  __hash__ = str.__hash__

  def __eq__(self, other):
    return other in ("cuda", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "exported"])
@pytest.mark.filterwarnings("ignore:.*ill-defined")  # its report, of a class that is never found
def test_the_linear_probe_of_clip_benchmark_reads_our_features(models, kind, tmp_path, monkeypatch):
  """AdamW trains its classifier, L-BFGS ours; equal are what both read, and measures of scores."""
  import torch
  from clip_benchmark.metrics import linear_probe

  for movable in (torch.nn.Module, torch.Tensor):
    monkeypatch.setattr(movable, "cuda", lambda self: self)
  inferred = []
  infer = linear_probe.infer
  monkeypatch.setattr(
    linear_probe, "infer", lambda *args: inferred.append(infer(*args)) or inferred[-1]
  )
  model = bigalign.load(models[kind])
  clip, transform, _ = adapters.clip_benchmark(model)
  parts = {"train": peer_sets.labelled(COUNT, 64), "test": peer_sets.labelled(0, COUNT)}
  loaders = [loader(transform, samples) for samples in parts.values()]
  options = dict(fewshot_k=-1, batch_size=16, num_workers=0, lr=0.1, epochs=2, seed=0, amp=False)
  found = linear_probe.evaluate(
    clip, *loaders, **options, model_id="m", feature_root=str(tmp_path / "out"), device=Cuda("cpu")
  )
  for part, samples in parts.items():
    features = torch.load(tmp_path / f"out/m/features_{part}.pt").numpy()
    expected = model.embed_images([image for image, _ in samples])
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert torch.load(tmp_path / f"out/m/targets_{part}.pt").tolist() == [k for _, k in samples]
  logits, target = (x.numpy() for x in inferred[-1])
  expected = measures(np.asarray(places(logits, target)), target, peer_sets.CLASSES)
  names = {
    "top1": "lp_acc1",
    "top5": "lp_acc5",
    "mean_per_class_recall": "lp_mean_per_class_recall",
  }
  assert {x: found[names[x]] for x in expected} == pytest.approx(expected, abs=1e-6)
  assert 0 < found["lp_acc5"] < 1


@pytest.mark.parametrize("size", [(20, 24), (50, 10)])
def test_patches_come_through_a_tensor_of_clip_benchmark(size):
  """Of a NaFlex model, whose images have three arrays."""
  reading = ImageReading(image_size=32, naflex=NaflexOptions(lengths=(12,), patch=8))
  view = View(reading)
  transform = adapters._Transform(view)
  image = Image.open(io.BytesIO(picture(3, size=size)))
  batch = np.stack([transform(image).numpy()] * 2)
  expected = naflex.to_fields(reading.stacked([view(image)] * 2))
  found = transform.fields(batch)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value)
