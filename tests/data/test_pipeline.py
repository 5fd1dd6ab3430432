"""Batches are a function of (seed, position): any workers, hosts, restarts, bad samples."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import subprocess
import sys
import weakref

import numpy as np
import pytest
from helpers.batches import data_options, eval_batches, train_batches
from helpers.small_shards import picture, samples, write_tar

from bigalign.data.image.transforms import eval_image
from bigalign.data.loader.training import batch_spec
from bigalign.data.samples.rejects import REASONS
from bigalign.data.sources.base import open_source

B, STEPS = 8, 5
OPTIONS = dict(
  batch_size=B,
  seed=3,
  image_size=16,
  tokenizer=dict(name="byte", length=24),
  augment=dict(scale=(0.5, 1.0), flip=0.5),
  captions_per_image=64,
)


class Numbers:
  """Sample i is a grey square with as many captions as i has bits; needs no file."""

  fingerprint = "0"

  def __init__(self, size: int, *, bad: tuple[int, ...] = ()):
    self.size = size
    self.bad = bad

  def __len__(self):
    return self.size

  def __getitem__(self, i):
    image = b"<html>" if i in self.bad else np.full((8, 8, 3), i % 256, np.uint8)
    captions = tuple(f"{i} {k}" for k in range(i.bit_count()))
    return dict(image=image, captions=captions or ("none",), key=f"number {i}", label=i % 10)


@pytest.fixture
def shards(tmp_path) -> str:
  """28 samples of which 5 are bad, one for each way."""
  whole = picture(50, size=(90, 120))
  bad = [
    ("000020.jpg", whole[:1000]),
    ("000020.txt", b"truncated"),
    ("000021.jpg", b"<html>404</html>"),
    ("000021.txt", b"a page"),
    ("000022.jpg", b""),
    ("000022.txt", b"empty"),
    ("000023.jpg", whole),
    ("000023.txt", b"  "),
    ("000024.txt", b"no image"),
  ]
  write_tar(tmp_path / "0.tar", samples(0, 20) + bad)
  write_tar(tmp_path / "1.tar", samples(25, 3))
  return f"{tmp_path}/*.tar"


BAD = {20: "truncated", 21: "undecodable", 22: "empty", 23: "no_caption", 24: "no_image"}


def take(source, count=STEPS, **options):
  with contextlib.closing(
    train_batches(source, **{"rows": np.arange(B), **OPTIONS, **options})
  ) as batches:
    return [next(batches) for _ in range(count)]


def ids(batches, name="image_id") -> np.ndarray:
  """[N] 64-bit ids of some batches."""
  words = np.concatenate([batch[name] for batch in batches]).astype(np.int64)
  return words[:, 0] << 32 | words[:, 1]


def caption_of(text: np.ndarray, mask: np.ndarray) -> str:
  """What the byte tokenizer made of a caption, undone."""
  return bytes((text[mask][:-1] - 3).tolist()).decode()


def assert_equal(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def merge(parts):
  """Batches of several hosts, given as pairs of rows and batches → the global batches."""
  rows = np.argsort(np.concatenate([rows for rows, _ in parts]))
  return [
    {name: np.concatenate([batch[name] for batch in step])[rows] for name in step[0]}
    for step in zip(*[batches for _, batches in parts])
  ]


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_do_not_change_the_batches(shards, workers):
  source = open_source(shards)
  batches = take(source, workers=workers)
  assert_equal(batches, take(source))
  # Shared memory of the workers would not outlive them.
  assert all(type(value) is np.ndarray and value.flags.owndata for value in batches[0].values())


@pytest.mark.parametrize(
  "rows",
  [
    [range(4), range(4, 8)],
    [range(0, 8, 2), range(1, 8, 2)],
    [range(2), range(2, 4), range(4, 6), range(6, 8)],
    [[7, 0], [3, 2, 5], [1, 4, 6]],
  ],
)
def test_hosts_together_hold_the_global_batch(shards, rows):
  source = open_source(shards)
  parts = [(np.array(own), take(source, rows=np.array(own))) for own in rows]
  assert_equal(merge(parts), take(source))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_restart_goes_on_where_it_stopped(shards, workers):
  source = open_source(shards)
  whole = take(source, 9)
  assert_equal(take(source, 3, start=6 * B, workers=workers), whole[6:])


def test_another_batch_size_goes_on_in_the_same_order(shards):
  source = open_source(shards)
  whole = ids(take(source, 6))
  np.testing.assert_array_equal(
    ids(take(source, 2, batch_size=4, rows=np.arange(4), start=24)), whole[24:32]
  )


def test_each_sample_once_per_epoch():
  source = Numbers(10_000)
  options = dict(
    batch_size=1000,
    rows=np.arange(1000),
    image_size=1,
    augment=dict(crop="squash"),
    tokenizer=dict(name="byte", length=2),
  )
  first, second = take(source, 10, **options), take(source, 1, start=10_000, **options)
  np.testing.assert_array_equal(np.sort(ids(first)), np.arange(10_000))
  assert (ids(second) != ids(first[:1])).mean() > 0.99


def test_rows_follow_the_sample(shards):
  """Image, text, label and ids of a row belong together."""
  source = Numbers(300)
  for batch in take(source, augment=dict(crop="squash")):
    image, text = ids([batch]), ids([batch], "text_id")
    np.testing.assert_array_equal(batch["image"][:, 3, 3, 0], image % 256)
    np.testing.assert_array_equal(batch["label"], image % 10)
    np.testing.assert_array_equal(text // 64, image)
    for r in range(B):
      caption = caption_of(batch["text"][r], batch["text_mask"][r])
      assert caption == f"{image[r]} {text[r] % 64}" or image[r] == 0


def test_every_caption_is_drawn():
  source = Numbers(8)  # sample 7 has three captions
  found = ids(take(source, 60), "text_id")
  counts = np.bincount(found[found // 64 == 7] % 64)
  assert len(counts) == 3 and counts.min() > 5


def test_bad_samples_are_substituted_and_counted(shards, caplog):
  source = open_source(shards)
  batches = take(source, 21)  # six epochs of 28 samples
  assert not set(ids(batches)) & set(BAD)
  counts = sum(batch["rejects"].sum(0) for batch in batches)
  found = {reason: int(n) for reason, n in zip(REASONS, counts) if n}
  # Each bad sample comes up once in an epoch, and now and then as a substitute.
  assert found.keys() == set(BAD.values())
  assert all(6 <= n <= 12 for n in found.values()), found
  for index, reason in BAD.items():
    lines = [
      record.getMessage() for record in caplog.records if f"(index {index})" in record.getMessage()
    ]
    assert len(lines) == 1 and reason in lines[0] and f"0.tar/{index:06d}" in lines[0], lines
  good = [row for batch in batches for row in np.flatnonzero(batch["rejects"].sum(1) == 0)]
  assert 100 < len(good) < 21 * B


@pytest.mark.slow
def test_a_hopeless_source_is_an_error(tmp_path):
  write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.cls", b"0")])
  source = open_source(f"{tmp_path}/0.tar")
  with pytest.raises(
    ValueError, match=r"0\.tar.*8 substitutes.*'no_caption': 9.*Set config\.data\.captions to"
  ):
    take(source, 1)
  with pytest.raises(ValueError, match=r"all rejected.*'undecodable': 9"):
    take(Numbers(3, bad=(0, 1, 2)), 1, workers=1)


def test_text_ids_have_room_for_the_captions_that_config_says():
  class Talkative(Numbers):
    def __getitem__(self, i):
      return super().__getitem__(i) | dict(captions=("word",) * (64 + i))

  assert set(ids(take(Talkative(1), 40), "text_id")) > set(range(0, 64, 4))
  with pytest.raises(ValueError, match=r"number 1 has 65 captions; set .*captions_per_image"):
    take(Talkative(2), 1)


def test_stop_ends_the_batches():
  source = Numbers(50)
  with contextlib.closing(
    train_batches(source, rows=np.arange(B), start=16, stop=43, **OPTIONS)
  ) as batches:
    assert len(list(batches)) == 3


def test_batch_spec_is_what_comes(shards):
  data = data_options(image_size=16, tokenizer=OPTIONS["tokenizer"])
  spec = batch_spec(data, batch_size=B)
  batch = take(open_source(shards), 1)[0]
  assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
    name: (shape, np.dtype(dtype)) for name, (shape, dtype) in spec.items()
  }


def evaluate(source, **options):
  options = (
    dict(batch_size=B, rows=np.arange(B), image_size=16, tokenizer=dict(name="byte", length=24))
    | options
  )
  with contextlib.closing(eval_batches(source, **options)) as batches:
    return list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_every_sample_once_in_order(shards, workers):
  batches = evaluate(open_source(shards), workers=workers)
  assert len(batches) == 4  # 28 samples by 8
  valid = np.concatenate([batch["valid"] for batch in batches])
  index = np.concatenate([batch["index"] for batch in batches])
  np.testing.assert_array_equal(index, np.arange(32))
  # A blank caption spoils no image.
  expected = [i < 28 and BAD.get(i, "no_caption") == "no_caption" for i in range(32)]
  np.testing.assert_array_equal(valid, expected)
  texts = np.concatenate([batch["texts_valid"] for batch in batches])[:, 0]
  np.testing.assert_array_equal(texts, [ok and i != 23 for i, ok in enumerate(expected)])
  rejects = sum(batch["rejects"].sum(0) for batch in batches)
  assert dict(zip(REASONS, rejects.tolist())) == {
    reason: int(reason in BAD.values() and reason != "no_caption") for reason in REASONS
  }
  last = batches[3]
  assert caption_of(last["texts"][2, 0], last["texts_mask"][2, 0]) == "picture number 26"


def test_evaluation_on_hosts_adds_up(shards):
  source = open_source(shards)
  parts = [(np.arange(h, B, 4), evaluate(source, rows=np.arange(h, B, 4))) for h in range(4)]
  assert [len(batches) for _, batches in parts] == [4] * 4
  assert_equal(merge(parts), evaluate(source))


def test_all_captions_of_an_image(shards):
  source = Numbers(20)
  batches = evaluate(source, captions=4, batch_size=20, rows=np.arange(20))
  np.testing.assert_array_equal(
    batches[0]["texts_valid"].sum(1), [max(i.bit_count(), 1) for i in range(20)]
  )
  assert not batches[0]["texts_mask"][~batches[0]["texts_valid"]].any()
  np.testing.assert_array_equal(batches[0]["image"][7], eval_image(source[7]["image"], size=16))
  with pytest.raises(ValueError, match="number 3 has 2 captions, but captions=1"):
    evaluate(source)
  assert evaluate(source, captions=0)[0]["texts"].shape == (8, 0, 24)


def test_wrong_options_are_named_before_the_first_batch():
  source = Numbers(8)
  with pytest.raises(TypeError, match="flop"):
    take(source, augment=dict(flop=1))
  with pytest.raises(ValueError, match="Unknown resize 'squish'"):
    evaluate(source, resize="squish")
  with pytest.raises(ValueError, match="batch_size=8"):
    take(source, rows=[8])


SCRIPT = """
import multiprocessing
import sys
import numpy as np
from bigalign.data.loader.options import resolve_data
from bigalign.data.loader.training import train_batches
from bigalign.data.sources.base import open_source

