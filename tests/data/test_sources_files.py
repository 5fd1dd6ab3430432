"""Parquet, ArrayRecord, tables with image folders: all that the tars can, and equal batches."""

from __future__ import annotations

import concurrent.futures
import csv
import io
import itertools
import json
import os
import pickle
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.batches import PHOTO_SHARDS, first_photo_batches
from helpers.every_format import (
  VERSIONS,
  example,
  write_array_record,
  write_array_records,
  write_parquet,
)
from helpers.marks import slow_unless
from helpers.shipped import load
from helpers.small_shards import picture

from bigalign.data.files.cache import LRUCache
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import open_source, where
from bigalign.data.sources.parquet import Parquet
from bigalign.data.sources.table_files import row_starts
from bigalign.options import plain
from bigalign.run.metrics import read_metrics
from bigalign.train import train


def made(count: int, first: int = 0) -> list[dict]:
  return [
    dict(image=picture(i), captions=(f"picture {i}", f"image {i}"), label=i % 3)
    for i in range(first, first + count)
  ]


def test_where_names_the_file_of_every_sample(tmp_path):
  """The log of rejected samples has the file, the place in it, and the samples of the file."""
  write_parquet(tmp_path / "p", made(11), rows=4)  # 6 and 5 rows, two row groups each
  write_array_records(tmp_path / "r", made(9))
  for name, count in (("a", 4), ("b", 7)):
    VERSIONS["folder"](tmp_path / name, made(count))
  for pattern, names, sizes in (
    ("p/*.parquet", ("p/0.parquet", "p/1.parquet"), (6, 5)),
    ("r/*.array_record", ("r/0.array_record", "r/1.array_record"), (3, 6)),
    ("{a,b}/data.jsonl", ("a/data.jsonl", "b/data.jsonl"), (4, 7)),
  ):
    captions = ("title",) if "jsonl" in pattern else None
    source = open_source(f"{tmp_path}/{pattern}", captions=captions)
    assert [where(source, i) for i in range(len(source))] == [
      (f"{tmp_path}/{name}", place, size)
      for name, size in zip(names, sizes)
      for place in range(size)
    ]


@pytest.mark.parametrize("version", ["folder", "parquet", "array_record"])
def test_every_record_by_random_access(tmp_path, version):
  records = made(25)
  spec = VERSIONS[version](tmp_path / "d", records)
  captions = ("title",) if version == "folder" else None
  source = open_source(spec, captions=captions)
  assert len(source) == 25
  for i in (24, 0, 13, 12, 7, 8, 24):
    record = source[i]
    assert isinstance(record.pop("key"), str)
    assert records[i]["captions"] in record.pop("texts").values()
    assert record == records[i]
  assert len({source[i]["key"] for i in range(25)}) == 25
  for i in (-1, 25):
    with pytest.raises(IndexError, match=f"asked for {i}"):
      source[i]
  again = pickle.loads(pickle.dumps(source))
  assert again[11] == source[11] and again.fingerprint == source.fingerprint
  assert source.fingerprint == open_source(spec, captions=captions).fingerprint
  other = VERSIONS[version](tmp_path / "e", made(25, first=1))
  assert source.fingerprint != open_source(other, captions=captions).fingerprint
  with pytest.raises(
    ValueError,
    match=r"no caption column \['recap'\]; the columns are: "
    r"\['(captions|filepath)', .*captions=",
  ):
    open_source(spec, captions=("recap",), label="class")
  with pytest.raises(
    ValueError,
    match=r"no image column 'photo'; .*label'.*Set config.data.source_options=dict\(image=",
  ):
    open_source(spec, image="photo")


