"""Tests of the notebooks: they run from the first cell to the last, and hold no outputs."""

from __future__ import annotations

import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import tarfile
import tomllib

import nbformat
import pytest
from helpers import small_checkpoints
from helpers.shipped import ROOT
from helpers.small_shards import picture, write_tar
from helpers.small_tokenizers import bert_json
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def cells(path):
  """The sources of the cells of code."""
  notebook = nbformat.read(path, as_version=4)
  return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def cell_with(name, text):
  """The cell of code that contains a text."""
  return next(x for x in cells(ROOT / "colabs" / f"{name}.ipynb") if text in x)


def run(name, monkeypatch, **variables):
  """Runs a notebook with few steps on one device; returns its printed text and its figures."""
  for variable, value in {**SMALL, **variables}.items():
    monkeypatch.setenv(variable, value)
  notebook = nbformat.read(ROOT / f"colabs/{name}.ipynb", as_version=4)
  NotebookClient(
    notebook, timeout=500, resources={"metadata": {"path": str(ROOT / "colabs")}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  printed = "".join(output.get("text", "") for output in outputs)
  assert "cpu 1" in printed
  return printed, [output for output in outputs if "image/png" in output.get("data", ())]


SMALL = dict(BIGALIGN_STEPS="2", JAX_NUM_CPU_DEVICES="1")
WORDS = ("red", "blue", "dog", "cat", "big", "small", "on")


def img2dataset_shard(folder, count=24):
  """A folder as img2dataset writes it: KEY.jpg, KEY.txt, KEY.json; all captions differ."""
  members = []
  for i in range(1, count + 1):
    text = " ".join(word for bit, word in enumerate(WORDS) if i >> bit & 1)
    about = {"key": f"{i:09d}", "caption": text, "status": "success"}
    members += [
      (f"{i:09d}.jpg", picture(i)),
      (f"{i:09d}.txt", text.encode()),
      (f"{i:09d}.json", json.dumps(about).encode()),
    ]
  return write_tar(folder / "00000.tar", members)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_committed_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not cell.outputs and cell.execution_count is None
      assert "jax==" not in cell.source and "numpy==" not in cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_badge_and_installs_from_the_address_of_the_project(path):
  address = REPOSITORY.removeprefix("https://github.com/")
  badge = f"(https://colab.research.google.com/github/{address}/blob/main/colabs/{path.name})"
  assert badge in nbformat.read(path, as_version=4).cells[0].source
  assert badge in (ROOT / "README.md").read_text()
  assert f'SOURCE = "git+{REPOSITORY}"' in cells(path)[0]
  assert cells(path)[0] == cells(NOTEBOOKS[0])[0]


@pytest.mark.parametrize(
  "gpu, installed, jax_for_gpu",
  [
    (False, {"jax": "0.10.2", "numpy": "2.3.0", "torch": "2.9.0", "flax": "0.10"}, []),
    (True, {"jax": "0.10.2", "numpy": "2.3.0"}, ["jax[cuda12]==0.10.2"]),
    (True, {"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2", "numpy": "2.3.0"}, []),
    (True, {}, ["jax[cuda12]"]),
  ],
)
def test_the_first_cell_keeps_jax_numpy_and_torch(
  gpu, installed, jax_for_gpu, tmp_path, monkeypatch
):
  class Distribution:
    def __init__(self, name, version):
      self.metadata, self.version = {"Name": name}, version

  calls = []
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(
    importlib.metadata, "distributions", lambda: [Distribution(*x) for x in installed.items()]
  )
  monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
  monkeypatch.setattr(
    subprocess, "run", lambda words: calls.append(words) or subprocess.CompletedProcess(words, 0)
  )
  exec(cells(NOTEBOOKS[0])[0], {})
  assert len(calls) == 1
  words = calls[0]
  assert words[words.index("--constraint") + 2 :] == [f"git+{REPOSITORY}", *jax_for_gpu]
  kept = pathlib.Path(words[words.index("--constraint") + 1]).read_text().split()
  assert kept == [f"{name}=={version}" for name, version in installed.items() if name != "flax"]


def test_the_drawn_example_is_a_folder_of_img2dataset(tmp_path):
  cell = cell_with("your_data", "def draw_shards").partition("drawn = not SHARDS")[0]
  assert cell.strip() in cell_with("frozen_towers", "def draw_shards")
  names = {"CLASSES": ["a red star"]}
  exec(cell, names)
  shard = names["draw_shards"](tmp_path, 60)
  with tarfile.open(shard) as tar:
    files = {member.name: tar.extractfile(member).read() for member in tar}
  assert len(files) == 180
  assert json.loads(files["000000003.json"])["caption"] == files["000000003.txt"].decode()
  image = names["Image"].open(io.BytesIO(files["000000003.jpg"]))
  assert image.size == (64, 64) and len(image.getcolors(4096)) > 1
  assert not any(b" red star " in data for name, data in files.items() if name.endswith("txt"))


@pytest.mark.slow
def test_quickstart_runs_and_shows_its_figures(monkeypatch):
  _, figures = run("quickstart", monkeypatch, BIGALIGN_STEPS="2")  # not divisible by 5
  assert len(figures) == 7  # loss and scores, the sphere, three name queries, two drawings


@pytest.mark.slow
def test_your_data_runs_on_a_folder_of_img2dataset(monkeypatch, tmp_path):
  shard = img2dataset_shard(tmp_path)
  _, figures = run("your_data", monkeypatch, BIGALIGN_SHARDS=shard, BIGALIGN_WIDTH="16")
  assert len(figures) == 5  # the pairs, the loss, the classes, two queries


@pytest.mark.slow
def test_frozen_towers_runs_on_small_towers(monkeypatch, tmp_path):
  pytest.importorskip("torch", reason="torch is not installed: the extra interop")
  clip = dict(small_checkpoints.CLIP)
  towers = [
    small_checkpoints.folder(tmp_path / f"clip{seed}", clip, small_checkpoints.clip_keys(seed))
    for seed in (0, 1)
  ]
  config = dict(small_checkpoints.BERT, max_position_embeddings=24)
  _, arrays = small_checkpoints.bert_keys(config)
  text = small_checkpoints.folder(tmp_path / "bert", config, arrays)
  bert_json(text, words=("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))
  printed, figures = run(
    "frozen_towers",
    monkeypatch,
    BIGALIGN_SHARDS=img2dataset_shard(tmp_path, 80),
    BIGALIGN_IMAGE_SIZE="16",
    BIGALIGN_TOWERS=":".join(map(str, [*towers, text])),
  )
  assert len(figures) == 4  # the measures, the loss, captions against images, PyTorch against JAX
  assert float(printed.rpartition("largest difference ")[2].split()[0]) < 2e-5