def main():
  data = resolve_data(dict(image_size=16, tokenizer=dict(name="byte", length=8), workers=1))
  batches = train_batches(
    open_source(sys.argv[1]), data, batch_size=8, rows=np.arange(8), seed=0)
  next(batches)
  print(*[process.pid for process in multiprocessing.active_children()], flush=True)
  if "wait" in sys.argv:
    sys.stdin.read()

"""
GUARD = 'if __name__ == "__main__":\n  main()\n'


def start(tmp_path, body: str, *args: str) -> subprocess.Popen:
  script = tmp_path / "program.py"
  script.write_text(SCRIPT + body)
  env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  return subprocess.Popen(
    [sys.executable, str(script), *args],
    env=env,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


SLOW = """
import time
from grain.multiprocessing import SharedMemoryArray
free = SharedMemoryArray.close_shm_async
SharedMemoryArray.close_shm_async = lambda *args: (time.sleep(0.1), free(*args))

"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_closed_batches_leave_nothing_to_a_garbage_collection(shards, workers, monkeypatch):
  """One that looks through all objects of JAX would be a large part of a short evaluation."""
  monkeypatch.setattr(gc, "collect", lambda: pytest.fail("collected"))
  gc.disable()
  try:
    batches = train_batches(open_source(shards), rows=np.arange(B), workers=workers, **OPTIONS)
    next(batches)
    iterator = weakref.ref(batches._iterators[0])
    batches.close()
    assert iterator() is None
  finally:
    gc.enable()


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_in_silence(shards, tmp_path):
  """Also on a busy machine, where batches that nobody took are still to be freed."""
  out, err = start(tmp_path, SLOW + GUARD, shards).communicate(timeout=120)
  lines = [line for line in err.splitlines() if "Rejected" not in line]
  assert len(out.split()) == 1 and lines == []


