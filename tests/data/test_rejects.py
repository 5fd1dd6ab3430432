"""Bad samples: written down, counted by source, and too many of them end a run."""

from __future__ import annotations

import contextlib
import json
import logging

import numpy as np
import pytest
from helpers.batches import train_batches
from helpers.shipped import load
from helpers.small_shards import samples, write_tar

from bigalign.data.samples.rejects import Watch
from bigalign.data.sources.base import open_source
from bigalign.options import plain
from bigalign.run.metrics import read_metrics
from bigalign.train import train


def broken(first, count, *, every):
  """Samples of which each `every`-th is a page of HTML."""
  return [
    (name, b"<html>") if name.endswith(".jpg") and i // 3 % every == 0 else (name, data)
    for i, (name, data) in enumerate(samples(first, count))
  ]


def test_the_share_of_the_last_samples_counts(caplog):
  watch = Watch(["a", "b"], warn=0.01, stop=0.02, last=1000, after=500)

  def add(times, bad):
    for _ in range(times):
      assert watch.add(np.array([(50, 0), (50, bad)])) == dict(a=0, b=bad)

  add(9, 5)
  watch.check()  # 450 samples of each are too few to tell
  add(30, 0)
  watch.check()  # the bad samples are more than a thousand samples ago
  assert not caplog.records
  add(20, 0)
  add(15, 1)
  with caplog.at_level(logging.WARNING):
    watch.check()
    watch.check()
  (said,) = caplog.messages
  assert said.startswith("b: 1.5% of the last 1015 samples tried cannot be used")
  add(20, 2)
  with pytest.raises(ValueError, match=r"^b: 3\.8% of the last 1040 .*rejects = dict\(stop=…\)"):
    watch.check()


def run(c, workdir):
  train(plain(c), workdir)
  return [row for row in read_metrics(workdir) if "train/loss" in row]


def lines(workdir):
  (path,) = workdir.glob("rejected-*.jsonl")
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_counts_writes_down_and_stops(tmp_path):
  latin = [(name, b"caf\xe9" if name.endswith(".txt") else data) for name, data in samples(0, 30)]
  good = write_tar(
    tmp_path / "good.tar", latin
  )  # half of its captions are invalid UTF-8, which is not a reject
  bad = write_tar(tmp_path / "bad.tar", broken(100, 40, every=5))
  c = load("tiny")
  c.update(total_steps=6, batch_size=16, log_every=3, checkpoint_every=0, ema=0.0, evals={})
  c.writer = dict(tensorboard=False)
  for tower in (c.model.image, c.model.text):
    tower.update(width=32, depth=1)
  del c.data.source
  c.data.mixture = (
    dict(name="good", source=good, weight=1),
    dict(name="bad", source=bad, weight=1),
  )
  c.data.rejects = dict(after=40)
  with pytest.raises(ValueError, match=r"^bad: \d+\.\d% of the last \d+ samples tried"):
    run(c, tmp_path / "stopped")
  c.data.rejects = dict(after=40, stop=1.0)
  rows = run(c, tmp_path / "run")
  assert rows[-1]["train/rejects_of_good"] == 0
  assert [row["train/repaired_captions"] for row in rows] == [24, 48]  # since the start
  assert rows[-1]["train/rejects_of_bad"] == rows[-1]["train/rejected_undecodable"] >= 8
  found = lines(tmp_path / "run")
  assert len(found) == 8 == len({line["ordinal"] for line in found})
  for line in found:
    assert line["shard"] == bad and line["index"] == 30 + line["ordinal"]
    assert line["ordinal"] % 5 == 0
    assert line["reason"] == "undecodable" and "an HTML page" in line["detail"]
    assert line["key"] == f"bad/bad.tar/{100 + line['ordinal']:06d}"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_bad_throughout_ends_the_run(tmp_path, workers):
  write_tar(tmp_path / "0.tar", samples(0, 60))
  shard = write_tar(tmp_path / "1.tar", broken(60, 20, every=1))
  source = open_source(f"{tmp_path}/*.tar")
  options = dict(
    batch_size=16,
    rows=np.arange(16),
    seed=0,
    image_size=8,
    workers=workers,
    stop=160,
    tokenizer=dict(name="byte", length=24),
  )
  with (
    contextlib.closing(train_batches(source, **options)) as batches,
    pytest.raises(
      ValueError, match=rf"{shard}: sample \d+ and 19 others.*'undecodable': 19.*stop_at_bad_shard"
    ),
  ):
    list(batches)
  with contextlib.closing(train_batches(source, stop_at_bad_shard=False, **options)) as batches:
    assert sum(batch["rejects"].sum() for batch in batches) >= 40


