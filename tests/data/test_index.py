"""The sidecar index: what it costs, when it is refused, how it is built."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from helpers.small_shards import samples, write_tar

from bigalign.data.files import storage
from bigalign.data.files.draws import draw
from bigalign.data.sources.base import open_source
from bigalign.data.tar import index, parse, shards
from bigalign.shards import index as program


def _many(path: pathlib.Path, count: int) -> str:
  """A shard of `count` tiny samples; written by hand, as tarfile needs seconds for 10,000."""
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w") as archive:
    info = tarfile.TarInfo("000000.jpg")
    info.size = 1
    archive.addfile(info, io.BytesIO(b"x"))
  header = bytearray(data.getvalue()[:512])
  blocks = []
  for i in range(count):
    header[:6] = f"{i:06d}".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    blocks.append(bytes(header) + b"x".ljust(512, b"\0"))
  path.write_bytes(b"".join(blocks) + bytes(1024))
  return str(path)


def test_four_bytes_a_sample(tmp_path):
  path = _many(tmp_path / "00000.tar", 10_000)
  part = index.index_shard(path, str(tmp_path))
  index.merge(str(tmp_path), str(tmp_path))
  assert part.entries == 10_001
  assert (tmp_path / index.FILE).stat().st_size <= 4.01 * 10_000
  found = index.Index(str(tmp_path / index.FILE))
  assert [found.span(i) for i in (0, 9_999)] == [(0, 1024), (9_999 * 1024, 10_000 * 1024)]


def test_an_index_next_to_the_shards_is_used_and_never_written(tmp_path):
  folder = str(tmp_path)
  paths = [write_tar(tmp_path / f"{i}.tar", samples(10 * i, 3)) for i in range(3)]
  for path in reversed(paths):
    index.index_shard(path, folder)
  index.merge(folder, folder)
  before = (tmp_path / index.FILE).read_bytes()
  source = open_source(f"{folder}/{{1,0}}.tar")
  assert [source[i]["captions"][0] for i in range(6)] == [
    f"picture number {i}" for i in (10, 11, 12, 0, 1, 2)
  ]
  assert not os.path.exists(index.home(folder))
  write_tar(tmp_path / "3.tar", samples(30, 3))
  with pytest.raises(
    ValueError, match=r"1 of 4 shards .* not in an index.* 3\.tar.*bigalign index '"
  ):
    open_source(f"{folder}/*.tar")
  assert (tmp_path / index.FILE).read_bytes() == before


@pytest.mark.parametrize("old", ["incomplete", "stale"])
def test_a_stale_index_in_a_read_only_folder_does_no_harm(tmp_path, monkeypatch, capsys, old):
  """The command of the error helps: the index in the other folder is used."""
  folder, access = str(tmp_path / "data"), os.access
  pattern = f"{folder}/*.tar"
  path = write_tar(tmp_path / "data" / "0.tar", samples(0, 3))
  assert program.main([pattern, "--workers=1"]) == 0
  write_tar(
    tmp_path / "data" / "1.tar" if old == "incomplete" else pathlib.Path(path), samples(10, 4)
  )
  monkeypatch.setattr(os, "access", lambda where, mode: where != folder and access(where, mode))
  with pytest.raises((ValueError, OSError), match=r"bigalign index '"):
    open_source(pattern)
  out = str(tmp_path / "out")
  for place in ([], [f"--out={out}"]):
    monkeypatch.setenv("BIGALIGN_INDEX", out if place else str(tmp_path / "cache"))
    assert program.main([pattern, "--workers=1", *place]) == 0
    assert index.home(folder) in capsys.readouterr().out
    source = open_source(pattern)
    assert len(source) == (7 if old == "incomplete" else 4)
    assert source[len(source) - 1]["captions"] == ("picture number 13",)
  assert index.Index(os.path.join(folder, index.FILE)).names == ["0.tar"]  # as it was


def test_the_index_next_to_the_shards_wins_a_tie(tmp_path):
  folder = str(tmp_path)
  path = write_tar(tmp_path / "0.tar", samples(0, 3))
  for place in (folder, index.home(folder)):
    index.index_shard(path, place)
    index.merge(folder, place)
  assert open_source(path).shards.index_folder(0) == folder


def test_opening_indexes_small_shards_once(tmp_path, monkeypatch):
  write_tar(tmp_path / "0.tar", samples(0, 3))
  first = open_source(f"{tmp_path}/0.tar")
  assert os.listdir(tmp_path) == ["0.tar"]  # the folder of the data stays as it was
  monkeypatch.setattr(parse, "scan", None)  # would fail if called
  again = open_source(f"{tmp_path}/*.tar")
  assert again[2] == first[2] and again.fingerprint == first.fingerprint
  assert pickle.loads(pickle.dumps(again))[1] == first[1]


def test_large_shards_are_not_indexed_automatically(tmp_path, monkeypatch):
  write_tar(tmp_path / "0.tar", samples(0, 3))
  monkeypatch.setattr("bigalign.data.tar.shards.UNASKED", 1000)
  with pytest.raises(ValueError, match=r"1 of 1 shards .*Build it, once: bigalign index .*0\.tar"):
    open_source(f"{tmp_path}/0.tar")


def change(path, how):
  if how == "size":
    path.write_bytes(path.read_bytes() + bytes(512))
  else:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


REFUSED = r"0\.tar: the shard changed .*index it again: bigalign index"


@pytest.mark.parametrize("how", ["size", "time"])
def test_a_stale_index_that_a_user_made_is_refused(tmp_path, how):
  path = pathlib.Path(write_tar(tmp_path / "0.tar", samples(0, 3)))
  index.index_shard(str(path), str(tmp_path))
  index.merge(str(tmp_path), str(tmp_path))
  open_source(str(path))
  change(path, how)
  with pytest.raises(OSError, match=REFUSED):
    open_source(str(path))


@pytest.mark.parametrize("how", ["size", "time"])
def test_shards_that_opening_indexed_are_indexed_again_when_they_change(tmp_path, how, caplog):
  paths = [pathlib.Path(write_tar(tmp_path / f"{i}.tar", samples(3 * i, 3))) for i in range(2)]
  pattern = f"{tmp_path}/*.tar"
  opened = open_source(pattern)
  change(paths[0], how)
  with pytest.raises(OSError, match=REFUSED):  # a data worker reads what its run began with
    pickle.loads(pickle.dumps(opened))
  assert not caplog.records
  write_tar(paths[1], samples(7, 5))
  again = open_source(pattern)
  assert len(again) == 8 and again[7]["captions"] == ("picture number 11",)
  (line,) = [x.getMessage() for x in caplog.records]
  assert line.startswith("2 of 2 shards in") and line.endswith(
    "(the first: 0.tar); they are indexed again"
  )
  open_source(pattern)
  assert len(caplog.records) == 1


def test_many_bytes_that_changed_are_not_indexed_unasked(tmp_path, monkeypatch):
  path = pathlib.Path(write_tar(tmp_path / "0.tar", samples(0, 3)))
  open_source(str(path))
  change(path, "time")
  monkeypatch.setattr(shards, "UNASKED", 1000)
  with pytest.raises(OSError, match=REFUSED):
    open_source(str(path))


def test_a_broken_index_says_so(tmp_path):
  write_tar(tmp_path / "0.tar", samples(0, 3))
  open_source(f"{tmp_path}/0.tar")
  path = pathlib.Path(index.home(str(tmp_path))) / index.FILE
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="not a complete index of this version"):
    open_source(f"{tmp_path}/0.tar")


def test_an_index_that_grows_is_still_that_of_its_shards(tmp_path):
  folder = str(tmp_path)
  path = write_tar(tmp_path / "1.tar", samples(0, 3))
  source = open_source(path)
  asleep = pickle.dumps(source)
  write_tar(tmp_path / "0.tar", samples(5, 2))
  open_source(f"{folder}/0.tar")  # adds to the same file, before 1.tar
  assert source[0]["captions"] == ("picture number 0",)  # the old file is still open
  assert pickle.loads(asleep)[0] == source[0]
  write_tar(tmp_path / "1.tar", samples(0, 4))
  index.index_shard(path, index.home(folder))
  index.merge(folder, index.home(folder))
  with pytest.raises(OSError, match="indexed again, and differ"):
    pickle.loads(asleep)


def test_merging_keeps_existing_shards_and_drops_missing_ones(tmp_path):
  folder, place = str(tmp_path / "shards"), str(tmp_path / "place")
  paths = [write_tar(tmp_path / "shards" / f"{i}.tar", samples(10 * i, 2 + i)) for i in range(4)]
  for path in paths[:3]:
    index.index_shard(path, place)
  assert set(index.current(paths, place)) == set(paths[:3])  # parts of a build that was stopped
  index.merge(folder, place)
  os.unlink(paths[1])
  index.index_shard(paths[3], place)
  index.merge(folder, place)
  found = index.Index(os.path.join(place, index.FILE))
  assert found.names == ["0.tar", "2.tar", "3.tar"]
  assert [found.part(row).entries - 1 for row in range(3)] == [2, 4, 5]
  assert os.listdir(place) == [index.FILE]


def test_more_parts_than_open_files(tmp_path):
  folder = str(tmp_path)
  write_tar(tmp_path / "000.tar", samples(0, 1))
  for i in range(80):
    if i:
      os.link(tmp_path / "000.tar", tmp_path / f"{i:03d}.tar")
    index.index_shard(f"{folder}/{i:03d}.tar", folder)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(
    resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 40, limits[1])
  )
  try:
    assert len(index.current([f"{folder}/{i:03d}.tar" for i in range(80)], folder)) == 80
    index.merge(folder, folder)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  assert len(open_source(f"{folder}/*.tar")) == 80


def test_opening_thousands_of_shards_does_not_look_at_each(tmp_path):
  """The memory and reads of opening grow with the shards."""
  path = _many(tmp_path / "00000.tar", 1000)
  part = index.index_shard(path, str(tmp_path))
  starts = index.Index(str(tmp_path / index.PARTS / "00000.tar.index")).starts(0)
  parts = [part._replace(name=f"{i:05d}.tar") for i in range(300)]
  index._write(
    str(tmp_path / index.FILE), parts, lambda file: file.write(np.tile(starts, 300).tobytes())
  )
  for i in range(1, 300):
    os.link(path, tmp_path / f"{i:05d}.tar")
  source = open_source(f"{tmp_path}/{{00000..00299}}.tar", captions=())
  assert len(source) == 300_000
  assert source[299_999]["key"] == "00299.tar/000999"
  assert len(pickle.dumps(source)) < 300 * 300  # bytes


def test_a_lock_of_a_removed_folder_excludes_no_process(tmp_path):
  """The process that waits for the lock of a folder gets that of the folder with this name now."""
  folder = tmp_path / "parts"
  folder.mkdir()
  waits, order = threading.Event(), []

  def wait():
    waits.set()
    with storage.locked(folder, "test", wait=True):
      order.append("second")
      with pytest.raises(BlockingIOError), storage.locked(folder, "test"):
        pass

  thread = threading.Thread(target=wait)
  with storage.locked(folder, "test"):
    thread.start()
    assert waits.wait(10)
    time.sleep(0.05)
    folder.rename(tmp_path / "old")
    folder.mkdir()
    order.append("first")
  thread.join(10)
  assert order == ["first", "second"]
  with storage.locked(folder, "test"):
    folder.rmdir()
  with pytest.raises(FileNotFoundError), storage.locked(folder, "test"):
    pass


def test_parts_are_written_although_another_process_removes_their_folder(tmp_path, monkeypatch):
  folder = str(tmp_path)
  path = write_tar(tmp_path / "0.tar", samples(0, 3))
  makedirs, removed = os.makedirs, []

  def and_removed(name, **options):
    makedirs(name, **options)
    if len(removed) < 3:
      removed.append(os.rmdir(name))

  monkeypatch.setattr(os, "makedirs", and_removed)
  index.index_shard(path, folder)
  assert len(removed) == 3 and index.locate("0.tar", folder)
  index.merge(folder, folder)
  index.merge(folder, folder)  # another process merged all parts
  assert index.locate("0.tar", folder) and sorted(os.listdir(folder)) == ["0.tar", index.FILE]


def test_parts_are_merged_although_their_folder_is_replaced_meanwhile(tmp_path, monkeypatch):
  """Other processes merge all parts while this one waits, and begin new ones."""
  folder = str(tmp_path)
  path = write_tar(tmp_path / "0.tar", samples(0, 3))
  locked, missed = storage.locked, []

  def and_missed(parts, *args, **options):
    if len(missed) < 3:
      missed.append(parts)
      raise FileNotFoundError(parts)
    return locked(parts, *args, **options)

  monkeypatch.setattr(storage, "locked", and_missed)
  index.index_shard(path, folder)
  index.merge(folder, folder)
  assert len(missed) == 3 and sorted(os.listdir(folder)) == ["0.tar", index.FILE]


_RACE = """
import glob, sys
from bigalign.data.tar import index
folder = sys.argv[1]
for _ in range(3):
  for path in sorted(glob.glob(f"{folder}/*.tar")):
    index.index_shard(path, folder)
    assert index.current([path], folder)
    index.merge(folder, folder)
