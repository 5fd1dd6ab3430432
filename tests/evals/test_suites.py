"""Suites: tasks of a file for several models, images decoded once, results kept."""

from __future__ import annotations

import collections
import csv
import dataclasses
import doctest
import io
import json
import subprocess

import numpy as np
import pytest
from helpers import made_runs
from helpers.small_shards import picture, samples, write_tar

import bigalign
from bigalign.api import embedding
from bigalign.data.sources.base import open_source
from bigalign.data.sources.webdataset import WebDataset
from bigalign.evals import caption_languages
from bigalign.suites import main as program
from bigalign.suites import results, runner
from bigalign.suites.suite import SHIPPED, read_suite

COUNT, OTHERS = 23, 7  # divide by no batch size

SUITE = """
[classes]
type = "zeroshot"
dataset = "$SUITE_DATA/classes"

[by_name]
type = "zeroshot"
dataset = "$SUITE_DATA/classes"
templates = "name"
metrics = ["mean_per_class_recall"]

[captions]
type = "retrieval"
source = "$SUITE_DATA/classes/test/0.tar"
fields = ["txt"]

[elsewhere]
type = "zeroshot"
dataset = "$SUITE_DATA/gone"
get = "get-data gone"
"""

# With those of SUITE ten tasks whose data is there, of the images of two shards.
MORE = """
[simple]
type = "zeroshot"
dataset = "$SUITE_DATA/classes"
templates = "simple"

[calibrated]
type = "zeroshot"
dataset = "$SUITE_DATA/classes"
calibration = true
metrics = ["ece"]

[prefix]
type = "zeroshot"
dataset = "$SUITE_DATA/classes"
widths = [8]
metrics = ["d8-top1"]

[precise]
type = "retrieval"
source = "$SUITE_DATA/classes/test/0.tar"
fields = ["txt"]
map_at_r = true
metrics = ["image_to_text_mAP@R"]

[spread]
type = "geometry"
source = "$SUITE_DATA/classes/test/0.tar"
fields = ["txt"]
metrics = ["centroid_distance"]

[others]
type = "zeroshot"
source = "$SUITE_DATA/others.tar"
classnames = "$SUITE_DATA/classes/classnames.txt"

[other_captions]
type = "retrieval"
source = "$SUITE_DATA/others.tar"
fields = ["txt"]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs that read images alike."""
  folder, values = tmp_path_factory.mktemp("runs"), made_runs.small()
  return [
    made_runs.write(folder / name, values, made_runs.random_params(values, seed))
    for seed, name in enumerate(("one", "two"))
  ]


@pytest.fixture
def suite(tmp_path, monkeypatch):
  """The file of a suite."""
  write_tar(tmp_path / "classes/test/0.tar", samples(0, COUNT))
  (tmp_path / "classes/classnames.txt").write_text("cat\ndog\nbird\n")
  monkeypatch.setenv("SUITE_DATA", str(tmp_path))
  file = tmp_path / "three.toml"
  file.write_text(SUITE)
  return file


@pytest.fixture
def ten(suite, tmp_path):
  """The file of a suite with ten tasks, and one whose data is missing."""
  write_tar(tmp_path / "others.tar", samples(60, OTHERS))
  suite.write_text(SUITE + MORE)
  return suite


@pytest.fixture
def decoded(monkeypatch):
  """The numbers of the images that were read, in order."""
  numbers = []
  square = embedding._square

  def counted(model, source, i):
    numbers.append(i)
    return square(model, source, i)

  monkeypatch.setattr(embedding, "_square", counted)
  return numbers


@pytest.fixture
def embedded(monkeypatch):
  """{model: the number of images that it embedded}."""
  numbers = collections.Counter()
  embedder = embedding._embedder

  def counting(model, batch_size):
    embed = embedder(model, batch_size)

    def counted(inputs):
      z = embed(inputs)
      numbers[model.source] += len(z)
      return z

    return counted

  monkeypatch.setattr(embedding, "_embedder", counting)
  return numbers