@pytest.mark.parametrize("version", slow_unless(VERSIONS, ["parquet", "tfds"].__contains__))
def test_photos_have_equal_batches_from_every_format(data_root, tmp_path, version):
  """Ids, pixels, tokens and labels, of three collections joined into one source."""
  tars = open_source(PHOTO_SHARDS, captions=("json.captions", "txt"))
  spec = VERSIONS[version](tmp_path, [tars[i] for i in range(len(tars))])
  options = dict(data_dir=str(tmp_path)) if version == "tfds" else {}
  expected = first_photo_batches(PHOTO_SHARDS, ("json.captions", "txt"))
  found = first_photo_batches(spec, ("title",) if version == "folder" else ("captions",), **options)
  assert len(found) == len(expected) == 3
  for a, b in zip(found, expected):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.slow
def test_photos_train_equally_from_tars_and_tfds(data_root, tmp_path):
  """The shipped config with narrow towers: every loss is equal to the bit.

  From other formats batches are equal: test_photos_have_equal_batches_from_every_format.
  """
  c = load("photos")
  c.total_steps, c.batch_size, c.log_every, c.eval_every = 3, 16, 1, 0
  c.model.image.update(width=32, depth=1)
  c.model.text.update(width=32)
  c.model.embed_dim, c.data.workers, c.data.order = 32, 0, "exact"
  c.writer, c.evals = dict(tensorboard=False), {}
  tars = open_source(PHOTO_SHARDS, captions=("json.captions", "txt"))
  records = [tars[i] for i in range(len(tars))]
  spec, found = VERSIONS["tfds"](tmp_path / "tfds", records), {}
  for version, data in (
    ("tar", dict(source=PHOTO_SHARDS)),
    (
      "tfds",
      dict(
        source=spec,
        captions=("captions",),
        source_options=dict(data_dir=str(tmp_path / "tfds")),
      ),
    ),
  ):
    config = plain(c)
    train(config | dict(data=config["data"] | data), tmp_path / version / "run")
    rows = read_metrics(tmp_path / version / "run")
    found[version] = [row["train/loss"] for row in rows if "train/loss" in row]
  assert len(found["tar"]) == 3 and found["tfds"] == found["tar"]


def write_images(root, count: int) -> None:
  for i in range(count):
    (root / f"{i}.jpg").write_bytes(picture(i))


QUOTED = [["0.jpg", 'two\nlines, a "word"'], ["1.jpg", "plain"], ["2.jpg", "a,\tb"], ["3.jpg", ""]]


@pytest.mark.parametrize("separator", ["\t", ","])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_read_as_csv_readers_do(tmp_path, separator, end):
  write_images(tmp_path, 4)
  with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8-sig") as file:
    writer = csv.writer(file, delimiter=separator, lineterminator=end)
    writer.writerows([["filepath", "title"], *QUOTED])
  source = open_source(f"{tmp_path}/t.csv")
  assert [source[i]["captions"] for i in range(len(source))] == [
    (text.strip(),) if text else () for _, text in QUOTED
  ]
  assert [source[i]["image"] for i in range(4)] == [picture(i) for i in range(4)]
  assert source[2]["key"] == "t.csv/2/2.jpg" and source[2]["label"] == -1


def test_a_stray_quote_is_a_character(tmp_path):
  """A 5" pipe: only a quote at the start of a field has a meaning."""
  write_images(tmp_path, 3)
  (tmp_path / "t.tsv").write_text(
    'title\tfilepath\na 5" pipe\t0.jpg\n\n\r\n"a ""6"" pipe"\t1.jpg\nend"\t2.jpg'
  )
  source = open_source(f"{tmp_path}/t.tsv")
  assert [source[i]["captions"][0] for i in range(len(source))] == [
    'a 5" pipe',
    'a "6" pipe',
    'end"',
  ]
  (tmp_path / "t.tsv").write_text('title\tfilepath\nfine\t0.jpg\n"open\nlost\n')
  with pytest.raises(ValueError, match=r"t\.tsv: a field in the row that begins in line 3 opens"):
    open_source(f"{tmp_path}/t.tsv")


