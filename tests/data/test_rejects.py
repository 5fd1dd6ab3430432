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
    assert line["reason"] == "undecodable" and "<html>" in line["detail"]
    assert line["key"] == f"bad/bad.tar/{100 + line['ordinal']:06d}"


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
      ValueError, match=rf"{shard}: sample \d+ and 8 others.*'undecodable': 8.*stop_at_bad_shard"
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
