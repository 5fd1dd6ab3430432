"""Stores that a function of the user makes: what is in them, and how they go on."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest
from helpers.shipped import load
from helpers.small_shards import picture, write_tar

from bigalign.data.image.decode import decode
from bigalign.data.samples.ids import class_key, sample_id
from bigalign.data.stores import writer
from bigalign.data.stores.reader import Store
from bigalign.frozen import embed, external

COUNT, BROKEN, SILENT = 11, 4, 7
MODEL = """
  import numpy as np

  calls = []

  def embed(items):
    calls.append(len(items))
    return [[len(x), ord(x[-1])] if isinstance(x, str) else [x.size[0], np.asarray(x).mean()]
            for x in items]

  def flat(items):
    return np.zeros(3)
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
  """A module in the current folder."""
  (tmp_path / "own_model.py").write_text(textwrap.dedent(MODEL))
  monkeypatch.chdir(tmp_path)
  monkeypatch.delitem(sys.modules, "own_model", raising=False)
  yield
  sys.modules.pop("own_model", None)


@pytest.fixture
def config(tmp_path):
  members = []
  for i in range(COUNT):
    members += [
      (f"{i:02}.jpg", b"none" if i == BROKEN else picture(i, size=(8, 8 + i))),
      (f"{i:02}.cls", str(i % 3).encode()),
      (f"{i:02}.txt", b"" if i == SILENT else f"text {i}".encode()),
    ]
  c = load("tiny").to_dict()
  c["model"]["image"]["init"] = "$NOT_HERE/weights"  # the towers are not loaded
  shard = write_tar(tmp_path / "0.tar", members)
  tokenizer = dict(name="byte", length=2)
  return c | dict(data=dict(source=shard, captions=("txt",), image_size=8, tokenizer=tokenizer))


def rows_of(folder):
  store = Store(folder)
  return dict(
    zip(store.samples(np.arange(len(store)))[:, 0].tolist(), store.read(np.arange(len(store))))
  )


def test_stores_hold_what_the_function_returns(config, model, tmp_path, monkeypatch):
  monkeypatch.setattr(external, "BATCHES", 1)
  monkeypatch.setenv("NOT_HERE", str(tmp_path))
  whole = dict(batch_size=3, dtype="float32")
  folders = external.embed_with("own_model:embed", config, tmp_path / "stores", **whole)
  calls = sys.modules["own_model"].calls
  assert max(calls) == 3 and sum(calls) == 2 * (COUNT - 1) + 2 - 1  # and one of each for the width
  image, text = (rows_of(folders[side]) for side in ("image", "text"))
  for i in range(COUNT):
    id = sample_id(f"0.tar/{i:02}")
    if i == BROKEN:
      assert id not in image and id not in text
      continue
    expected = [8 + i, decode(picture(i, size=(8, 8 + i))).mean()]
    np.testing.assert_allclose(image[id], expected, rtol=1e-6)
    assert id not in text if i == SILENT else text[id].tolist() == [6 + (i > 9), ord(str(i)[-1])]
  store = Store(folders["image"])
  np.testing.assert_array_equal(
    store.labels(np.arange(len(store))), store.samples(np.arange(len(store)))[:, 1] % 3
  )
  assert store.left_out == {"undecodable": 1}

  # The same command goes on after a kill; another function may not.
  write, begun = writer.write, []

  def stop_at(folder, piece, *args, **options):
    if piece == 2:
      raise KeyboardInterrupt
    begun.append((folder.name, piece))
    return write(folder, piece, *args, **options)

  monkeypatch.setattr(writer, "write", stop_at)
  with pytest.raises(KeyboardInterrupt):
    external.embed_with("own_model:embed", config, tmp_path / "again", **whole)
  monkeypatch.setattr(writer, "write", write)
  del calls[:]
  again = external.embed_with("own_model:embed", config, tmp_path / "again", **whole)
  assert sum(calls) == 2 * (COUNT - 6) - 1 and len(begun) == 4
  for side in ("image", "text"):
    assert {**rows_of(again[side])}.keys() == {**rows_of(folders[side])}.keys()
  (tmp_path / "own_model.py").write_text(textwrap.dedent(MODEL) + "# another model")
  with pytest.raises(ValueError, match="made another way:\n  fingerprint: "):
    external.embed_with("own_model:embed", config, tmp_path / "again", **whole)


def test_prompts_of_classes(config, model, tmp_path):
  (tmp_path / "names.txt").write_text("ant\nbee\n")
  (tmp_path / "templates.txt").write_text("a {c}\nthe {c}.\n")
  folders = external.embed_with(
    "own_model:embed",
    config,
    tmp_path / "stores",
    classnames=str(tmp_path / "names.txt"),
    templates=str(tmp_path / "templates.txt"),
  )
  store = Store(folders["classes"])
  first, count = store.find(np.array([sample_id(class_key(1, "bee"))], np.uint64))
  assert count.tolist() == [2] and len(store) == 4
  assert store.read(first + np.arange(2)).tolist() == [[5, ord("e")], [8, ord(".")]]


def test_functions_that_cannot_be_used(config, model, tmp_path):
  for name, message in (
    ("own_model", "write MODULE:FUNCTION"),
    ("own_model:no", "own_model has no function no"),
    ("own_model:flat", r"returned float64 \(3,\) for 1 items; expected numbers \[1, D\]"),
  ):
    with pytest.raises(ValueError, match=message):
      external.embed_with(name, config, tmp_path / "stores")
  with pytest.raises(ValueError, match="captions with weights"):
    config["data"]["captions"] = (("txt", 1),)
    external.embed_with("own_model:embed", config, tmp_path / "stores")
  assert embed.SIDES == ("image", "text")
