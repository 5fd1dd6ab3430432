"""A folder with a subfolder of image files for each class."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.small_shards import picture
from PIL import Image

from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import open_source


@pytest.fixture
def folder(tmp_path):
  """Two classes with an image each, one with images below, one without any; and a text."""
  for n, name in enumerate(("b/2.PNG", "b/1.jpg", "a/deep/er/3.webp", "c/notes.txt", ".git/x.jpg")):
    path = tmp_path / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(n))
  return tmp_path / "photos"


def test_labels_are_the_places_of_the_subfolders(folder, caplog):
  source = open_source(f"folder:{folder}", captions=())
  records = [source[i] for i in range(len(source))]
  assert [(x["key"], x["label"]) for x in records] == [
    *(("a/deep/er/3.webp", 0), ("b/1.jpg", 1), ("b/2.PNG", 1))
  ]
  assert source.classnames == ("a", "b", "c") and records[1]["image"] == picture(1)
  assert np.asarray(Image.open(io.BytesIO(records[2]["image"]))).shape[2] == 3
  assert "has files that are not images (1): ['c/notes.txt']" in caplog.text
  again = open_source(f"folder:{folder}", images=False)
  assert again.fingerprint == source.fingerprint and again[0]["image"] == b""
  with pytest.raises(IndexError):
    source[3]


def test_names_may_lie_beside_the_folder(folder):
  before = open_source(f"folder:{folder}").fingerprint
  (folder.parent / "classnames.txt").write_text("an ape\na bee\na cat\n")
  source = open_source(f"folder:{folder}")
  assert source.classnames == ("an ape", "a bee", "a cat") and source.fingerprint != before
  (folder / "classnames.txt").write_text("an ape\n")
  with pytest.raises(ValueError, match=r"3 subfolders, but 1 names in classnames\.txt"):
    open_source(f"folder:{folder}")


def test_what_cannot_be_read_is_named(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no such folder"):
    open_source(f"folder:{folder}/none")
  with pytest.raises(ValueError, match="no subfolder holds an image"):
    open_source(f"folder:{folder}/c")
  with pytest.raises(ValueError, match=r"have no captions \['txt'\]"):
    open_source(f"folder:{folder}", captions=("txt",))
  (tmp_path / "secret.jpg").write_bytes(picture(9))
  (folder / "a/0.jpg").symlink_to(tmp_path / "secret.jpg")
  with pytest.raises(Rejected, match=r"a/0\.jpg"):
    open_source(f"folder:{folder}")[0]
  assert open_source(f"folder:{folder}", root=str(tmp_path))[0]["image"] == picture(9)
