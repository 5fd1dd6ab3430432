"""bigalign search: embeds a source once, takes stores of the same model, and answers."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import functools
import io
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from helpers.shipped import load
from helpers.small_shards import samples, write_tar
from PIL import Image
from search.conftest import square, unit, write_store

from bigalign.api import embedding
from bigalign.api.embedding import embed_source, project
from bigalign.api.image_inputs import View
from bigalign.api.model import Model
from bigalign.config import resolve_config
from bigalign.data.sources.base import open_source
from bigalign.data.stores import writer
from bigalign.data.stores.reader import Store
from bigalign.frozen.embed import source_fingerprint
from bigalign.losses.logit_head import LogitHead
from bigalign.options import plain
from bigalign.program import init_params, make_program
from bigalign.search import main
from bigalign.search.collection import Collection
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
    head=LogitHead(1.0, 0.0, True),
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


def keys_of(source):
  return [source[i]["key"] for i in range(len(source))]


def with_data(model, source):
  """The model as if a run had trained it on this source."""
  other = copy.copy(model)
  data = {k: v for k, v in model.config["data"].items() if k not in ("mixture", "source_options")}
  other.config = model.config | dict(data=data | dict(source=source))
  return other


def test_examples():
  assert doctest.testmod(main).failed == 0


@pytest.mark.slow
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
  # The source that was refused left nothing in the folder.
  again = embed_source(model, open_source(pictures), store.folder, batch_size=8)
  assert again.fingerprint == store.fingerprint


def test_another_batch_size_or_number_of_devices_finds_and_resumes_a_store(
  model, pictures, store, tmp_path, monkeypatch
):
  again = embed_source(model, open_source(pictures), store.folder, batch_size=3)
  assert again.fingerprint == store.fingerprint
  monkeypatch.setattr(embedding, "_PIECE", 8)
  write = writer.write

  def stop_at_second(folder, piece, *args, **options):
    if piece == 1:
      raise KeyboardInterrupt
    write(folder, piece, *args, **options)

  with monkeypatch.context() as killed:
    killed.setattr(writer, "write", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
      embed_source(model, open_source(pictures), tmp_path, batch_size=8)
  with pytest.raises(ValueError, match="the embeddings of another source"):
    other = write_tar(tmp_path / "other.tar", samples(5, 3))
    embed_source(model, open_source(other), tmp_path, batch_size=8)
  found = embed_source(model, open_source(pictures), tmp_path, batch_size=3)
  rows = np.arange(COUNT)
  assert found.samples(rows)[:, 1].tolist() == rows.tolist()
  np.testing.assert_allclose(
    found.read(rows).astype(np.float32), store.read(rows).astype(np.float32), atol=1e-3
  )


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


def test_samples_of_the_training_data_are_shown_if_the_store_was_made_from_them(
  model, pictures, store, tmp_path, caplog
):
  """By `bigalign search`, or by `bigalign embed`; the first keys of another source may be equal."""
  searcher = main.search(with_data(model, pictures), str(store.folder))
  assert searcher.collection.item(4).captions == ("picture number 4",)
  source, z = open_source(pictures), store.read(np.arange(COUNT))
  trained = with_data(model, pictures)
  data = resolve_config(dict(trained.config)).data
  for places in (False, True):
    made = write_store(
      tmp_path / str(places),
      z,
      keys=keys_of(source),
      fingerprint=source_fingerprint(source, data, places=places),
    )
    searcher = main.search(trained, str(made.folder))
    assert searcher.collection.item(4).captions == ("picture number 4",)
  assert "Without --source" not in caplog.text
  longer = write_tar(tmp_path / "0.tar", samples(0, COUNT + 1))
  searcher = main.search(with_data(model, longer), str(store.folder))
  assert searcher.collection.source is None and "Without --source SHARDS" in caplog.text


def test_a_model_without_the_tower_of_a_store_compares_nothing(model, pictures, tmp_path, caplog):
  """A run on stored embeddings of images has no image tower, and may have no tokenizer."""
  z = np.random.default_rng(0).standard_normal((COUNT, model.embed_dim))  # the check refuses it
  for side, part in (("image", "view"), ("text", "tokenizer")):
    caplog.clear()
    other = copy.copy(model)
    setattr(other, part, None)
    made = write_store(tmp_path / side, z, keys=keys_of(open_source(pictures)), side=side)
    main.check_model(other, Collection(made, open_source(pictures)))
    assert "It was not checked that random made" in caplog.text
    with pytest.raises(ValueError, match="made by another model"):
      main.check_model(model, Collection(made, open_source(pictures)))


def test_the_check_decodes_images_as_the_model_does(tmp_path, model):
  """With the EXIF orientation, if the model was trained with it."""
  other = copy.copy(model)
  turned = dataclasses.replace(model.view.reading, apply_exif=True)
  other.view = model.view._replace(reading=turned)
  rng = np.random.default_rng(0)
  members = []
  for i in range(4):
    image, exif, file = Image.new("RGB", (60, 40)), Image.Exif(), io.BytesIO()
    image.paste(tuple(rng.integers(100, 255, 3).tolist()), (0, 0, 60, 12))
    exif[0x0112] = 6
    image.save(file, "jpeg", exif=exif)
    members.append((f"{i}.jpg", file.getvalue()))
  source = open_source(write_tar(tmp_path / "0.tar", members), captions=())
  z = other.embed_images([source[i]["image"] for i in range(4)])
  made = write_store(tmp_path / "store", z, keys=keys_of(source))
  main.check_model(other, Collection(made, source), least=0.9999)


def test_a_store_of_texts_whose_captions_are_not_those_of_the_source(model, tmp_path, caplog):
  """No row shows the caption of another one, and rows without captions are not compared."""
  picture = samples(0, 1)[0][1]
  members = [("0.jpg", picture), ("0.txt", b"a"), ("1.jpg", picture), ("2.jpg", picture)]
  source = open_source(write_tar(tmp_path / "0.tar", members))
  z = model.embed_texts(["a", "b", "c"])
  made = write_store(tmp_path / "texts", z, keys=keys_of(source), side="text")
  texts = Collection(made, source)
  assert [texts.item(i).captions for i in range(3)] == [("a",), (), ()]
  assert "0 captions of this sample and the store 1" in texts.item(1).note
  main.check_model(model, texts)
  assert "It was not checked" not in caplog.text
  members = [("0.jpg", picture), ("1.jpg", picture), ("2.jpg", picture), ("2.txt", b"a")]
  pairless = open_source(write_tar(tmp_path / "pairless" / "0.tar", members))
  made = write_store(tmp_path / "none", z[:2], keys=keys_of(pairless)[:2], side="text")
  main.check_model(model, Collection(made, pairless))
  assert "It was not checked" in caplog.text


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
    (["--probes", "0"], "--probes=0: at least 1"),
    (["--batch_size", "0"], "--batch_size=0: at least 1"),
    (["--memory", "-1"], "--memory=-1.0: a number of GiB, at least 0"),
    (["--memory", "nan"], "--memory=nan"),
    (["--memory", "inf"], "--memory=inf"),
    (["--port", "70000"], "--port=70000: from 0 to 65535"),
    (["--port", "-1"], "--port=-1"),
    (["--image", "nowhere.jpg"], "--image=nowhere.jpg: no such file"),
    (["--source_options", "image"], "write NAME=VALUE"),
  ],
)
def test_wrong_words_are_refused_before_a_model_is_loaded(words, message, capsys):
  with pytest.raises(SystemExit, match="2"):
    main.main(["random", "x.tar", *words])
  assert message in capsys.readouterr().err


def test_missing_packages_are_reported_before_a_model_is_loaded(monkeypatch):
  monkeypatch.setattr(main, "load", None)
  monkeypatch.setitem(sys.modules, "faiss", None)
  with pytest.raises(ImportError, match="an approximate index needs faiss: pip install"):
    main.main(["random", "x.tar", "--index", "approximate"])
  monkeypatch.setitem(sys.modules, "bigalign.search.server", None)
  with pytest.raises(ImportError, match="--serve needs the extra `search`"):
    main.main(["random", "x.tar", "--serve", "--port", "0"])


def test_a_large_source_needs_faiss_before_it_is_embedded(model, pictures, monkeypatch):
  monkeypatch.setattr(main, "EXACT_ROWS", COUNT - 1)
  monkeypatch.setattr(embedding, "embed_source", None)
  monkeypatch.setitem(sys.modules, "faiss", None)
  with pytest.raises(ImportError, match="an approximate index needs faiss"):
    main.search(model, pictures)


def test_the_command_line_says_what_was_left_out(loaded, tmp_path, capsys):
  bad = {"000003.jpg": b"<html>", "000004.jpg": b""}
  path = write_tar(tmp_path / "0.tar", [(k, bad.get(k, x)) for k, x in samples(0, 10)])
  main.main(["random", path, "--query", "a cat", "--k", "1"])
  assert "2 samples are left out: 1 undecodable, 1 empty" in capsys.readouterr().err


def test_recall_belongs_to_the_captions_and_the_text_tower(model, pictures, store, monkeypatch):
  collection = Collection(store, open_source(pictures))
  origin = main._origin(model, collection)
  assert origin == main._origin(with_data(model, "elsewhere"), collection)
  other = copy.copy(model)
  path = next(path for path in model.params if path.startswith("text_tower/"))
  other.params = model.params | {path: model.params[path] + 1}
  assert (
    len({origin, main._origin(other, collection), main._origin(model, Collection(store, None))})
    == 3
  )


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
