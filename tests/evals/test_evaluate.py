"""What training measured, `bigalign evaluate` finds again; a report of a real run is written."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from helpers.shipped import load
from helpers.small_shards import samples, write_tar

from bigalign import evaluate, sharding
from bigalign.config import resolve_config
from bigalign.report import main
from bigalign.run.metrics import read_metrics
from bigalign.suites import main as program
from bigalign.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  c = load("tiny")
  c.total_steps, c.log_every, c.checkpoint_every, c.batch_size = 4, 2, 2, 16
  c.data.source = write_tar(folder / "shards/train.tar", samples(0, 40))
  c.evals = dict(
    val=dict(
      type="retrieval", source=write_tar(folder / "shards/val.tar", samples(40, 21)), batch_size=16
    )
  )
  c.model.image.update(width=32, depth=1)
  c.model.text.update(width=32, depth=1)
  c.writer = dict(tensorboard=False)
  c.mesh = dict(data=4, fsdp=2)  # the evaluation has another mesh
  train(c, folder / "run")
  return folder / "run"


@pytest.mark.slow
def test_evaluate_finds_what_training_measured(trained, tmp_path, capsys):
  found = program.main([str(trained), "--json", str(tmp_path / "scores.json")])
  *_, row = read_metrics(trained)
  assert row.pop("step") == 4
  # Sums in another order: of a rank or two, the neighbours may change places.
  assert found == pytest.approx(row, abs=0.1)
  assert found.keys() == row.keys() and "ema/val/image_to_text_R@1" in found
  written = json.loads((tmp_path / "scores.json").read_text())
  assert written["metrics"] == found and written["step"] == 4 and written["samples_seen"] == 64
  assert "val/image_to_text_R@1" in capsys.readouterr().out


def test_evaluators_without_data_are_left_out_by_name(tmp_path, monkeypatch):
  """And not those in whose code something fails."""

  def made(evals, **kwargs):
    (name,) = evals
    if name == "gone":
      open(tmp_path / "gone.tar").close()
    return {name: lambda params: {f"{name}/x": 1.0}} if name != "bug" else {}["bug"]

  config = resolve_config(load("tiny"))
  (component, *_) = config.evals.values()

  def run_with(*names):
    there = dataclasses.replace(config, evals=dict.fromkeys(names, component))
    options = {name: {"type": "retrieval"} for name in names}
    meta = dict(samples_seen=64, revision="x", config=dict(evals=options))
    params = {"w": np.zeros(1)}
    return evaluate.Run(tmp_path, 4, there, meta, sharding.make_mesh(), params, {}, {})

  monkeypatch.setattr(evaluate, "make_evaluators", made)
  monkeypatch.setattr(program, "open_any", lambda *args: run_with("gone", "val"))
  found = program.main(["run", "--json", str(tmp_path / "scores.json")])
  written = json.loads((tmp_path / "scores.json").read_text())
  assert found == {"val/x": 1.0}
  assert [*written["evals"]] == ["val"]
  assert written["left_out"] == {"gone": f"{tmp_path}/gone.tar: No such file or directory"}
  other = r"give other data as retrieval or zeroshot \(--retrieval, --zeroshot\)\. .*gone\.tar"
  with pytest.raises(FileNotFoundError, match=other):
    evaluate.evaluate(run_with("gone"))
  with pytest.raises(KeyError, match="bug"):
    evaluate.evaluate(run_with("val", "bug"))


@pytest.mark.slow
def test_report_of_a_run_is_the_last_thing_printed(trained, capsys):
  path = main.main([str(trained)])
  assert capsys.readouterr().out.splitlines()[-1] == str(path) == str(trained / "report.html")
  assert "picture number 40" in path.read_text()  # a held-out caption


@pytest.mark.slow
def test_shards_and_a_folder_given_by_hand(trained, tmp_path):
  write_tar(tmp_path / "shapes/test/0.tar", samples(0, 10))
  (tmp_path / "shapes/classnames.txt").write_text("disc\nline\nsquare\n")
  found = program.main(
    [
      str(trained),
      "--zeroshot",
      str(tmp_path / "shapes"),
      "--retrieval",
      str(tmp_path / "shapes/test/*.tar"),
      "--fields",
      "json.caption,txt",
    ]
  )
  assert found["val/shapes-zeroshot-val-num_classes"] == 3
  assert found["val/shapes-zeroshot-val-num_samples"] == found["val/num_samples"] == 10


@pytest.mark.parametrize(
  ("folder", "members", "message"),
  [
    ("gs://bucket/shapes", (), "a folder on a disk or a mount"),
    ("nowhere", (), "there is no such folder"),
    (
      "empty",
      ("empty/classnames.txt",),
      r"neither .*empty nor .*/test holds shards \(\.tar\)",
    ),
    ("bare", ("bare/test/0.tar",), r"neither .*bare/test nor .*bare holds a classnames\.txt"),
  ],
)
def test_a_folder_of_classes_that_cannot_be_used(folder, members, message, tmp_path, monkeypatch):
  """The message names the option, in the words of the command line and of Python."""
  monkeypatch.chdir(tmp_path)
  for member in members:
    (tmp_path / member).parent.mkdir(parents=True)
    (tmp_path / member).write_text("disc")
  with pytest.raises((ValueError, OSError), match=rf"^zeroshot \(--zeroshot\)={folder}: {message}"):
    evaluate.data_evals(None, None, folder)


def test_steps_that_a_run_does_not_have(trained):
  assert evaluate.open_run(trained, 2).step == 2
  with pytest.raises(FileNotFoundError, match=r"'3'.*\[2, 4\]"):
    evaluate.open_run(trained, "3")
  with pytest.raises(ValueError, match=r"config\.keep\.best"):
    evaluate.open_run(trained, "best")
