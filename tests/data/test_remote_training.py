"""Training reads a store of objects as it reads a disk: equal batches, each byte fetched once."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading

import numpy as np
import pytest
from helpers.batches import eval_batches, train_batches
from helpers.every_format import write_parquet
from helpers.object_store_server import store
from helpers.small_shards import picture, write_tar

from bigalign.data.files import storage
from bigalign.data.sources.base import open_source, where
from bigalign.shards import index as program

B, SHARDS, SAMPLES = (
  32,
  3,
  3072,
)  # samples of a shard; an epoch is several times what an order holds


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  """A folder of shards, and of their index."""
  folder = tmp_path_factory.mktemp("store")
  images = [picture(i) for i in range(16)]
  for shard in range(SHARDS):
    write_tar(
      folder / f"{shard}.tar",
      [
        member
        for i in range(SAMPLES)
        for member in (
          (f"{i:05d}.jpg", images[(i + shard) % 16]),
          (f"{i:05d}.txt", f"{shard} {i}".encode()),
        )
      ],
    )
  assert program.main([f"{folder}/*.tar", f"--out={folder}", "--workers=1"]) == 0
  return folder


@pytest.fixture
def served(shards, monkeypatch):
  """The store of these shards, and the pattern to read them there."""
  monkeypatch.setenv("BIGALIGN_INDEX", str(shards / "index"))
  with store(shards) as server:
    pattern = f"{server.url}/{{0..{SHARDS - 1}}}.tar"
    assert program.main([pattern, f"--out={shards / 'index'}", "--workers=1"]) == 0
    server.requests.clear()
    yield server, pattern


def epoch(pattern, *, stop=SHARDS * SAMPLES, **options):
  """The batches of an epoch in the order of blocks."""
  return contextlib.closing(
    train_batches(
      open_source(pattern),
      batch_size=B,
      rows=np.arange(B),
      seed=1,
      image_size=8,
      order="block",
      tokenizer=dict(name="byte", length=16),
      stop=stop,
      **options,
    )
  )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_remote_shards_equal_those_of_local_ones(shards, served, workers):
  server, pattern = served
  server.failures = [429, 503, 0, 500]  # also of the workers' first requests
  seen = 0
  with epoch(f"{shards}/*.tar") as local, epoch(pattern, workers=workers) as remote:
    for found, wanted in zip(remote, local, strict=True):
      assert found.keys() == wanted.keys()
      assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
      seen += len(found["image"])
  assert seen == SHARDS * SAMPLES and not server.failures
  sent = sum(size for _, size in server.requests)
  whole = sum(os.path.getsize(shards / f"{n}.tar") for n in range(SHARDS))
  assert 0.99 * whole < sent <= 1.05 * whole


class Announced:
  """A source that requires a prefetch of each sample before it is read."""

  fingerprint = "0"

  def __init__(self, source):
    self.source, self.soon = source, set()

  def __len__(self):
    return len(self.source)

  def prefetch(self, ids, *, hold=0):
    self.soon |= {*ids}

  def __getitem__(self, i):
    assert {i, min(i + B, len(self) - 1)} <= self.soon
    return self.source[i]


@pytest.mark.parametrize("rows", [np.arange(1024), np.arange(0, 2048, 2)], ids=["own", "every 2nd"])
def test_evaluation_has_room_for_two_large_batches(rows):
  """With room for 1,024 samples, most of a batch above 512 rows was fetched one by one."""

  class Far:
    """Samples that remember what is held."""

    fingerprint, block = "0", 32

    def __init__(self):
      self.held = 0

    def __len__(self):
      return 9000

    def prefetch(self, ids, *, hold=0):
      self.held = max(self.held, hold)
      assert len({i // 32 for i in ids}) * 32 <= self.held <= 2 * 2048 + 64

    def __getitem__(self, i):
      return dict(image=np.zeros((8, 8, 3), np.uint8), captions=("a",), key=str(i), label=-1)

  options = dict(
    batch_size=2048, rows=rows, image_size=8, images=False, tokenizer=dict(name="byte", length=16)
  )
  with contextlib.closing(eval_batches(Far(), **options)) as batches:
    seen = sum(int(batch["valid"].sum()) for batch in batches)
  assert seen == sum(k * 2048 + row < 9000 for k in range(5) for row in rows.tolist())


def test_evaluation_and_embedding_fetch_the_next_batch(shards):
  options = dict(
    batch_size=B,
    rows=np.arange(B),
    image_size=8,
    start=SHARDS * SAMPLES - 5 * B,
    tokenizer=dict(name="byte", length=16),
  )
  source = open_source(f"{shards}/*.tar")
  with (
    contextlib.closing(eval_batches(Announced(source), **options)) as remote,
    contextlib.closing(eval_batches(source, images=False, **options)) as local,
  ):
    for found, wanted in zip(remote, local, strict=True):
      assert found["valid"].all() and found["image"].any() and not wanted["image"].any()
      texts = wanted.keys() - {"image"}
      assert all(found[name].tobytes() == wanted[name].tobytes() for name in texts)


def test_a_shard_that_disappears_ends_training_with_its_name(shards, served, monkeypatch):
  monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
  server, pattern = served
  with epoch(pattern) as batches:
    next(batches)
    server.failures = [404] * 10**4
    with pytest.raises(FileNotFoundError, match=r"http://.*/\d\.tar: there is no such object"):
      list(batches)


def test_remote_parquet_equals_local_parquet(tmp_path, monkeypatch):
  """Each row group costs one or two requests; transient errors are retried."""
  monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
  records = [dict(image=picture(i), captions=(f"picture {i}",), label=i % 3) for i in range(40)]
  local = open_source(write_parquet(tmp_path, records, rows=5))
  with store(tmp_path) as server:
    server.failures = [429, 0, 503]
    remote = open_source(f"{server.url}/{{0..1}}.parquet")
    assert len(remote) == 40 and remote.block == local.block == 5
    server.requests.clear()
    server.failures = [500]
    for i in range(40):
      assert remote[i] == local[i]
    sent = [name for name, size in server.requests if size]
    assert 8 <= len(sent) <= 24 and {*sent} == {"0.parquet", "1.parquet"}
    again = pickle.loads(pickle.dumps(remote))
    assert again.fingerprint == remote.fingerprint and again[33] == local[33]
    assert where(remote, 21) == (f"{server.url}/1.parquet", 1, 20)


def test_footers_of_remote_parquet_are_read_at_the_same_time(tmp_path, monkeypatch):
  records = [dict(image=picture(i), captions=("a",), label=0) for i in range(4)]
  write_parquet(tmp_path, records, files=2)
  tail, together = storage.tail, threading.Barrier(2, timeout=20)
  monkeypatch.setattr(storage, "tail", lambda *given: together.wait() < 0 or tail(*given))
  with store(tmp_path) as server:
    assert len(open_source(f"{server.url}/{{0..1}}.parquet")) == 4


def test_missing_or_changed_remote_parquet_is_named(tmp_path):
  records = [dict(image=picture(i), captions=(f"picture {i}",), label=0) for i in range(20)]
  write_parquet(tmp_path, records, files=1, rows=5)
  with store(tmp_path) as server:
    with pytest.raises(FileNotFoundError, match=r"/1.parquet: there is no such object"):
      open_source(f"{server.url}/{{0..1}}.parquet")
    remote = open_source(f"{server.url}/0.parquet")
    write_parquet(tmp_path, records[::-1], files=1, rows=5)
    with pytest.raises(storage.FileChanged, match=r"0.parquet: the shard changed"):
      remote[3]
    (tmp_path / "2.parquet").write_bytes(b"<html>no such page</html>")
    with pytest.raises(
      ValueError, match=r"2.parquet: not a complete Parquet file: .*Fetch it again"
    ):
      open_source(f"{server.url}/2.parquet")


@pytest.mark.parametrize("name", ["0.array_record", "train.tsv"])
def test_formats_that_are_read_only_from_disks_say_so(name):
  with pytest.raises(ValueError, match=r"\.tar and \.parquet are also read from object stores"):
    open_source(f"http://127.0.0.1:9/{name}")