@pytest.mark.slow
def test_a_program_without_a_main_guard_is_told(shards, tmp_path):
  process = start(tmp_path, "main()\n", shards)
  _, err = process.communicate(timeout=120)
  assert process.returncode != 0
  assert 'Put the call under `if __name__ == "__main__":`' in err


@pytest.mark.slow
def test_workers_end_with_a_killed_program(shards, tmp_path):
  process = start(tmp_path, GUARD, shards, "wait")
  os.kill(int(process.stdout.readline()), 0)  # the worker lives
  process.kill()
  # The worker holds the other ends of the pipes: reading comes to an end when it does.
  process.communicate(timeout=20)


KILL = """
  import os, signal, time
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
  begin = time.monotonic()
  try:
    while True:
      next(batches)
  except RuntimeError as error:
    print(time.monotonic() - begin, error, flush=True)

"""


@pytest.mark.slow
def test_a_killed_worker_is_noticed_within_seconds(shards, tmp_path):
  out, _ = start(tmp_path, KILL + GUARD, shards).communicate(timeout=120)
  pid, line = out.splitlines()
  seconds, said = line.split(" ", 1)
  assert float(seconds) < 10
  assert said.startswith(f"The data's worker process {pid} was killed by SIGKILL, which is what")
  assert "use fewer workers (config.data.workers), and run the same command again" in said


@pytest.mark.parametrize(
  "source", ["cifar10/train/{0..4}.tar", "emoji/train/*.tar", "coco2k/train/*.tar"]
)
def test_real_shards_have_no_bad_samples(data_root, source):
  source = open_source(f"{data_root}/{source}")
  with contextlib.closing(
    train_batches(
      source,
      batch_size=256,
      rows=np.arange(256),
      seed=0,
      image_size=32,
      stop=768,
      tokenizer=dict(name="byte", length=64),
    )
  ) as batches:
    for batch in batches:
      assert not batch["rejects"].any() and (batch["text_mask"].sum(1) > 2).all()