def test_examples():
  assert doctest.testmod(results).failed == 0


@pytest.mark.slow
def test_a_suite_of_two_models(runs, ten, decoded, embedded, tmp_path, capsys, monkeypatch):
  """Each image is decoded once and embedded once by each model; nothing is done twice."""
  out = {name: str(tmp_path / f"out.{name}") for name in ("json", "csv", "html")}
  words = [*runs, f"--suite={ten}", f"--cache={tmp_path / 'cache'}"]
  words += [f"--{name}={file}" for name, file in out.items()]
  found = program.main(words)
  assert decoded == [*range(COUNT), *range(OTHERS)]
  assert [*embedded.values()] == [COUNT + OTHERS] * 2
  tasks = [x.name for x in read_suite(str(ten))]
  assert len(tasks) == 11 and [(x.task, x.model, bool(x.missing)) for x in found] == [
    (task, run, task == "elsewhere") for task in tasks for run in runs
  ]
  # Equal to the evaluation of a run alone, whose images are not kept.
  alone = bigalign.evaluate(runs[1], zeroshot=tmp_path / "classes")
  top1 = alone["val/classes-zeroshot-val-top1"]
  by_task = {(x.task, x.model): x for x in found}
  assert by_task["classes", runs[1]].score == by_task["classes", runs[1]].metrics["top1"] == top1
  alone = bigalign.evaluate(runs[1], retrieval=f"{tmp_path}/classes/test/0.tar", fields=["txt"])
  metrics = by_task["captions", runs[1]].metrics
  assert {f"val/{name}": value for name, value in metrics.items()} == alone
  both = [metrics[f"{name}_R@1"] for name in ("text_to_image", "image_to_text")]
  assert by_task["captions", runs[1]].score == np.mean(both)
  # What is written.
  records = json.loads((tmp_path / "out.json").read_text())
  assert len(records) == 22
  assert records[1]["task"] == "zeroshot_classification" and records[1]["metrics"]["acc1"] == top1
  assert records[5]["metrics"]["image_retrieval_recall@5"] == metrics["text_to_image_R@5"]
  assert records[7]["metrics"] == {} and "gone" in records[7]["missing"]
  lines = [*csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))]
  recalls = ("text_to_image_R@1", "image_to_text_R@1")
  assert [x["metric"] for x in lines if x["model"] == runs[0]] == [
    *("top1", "mean_per_class_recall", *recalls, "", "top1", "ece", "d8-top1"),
    *("image_to_text_mAP@R", "centroid_distance", "top1", *recalls),
  ]
  within = [float(x["low"]) <= float(x["value"]) <= float(x["high"]) for x in lines if x["low"]]
  assert within == [True] * 16
  page = (tmp_path / "out.html").read_text()
  assert "$" not in page and f"{top1:.4f}" in page and "get-data gone" in page
  printed = capsys.readouterr().out
  assert "mean of 10 of 11 tasks" in printed
  assert "elsewhere was not evaluated" in printed and "Get its data with: get-data gone" in printed
  # Once more: nothing is embedded or evaluated.
  with monkeypatch.context() as patch:
    patch.setattr(runner.Subject, "measure", None)
    again = program.main(words)
  assert [(x.metrics, x.score) for x in again] == [(x.metrics, x.score) for x in found]
  assert all(x.kept or x.missing for x in again) and len(decoded) == COUNT + OTHERS
  # Another label is another task, of the same images.
  (tmp_path / "classes/classnames.txt").write_text("cat\ndog\nfish\n")
  changed = program.main(words)
  assert not any(x.kept for x in changed[:6]) and changed[4].metrics == found[4].metrics
  assert len(decoded) == COUNT + OTHERS and [*embedded.values()] == [COUNT + OTHERS] * 2