def test_probes_are_not_counted(tmp_path):
  """A shard with some bad samples is probed, and the batches equal those without probes."""
  write_tar(tmp_path / "0.tar", broken(0, 60, every=3))
  source = open_source(f"{tmp_path}/0.tar")
  options = dict(
    batch_size=16,
    rows=np.arange(16),
    seed=0,
    image_size=8,
    stop=160,
    tokenizer=dict(name="byte", length=24),
  )
  both = []
  for probe in (True, False):
    with contextlib.closing(train_batches(source, stop_at_bad_shard=probe, **options)) as batches:
      both.append(list(batches))
  for a, b in zip(*both):
    assert all(np.array_equal(a[name], b[name]) for name in a)


class Listed:
  """Samples in shards of 1,000 in memory; those of some indices have no caption."""

  fingerprint = "00"

  def __init__(self, size, bad):
    self.size, self.bad = size, bad
    self.read: list[int] = []

  def __len__(self):
    return self.size

  def where(self, i):
    return f"shard {i // 10_000}", i % 10_000, min(10_000, self.size - i // 10_000 * 10_000)

  def __getitem__(self, i):
    self.read.append(i)
    image = np.zeros((2, 2, 3), np.uint8)
    return dict(image=image, key=str(i), label=-1, captions=() if self.bad(i) else ("a",))


def rejected(source, stop, **options):
  given = dict(
    batch_size=16, rows=np.arange(16), image_size=2, tokenizer=dict(name="byte", length=8)
  )
  with contextlib.closing(train_batches(source, seed=0, stop=stop, **given, **options)) as batches:
    return sum(int(batch["rejects"].sum()) for batch in batches)


def test_samples_that_are_bad_at_regular_places_do_not_condemn_a_shard():
  """16 of 10,000: probes at even strides would meet nothing else."""
  assert 8 <= rejected(Listed(10_000, lambda i: i % 625 == 312), 10_000) <= 32


def test_the_rejected_sample_is_not_its_own_evidence():
  source = Listed(1_000, lambda i: True)
  with pytest.raises(ValueError, match=r"sample \d+ and \d+ others") as error:
    rejected(source, 16)
  assert "the whole shard seems to be bad" in str(error.value)
  assert len(source.read) == len(set(source.read)) == 133


def test_a_shard_with_a_few_usable_samples_is_not_bad_throughout():
  assert rejected(Listed(10_000, lambda i: i % 20 != 3), 320, rejects=dict(stop=0.97)) > 3_000


def test_many_rejects_in_a_row_are_no_reason_to_stop_if_the_share_is_allowed():
  """With 80 % the ninth in a row is bad at every eighth position."""
  assert rejected(Listed(5_000, lambda i: i % 5 != 0), 800, rejects=dict(stop=0.85)) > 2_500


def test_a_bad_shard_within_the_tolerated_share_is_named_and_does_not_stop(caplog):
  source = Listed(600_000, lambda i: i // 10_000 == 7)
  with caplog.at_level(logging.WARNING):
    assert rejected(source, 320) > 1
  (line,) = [m for m in caplog.messages if "the whole shard seems" in m]
  assert line.startswith("shard 7: ") and "1.67% of the source" in line
  with pytest.raises(ValueError, match=r"^shard \d+: .*rejects=dict\(stop=…\)"):
    rejected(source, 320, rejects=dict(stop=0.01))


def test_probes_are_drawn_from_what_a_view_keeps_of_a_shard():
  class Kept(Listed):
    def where(self, i):  # every tenth sample of each shard
      return super().where(10 * i)

  source = Kept(3_000, lambda i: 1_000 <= i < 2_000)
  source.size = 30_000
  shards = [source.where(i)[0] for i in (0, 999, 1_000, 1_999, 2_000)]
  assert shards == [f"shard {n}" for n in (0, 0, 1, 1, 2)]
  Kept.__len__ = lambda self: 3_000
  with pytest.raises(ValueError, match=r"^shard 1: .*drawn at random from its 1000,"):
    rejected(source, 64)
  start = next(n for n, i in enumerate(source.read) if 1_000 <= i < 2_000)
  probed = source.read[start + 1 : start + 133]
  assert len(probed) == len({*probed, source.read[start]}) - 1 == 132
  assert all(1_000 <= i < 2_000 for i in probed)
