"""Local and remote files through one function; the remote ones on a server of this machine."""

from __future__ import annotations

import hashlib
import os
import pathlib
import pickle
import time

import pytest
import tensorstore
from helpers.object_store_server import store
from helpers.small_shards import samples, write_tar

from bigalign.data.files import fingerprints, storage
from bigalign.data.files.patterns import expand_shards
from bigalign.data.sources.base import open_source
from bigalign.shards import index as program

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)


def _remote_shards(folder: pathlib.Path, url: str, out: pathlib.Path) -> str:
  for shard in range(2):
    write_tar(folder / "set" / f"{shard}.tar", samples(50 * shard, 50))
  pattern = f"{url}/set/{{0..1}}.tar"
  assert program.main([pattern, f"--out={out}", "--workers=1"]) == 0
  return pattern


@pytest.mark.parametrize("remote", [False, True])
def test_ranges_and_ends(tmp_path, remote):
  (tmp_path / "x").write_bytes(DATA)
  size = len(DATA)
  with store(tmp_path) as server:
    path = f"{server.url}/x" if remote else str(tmp_path / "x")
    for start, end in (
      (0, 10),
      (5000, 5001),
      (size - 3, size),
      (size - 3, size + 9),
      (size, size + 1),
      (size + 5, size + 9),
    ):
      assert storage.read(path, start, end) == DATA[start:end], (start, end)
    blocks = storage.BlockReader(path, block=1000)
    for start, end in ((0, 512), (900, 2100), (size - 10, size + 500), (size + 512, size + 1024)):
      assert blocks[start:end] == DATA[start:end], (start, end)
    with pytest.raises(FileNotFoundError, match="nowhere"):
      storage.read(path.replace("/x", "/nowhere"), 0, 1)


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_changed_is_noticed(tmp_path, remote):
  (tmp_path / "x").write_bytes(DATA)
  with store(tmp_path) as server:
    path = f"{server.url}/x" if remote else str(tmp_path / "x")
    before = storage.stat(path)
    assert storage.read(path, 3, 5, expect=before) == DATA[3:5]
    (tmp_path / "x").write_bytes(DATA[::-1])
    os.utime(tmp_path / "x", (1, 1))
    with pytest.raises(storage.FileChanged, match="changed since it was indexed"):
      storage.read(path, 3, 5, expect=before)


@pytest.mark.parametrize("failure", [429, 503, 500, 0])
def test_transient_errors_are_retried(tmp_path, caplog, failure):
  (tmp_path / "x").write_bytes(DATA)
  with store(tmp_path) as server:
    server.failures = [failure] * 3
    assert storage.read(f"{server.url}/x", 7, 9) == DATA[7:9]
  assert "try 2 of 8" in caplog.text and "/x: UNAVAILABLE" in caplog.text


def test_permanent_errors_name_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, "TRIES", 3)
  (tmp_path / "x").write_bytes(DATA)
  with store(tmp_path) as server:
    server.failures = [503] * 3
    with pytest.raises(OSError, match=r"/x: given up after 3 tries: .*503"):
      storage.read(f"{server.url}/x", 7, 9)
    server.failures = [403, 503]
    with pytest.raises(ValueError, match="403"):
      storage.read(f"{server.url}/x", 7, 9)
    assert server.failures == [503]  # a refusal is not retried


def test_stores_and_patterns():
  assert storage.is_remote("gs://bucket/x") and not storage.is_remote("/a/b")
  with pytest.raises(ValueError, match="unknown store ftp://; known: a local path, gs://"):
    storage.is_remote("ftp://a/b")
  assert expand_shards("s3://bucket-name/{a,b}/{08..09}.tar") == [
    f"s3://bucket-name/{folder}/{n}.tar" for folder in "ab" for n in ("08", "09")
  ]


def test_a_store_that_cannot_list_says_so(tmp_path):
  with store(tmp_path) as server, pytest.raises(ValueError, match="cannot list its files; write"):
    expand_shards(f"{server.url}/*.tar")