@pytest.mark.slow
def test_a_kill_loses_nothing(runs, ten, decoded, embedded, tmp_path, monkeypatch):
  """What was embedded and evaluated before the end of a process is there afterwards."""
  words = [*runs, f"--suite={ten}", f"--cache={tmp_path / 'cache'}"]
  measure = runner.Subject.measure

  def killed(self, task, store=""):
    if task.name == "others" and self.name == runs[1]:
      raise KeyboardInterrupt
    return measure(self, task, store)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(runner.Subject, "measure", killed)
    program.main(words)
  found = program.main(words)
  assert [x.kept for x in found if not x.missing] == [True] * 17 + [False] * 3
  assert decoded == [*range(COUNT), *range(OTHERS)]
  assert [*embedded.values()] == [COUNT + OTHERS] * 2


def test_a_task_that_fails_does_not_end_the_suite(runs, suite, tmp_path, capsys):
  """Its row says why, and the mean does not count it as a score."""
  (tmp_path / "classes/classnames.txt").write_text("cat\ndog\n")  # labels are 0, 1 and 2
  words = [runs[0], f"--suite={suite}", f"--cache={tmp_path / 'cache'}"]
  found = program.main(words)
  assert [bool(x.missing) for x in found] == [True, True, False, True]
  assert "outside the 2 class names" in found[0].missing
  assert "mean of 1 of 4 tasks" in capsys.readouterr().out


@pytest.mark.slow
def test_an_exported_folder_is_evaluated_as_its_run(runs, suite, tmp_path):
  bigalign.load(runs[0]).save(tmp_path / "torch", "torch")
  pair = [runs[0], str(tmp_path / "torch")]
  found = program.main([*pair, f"--suite={suite}", f"--cache={tmp_path / 'cache'}"])
  assert found[0].metrics == found[1].metrics and found[4].metrics == found[5].metrics
  of_run = bigalign.evaluate(runs[0], zeroshot=tmp_path / "classes")
  assert bigalign.evaluate(tmp_path / "torch", zeroshot=tmp_path / "classes") == of_run


def test_the_interval_is_that_of_a_bootstrap_of_samples():
  hits = np.repeat([1.0, 0.0], [70, 130])
  rng = np.random.default_rng(1)
  means = rng.choice(hits, (20_000, 200)).mean(1)
  expected = np.quantile(means, (0.025, 0.975))
  found = results.interval("top5", {"top5": 0.35, "num_samples": 200})
  np.testing.assert_allclose(found, expected, atol=0.006)
  assert results.interval("text_to_image_R@5", {"text_to_image_R@5": 1.0, "num_captions": 9}) == (
    1.0,
    1.0,
  )
  assert results.interval("mean_rank", {"mean_rank": 3.0, "num_samples": 9}) is None


@pytest.mark.parametrize(
  "text, message",
  [
    ("x = 1", "x has no type"),
    ("[x]\ntype = 'zeroshut'", "x.type: unknown 'zeroshut'"),
    ("[x]\ntype = 'zeroshot'\nsourc = 'a'", "sourc"),
    ("[x]\ntype = 'zeroshot'\nmetrics = 'top1'", "expected a list of names"),
    ("[x]\ntype = 'geometry'\ndataset = 'a'", "dataset is of zeroshot, retrieval and associations"),
    ("[x", "is not TOML"),
    ("", "lists no task"),
  ],
)
def test_a_file_with_a_mistake(text, message, tmp_path):
  (tmp_path / "s.toml").write_text(text)
  with pytest.raises((ValueError, TypeError), match=message):
    read_suite(str(tmp_path / "s.toml"))


def test_a_metric_that_a_task_does_not_have(runs, suite, tmp_path):
  suite.write_text(SUITE.replace("mean_per_class_recall", "acc1"))
  found = program.main([runs[0], f"--suite={suite}", f"--cache={tmp_path / 'cache'}"])
  assert "metrics=['acc1'] are none of its metrics: top1" in found[1].missing
  assert [bool(x.missing) for x in found] == [False, True, False, True]


