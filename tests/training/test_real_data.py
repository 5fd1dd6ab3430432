"""The shards people have: photos, emoji and CIFAR-10 as they came, through the shipped configs."""

from __future__ import annotations

import os
import pathlib
import resource
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from helpers.shipped import ROOT, load
from helpers.small_shards import write_tar

from bigalign.data.order.permutation import sample_index
from bigalign.data.samples.rejects import REASONS
from bigalign.data.sources.base import open_source
from bigalign.run.metrics import read_metrics
from bigalign.train import train

pytestmark = pytest.mark.slow


def small(name):
  """A shipped config with narrow, shallow towers and small batches; its data as shipped."""
  c = load(name)
  c.total_steps, c.batch_size, c.log_every, c.eval_every = 15, 32, 1, 0
  c.model.image.update(width=32, depth=1)
  c.model.text.update(width=32, depth=1)
  c.model.embed_dim = 32
  c.writer = dict(tensorboard=False)
  return c


def assert_learns(rows):
  losses = [row["train/loss"] for row in rows if "train/loss" in row]
  assert len(losses) == 15
  assert np.mean(losses[-3:]) < np.mean(losses[:3])


def only(rows, name):
  """The values of a metric in a run, each once."""
  return {row[name] for row in rows if name in row}


def bigalign_train(*words):
  """`bigalign train …` as installed; one device, and compiled as for a user, not as for tests."""
  ours = ("JAX_NUM_CPU_DEVICES", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
  env = {name: x for name, x in os.environ.items() if name not in ours}
  installed = pathlib.Path(sys.executable).parent / "bigalign"
  done = subprocess.run(
    [installed, "train", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-4000:]


def test_photos(data_root, tmp_path):
  """Three collections in one source, up to five captions an image, three evaluations."""
  train(small("photos"), tmp_path)
  rows = read_metrics(tmp_path)
  assert_learns(rows)
  assert rows[0]["step"] == 0 and rows[-1]["step"] == 15  # where the evaluations stand
  for name, images, captions in (("coco2k", 250, 250), ("flickr8k", 113, 565), ("emoji", 250, 250)):
    for row in (rows[0], rows[-1]):
      found = {k: row[f"val/{name}/{k}"] for k in ("num_samples", "num_captions")}
      assert found == {"num_samples": images, "num_captions": captions}
      assert f"val/{name}/rejected" not in row
  for reason in REASONS:
    assert only(rows, f"train/rejected_{reason}") == {0}


def test_cifar10(data_root, tmp_path):
  train(small("cifar10_captions"), tmp_path)
  rows = read_metrics(tmp_path)
  assert_learns(rows)
  assert only(rows, "val/cifar10-zeroshot-val-num_samples") == {1000}
  assert only(rows, "val/cifar10-zeroshot-val-num_classes") == {10}


def test_a_truncated_photo_is_counted_and_replaced(data_root, tmp_path):
  """One JPEG of a real shard ends too early: training and evaluation go on, and tell."""
  broken = 100
  with tarfile.open(data_root / "emoji/train/00000.tar") as tar:
    members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
  photos = [i for i, (name, _) in enumerate(members) if name.endswith(".jpg")]
  name, data = members[photos[broken]]
  members[photos[broken]] = name, data[: len(data) // 2]
  shard = write_tar(tmp_path / "shards/00000.tar", members)

  c = small("photos")
  c.data.source, c.log_every = shard, 5
  c.evals = dict(emoji=dict(type="retrieval", source=shard, captions=1))
  train(c, tmp_path / "run")
  rows = read_metrics(tmp_path / "run")
  seen = sample_index(np.arange(15 * 32), size=len(photos), seed=0)
  met = int((seen == broken).sum())
  assert len(photos) < 15 * 32 and met >= 1
  last = [row for row in rows if "train/loss" in row][-1]
  counted = {reason: last[f"train/rejected_{reason}"] for reason in REASONS}  # since the start
  assert counted == dict.fromkeys(REASONS, 0) | {"truncated": met}
  assert only(rows, "val/emoji/num_samples") == {len(photos) - 1}
  assert only(rows, "val/emoji/rejected") == {1}


def test_own_shards_from_the_command_line(data_root, tmp_path):
  """A shipped config on a user's shards, named by a brace pattern."""
  emoji = data_root / "emoji"
  bigalign_train(
    f"--config={ROOT}/configs/tiny.py",
    f"--workdir={tmp_path}",
    f"--config.data.source={emoji}/train/{{00000..00002}}.tar",
    f"--config.evals.val.source={emoji}/val/{{00000..00000}}.tar",
    "--config.total_steps=4",
    "--config.log_every=1",
  )
  rows = read_metrics(tmp_path)
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
  images = len(open_source(f"{emoji}/train/*.tar"))
  assert rows[-2]["train/epoch"] == pytest.approx(4 * 64 / images)
  assert only(rows, "val/num_samples") == {250}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_cifar10_reaches_its_bar(data_root, tmp_path):
  """45 % of the test photos named, from 5,000 captioned ones, in ten minutes of two cores."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  bigalign_train(f"--config={ROOT}/configs/cifar10_captions.py", f"--workdir={tmp_path}")
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  *_, last = read_metrics(tmp_path)
  assert last["step"] == load("cifar10_captions").total_steps
  assert last["val/cifar10-zeroshot-val-top1"] >= 0.45
  # Of the processor, not of the clock: whoever shares the machine does not count.
  assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 600
