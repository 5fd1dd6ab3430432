"""Embedding stores: what is written is found again, by id, whatever was killed in between."""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import tracemalloc

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.shipped import ROOT
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store

from bigalign.data.loader.pairs import Pairs, pair_batches
from bigalign.data.samples.ids import sample_id
from bigalign.data.stores import reader, writer
from bigalign.data.stores.one_side import OneSide
from bigalign.data.stores.reader import Store
from bigalign.data.text.kinds import POSITIVE
from bigalign.inputs import open_data

HEADER = dict(side="image", width=3, dtype="float16", weights="abc")


def vectors(ids, width=3):
  """Rows that encode their sample."""
  return np.stack([(np.asarray(ids) % 1000).astype(np.float32) * (k + 1) for k in range(width)], 1)


def write(
  folder: pathlib.Path, ids, *, piece=4, texts=(), name="a", dtype="float16", parts=1, width=3
):
  """A store of samples with these ids; `texts` of them each, or one."""
  writer.begin(folder, HEADER | dict(dtype=dtype, width=width))
  ids = np.asarray(ids, np.uint64)
  held = writer.claim(folder, name, len(ids), name, batch_size=piece, batches=1, write=True)
  counts = np.asarray(texts) if len(texts) else np.ones(len(ids), int)
  for n in range(held.next, -(-len(ids) // piece)):
    own = np.arange(n * piece, min((n + 1) * piece, len(ids)))
    for part in range(parts):
      mine = np.repeat(own[part::parts], counts[own[part::parts]])
      samples = np.stack([ids[mine], mine.astype(np.uint64) + np.uint64(held.place)], 1)
      rows = vectors(ids[mine], width).astype(reader.DTYPES[dtype])
      writer.write(folder, held.first + n, rows, samples, part=part, parts=parts)
  writer.finish(folder, captions=len(texts) > 0)
  return folder


@pytest.mark.parametrize("dtype", reader.DTYPES)
@pytest.mark.parametrize("parts", [1, 3])
def test_rows_are_found_by_id(tmp_path, dtype, parts):
  ids = np.random.default_rng(0).permutation(80)[:50] + 1
  counts = np.arange(50) % 4  # some samples have no captions at all
  found = Store(write(tmp_path / "s", ids, texts=counts, dtype=dtype, parts=parts))
  assert len(found) == counts.sum() and found.dtype == reader.DTYPES[dtype]
  first, count = pickle.loads(pickle.dumps(found)).find(ids.astype(np.uint64))
  np.testing.assert_array_equal(count, counts)
  for i, at, n in zip(ids, first, count):
    rows = at + np.arange(n)
    np.testing.assert_array_equal(found.read(rows).astype(np.float32), vectors([i] * n))
    assert (found.samples(rows)[:, 0] == i).all()
  assert (found.find(np.array([0, 777], np.uint64))[1] == 0).all()
  with pytest.raises(IndexError, match=f"has {len(found)} rows; asked for 0 to {len(found)}"):
    found.read(np.array([0, len(found)]))
  assert list(found.verify()) == []


def test_sorting_in_ranges_is_sorting(tmp_path, monkeypatch):
  ids = np.random.default_rng(1).integers(0, 2**64, 500, np.uint64)
  whole = Store(write(tmp_path / "a", ids))
  monkeypatch.setattr(reader, "CHUNK", 16)
  ranges = Store(write(tmp_path / "b", ids))
  for name in ("ids", "rows"):
    one, other = (np.load(next((tmp_path / x).glob(f"{name}-*.npy"))) for x in "ab")
    np.testing.assert_array_equal(one, other)
  assert ranges.ids == whole.ids
  np.testing.assert_array_equal(np.concatenate([x for x, _ in ranges.sorted_ids()]), np.sort(ids))


def test_sorting_needs_few_open_files(tmp_path, monkeypatch):
  """4096 ranges; a temporary file for each ended the work of hours with EMFILE."""
  ids = np.random.default_rng(0).integers(0, 1 << 63, 2000, np.uint64) * 2 + 1
  monkeypatch.setattr(reader, "CHUNK", 1)
  opened = []
  make = tempfile.TemporaryFile
  monkeypatch.setattr(
    writer.tempfile, "TemporaryFile", lambda **options: opened.append(1) or make(**options)
  )
  table = np.stack([ids, np.arange(2000, dtype=np.uint64)], 1)
  np.save(tmp_path / "a.samples.npy", table[:1500])
  np.save(tmp_path / "b.samples.npy", table[1500:])
  files = [dict(stem="a"), dict(stem="b")]
  rows = np.concatenate([*writer._by_high_bits(tmp_path, files, len(ids))])
  order = np.argsort(rows[:, 0] >> np.uint64(64 - 11), kind="stable")
  assert len(opened) == 1 and (order == np.arange(2000)).all()
  by_row = rows[np.argsort(rows[:, 1])]
  assert (by_row[:, 0] == ids).all() and (by_row[:, 1] == by_row[:, 2]).all()


def test_another_source_is_appended(tmp_path):
  write(tmp_path / "s", range(1, 11))
  first = Store(tmp_path / "s")
  found = Store(write(tmp_path / "s", range(20, 26), name="b"))
  assert len(found) == 16 and first.fingerprint != found.fingerprint
  rows, count = found.find(np.arange(20, 26, dtype=np.uint64))
  assert (count == 1).all() and found.samples(rows)[:, 1].tolist() == list(range(10, 16))
  with pytest.raises(ValueError, match=r"begun with batch size 4, .* the batch size is now 5"):
    writer.claim(tmp_path / "s", "b", 6, "b", batch_size=5, batches=1, write=True)


def test_a_reader_outlives_appends(tmp_path, monkeypatch):
  """Only two files stay mapped, besides the index."""
  folder = write(tmp_path / "s", np.arange(12))
  monkeypatch.setattr(reader, "OPEN", 2)
  opened = Store(folder)
  for n, name in enumerate("bcd"):
    if n:
      np.testing.assert_array_equal(opened.find(np.arange(12, dtype=np.uint64))[1], 1)
    write(folder, np.arange(100 * (n + 1), 100 * (n + 1) + 9), name=name)
    np.testing.assert_array_equal(opened.read(np.arange(12)), vectors(np.arange(12)))
  assert len(list(folder.glob("ids-*.npy"))) == 2, "those of the store and of the one before"
  assert len(Store(folder)) == 12 + 27 and len(opened) == 12


def test_a_header_without_dtype_or_width_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"needs `dtype`, one of .* and `width`"):
    writer.begin(tmp_path, dict(model="NV-Embed-v2"))
  writer.begin(tmp_path, HEADER)
  with pytest.raises(ValueError, match=r"of float16 and shape \(3,\); got float32 and \(3,\)"):
    writer.write(tmp_path, 0, np.ones((2, 3), np.float32), np.ones((2, 2), np.uint64))


def test_repeated_ids_are_refused_by_place(tmp_path):
  with pytest.raises(
    ValueError,
    match=r"1 row has the id of another sample, first samples 2 and"
    r" 5.*config\.data\.mixture",
  ):
    write(tmp_path / "image", [1, 2, 7, 3, 4, 7])
  with pytest.raises(ValueError, match="first samples 2 and 5"):
    write(tmp_path / "text", [1, 2, 7, 3, 4, 7], texts=[1, 2, 2, 0, 1, 1])
  with pytest.raises(
    FileNotFoundError, match="not a complete store yet: run the same `bigalign embed` again"
  ):
    Store(tmp_path / "text")
  with pytest.raises(FileNotFoundError, match="not an embedding store"):
    Store(tmp_path)


def test_other_vectors_are_refused(tmp_path):
  write(tmp_path / "s", range(8))
  with pytest.raises(ValueError, match=r"made another way:\n  weights: 'abc' there, 'abd' here"):
    writer.begin(tmp_path / "s", HEADER | dict(weights="abd"))


def test_verify_finds_changed_files(tmp_path):
  folder = write(tmp_path / "s", range(1, 9))
  path = folder / "00001.0-of-1.vectors.npy"
  data = bytearray(path.read_bytes())
  data[-3] ^= 4
  path.write_bytes(data)
  assert [str(path) in line for line in Store(folder).verify()] == [True]
  array = np.load(path)
  array[2] = np.nan
  np.save(path, array)
  (folder / "00000.0-of-1.samples.npy").unlink()
  wrong = list(Store(folder).verify())
  assert len(wrong) == 3 and "samples.npy is missing" in wrong[0] and "checksum differs" in wrong[1]
  assert "1 row holds NaN or infinity; the first samples: [6]" in wrong[2]


def test_a_changed_bit_of_a_store_is_found_when_it_is_read(tmp_path):
  """Vectors by their row, labels by their file, JSON by its own checksum; the file is named."""
  folder = write(tmp_path / "s", range(1, 9))
  with_labels = tmp_path / "l"
  writer.begin(with_labels, HEADER)
  writer.claim(with_labels, "a", 8, "a", batch_size=8, batches=1, write=True)
  pairs = np.stack([np.arange(1, 9, dtype=np.uint64)] * 2, 1)
  rows = vectors(range(8)).astype(np.float16)
  writer.write(with_labels, 0, rows, pairs, labels=np.arange(8))
  writer.finish(with_labels, captions=False)
  everything = np.arange(8)

  def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)

  assert Store(with_labels).labels(everything).tolist() == [*range(8)]
  for path, place, use in (
    (folder / "00001.0-of-1.vectors.npy", -3, lambda: Store(folder).read(everything)),
    (folder / "00001.0-of-1.crc.npy", -3, lambda: Store(folder).read(everything)),
    (folder / "manifest.json", 40, lambda: Store(folder)),
    (folder / "header.json", 20, lambda: reader.check_header(folder, HEADER)),
    (folder / "00001.0-of-1.json", 20, lambda: writer.pieces(folder)),
    (with_labels / "00000.0-of-1.labels.npy", -3, lambda: Store(with_labels).labels(everything)),
  ):
    use()
    flip(path, place)
    with pytest.raises(ValueError, match=r"changed after|damaged") as error:
      use()
    assert path.name in str(error.value) or path.name.replace("crc", "vectors") in str(error.value)
    flip(path, place)
  one = OneSide(image=folder)
  record = dict(key="k")
  ids = np.load(next(folder.glob("ids-*.npy")))
  assert len(ids) == 8 and one.image.find(ids[:1])[1] == [1]
  (path,) = folder.glob("rows-*.npy")
  flip(path, -8)  # the row of the last sample
  one.image = Store(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("bigalign.data.stores.one_side.sample_id", lambda key: ids[-1])
    with pytest.raises(ValueError, match="belongs to another sample"):
      one.replace(record)


def test_an_array_that_is_cut_or_not_an_array_names_its_file(tmp_path):
  folder = write(tmp_path / "s", range(1, 9))
  uses = {
    "00001.0-of-1.vectors.npy": lambda: Store(folder).read(np.arange(8)),
    "00001.0-of-1.samples.npy": lambda: Store(folder).samples(np.arange(8)),
    next(folder.glob("ids-*.npy")).name: lambda: Store(folder).find(np.arange(8, dtype=np.uint64)),
  }
  for name, use in uses.items():
    good = (folder / name).read_bytes()
    shorter = good.replace(b"(4", b"(3").replace(b"(8", b"(7")
    for bad in (good[:-8], good[:40], b"", good[8:], shorter):
      (folder / name).write_bytes(bad)
      with pytest.raises(ValueError, match="is damaged") as error:
        use()
      assert str(folder / name) in str(error.value)
    (folder / name).write_bytes(good)
    use()


def test_a_store_of_an_older_version_is_read_with_a_line_in_the_log(tmp_path, caplog):
  folder = write(tmp_path / "s", range(1, 9))
  wanted = Store(folder).read(np.arange(8))
  for path in folder.glob("*.json"):
    content = json.loads(path.read_text())
    if isinstance(content, dict):
      del content["checksum"]
      for file in [content, *content.get("files", [])]:
        file.get("sums", {}).pop("crc", None)
    path.write_text(json.dumps(content))
  for path in folder.glob("*.crc.npy"):
    path.unlink()
  with caplog.at_level("INFO"):
    np.testing.assert_array_equal(Store(folder).read(np.arange(8)), wanted)
  assert "has no checksums of rows: an older version wrote it" in caplog.text


def test_a_damaged_index_is_found(tmp_path):
  folder = write(tmp_path / "s", range(1, 9))
  (path,) = folder.glob("rows-*.npy")
  data = bytearray(path.read_bytes())
  data[-8] ^= 1
  path.write_bytes(data)
  assert [str(path) in line for line in Store(folder).verify()] == [True]
  text = write(tmp_path / "t", range(1, 9), texts=[1] * 8)
  with pytest.raises(ValueError, match="changed while it was read"):
    batches(Pairs(text, folder), range(8), stop=8)
  (folder / "00000.0-of-1.vectors.npy").write_bytes(data[:20])
  assert any("00000.0-of-1 cannot be read" in line for line in Store(folder).verify())


def test_a_missing_piece_is_an_error(tmp_path):
  folder = write(tmp_path / "s", range(1, 9))
  (folder / "00001.0-of-1.json").unlink()
  with pytest.raises(ValueError, match=r"pieces \[1\] of a are missing; do all processes write"):
    writer.finish(folder, captions=False)


def test_a_source_that_was_never_begun_is_replaced(tmp_path):
  writer.begin(tmp_path / "s", HEADER)
  writer.claim(tmp_path / "s", "typo", 9, "typo", batch_size=4, batches=1, write=True)
  assert len(Store(write(tmp_path / "s", range(8)))) == 8


def test_an_append_that_is_killed_leaves_the_store_as_it_was(tmp_path, monkeypatch):
  """Kills the append at each rename of a file."""
  replace, moves = pathlib.Path.replace, []
  for stop in range(99):
    folder = tmp_path / str(stop)
    write(folder, range(1, 9))
    moves.clear()

    def move(self, target, stop=stop):
      moves.append(target)
      if len(moves) > stop:
        raise KeyboardInterrupt
      return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", move)
    try:
      write(folder, range(20, 26), name="b")
    except KeyboardInterrupt:
      monkeypatch.setattr(pathlib.Path, "replace", replace)
      found, expected = Store(folder), set(range(1, 9))
      assert set(found.samples(np.arange(len(found)))[:, 0].tolist()) == expected
      assert list(found.verify()) == []
      write(folder, range(20, 26), name="b")
    monkeypatch.setattr(pathlib.Path, "replace", replace)
    assert len(Store(folder)) == 14 and list(Store(folder).verify()) == []
    if len(moves) <= stop:
      break
  assert stop == len(moves) > 8


WRITER = """
import pathlib, sys, time
import numpy as np
from bigalign.data.stores import writer

folder = pathlib.Path(sys.argv[1])
writer.begin(folder, dict(width=64, dtype="float16"))
pieces = writer.claim(folder, "x", 4000, "x", batch_size=50, batches=1, write=True)
print("begun", flush=True)
for n in range(pieces.next, 80):
  place = np.arange(n * 50, n * 50 + 50)
  own = np.repeat(place, place % 3)  # none, one or two captions
  rows = np.repeat(own[:, None] % 1000, 64, 1).astype(np.float16)
  writer.write(folder, n, rows, np.stack([own * 7919 + 1, own], 1).astype(np.uint64))
  time.sleep(0.003)
writer.finish(folder, captions=True)
"""


@pytest.mark.slow
def test_twenty_kills_neither_lose_nor_repeat_nor_mix_rows(tmp_path):
  draws, folder = random.Random(0), tmp_path / "s"
  command = [sys.executable, "-c", WRITER, str(folder)]
  kept = []
  for _ in range(20):
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
      process.stdout.readline()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(draws.uniform(0, 0.05))
      process.kill()
    kept.append(len(writer.pieces(folder)))
  assert kept == sorted(kept) and kept[0] < 80  # a kill costs a piece at most, never one before
  subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  found, place = Store(folder), np.arange(4000)
  assert list(found.verify()) == [] and len(found) == (place % 3).sum()
  rows, count = found.find((place * 7919 + 1).astype(np.uint64))
  np.testing.assert_array_equal(count, place % 3)
  np.testing.assert_array_equal(found.read(rows[count > 0])[:, 5], place[count > 0] % 1000)
  assert sorted(x.name for x in folder.glob("*.part")) == []


def test_a_hundred_million_rows_are_addressed_without_an_index_in_memory(tmp_path):
  folder, each, files = tmp_path / "s", 1_000_000, 100
  (folder).mkdir()
  listed = []

  def sparse(name, shape, dtype):
    """An array of zeros in a sparse file."""
    with (folder / name).open("wb") as file:
      np.lib.format.write_array_header_1_0(
        file, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape)
      )
      file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)

  for n in range(files):
    stem = f"{n:05}.0-of-1"
    sparse(f"{stem}.vectors.npy", (each, 1024), np.float16)
    sparse(f"{stem}.samples.npy", (each, 2), np.uint64)
    listed.append(dict(stem=stem, rows=each, sums={}))
  sparse("ids.npy", (each * files,), np.uint64)
  sparse("rows.npy", (each * files,), np.uint64)
  last = np.load(folder / "00099.0-of-1.vectors.npy", mmap_mode="r+")
  last[-1] = 3
  last.flush()
  ids = np.load(folder / "ids.npy", mmap_mode="r+")
  ids[-1] = 2**63
  ids.flush()
  rows = np.load(folder / "rows.npy", mmap_mode="r+")
  rows[-1] = each * files - 1
  rows.flush()
  (folder / "manifest.json").write_text(
    json.dumps(
      dict(
        header=HEADER | dict(width=1024),
        ids="",
        left_out={},
        sources=[],
        files=listed,
        index={"ids.npy": "", "rows.npy": ""},
      )
    )
  )
  tracemalloc.start()
  found = Store(folder)
  row, count = found.find(np.array([2**63], np.uint64))
  assert (row.tolist(), count.tolist()) == ([each * files - 1], [1])
  assert found.read(row)[0, 7] == 3
  found.read(np.random.default_rng(0).integers(0, len(found), 200))
  assert tracemalloc.get_traced_memory()[1] < 20e6  # and a byte per row would be 100e6
  tracemalloc.stop()