def test_remote_shards_are_read_in_blocks(tmp_path, monkeypatch):
  with store(tmp_path) as server:
    pattern = _remote_shards(tmp_path, server.url, tmp_path / "index")
    with pytest.raises(ValueError, match=r"2 of 2 shards .* bigalign index"):
      open_source(pattern)
    monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "index"))
    source = open_source(pattern)
    local = open_source(f"{tmp_path}/set/{{0..1}}.tar")
    assert local.block == 1 and source.fingerprint == local.fingerprint
    server.requests.clear()
    backwards = list(range(len(source)))[::-1]
    assert [source[i] for i in backwards] == [local[i] for i in backwards]
    # Blocks of 32 over 50 + 50 samples: the second block has samples of both shards.
    assert len(server.requests) == 5
    sent = sum(size for _, size in server.requests)
    assert sent <= 1.05 * sum((tmp_path / "set" / f"{n}.tar").stat().st_size for n in (0, 1))
    assert pickle.loads(pickle.dumps(source))[7] == local[7]


def test_prefetching_waits_once(tmp_path, monkeypatch):
  with store(tmp_path) as server:
    pattern = _remote_shards(tmp_path, server.url, tmp_path / "index")
    monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "index"))
    source = open_source(pattern)
    server.latency = 0.5
    began = time.monotonic()
    source.prefetch(range(100))
    for i in range(100):
      source[i]
    assert time.monotonic() - began < 4 * 0.5  # sequentially it would be 5 requests


def test_a_missing_shard_is_named(tmp_path, monkeypatch):
  with store(tmp_path) as server:
    pattern = _remote_shards(tmp_path, server.url, tmp_path / "index")
    monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "index"))
    source = open_source(pattern)
    (tmp_path / "set" / "1.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"set/1\.tar: there is no such object"):
      source[99]
    write_tar(tmp_path / "set" / "1.tar", samples(0, 50))
    again = open_source(pattern)
    with pytest.raises(OSError, match=r"1\.tar: the shard changed .*bigalign index"):
      again[98]


def test_the_fingerprint_of_many_remote_files_takes_the_time_of_a_few(tmp_path, monkeypatch):
  paths = [str(tmp_path / f"{i}") for i in range(64)]
  for path in paths:
    pathlib.Path(path).write_bytes(path.encode() * 9)
  urls = [f"gs://bucket{path}" for path in paths]

  def tail(path, size):
    time.sleep(0.02)
    data = pathlib.Path(path.removeprefix("gs://bucket")).read_bytes()
    return data[-size:], storage.Stat(-1, 0)

  monkeypatch.setattr(storage, "tail", tail)
  begin = time.perf_counter()
  made = fingerprints.of_files(urls)
  assert time.perf_counter() - begin < 64 * 0.02 / 4
  assert made == fingerprints.of_files(reversed(urls[::-1])) != fingerprints.of_files(urls[::-1])
  ends = [f"{i}\n".encode() + path.encode() * 9 for i, path in enumerate(paths)]
  assert made == hashlib.sha256(b"".join(ends)).hexdigest()[:32]


def test_a_glob_lists_only_what_its_beginning_allows(monkeypatch):
  """A folder of a store may hold millions of objects that the pattern does not mean."""
  objects = tensorstore.KvStore.open("memory://").result()
  for name in ("a.tar", "train-0.tar", "train-10.tar", "train-x/0.tar", "train.txt", "val-0.tar"):
    objects[name] = b""
  asked = []

  class Recorded:
    def list(self, keys):
      asked.append((keys.inclusive_min, keys.exclusive_max))
      return objects.list(keys)

  monkeypatch.setattr(storage, "_store", lambda folder: Recorded())

  assert expand_shards("gs://b/d/train-*.tar") == ["gs://b/d/train-0.tar", "gs://b/d/train-10.tar"]
  assert expand_shards("gs://b/d/train-[1]?.tar") == ["gs://b/d/train-10.tar"]
  assert expand_shards("gs://b/d/{train,val}-?.tar") == [
    "gs://b/d/train-0.tar",
    "gs://b/d/val-0.tar",
  ]
  assert len(expand_shards("gs://b/d/*.tar")) == 4
  train, val = (b"train-", b"train."), (b"val-", b"val.")
  assert asked == [train, train, train, val, (b"", b"")]
