"""bigalign search: embeds a source once, takes stores of the same model, and answers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import pathlib

import jax
import numpy as np
import pytest
from helpers.shipped import load
from helpers.small_shards import samples, write_tar
from search.conftest import square, unit, write_store

from bigalign.api.image_inputs import View
from bigalign.api.logits import Head
from bigalign.api.model import Model
from bigalign.config import resolve_config
from bigalign.data.sources.base import open_source
from bigalign.data.stores import writer
from bigalign.data.stores.reader import Store
from bigalign.options import plain
from bigalign.program import init_params, make_program
from bigalign.search import embedding, main
from bigalign.search.collection import Collection
from bigalign.search.embedding import embed_source, project
from bigalign.search.index import Exact

COUNT = 21


@pytest.fixture(scope="module")
def model():
  """A model with random parameters."""
  c = load("tiny")
  small = {"depth": 1, "width": 32}
  c.update_from_flattened_dict(
    {f"model.{side}.{k}": v for side in ("image", "text") for k, v in small.items()}
  )
  config = resolve_config(c)
  program = make_program(config)
  params = jax.jit(functools.partial(init_params, program))(jax.random.key(0))
  return Model(
    source="random",
    encoder=program.model,
    params={k.removeprefix("model/"): v for k, v in params.items() if k.startswith("model/")},
    config=plain(config),
    head=Head(1.0, 0.0, True),
    view=View(config.data),
    tokenizer=config.data.make_tokenizer(),
    embed_dim=config.model.embed_dim,
    export=lambda *args, **options: None,
  )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  return write_tar(tmp_path_factory.mktemp("pictures") / "0.tar", samples(0, COUNT))


@pytest.fixture(scope="module")
def store(model, pictures, tmp_path_factory):
  """The embeddings of `pictures`."""
  return embed_source(model, open_source(pictures), tmp_path_factory.mktemp("s"), batch_size=8)


@pytest.fixture
def loaded(model, monkeypatch, tmp_path):
  """The program loads `model`, and keeps embeddings in tmp_path."""
  monkeypatch.setattr(main, "load", lambda *args: model)
  monkeypatch.setenv("BIGALIGN_SEARCH", str(tmp_path / "cache"))


def test_a_store_holds_the_embeddings_of_the_images(model, pictures, store):
  source = open_source(pictures)
  expected = model.embed_images([source[i]["image"] for i in range(COUNT)])
  found = store.read(np.arange(COUNT))
  assert found.dtype == np.float16
  np.testing.assert_allclose(found.astype(np.float32), expected, atol=5e-4)
  assert store.samples(np.arange(COUNT))[:, 1].tolist() == list(range(COUNT))


def test_what_is_embedded_is_not_embedded_again(model, pictures, store, monkeypatch):
  monkeypatch.setattr(embedding, "_embedder", None)
  again = embed_source(model, open_source(pictures), store.folder, batch_size=8)
  assert again.fingerprint == store.fingerprint
  with pytest.raises(ValueError, match="the embeddings of another source; name another --out"):
    other = write_tar(pathlib.Path(pictures).parent / "other.tar", samples(5, 3))
    embed_source(model, open_source(other), store.folder, batch_size=8)


def test_the_folder_in_the_cache_depends_on_model_and_source_only(model, monkeypatch):
  """Not on where a run lies, or on what it was trained with."""
  other = copy.copy(model)
  moved = dataclasses.replace(model.view.reading, source="elsewhere.tar", workers=7)
  other.view = model.view._replace(reading=moved)
  assert embedding.header_of(other, "float16") == embedding.header_of(model, "float16")
  folder = embedding.cache_folder(model, "f")
  assert embedding.cache_folder(other, "f") == folder != embedding.cache_folder(other, "g")
  other.view = model.view._replace(reading=dataclasses.replace(moved, resize="shortest"))
  assert embedding.cache_folder(other, "f") != folder
  other = copy.copy(model)
  path = next(path for path in model.params if path.startswith("image_tower/"))
  other.params = model.params | {path: model.params[path] + 1}
  assert embedding.cache_folder(other, "f") != folder
  monkeypatch.setenv("BIGALIGN_SEARCH", "/data/search")
  assert embedding.cache_folder(model, "f").parent == pathlib.Path("/data/search")


def test_a_search_that_was_killed_resumes(model, pictures, store, tmp_path, monkeypatch):
  monkeypatch.setattr(embedding, "_PIECE", 8)
  write, pieces = writer.write, []

  def stop_at_second(folder, piece, *args, **options):
    if piece == 1 and not pieces.count(1):
      pieces.append(1)
      raise KeyboardInterrupt
    pieces.append(piece)
    write(folder, piece, *args, **options)

  monkeypatch.setattr(writer, "write", stop_at_second)
  with pytest.raises(KeyboardInterrupt):
    embed_source(model, open_source(pictures), tmp_path, batch_size=8)
  found = embed_source(model, open_source(pictures), tmp_path, batch_size=8)
  assert pieces == [0, 1, 1, 2]
  rows = np.arange(COUNT)
  np.testing.assert_array_equal(found.read(rows), store.read(rows))


def test_images_that_cannot_be_read_are_left_out(model, tmp_path):
  bad = {"000003.jpg": b"<html>", "000004.jpg": b""}
  path = write_tar(tmp_path / "0.tar", [(k, bad.get(k, x)) for k, x in samples(0, 10)])
  found = embed_source(model, open_source(path), tmp_path / "store", batch_size=8)
  assert len(found) == 8 and found.left_out == {"undecodable": 1, "empty": 1}
  collection = Collection(found, open_source(path))
  assert collection.item(3).captions == ("picture number 5",)


def test_the_outputs_of_a_tower_are_projected(model, pictures, store, tmp_path):
  """A store of `bigalign embed` without --projected."""
  source = open_source(pictures)
  squares = model.preprocess([source[i]["image"] for i in range(COUNT)])
  padded = np.concatenate([squares, squares[:3]])
  variables = {"params": {}}
  for path, x in model.params.items():
    part = variables["params"]
    *folders, name = path.split("/")
    for folder in folders:
      part = part.setdefault(folder, {})
    part[name] = x
  pooled = jax.jit(functools.partial(model.encoder.apply, method="pooled_image"))
  pooled = np.asarray(pooled(variables, padded))[:COUNT]
  keys = [source[i]["key"] for i in range(COUNT)]
  tower = write_store(tmp_path / "tower", pooled, dtype="float32", keys=keys, projected=False)
  found = project(model, tower, tmp_path / "projected", batch_size=8)
  rows = np.arange(COUNT)
  z = store.read(rows).astype(np.float32)
  np.testing.assert_allclose(found.read(rows).astype(np.float32), z, atol=1e-3)
  searcher = main.search(model, str(tower.folder), source=pictures, out=tmp_path / "again")
  assert searcher.collection.item(4).captions == ("picture number 4",)


def test_stores_of_other_models_are_refused(model, pictures, tmp_path):
  source = open_source(pictures)
  keys = [source[i]["key"] for i in range(COUNT)]
  z = np.random.default_rng(0).standard_normal((COUNT, model.embed_dim)).astype(np.float32)
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  other = write_store(tmp_path / "other", z, keys=keys)
  with pytest.raises(ValueError, match=r"made by another model than random.*mean cosine"):
    main.search(model, str(other.folder), source=pictures)
  narrow = write_store(tmp_path / "narrow", z[:, :7], keys=keys)
  with pytest.raises(ValueError, match=r"7 numbers, and random makes 64"):
    main.search(model, str(narrow.folder), source=pictures)
  texts = write_store(tmp_path / "texts", z, keys=keys, side="text", projected=False)
  with pytest.raises(ValueError, match="texts before their projector"):
    main.search(model, str(texts.folder))
  with pytest.raises(ValueError, match=r"is not the source of .*row 0 is sample 0"):
    elsewhere = write_tar(tmp_path / "9.tar", samples(50, 30))
    main.search(model, str(other.folder), source=elsewhere)
  with pytest.raises(ValueError, match="only for a store"):
    main.search(model, pictures, source=pictures)


def test_a_store_without_its_source_gives_positions(model, store, caplog):
  searcher = main.search(model, str(store.folder))
  assert "Without --source SHARDS" in caplog.text
  (found,) = searcher.images([square((3, 200, 9))], k=2)
  assert [x.item.key for x in found] == ["", ""] and found[0].item.note == "no source"


def test_queries_on_the_command_line(loaded, pictures, tmp_path, capsys):
  path = tmp_path / "7.jpg"
  path.write_bytes(open_source(pictures)[7]["image"])
  words = ["random", pictures, "--query", "a cat", "--image", str(path), "--k", "3"]
  main.main(words)
  table = capsys.readouterr().out
  assert "a cat" in table and str(path) in table and "picture number 7" in table
  main.main([*words, "--json"])
  output = capsys.readouterr()
  text, image = map(json.loads, output.out.splitlines())
  assert text["query"] == "a cat" and len(text["results"]) == 3
  best = image["results"][0]
  assert (best["rank"], best["sample"], best["captions"]) == (1, 7, ["picture number 7"])
  assert best["score"] == pytest.approx(1, abs=1e-3) and best["key"].endswith("000007")
  assert f"21 embeddings in {tmp_path / 'cache'}" in output.err


def test_queries_from_the_standard_input(loaded, pictures, capsys, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.StringIO("a dog\n\n a cat \n"))
  main.main(["random", pictures, "--json", "--k", "1"])
  found = [json.loads(line)["query"] for line in capsys.readouterr().out.splitlines()]
  assert found == ["a dog", "a cat"]


@pytest.mark.parametrize(
  "words, message",
  [
    (["--k", "0"], "--k=0: at least 1"),
    (["--image", "nowhere.jpg"], "--image=nowhere.jpg: no such file"),
    (["--source_options", "image"], "write NAME=VALUE"),
  ],
)
def test_wrong_words_are_refused_before_a_model_is_loaded(words, message, capsys):
  with pytest.raises(SystemExit, match="2"):
    main.main(["random", "x.tar", *words])
  assert message in capsys.readouterr().err


def test_a_caption_cannot_change_the_terminal(searcher):
  assert main.printable("red\x1b[31m\r\nsquare\u202e") == "red [31m  square "
  assert main.printable("日本 é 🚌") == "日本 é 🚌"


def test_a_large_store_gets_an_approximate_index(searcher, monkeypatch, caplog, tmp_path):
  pytest.importorskip("faiss", reason="faiss or starlette is not installed: the extra search")
  vectors = unit(np.random.default_rng(0).integers(0, 255, (200, 3)))
  collection = Collection(write_store(tmp_path, vectors), None)
  args = dict(probes=1, memory=1.0)
  model = searcher.model
  assert isinstance(main._index(model, collection, "auto", **args), Exact)
  monkeypatch.setattr(main, "EXACT_ROWS", 100)
  assert isinstance(main._index(model, collection, "exact", **args), Exact)
  found = main._index(model, collection, "auto", **args)
  assert "Approximate index: 5 lists, 1 searched; it finds" in caplog.text
  assert found.search(vectors[:1], 1).rows.tolist() == [[0]]


def test_stores_are_recognised(tmp_path, store):
  assert isinstance(store, Store) and main.is_store(str(store.folder))
  assert not main.is_store(str(tmp_path)) and not main.is_store("val/*.tar")