def stores(tmp_path, *, count=40, second=False):
  """Images, and one to three captions of each, written in another order."""
  shutil.rmtree(tmp_path, ignore_errors=True)
  order = np.random.default_rng(3).permutation(count)
  write(tmp_path / "image", np.arange(count) + 1)
  write(tmp_path / "text", order + 1, texts=order % 3 + 1, piece=7, width=2)
  return dict(
    image=tmp_path / "image",
    text=tmp_path / "text",
    **(dict(second=tmp_path / "text") if second else {}),
  )


def batches(pairs, rows, *, batch_size=8, start=0, stop=80, **options):
  data = data_options(image_size=1, tokenizer=dict(name="byte", length=2), **options)
  with contextlib.closing(
    pair_batches(pairs, data, batch_size=batch_size, rows=rows, seed=5, start=start, stop=stop)
  ) as found:
    return list(found)


@pytest.mark.slow
def test_pairs_belong_together_in_any_order_on_any_hosts_from_any_place(tmp_path):
  pairs = Pairs(**stores(tmp_path / "s", second=True))
  whole = batches(pairs, range(8))
  image, text, second = (
    np.concatenate([b[name] for b in whole])[:, 0] for name in ("image", "text", "text_second")
  )
  assert len(image) == 80 and sorted(image[:40]) == sorted(image[40:]) == list(range(1, 41))
  np.testing.assert_array_equal(image, text)
  np.testing.assert_array_equal(image, second)
  drawn = np.concatenate([b["text_id"] for b in whole])[:, 1] % 8
  counts = (image - 1) % 3 + 1
  assert (drawn < counts).all() and set(drawn[counts == 3]) == {0, 1, 2}
  halves = [batches(pairs, rows) for rows in (range(4), range(4, 8))]
  later = batches(pairs, range(4), batch_size=4, start=24)
  for name in whole[0]:
    joined = np.concatenate([[b[name] for b in half] for half in halves], 1)
    np.testing.assert_array_equal(joined, [b[name] for b in whole])
    np.testing.assert_array_equal(
      np.concatenate([b[name] for b in later]), np.concatenate([b[name] for b in whole])[24:]
    )