def test_rows_agree_with_the_csv_module(tmp_path):
  """A thousand random rows of the special characters."""
  rng = np.random.default_rng(0)
  rows = [
    ["".join(rng.choice(list('ab,\n"\t '), rng.integers(0, 8))) for _ in range(3)]
    for _ in range(1000)
  ]
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows([["filepath", "title", "x"], *rows])
  (tmp_path / "t.csv").write_text(text.getvalue(), newline="")
  data = (tmp_path / "t.csv").read_bytes()
  starts = row_starts(str(tmp_path / "t.csv"), separator=b",")
  found = [next(csv.reader([data[a:b].decode()])) for a, b in itertools.pairwise(starts)]
  assert found == rows
  # As the source reads them: a missing file is rejected under its name.
  source = open_source(f"{tmp_path}/t.csv")
  for i, row in enumerate(found):
    assert source._row(i)[1] == dict(zip(("filepath", "title", "x"), row))


def test_ten_megabytes_of_rows_cost_eight_bytes_each(tmp_path):
  rows = 300_000
  (tmp_path / "t.jsonl").write_text(
    "".join(f'{{"filepath": "{i}.jpg", "title": "{i}"}}\n' for i in range(rows))
  )
  open_source(f"{tmp_path}/t.jsonl")
  tracemalloc.start()
  try:
    source = open_source(f"{tmp_path}/t.jsonl")
    held = tracemalloc.get_traced_memory()[0]
  finally:
    tracemalloc.stop()
  assert len(source) == rows and held < 8 * rows + 100_000
  assert source._row(rows - 1)[1]["title"] == str(rows - 1)


BAD_ROWS = [
  ("none.jpg\tgone", "no_image"),
  ("\tno name", "no_image"),
  (".\ta folder", "no_image"),
  ("n" * 400 + "\tlong", "no_image"),
  ("a\0b\tzero", "no_image"),
  ("one field", "bad_metadata"),
  ("a\tb\tc", "bad_metadata"),
]


@pytest.mark.parametrize("row,reason", BAD_ROWS, ids=[row[:12] for row, _ in BAD_ROWS])
def test_bad_rows_are_rejected_with_a_reason(tmp_path, row, reason):
  (tmp_path / "t.tsv").write_text(f"filepath\ttitle\n{row}\n")
  source = open_source(f"{tmp_path}/t.tsv")
  with pytest.raises(Rejected) as error:
    source[0]
  assert error.value.reason == reason and "t.tsv" in error.value.detail


def test_bad_objects_are_rejected_with_a_reason(tmp_path):
  write_images(tmp_path, 1)
  good = dict(filepath="0.jpg", title="good")
  lines = [
    json.dumps(good),
    "{oops",
    "[1, 2]",
    json.dumps(good | dict(label="cat")),
    json.dumps(good | dict(title=dict(deep=["a", " ", "b"]), label="7")),
  ]
  (tmp_path / "t.jsonl").write_text("\n".join(lines))
  source = open_source(f"{tmp_path}/t.jsonl", captions=("title.deep", "title"))
  assert source[0]["captions"] == ("good",)
  assert source[4]["captions"] == ("a", "b") and source[4]["label"] == 7
  assert source[3]["label"] == -1
  for i in (1, 2):
    with pytest.raises(Rejected, match=r"bad_metadata: t\.jsonl"):
      source[i]


def test_a_file_that_changed_is_an_error(tmp_path):
  write_images(tmp_path, 2)
  path = tmp_path / "t.csv"
  path.write_text("filepath,title\n0.jpg,a\n1.jpg,b\n")
  source = open_source(str(path))
  path.write_text("filepath,title\n0.jpg,a\n")
  with pytest.raises(OSError, match=r"t\.csv: the file changed while in use"):
    source[1]
  path.write_text("filepath,title\n")
  with pytest.raises(ValueError, match="no rows in 1 files"):
    open_source(str(path))