def test_a_task_whose_files_are_missing_does_not_end_the_suite(runs, suite, tmp_path):
  """Files that its options name, and stores."""
  data = f'type = "zeroshot"\nsource = "{tmp_path}/classes/test/0.tar"'
  suite.write_text(
    f'[one]\n{data}\nclassnames = "{tmp_path}/gone.txt"\n'
    f'[two]\n{data}\nimage_store = "{tmp_path}/gone"\n'
    f'[three]\n{data}\nclassnames = "{tmp_path}/classes/classnames.txt"\nmetrics = []\n'
  )
  found = program.main([runs[0], f"--suite={suite}", f"--cache={tmp_path / 'cache'}"])
  assert [("gone" in x.missing, x.due, x.score) for x in found] == [
    *((True, True, None), (True, True, None), (False, False, None))
  ]
  assert results.means(found) == {runs[0]: (None, 0, 2)}


@pytest.mark.slow
def test_images_without_vectors_count_as_without_a_cache(runs, suite, tmp_path):
  """A broken image is left out and counted; a model of NaN misses each image."""
  members = samples(0, COUNT)
  members[0] = (members[0][0], b"no image")
  write_tar(tmp_path / "classes/test/0.tar", members)
  values = made_runs.small()
  arrays = made_runs.random_params(values)
  name = next(k for k in arrays if "image_tower" in k and k.endswith("bias"))
  lost = arrays | {name: np.full_like(arrays[name], np.nan)}
  words = [runs[0], made_runs.write(tmp_path / "nan", values, lost)]
  found = program.main([*words, f"--suite={suite}", f"--cache={tmp_path / 'cache'}"])[:2]
  for result in found:
    alone = bigalign.evaluate(result.model, zeroshot=tmp_path / "classes")
    assert {f"val/classes-zeroshot-val-{k}": v for k, v in result.metrics.items()} == alone
    assert result.metrics["num_samples"] == COUNT - 1 and result.metrics["rejected"] == 1
  assert found[1].score == 0.0


@pytest.mark.slow
def test_models_that_read_images_alike_share_a_pass_whatever_their_texts(
  runs, suite, decoded, tmp_path
):
  """A run, a run with other captions, and an export."""
  values = made_runs.small()
  values["data"] = values["data"] | dict(captions=("json.caption",))
  other = made_runs.write(tmp_path / "other", values, made_runs.random_params(values, 2))
  bigalign.load(runs[0]).save(tmp_path / "torch", "torch")
  words = [runs[0], other, str(tmp_path / "torch")]
  program.main([*words, f"--suite={suite}", f"--cache={tmp_path / 'cache'}"])
  assert decoded == [*range(COUNT)]


def test_rows_of_models_with_different_metrics():
  """A cell is empty; less is better for errors and ranks; counts are no quality."""
  one = runner.Result("t", "zeroshot", "a", {"ece": 0.3, "num_samples": 5})
  two = runner.Result("t", "zeroshot", "b", {"ece": 0.01, "num_samples": 4, "rejected": 1})
  rows = {row.metric: row for row in results.rows_of([one, two])}
  assert [*rows] == ["ece", "num_samples", "rejected"] and [*rows["rejected"].values] == ["b"]
  assert [results._best(rows[name]) for name in rows] == [0.01, None, None]
  assert "rejected" in results.as_csv([one, two]) and "rejected" in results.page([one, two], "x")
  assert results.table([one, two]).row_count == 4
  assert results.interval("top1", {"top1": float("nan"), "num_samples": 5}) is None
  accuracy = {"add-accuracy": 0.5, "add-num_samples": 100}
  assert results.interval("add-accuracy", accuracy) == (0.4, 0.6)