def test_several_captions_of_an_image_are_drawn_without_replacement(tmp_path):
  """Captions are (number of the image, number of the caption); the first is the one of one text."""
  keys = [str(i) for i in range(12)]
  image = write_store(tmp_path / "image", {key: np.full(2, float(key)) for key in keys})
  own = {key: [(float(key), k) for k in range(1 + int(key) % 4)] for key in reversed(keys)}
  text = write_store(tmp_path / "text", {key: np.array(x) for key, x in own.items()})
  pairs, orders = Pairs(image, text), collections.Counter()
  one = batches(pairs, range(6), batch_size=6, stop=240)
  for count in (1, 3, 9):
    several = batches(pairs, range(6), batch_size=6, stop=240, texts=dict(count=count))
    for plain, batch in zip(one, several, strict=True):
      for name, x in plain.items():
        np.testing.assert_array_equal(batch[name], x)
      kinds = batch["texts_kind"]
      given = [batch["text"][:, None], *([batch["text_others"]] if count > 1 else [])]
      every = np.concatenate(given, 1)
      assert kinds.shape == every.shape[:2] == (6, count)
      assert (every[:, :, 0] == batch["image"][:, :1]).all()
      for i, texts, kind in zip(batch["image"][:, 0].astype(int), every[:, :, 1], kinds):
        there = kind == POSITIVE
        assert there.sum() == min(count, 1 + i % 4) and not kind[~there].any()
        assert len({*texts[there]}) == there.sum() and (texts[~there] == texts[0]).all()
        if count == 9 and i % 4 == 3:
          orders[tuple(texts[there])] += 1
    later = batches(pairs, [4, 5], batch_size=6, start=18, stop=24, texts=dict(count=count))
    for name, x in later[0].items():
      np.testing.assert_array_equal(x, several[3][name][4:])
  assert len(orders) > 18  # 60 draws have 22 of the 24 orders in the mean
  with pytest.raises(ValueError, match=r"negatives needs texts, but config\.data\.stores"):
    open_data(
      data_options(
        stores=dict(image=image, text=text),
        image_size=1,
        tokenizer=dict(name="byte", length=2),
        texts=dict(count=2, negatives=dict(count=1, rule="swap")),
      )
    )