@pytest.mark.parametrize("name", ["t.parquet", "t.array_record"])
def test_broken_files_are_errors(tmp_path, name):
  version = name.split(".")[1]
  spec = VERSIONS[version](tmp_path / "whole", made(20))
  whole = next((tmp_path / "whole").iterdir()).read_bytes()
  for data in (b"", b"<html>404</html>" * 100, whole[: len(whole) // 2]):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: not a complete .* \({len(data)} bytes\)"):
      open_source(f"{tmp_path}/{name}")
  assert len(open_source(spec)) == 20


def test_array_record_features(tmp_path):
  """Absent, empty and damaged records; the names of webdataset's members."""
  path = write_array_record(
    tmp_path / "0.array_record",
    [
      example(jpg=[picture(0)], txt=["zwölf".encode()], cls=[3]),
      example(txt=[b"no image"]),
      b"no example",
      example(jpg=[picture(3)]),
      example(jpg=[picture(4)], txt=[b"caf\xe9"]),
    ],
  )
  source = open_source(f"arrayrecord:{path}", label="cls")
  assert source[0] == dict(
    image=picture(0), captions=("zwölf",), label=3, key="0.array_record/0", texts=source[0]["texts"]
  )
  assert {path for path, texts in source[0]["texts"].items() if texts} == {"txt"}
  assert source[3]["captions"] == () and source[3]["label"] == -1
  assert source[4]["captions"] == ("caf\N{REPLACEMENT CHARACTER}",)
  for i, reason in ((1, "no_image"), (2, "bad_metadata")):
    with pytest.raises(Rejected, match=f"{reason}: 0.array_record/{i}"):
      source[i]


def test_a_damaged_array_record_loses_one_record(tmp_path):
  images = [np.random.default_rng(i).bytes(50_000) for i in range(5)]
  path = tmp_path / "0.array_record"
  write_array_record(path, [example(image=[image], text=[b"t"]) for image in images])
  data = bytearray(path.read_bytes())
  middle = data.index(images[3][:16]) + 25_000
  data[middle] ^= 1
  path.write_bytes(data)
  source = open_source(str(path))
  for i in (0, 1, 2, 4):
    assert source[i]["image"] == images[i]
  with pytest.raises(Rejected, match=r"undecodable: 0\.array_record/3.*Corrupted"):
    source[3]


def test_more_array_record_files_than_stay_open(tmp_path):
  before = len(os.listdir("/proc/self/fd"))
  for i in range(140):
    write_array_record(tmp_path / f"{i:03d}.array_record", [example(image=[b"i"], text=[b"t"])])
  source = open_source(f"{tmp_path}/*.array_record")
  assert [source[i]["key"] for i in range(140)] == [f"{i:03d}.array_record/0" for i in range(140)]
  assert len(os.listdir("/proc/self/fd")) - before < 140


def test_parquet_reads_each_row_group_once_in_block_order(tmp_path, monkeypatch):
  spec = write_parquet(tmp_path, made(50), files=2, rows=10)
  source = open_source(spec)
  assert source.block == 10
  assert open_source(f"{spec}::{spec[:-9]}/0.parquet").block == 10
  assert open_source("glyphs::glyphs").block == 1
  read: list[int] = []
  whole = source._read
  monkeypatch.setattr(source._groups, "_make", lambda group: (read.append(group), whole(group))[1])
  for block in (3, 0, 4):
    for i in range(10):
      source[10 * block + i]
  assert read == [3, 4, 0, 5]  # 25 samples a file, in groups of 10, 10 and 5


def test_parquet_columns(tmp_path):
  """Plain bytes as img2dataset writes them, missing values, class names of the hub."""
  table = pa.table(
    dict(jpg=[picture(0), None, picture(2)], caption=["a", "b", None], label=[1, None, 0])
  )
  features = dict(label=dict(names=["cat", "dog"], _type="ClassLabel"))
  table = table.replace_schema_metadata(
    {"huggingface": json.dumps(dict(info=dict(features=features)))}
  )
  pq.write_table(table, tmp_path / "0.parquet")
  source = open_source(f"{tmp_path}/0.parquet")
  assert source.classnames == ("cat", "dog")
  assert source[0] == dict(
    image=picture(0), captions=("a",), label=1, key="0.parquet/0.0", texts=source[0]["texts"]
  )
  assert source[2]["captions"] == ()
  with pytest.raises(Rejected, match=r"no_image: 0\.parquet/0\.1"):
    source[1]
  with pytest.raises(ValueError, match=r"no rows in 1 files"):
    pq.write_table(table.slice(0, 0), tmp_path / "1.parquet")
    Parquet(f"{tmp_path}/1.parquet")


def test_the_cache_keeps_to_its_capacity():
  made: list[int] = []
  cache = LRUCache(lambda key: (made.append(key) or -key, key), capacity=10)
  assert [cache[key] for key in (4, 5, 4, 6, 4, 5)] == [-4, -5, -4, -6, -4, -5]
  assert made == [4, 5, 6, 5]  # 6 evicted 5, which was used less recently than 4
  assert cache[50] == -50 and list(cache._values) == [50]  # larger than the capacity, but used last


def test_the_cache_makes_different_values_at_the_same_time_and_each_once():
  both, made = threading.Barrier(2, timeout=20), []

  def make(key):
    if key != 5:
      both.wait()  # for the thread that makes the other value
    made.append(key)
    if key == 5 and made.count(5) == 1:
      raise OSError("once")
    return -key, 1

  cache = LRUCache(make, capacity=10)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert sorted(pool.map(cache.__getitem__, [3, 4] * 4)) == [-4] * 4 + [-3] * 4
  assert sorted(made) == [3, 4]
  with pytest.raises(OSError, match="once"):
    cache[5]
  assert cache[5] == -5 and cache._used == 3 and not cache._turns


def test_array_records_whose_first_record_is_broken_are_read(tmp_path):
  good = example(image=[picture(0)], text=[b"t"])
  write_array_record(tmp_path / "0.array_record", [b"\xff broken", good, good])
  source = open_source(f"{tmp_path}/0.array_record")
  assert source[1]["image"] == picture(0)
  with pytest.raises(Rejected, match=r"bad_metadata: 0\.array_record/0"):
    source[0]
  write_array_record(tmp_path / "1.array_record", [b"\xff broken"] * 3)
  assert len(open_source(f"{tmp_path}/*.array_record")) == 6
  with pytest.raises(ValueError, match=r"no record can be read.*1\.array_record/\d: not a tf"):
    open_source(f"{tmp_path}/1.array_record")


def test_every_array_record_file_is_checked_on_opening(tmp_path):
  good = example(image=[picture(0)], text=[b"t"])
  write_array_record(tmp_path / "0.array_record", [good] * 3)
  for features, problem in (
    (dict(jpg=[b"i"], text=[b"t"]), "no image column 'image'; the columns are: .'jpg', 'text'."),
    (dict(image=[b"i"], words=[b"t"]), "no caption column"),
    (dict(image=[3], text=[b"t"]), "the image feature 'image' holds int, expected bytes"),
  ):
    write_array_record(tmp_path / "1.array_record", [example(**features)] * 40)
    with pytest.raises(ValueError, match=rf"1\.array_record: {problem}"):
      open_source(f"{tmp_path}/*.array_record")
  some = [example(text=[b"t"])] * 5 + [good]
  write_array_record(tmp_path / "1.array_record", some)  # an image may be missing
  assert len(open_source(f"{tmp_path}/*.array_record")) == 9


def test_records_that_a_copy_marks_as_rejected_are_rejected(tmp_path):
  marks = dict(__rejected__=[b"truncated", b"why"]), dict(label=[b"bad_metadata: 0.json"])
  records = [example(image=[picture(0)], text=[b"t"], **mark) for mark in ({}, *marks)]
  source = open_source(write_array_record(tmp_path / "0.array_record", records))
  assert source[0]["captions"] == ("t",) and source.fields(1)["text"] == [b"t"]
  for i, reason in ((1, "truncated: why"), (2, "bad_metadata: bad_metadata: 0.json")):
    with pytest.raises(Rejected, match=reason):
      source[i]
