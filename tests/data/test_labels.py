"""A label is optional: what cannot be read as one is missing, and rejects no sample."""

from __future__ import annotations

import decimal
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.every_format import example, write_array_record
from helpers.object_store_server import store
from helpers.small_shards import picture, write_tar

from bigalign.data.samples.labels import Labels
from bigalign.data.sources import clip_benchmark
from bigalign.data.sources.base import Concatenation, name_classes, open_source
from bigalign.data.sources.webdataset import classnames_near

INTEGERS = [3, "3", b"3\n", " 3 ", 3.0, "3.0", [3], [[b"3"]], np.int64(3), np.array([3])]
MISSING = [None, "", " \n", b"", float("nan"), "nan", [], [None], np.array([]), -1]
UNREADABLE = [
  *("cat", 2.5, "2.5", [1, 2], np.array([1, 2]), {"a": 1}, float("inf"), "inf", "9" * 5000),
  *(20240101123456, "20240101123456", -(1 << 40), 1e300, decimal.Decimal("0.5"), object()),
]


@pytest.mark.parametrize("value", [*INTEGERS, decimal.Decimal(3)], ids=repr)
def test_integers_are_read_in_every_form(value):
  assert Labels((), what="label")(value, key="k") == 3


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_labels_are_missing_without_a_word(value, caplog):
  assert Labels((), what="label")(value, key="k") == -1
  assert not caplog.records


def test_files_next_to_remote_shards_are_read(tmp_path):
  """In the folder of the shards, or one level up; without the file, labels have no names."""
  (tmp_path / "set/test").mkdir(parents=True)
  with store(tmp_path) as server:
    shard = f"{server.url}/set/test/0.tar"
    assert classnames_near(shard) == () and clip_benchmark.dataset_type(shard) == ""
    (tmp_path / "set/classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "set/dataset_type.txt").write_text("multilabel\n")
    (tmp_path / "set/test/nshards.txt").write_text("1")
    assert classnames_near(shard) == ("cat", "dog")
    assert clip_benchmark.dataset_type(shard) == "multilabel"
    two = [shard, f"{server.url}/set/test/1.tar"]
    assert clip_benchmark.stated_shards(two, pattern="{0..1}.tar") == [shard]
    (tmp_path / "set/test/classnames.txt").write_text("kitten\n\npuppy\n")
    with pytest.raises(ValueError, match=rf"{server.url}/set/test/classnames.txt: line 2 is blank"):
      classnames_near(shard)
    assert clip_benchmark.near(f"{server.url}/0.tar", "classnames.txt") is None  # no level above


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: repr(value)[:20])
def test_anything_else_counts_as_missing_and_is_logged_once(value, caplog):
  labels = Labels(("dog",), what="label")
  with caplog.at_level(logging.WARNING):
    assert labels(value, key="first") == labels(value, key="second") == -1
  (line,) = caplog.messages
  assert line.startswith("first: label=") and "1 class names" in line and len(line) < 400


def test_names_are_class_names():
  labels = Labels(("cat", "dog", "7", "cat"), what="label")
  assert [labels(value, key="k") for value in ("dog", b" cat\n", ["dog"], "7")] == [1, 0, 1, 7]
  assert labels("Dog", key="k") == -1


def _tar(path, values):
  return write_tar(
    path / "0.tar",
    [
      member
      for i, value in enumerate(values)
      for member in (
        (f"{i}.cls", value.encode()),
        (f"{i}.jpg", picture(i)),
        (f"{i}.txt", b"a caption"),
      )
    ],
  )


def _csv(path, values):
  lines = ["filepath,title,label", *(f"{i}.jpg,a caption,{v}" for i, v in enumerate(values))]
  (path / "t.csv").write_text("\n".join(lines))
  for i in range(len(values)):
    (path / f"{i}.jpg").write_bytes(picture(i))
  return f"{path}/t.csv"


def _parquet(path, values):
  n = len(values)
  columns = dict(image=[picture(i) for i in range(n)], caption=["a caption"] * n, label=values)
  pq.write_table(pa.table(columns), path / "0.parquet")
  return f"{path}/0.parquet"


def _array_record(path, values):
  records = [
    example(image=[picture(i)], caption=[b"a caption"], label=[value.encode()])
    for i, value in enumerate(values)
  ]
  return write_array_record(path / "0.array_record", records)


@pytest.mark.parametrize("write", [_tar, _csv, _parquet, _array_record])
def test_every_source_reads_names_through_its_class_names(tmp_path, write):
  values = ["dog", "cat", "emu", "1", "20240101123456", ""]
  pattern = write(tmp_path, values)
  source = open_source(pattern)
  assert [source[i]["label"] for i in range(6)] == [-1, -1, -1, 1, -1, -1]
  assert all(source[i]["captions"] == ("a caption",) for i in range(6))
  (tmp_path / "classnames.txt").write_text("cat\ndog\n")
  source = open_source(pattern)
  assert source.classnames == ("cat", "dog")
  assert [source[i]["label"] for i in range(6)] == [1, 0, -1, 1, -1, -1]
  name_classes(Concatenation([source]), ("emu", "dog"))  # as an evaluator's own list does
  assert [source[i]["label"] for i in range(6)] == [1, -1, 0, 1, -1, -1]
