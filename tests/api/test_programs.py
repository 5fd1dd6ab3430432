"""The programs as functions: they take configs by name and return what the programs print."""

from __future__ import annotations

import json

import pytest
from helpers.small_checkpoints import CLIP, clip_keys, folder
from helpers.small_shards import samples, write_tar

import bigalign
from bigalign.api import programs
from bigalign.plan import main as planning
from bigalign.run import provenance
from bigalign.suites import main as program


def test_a_config_by_name_with_overrides_of_both_kinds(run_folder):
  config = provenance.read_config(run_folder)["config"]
  assert config["total_steps"] == 2 and config["checkpoint_every"] == 1
  assert config["model"]["text"]["width"] == 32 and config["model"]["image"]["depth"] == 1
  assert config["optimizer"]["lr"] == 1e-3, "what is not replaced is the config's"


def test_a_config_without_a_name_needs_a_folder():
  with pytest.raises(TypeError, match="needs workdir="):
    bigalign.train({"seed": 0})
  with pytest.raises(FileNotFoundError, match="No config file tyny"):
    bigalign.train("tyny")


def test_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  trained = []
  monkeypatch.setattr(programs, "setup_runtime", lambda values: None)
  monkeypatch.setattr(programs, "train_in", lambda values, folder, **_: trained.append(folder))
  assert bigalign.train("tiny", workdir="~/runs/x") == str(tmp_path / "runs/x")
  assert trained == [str(tmp_path / "runs/x")]


@pytest.mark.slow
def test_evaluate_returns_what_the_program_prints(run_folder, tmp_path, capsys):
  shards = write_tar(tmp_path / "0.tar", samples(0, 16))
  found = bigalign.evaluate(run_folder, retrieval=shards, step=1)
  assert found == program.main([str(run_folder), "--retrieval", shards, "--step", "1"])
  with pytest.raises(ValueError, match=r"has no config\.evals; give retrieval"):
    bigalign.evaluate(run_folder)


@pytest.mark.slow
def test_embed_returns_the_stores(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  image = dict(init=str(folder(tmp_path / "clip", CLIP, clip_keys())))
  found = bigalign.embed(
    "tiny",
    "~/stores",
    {"data.source": write_tar(tmp_path / "0.tar", samples(0, 16)), "model.image": image},
    towers=["image"],
    data__image_size=16,
    frozen="image_tower/",
  )
  assert found == {str(tmp_path / "stores/image"): dict(rows=16, width=12, left_out={})}


@pytest.mark.slow
def test_export_returns_the_folder(run_folder, tmp_path, monkeypatch):
  monkeypatch.setattr("bigalign.export.check.possible", lambda kind: False)
  made = bigalign.export(run_folder, tmp_path / "out", "torch", step=1, name="small")
  assert made == (tmp_path / "out", None)
  assert json.loads((made.folder / "bigalign.json").read_text())["step"] == 1
  assert bigalign.load(made.folder).config["model"]["text"]["width"] == 32


def test_plan_returns_the_figures(monkeypatch):
  asked = []
  figures = dict(fits=True, devices=1, total_steps=7)

  def plan(config, topology, **options):
    asked.append((config["total_steps"], topology, options["samples"]))
    return dict(figures)

  monkeypatch.setattr(planning, "plan", plan)
  monkeypatch.setattr(planning.chips, "estimate", lambda stage, prices: {})
  monkeypatch.setattr(planning.table, "format_plan", lambda name, result: "")
  monkeypatch.setattr(planning.largest_batch, "predict", lambda plans: None)
  assert bigalign.plan("tiny", samples=5, total_steps=7) == figures
  assert asked == [(7, "v5e:1x1", 5)]


@pytest.mark.parametrize("function", ["train", "embed"])
def test_a_script_that_a_data_worker_imports_needs_a_guard(function):
  """As multiprocessing imports it; the same script as a program goes on to its next error."""
  script = compile(f"import bigalign; bigalign.{function}('nope', 'x')", "script.py", "exec")
  with pytest.raises(RuntimeError, match=rf"bigalign\.{function} .*if __name__ == \"__main__\""):
    exec(script, {"__name__": "__mp_main__"})
  with pytest.raises((TypeError, FileNotFoundError)):
    exec(script, {"__name__": "__main__"})
