"""CLIP_benchmark's folders: what lies outside the shards is read too."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from helpers.small_shards import write_tar
from PIL import Image

from bigalign import sharding
from bigalign.data.loader.options import resolve_data
from bigalign.data.sources.webdataset import WebDataset
from bigalign.evals.embed import Context, most_captions
from bigalign.evals.zeroshot import zeroshot

FIVE = "one dog\na dog, running\nline\u2028inside\n\n two dogs \r\nfive"


@pytest.fixture
def root(tmp_path):
  """A folder with two shards of three samples."""
  file = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(file, "png")
  (tmp_path / "test").mkdir()
  for shard in range(2):
    names = [f"s{shard}{i}" for i in range(3)]
    texts = {f"{name}.txt": FIVE.encode() for name in names}
    images = {f"{name}.png": file.getvalue() for name in names}
    members = dict(sorted((images | texts).items()))
    write_tar(tmp_path / f"test/{shard}.tar", [*members.items()])
  (tmp_path / "test/nshards.txt").write_text("2")
  return tmp_path


def test_each_line_of_a_retrieval_dataset_is_a_caption(root):
  (root / "dataset_type.txt").write_text("Retrieval\n")
  source = WebDataset(f"{root}/test/*.tar")
  captions = ("one dog", "a dog, running", "line\u2028inside", "two dogs", "five")
  assert [source[i]["captions"] for i in range(6)] == [captions] * 6
  assert most_captions(source) == 5


def test_a_text_of_several_lines_is_noticed_once(root, caplog):
  source = WebDataset(f"{root}/test/*.tar")
  assert len(source[0]["captions"]) == len(source[1]["captions"]) == 1
  texts = [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]
  assert len(texts) == 1 and "has 6 lines and is read as one caption" in texts[0]


def test_the_number_of_shards_is_that_of_nshards_txt(root, caplog):
  pattern = f"{root}/test/*.tar"
  (root / "test/nshards.txt").write_text("1\n")
  assert len(WebDataset(pattern)) == 3
  assert any("left out 1 shards, ['1.tar']" in x.getMessage() for x in caplog.records)
  (root / "test/nshards.txt").write_text("4")
  with pytest.raises(ValueError, match=r"states 4 shards, but 2 are missing: .'2.tar', '3.tar'"):
    WebDataset(pattern)
  assert len(WebDataset(f"{root}/test/0.tar")) == 3  # some shards by name
  (root / "test/nshards.txt").write_text("many")
  with pytest.raises(ValueError, match=r"nshards\.txt: 'many' is not a number of shards"):
    WebDataset(pattern)


def test_kinds_that_cannot_be_evaluated_are_named(root):
  (root / "dataset_type.txt").write_text("multilabel")
  (root / "classnames.txt").write_text("a\nb")
  data = resolve_data(dict(image_size=8, tokenizer=dict(name="byte", length=4)))
  context = Context("val", None, None, sharding.make_mesh(), data)
  with pytest.raises(ValueError, match="says multilabel: its labels are sets of classes"):
    zeroshot(context, source=f"{root}/test/*.tar")
  (root / "dataset_type.txt").write_text("detection")
  with pytest.raises(ValueError, match=r"dataset_type\.txt: 'detection'; known"):
    WebDataset(f"{root}/test/*.tar")