assert len(index.Index(f"{folder}/{index.FILE}").names) == 8
"""


@pytest.mark.slow
def test_many_processes_index_one_fresh_folder(tmp_path):
  for i in range(8):
    write_tar(tmp_path / f"{i}.tar", samples(3 * i, 3))
  command = [sys.executable, "-c", _RACE, str(tmp_path)]
  processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(6)]
  errors = [process.communicate()[1].decode() for process in processes]
  assert [process.returncode for process in processes] == [0] * 6, errors
  assert len(open_source(f"{tmp_path}/*.tar")) == 24
  assert index.PARTS not in os.listdir(tmp_path)


def test_which_shards_are_checked_does_not_alias_with_periodic_changes(tmp_path, monkeypatch):
  """Every other shard changed: at even strides, none of them would be looked at."""
  for i in range(16):
    write_tar(tmp_path / f"{i:02}.tar", samples(10 * i, 1))
    index.index_shard(str(tmp_path / f"{i:02}.tar"), str(tmp_path))
  index.merge(str(tmp_path), str(tmp_path))
  open_source(f"{tmp_path}/*.tar")
  for i in range(1, 16, 2):
    os.utime(tmp_path / f"{i:02}.tar", (1, 1))
  monkeypatch.setattr(shards, "CHECKED", 8)
  with pytest.raises(storage.FileChanged, match="changed since it was indexed"):
    open_source(f"{tmp_path}/*.tar")


def test_draws_are_all_of_few_and_some_of_many():
  assert [draw(count, 8) for count in (0, 5, 8)] == [[], [0, 1, 2, 3, 4], [*range(8)]]
  drawn = draw(10**12, 1000)
  assert drawn == sorted({*drawn}) == draw(10**12, 1000) and len(drawn) == 1000
  assert drawn[0] >= 0 and drawn[-1] < 10**12
  for period in (2, 16):
    assert sum(i % period == 0 for i in drawn) == pytest.approx(1000 / period, rel=0.2)