def test_names_and_paths_of_suites(tmp_path):
  with pytest.raises(ValueError, match="--suite: unknown 'datacmp'"):
    read_suite("datacmp")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    read_suite(str(tmp_path / "gone.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_suite_names_its_data_and_how_to_get_it(name, monkeypatch):
  """Without the data each task is missing, and says so."""
  monkeypatch.delenv("BIGALIGN_EVALS", raising=False)
  for task in read_suite(name):
    named = task.missing or str(task.evaluator.options)
    assert task.get and task.metrics != () and "BIGALIGN_EVALS" in named
    assert "BIGALIGN_EVALS" in task.get


def test_the_files_of_crossmodal_3600_are_read_as_its_command_writes_them(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGALIGN_EVALS", str(tmp_path))
  task = next(x for x in read_suite("multilingual") if x.name == "xm3600")
  options, folder = task.evaluator.options, tmp_path / "xm3600"
  spoken = [*options["languages"]]
  (folder / "images").mkdir(parents=True)
  for n in range(3):
    (folder / f"images/a{n}.jpg").write_bytes(picture(n))
  records = [
    {"image/key": f"a{n}", **{x: {"caption": [f"{x} {n}", f"{x} 9"]} for x in spoken}}
    for n in range(3)
  ]
  (folder / "captions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
  last = task.get.splitlines()[-1]
  assert last.startswith("sed ")
  subprocess.run(["bash", "-c", last], cwd=folder, check=True)
  read = caption_languages.read(options["source"], options["languages"], "", None, "x")
  assert len(spoken) == 36 and [*read.names] == spoken and read.most == 72
  source = open_source(options["source"], captions=read.fields)
  assert len(open_source(options["source"], captions=())) == 3  # as a suite opens it
  assert source[1]["image"] == picture(1) and source[1]["texts"]["sw.caption"] == ("sw 1", "sw 9")


def test_models_that_read_images_differently_do_not_share_a_pass(runs, tmp_path):
  source = WebDataset(write_tar(tmp_path / "0.tar", samples(0, 3)))
  one, two = (bigalign.load(run) for run in runs)
  targets = [embedding.Target(one, tmp_path / "a"), embedding.Target(two, tmp_path / "b")]
  stores = embedding.embed_with(targets, source)
  for model, store in zip((one, two), stores):
    expected = model.embed_images([source[i]["image"] for i in range(3)])
    np.testing.assert_allclose(np.float32(store.read(np.arange(3))), expected, atol=5e-4)
  other = dataclasses.replace(two.view.reading, resize="shortest")
  two.view = two.view._replace(reading=other)
  with pytest.raises(ValueError, match="read images differently"):
    embedding.embed_with(targets, source)


@pytest.mark.slow
def test_evaluators_that_read_other_images_see_pixels(runs, suite, tmp_path):
  """Images of no class, and the training images of a probe; a change of either is another task."""
  write_tar(tmp_path / "others.tar", samples(50, 5))
  write_tar(tmp_path / "train.tar", samples(100, 12))
  data = (
    f'source = "{tmp_path}/classes/test/0.tar"\nclassnames = "{tmp_path}/classes/classnames.txt"'
  )
  probe = f'train = "{tmp_path}/train.tar"\ntest = "{tmp_path}/classes/test/0.tar"\nneighbours = 3'
  suite.write_text(
    f'[far]\ntype = "zeroshot"\n{data}\nood = "{tmp_path}/others.tar"\nmetrics = ["ood_auroc"]\n'
    f'[near]\ntype = "knn"\n{probe}\nmetrics = ["top1"]\n'
    f'[alike]\ntype = "image_retrieval"\nsource = "{tmp_path}/classes/test/0.tar"\n'
    f'gallery = "{tmp_path}/train.tar"\nmetrics = ["image_to_image_R@1"]\n'
  )
  words = [runs[0], f"--suite={suite}", f"--cache={tmp_path / 'cache'}"]
  first, second = program.main(words), program.main(words)
  assert [x.missing for x in first] == ["", "", ""] and 0 <= first[0].score <= 1
  assert [x.kept for x in second] == [True, True, True]
  write_tar(tmp_path / "train.tar", samples(100, 30))
  assert [x.kept for x in program.main(words)] == [True, False, False]