def test_images_without_captions_are_left_out_and_counted(tmp_path):
  image = write(tmp_path / "image", range(1, 41))
  text = write(tmp_path / "text", range(3, 50), texts=[2] * 47)
  with pytest.raises(
    ValueError,
    match=r"38 of the 40 images in .* fewer than"
    r" the share config\.data\.stores\.least=0\.99: ",
  ):
    Pairs(image, text)
  pairs = Pairs(image, text, least=0.9)
  assert len(pairs) == 38 and pairs[0]["text"][0, 0] == pairs[0]["image"][0] == 3
  two = batches(pairs, range(19), batch_size=19, stop=38)
  assert sorted(np.concatenate([batch["image"][:, 0] for batch in two])) == list(range(3, 41))
  other = write(tmp_path / "other", range(100, 140), texts=[1] * 40)
  with pytest.raises(ValueError, match="0 of the 40 images"):
    Pairs(image, other, least=0.0)


@pytest.mark.parametrize("members", ["images", "bad texts", "json"])
def test_texts_from_a_store_need_no_captions_in_the_source(tmp_path, members):
  """Shards without .txt, or with texts that would reject their sample, in a mixture too."""
  more = {"images": [], "bad texts": [("txt", b"\xff\xfe")], "json": [("json", b"{}")]}[members]
  entries = [(f"{i}.{name}", data) for i in range(8) for name, data in [("jpg", picture(i)), *more]]
  shard = write_tar(tmp_path / "0.tar", entries)
  parts = (dict(name="a", source=shard, captions=("json.caption",)),)
  for prefix, source in (("", dict(source=shard)), ("a/", dict(mixture=parts))):
    ids = np.array([sample_id(f"{prefix}0.tar/{i}") for i in range(8)], np.uint64)
    stores = dict(text=str(write(tmp_path / f"s{prefix}", ids, texts=[1] * 8)))
    tokenizer = dict(name="byte", length=4)
    inputs = open_data(data_options(stores=stores, image_size=8, tokenizer=tokenizer, **source))
    with contextlib.closing(
      inputs.batches(rejected_log="", batch_size=8, rows=np.arange(8), seed=0, stop=8)
    ) as found:
      (batch,) = found
    assert not batch["rejects"].any()
    assert sorted(batch["text"][:, 0].tolist()) == sorted(vectors(ids)[:, 0].tolist())


def test_too_many_captions_are_an_error(tmp_path):
  pairs = Pairs(**stores(tmp_path / "s"))
  with pytest.raises(ValueError, match="captions_per_image, now 2, to the largest number"):
    batches(pairs, range(8), captions_per_image=2)
