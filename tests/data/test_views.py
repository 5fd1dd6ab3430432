"""Views: rules over columns, deduplication and lists leave samples out once, before a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shlex

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.small_shards import picture, samples, write_tar

from bigalign.data.sources import views
from bigalign.data.sources.base import open_source
from bigalign.data.sources.views import View, make_view
from bigalign.inputs import open_data
from bigalign.shards import index, view

SIZES = (30, 40)


class WithColumns:
  """Sample i, with the columns of two shards; the first has no json.score."""

  fingerprint = "0123"

  def __len__(self):
    return sum(SIZES)

  def __getitem__(self, i):
    return dict(image=np.full((4, 4, 3), i, np.uint8), captions=(str(i),), key=str(i), label=-1)

  def columns(self):
    common = [("width", "<u4"), ("height", "<u4"), ("sha256", "u1", 32)]
    first = 0
    for size, more in zip(SIZES, ([], [("json.score", "<f8")])):
      part = np.zeros(size, common + more)
      i = np.arange(first, first + size)
      part["width"], part["height"] = i * 10, 200
      # Every tenth sample has the image of the one before.
      part["sha256"] = [list(hashlib.sha256(bytes([n - (n % 10 == 9)])).digest()) for n in i]
      for name, _ in more:
        part[name] = i / 100
      first += size
      yield part


def kept(tmp_path, **rule):
  source = WithColumns()
  manifest = make_view(source, str(tmp_path / "view"), **rule)
  found = View(source, str(tmp_path / "view"))
  assert manifest["kept"] == len(found)
  assert manifest["kept"] + sum(manifest["left_out"].values()) == manifest["samples"] == 70
  return [int(found[i]["key"]) for i in range(len(found))], manifest["left_out"]


@pytest.mark.parametrize(
  "where, wanted",
  [
    ("width >= 200", range(20, 70)),
    ("100 < width <= 200", range(11, 21)),
    ("width / height < 1 or width == 690", [*range(20), 69]),
    ("not width > 100 and width != 50", [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),
    ("json.score > 0.5", range(51, 70)),  # comparisons with a missing score are false
    ("not json.score > 0.5", range(51)),
    ("json.score != 0.5", [*range(30, 50), *range(51, 70)]),
    ("width * 2 - height + -100 > 1000", range(66, 70)),
    ("width > 1e2 and (height == 200 and width < 150)", range(11, 15)),
    ("height / (width - 100) > 19", [10, 11]),  # 200 / 0 is infinite, not an error
  ],
)
def test_rules(tmp_path, where, wanted):
  found, _ = kept(tmp_path, rule=where)
  assert found == [*wanted]


def test_each_part_of_a_rule_has_its_count(tmp_path):
  found, taken = kept(
    tmp_path, rule="width >= 200 and json.score > 0.5", unique="sha256", ids=np.arange(0, 70, 1)
  )
  assert found == [i for i in range(51, 70) if i % 10 != 9]
  assert taken == {
    "not width >= 200": 20,
    "not json.score > 0.5": 31,
    "not in the list": 0,
    "sha256 of a sample before": 2,
  }


def test_unique_keeps_the_first_of_equal_samples(tmp_path):
  found, _ = kept(tmp_path, rule="width != 180", unique="sha256")
  assert 19 in found and 18 not in found and 29 not in found and len(found) == 70 - 1 - 6


def test_unique_keeps_all_samples_without_a_value(tmp_path):
  class Sparse(WithColumns):
    def columns(self):
      for part in super().columns():
        part["sha256"][::2] = 0  # no image
        part["width"][part["width"] < 200] = 0  # not understood
        yield part

  for column, repeated in (("json.score", 0), ("sha256", 0), ("width", 0), ("height", 69)):
    manifest = make_view(Sparse(), str(tmp_path / "view"), unique=column)
    # sha256: each tenth sample repeats one without an image, which has no value any more.
    assert manifest["left_out"] == {f"{column} of a sample before": repeated}


def test_unique_tells_large_integers_apart(tmp_path, capsys):
  """float64 rounds 2**53 + 1 to 2**53; the columns of shards hold exact bits beside it."""
  uids = [2**53, 2**53 + 1, 2**53 + 2, 2**64 + 1, 2**64, -(2**63) - 1, 2**999, 2**999 + 1]
  uids += [7, 2**53 + 1, None, 2**999, 2**53, None, 9007199254740994.0, 1e300, 0, -0.0, True]
  members = []
  for i, uid in enumerate(uids):
    entry = {} if uid is None else dict(uid=uid)
    members += [(f"{i:03}.jpg", picture(i)), (f"{i:03}.json", json.dumps(entry).encode())]
  shards = [write_tar(tmp_path / "0.tar", members)]
  small = [(f"9{i}.json", json.dumps(dict(uid=i)).encode()) for i in (7, 8)]
  shards.append(write_tar(tmp_path / "1.tar", small))  # needs no exact bits
  assert index.main([*shards, "--stats", "--captions", "json.uid", "--workers", "1"]) == 0
  capsys.readouterr()
  source = open_source(f"{tmp_path}/{{0,1}}.tar", captions=("json.uid",))
  make_view(source, f"{tmp_path}/view", unique="json.uid")
  found = View(source, f"{tmp_path}/view")
  assert [found.where(i)[1] for i in range(len(found))] == [*range(9), 10, 13, 15, 16, 18, 1]
  with pytest.raises(
    ValueError, match="rounds integers from 2\\*\\*53 on; choose these samples by"
  ):
    make_view(source, f"{tmp_path}/view", rule="json.uid == 9007199254740993")
  with pytest.raises(ValueError, match=r"no column 'word.json.uid'; it has .*'width'\]"):
    make_view(source, f"{tmp_path}/view", unique="word.json.uid")
  make_view(source, f"{tmp_path}/view", rule="json.uid > 10000000000000000")
  assert len(View(source, f"{tmp_path}/view")) == 6


def test_stats_that_rounded_integers_are_refused(tmp_path):
  class Old(WithColumns):
    def columns(self):
      for part in super().columns():
        if "json.score" in part.dtype.names:
          part["json.score"] = 2.0**53
        yield part

  with pytest.raises(ValueError, match="which rounded such integers"):
    make_view(Old(), str(tmp_path / "view"), unique="json.score")


def test_a_list_is_a_view(tmp_path):
  found, _ = kept(tmp_path, ids=np.array([5, 3, 68, 3]))
  assert found == [3, 5, 68]
  assert os.path.getsize(tmp_path / "view.npy") == 128 + 4 * 3
  with pytest.raises(ValueError, match="has only samples 0 to 69"):
    kept(tmp_path, ids=np.array([70]))


@pytest.mark.parametrize(
  "where, message",
  [
    ("__import__('os').system('true')", "is not allowed"),
    ("(lambda: 1)() > 0", "is not allowed"),
    ("width[0] > 1", "is not allowed"),
    ("[w for w in (1,)]", "is not allowed"),
    ("width ** 9 > 1", "is not allowed"),
    ("width in (1, 2)", "is not allowed"),
    ("'a' > 1", "is not allowed"),
    ("width >= ", "invalid syntax at character"),
    ("depth > 3", r"no column 'depth'; it has \['height', 'json.score', 'sha256', 'width'\]"),
    ("sha256 > 3", "'sha256' does not hold numbers"),
    ("width > 1e9", "no sample is left of 70: .*'not width > 1000000000.0': 70"),
  ],
)
def test_wrong_rules_are_errors(tmp_path, where, message):
  with pytest.raises(ValueError, match=message):
    kept(tmp_path, rule=where)


def test_indices_beyond_32_bits(tmp_path):
  class Huge:
    fingerprint = "1"

    def __len__(self):
      return 10**10

    def __getitem__(self, i):
      return i

  places = np.array([7, 2**32 - 1, 2**32, 2**32 + 5, 9 * 10**9])
  manifest = views._write(places, {}, Huge(), str(tmp_path / "huge"), dict(source=""))
  assert manifest["kept"] == 5
  found = View(Huge(), str(tmp_path / "huge"))
  assert [found[i] for i in range(5)] == places.tolist()


def test_a_run_reads_a_view_and_refuses_another(tmp_path, capsys):
  shard = write_tar(tmp_path / "0.tar", samples(0, 30))
  (tmp_path / "ids.txt").write_text("\n".join(map(str, range(0, 30, 2))))
  words = [shard, "--ids", str(tmp_path / "ids.txt"), "--out", str(tmp_path / "even")]
  view.main([*words, "--json", str(tmp_path / "counts.json")])
  assert json.loads((tmp_path / "counts.json").read_text()) == dict(
    samples=30, kept=15, left_out={"not in the list": 15}
  )
  printed = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["left", "out", "not", "in", "the", "list", "15"] in printed and ["kept", "15"] in printed
  options = dict(image_size=4, tokenizer=dict(name="byte", length=40))
  for chosen in (
    dict(source=shard, view=f"{tmp_path}/even"),
    dict(mixture=(dict(name="a", source=shard, view=f"{tmp_path}/even"),)),
  ):
    inputs = open_data(data_options(**chosen, **options))
    with contextlib.closing(
      inputs.batches(rejected_log="", batch_size=15, rows=np.arange(15), seed=0, stop=15)
    ) as batches:
      (batch,) = batches
    numbers = [
      int(bytes((row[row > 2] - 3).tolist()).decode().split()[-1]) for row in batch["text"]
    ]
    assert sorted(numbers) == [*range(0, 30, 2)]
    np.testing.assert_array_equal(np.sort(batch["image_id"][:, 1]), np.arange(15))
  other = open_source(write_tar(tmp_path / "1.tar", samples(0, 31)))
  with pytest.raises(
    ValueError, match=r"was made of '.*0\.tar', fingerprint .* make the view again"
  ):
    View(other, f"{tmp_path}/even")
  with pytest.raises(FileNotFoundError, match=r"no .*odd\.json; make it with bigalign view"):
    View(other, f"{tmp_path}/odd")
  with pytest.raises(FileNotFoundError, match="write them: bigalign index --stats") as missing:
    make_view(other, f"{tmp_path}/none", rule="width > 1")
  # The command writes next to the index that was made by itself, and not into the data.
  words = shlex.split(str(missing.value).split("write them: bigalign index ")[1])
  assert index.main([*words, "--workers", "1"]) == 0
  assert [x.name for x in tmp_path.iterdir() if x.name.startswith("bigalign")] == []
  make_view(other, f"{tmp_path}/some", rule="width > 1")
  with pytest.raises(ValueError, match=r"no columns to filter by.*bigalign index --stats"):
    make_view(open_source("glyphs"), f"{tmp_path}/none", rule="width > 1")
  view.main([shard, "--ids", str(tmp_path / "ids.txt"), "--out", str(tmp_path / "more")])
  again = View(open_source(shard), f"{tmp_path}/more")
  assert again.fingerprint == View(open_source(shard), f"{tmp_path}/even").fingerprint
  assert again.fingerprint != open_source(shard).fingerprint
  assert pickle.loads(pickle.dumps(again))[7]["key"] == again[7]["key"] == "0.tar/000014"


def test_the_columns_of_shards(tmp_path, capsys):
  """From tars to a view: rules read the columns that bigalign index --stats writes."""
  members = []
  for i in range(12):
    members += [
      (f"{i:03}.jpg", picture(i % 9, size=(20, 20 + i % 9))),
      (f"{i:03}.txt", b"x" * i),
      (f"{i:03}.json", json.dumps(dict(score=i / 10)).encode()),
    ]
  shard = write_tar(tmp_path / "0.tar", members)
  assert index.main([shard, "--stats", "--workers", "1"]) == 0
  rule = ["--where", "json.score >= 0.2 and length.txt < 12 and width != 27", "--unique", "sha256"]
  found = view.main([shard, *rule, "--out", str(tmp_path / "good")])
  # Samples 9, 10 and 11 have the images of 0, 1 and 2; 7 is 27 pixels wide.
  assert found["kept"] == 8 and found["left_out"]["sha256 of a sample before"] == 1
  source = View(open_source(shard, captions=("txt",)), f"{tmp_path}/good")
  assert [source.where(i)[1] for i in range(8)] == [2, 3, 4, 5, 6, 8, 9, 10]
