"""Mixtures: shares in closed form, each source without replacement, ids that stay."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest
from helpers.batches import data_options, train_batches
from helpers.shipped import load
from helpers.small_shards import samples, write_tar

from bigalign import inputs
from bigalign.data.order.order import Order
from bigalign.data.order.schedule import MixtureSchedule, check_sizes, epochs
from bigalign.data.sources.base import open_source
from bigalign.data.sources.mixture import Mixture
from bigalign.options import plain
from bigalign.run.metrics import read_metrics
from bigalign.train import train

TOKENIZER = dict(name="byte", length=40)
SHARES = dict(coco2k=2.0, flickr8k=1.0, emoji=1.0)


class Numbers:
  """Sample i of a source is named after both."""

  def __init__(self, name: str, size: int, *, bad: int = 0, block: int = 1):
    self.fingerprint, self.size, self.bad, self.block = name, size, bad, block

  def __len__(self):
    return self.size

  def __getitem__(self, i):
    image = b"<html>" if i < self.bad else np.full((4, 4, 3), i % 256, np.uint8)
    return dict(image=image, captions=(f"{self.fingerprint} {i}",), key=f"{i}", label=-1)


def mixture(weights, *, sizes=None, phases=None, **options):
  sizes = sizes or dict.fromkeys(weights, 1000)
  return Mixture(
    {name: Numbers(name, sizes[name], **options) for name in weights}, phases or ((0, weights),)
  )


THREE = dict(a=5.0, b=0.3, c=1.7)


def test_shares_hold_at_every_position():
  split = MixtureSchedule(mixture(THREE), batch_size=8)
  source, _ = split(np.arange(70_000))
  for s, weight in enumerate(THREE.values()):
    so_far = np.cumsum(source == s)
    assert np.abs(so_far - np.arange(1, 70_001) * weight / 7).max() < 3


def test_the_positions_of_a_source_are_consecutive():
  """Also at changes of the weights, and at large positions."""
  phases = (
    (0, THREE),
    ("1000 samples", dict(a=1, c=1)),
    ("200 steps", dict(b=1)),
    ("1 epochs", THREE),
  )
  mixed = mixture(THREE, sizes=dict(a=1000, b=2000, c=500), phases=phases)
  split = MixtureSchedule(mixed, batch_size=8)
  assert split.starts.tolist() == [0, 1000, 1600, 3500]
  source, own = split(np.arange(6000))
  for s in range(3):
    np.testing.assert_array_equal(own[source == s], np.arange((source == s).sum()))
  assert {*source[1000:1600]} == {0, 2} and {*source[1600:3500]} == {1}
  for position in (0, 7, 1000, 1001, 1599, 1600, 3499, 3500, 6000):
    assert split.before(position).tolist() == np.bincount(source[:position], minlength=3).tolist()
  far = 10**15
  source, own = split(far + np.arange(100))
  assert (own[source == 0] == split.before(far)[0] + np.arange((source == 0).sum())).all()
  assert abs(split.before(far)[0] / far - 5 / 7) < 1e-8


def test_pure_batches_have_one_source_each():
  """Shares count batches; each source is read without replacement, whatever the size of batches."""
  sources = {name: Numbers(name, 1000) for name in THREE}
  pure = Mixture(sources, ((0, THREE),), pure=True)
  split = MixtureSchedule(pure, batch_size=16)
  source, own = split(np.arange(16 * 700))
  of_batch = source.reshape(700, 16)
  assert (of_batch == of_batch[:, :1]).all()
  for s, weight in enumerate(THREE.values()):
    so_far = np.cumsum(of_batch[:, 0] == s)
    assert np.abs(so_far - np.arange(1, 701) * weight / 7).max() < 3
    np.testing.assert_array_equal(own[source == s], np.arange((source == s).sum()))
  for position in (0, 15, 16, 1000, 16 * 300 + 5):
    expected = np.bincount(source[:position], minlength=3)
    np.testing.assert_array_equal(split.before(position), expected)
  check_sizes(pure, batch_size=8, lane_rows=16)
  with pytest.raises(ValueError, match="must divide 16"):
    check_sizes(pure, batch_size=32, lane_rows=16)
  with pytest.raises(ValueError, match="'a' has 1000 samples, fewer than the 1024"):
    check_sizes(pure, batch_size=1024)
  later = Mixture(sources, ((0, THREE), ("40 samples", dict(a=1.0))), pure=True)
  with pytest.raises(ValueError, match="multiples of 16"):
    MixtureSchedule(later, batch_size=16)


@pytest.mark.parametrize("block", [1, 4])
def test_each_source_is_read_without_replacement(block):
  sizes = dict(a=50, b=7, c=333)
  mixed = mixture(THREE, sizes=sizes, block=block)
  index = Order(mixed, seed=1, lane_rows=16)(np.arange(7000))
  first = 0
  for size in sizes.values():
    own = index[(index >= first) & (index < first + size)] - first
    own = own[: len(own) // size * size].reshape(-1, size)
    assert len(own) > 0 or size == 333
    np.testing.assert_array_equal(np.sort(own, 1), np.tile(np.arange(size), (len(own), 1)))
    first += size


def test_a_source_added_at_the_end_changes_no_id_and_no_order():
  two, three = mixture(dict(a=1, b=1)), mixture(dict(a=1, b=1, c=1))
  short, long = (Order(m, seed=0, lane_rows=8)(np.arange(3000)) for m in (two, three))
  for first in (0, 1000):
    before, after = (x[(x >= first) & (x < first + 1000)] for x in (short, long))
    assert len(after) >= 999
    np.testing.assert_array_equal(before[: len(after)], after)


def test_epochs_of_each_source():
  mixed = mixture(dict(a=3, b=1), sizes=dict(a=100, b=50))
  assert epochs(mixed, 400, batch_size=8) == dict(a=3.0, b=2.0)
  assert epochs(Numbers("a", 5), 400, batch_size=8) == {}


def test_a_substitute_is_of_the_same_source(tmp_path):
  mixed = Mixture(dict(a=Numbers("a", 30, bad=10), b=Numbers("b", 40)), ((0, dict(a=1, b=1)),))
  reading = dict(image_size=4, tokenizer=TOKENIZER, augment=dict(crop="squash"))
  with contextlib.closing(
    train_batches(mixed, batch_size=20, rows=np.arange(20), seed=0, stop=600, **reading)
  ) as batches:
    found = list(batches)
  ids = np.concatenate([batch["image_id"][:, 1] for batch in found])
  assert (ids < 30).sum() == (ids >= 30).sum() == 300
  assert ids[ids < 30].min() == 10
  assert sum(batch["rejects"].sum() for batch in found) > 100 * 2 / 3


def write(tmp_path):
  a = write_tar(tmp_path / "a" / "0.tar", samples(0, 30))
  b = write_tar(tmp_path / "b" / "0.tar", samples(100, 60))
  return a, b


def open_data(**options):
  return inputs.open_data(data_options(image_size=4, tokenizer=TOKENIZER, **options))


def texts(opened, count):
  with contextlib.closing(
    opened.batches(rejected_log="", batch_size=10, rows=np.arange(10), seed=0, stop=count)
  ) as batches:
    rows = np.concatenate([batch["text"] for batch in batches])
  return [bytes((row[row > 2] - 3).tolist()).decode() for row in rows]


def test_a_config_mixes_shards(tmp_path):
  a, b = write(tmp_path)
  found = texts(
    open_data(
      mixture=(
        dict(name="de", source=a, weight=1.0, prefix="de: "),
        dict(name="en", source=b, weight=3.0),
      )
    ),
    240,
  )
  german = [text for text in found if text.startswith("de: picture number ")]
  assert len(german) == 60 and len({*german}) == 30
  assert len({*found} - {*german}) == 60


def test_upsampling_factors(tmp_path):
  a, b = write(tmp_path)
  mixed = (dict(name="a", source=a, upsampling=2), dict(name="b", source=b))
  source = open_data(mixture=mixed).source
  # As open_clip's 2::1: twice over the first while the second is passed once.
  assert epochs(source, 120, batch_size=10) == dict(a=2.0, b=1.0)


def test_weights_of_some_sources_only_are_refused(tmp_path):
  """A weight of 0.5 next to a source of a hundred thousand samples would be 5e-6 of the stream."""
  a, b = write(tmp_path)
  for other in ({}, dict(upsampling=2)):
    mixed = (dict(name="a", source=a, weight=0.5), dict(name="b", source=b, **other))
    with pytest.raises(ValueError, match=r"1 of 2 sources have no weight \('b'\)"):
      open_data(mixture=mixed)
    # The schedule's weights are used instead.
    open_data(mixture=mixed, schedule=((0, dict(a=1, b=2)),))


def test_a_schedule_begins_as_it_says(tmp_path):
  a, b = write(tmp_path)
  mixed = (dict(name="a", source=a), dict(name="b", source=b))
  found = texts(open_data(mixture=mixed, schedule=((0, dict(a=1)), ("3 steps", dict(b=1)))), 60)
  assert {int(text.split()[-1]) < 100 for text in found[:30]} == {True}
  assert {int(text.split()[-1]) < 100 for text in found[30:]} == {False}


@pytest.mark.parametrize(
  "message, options",
  [
    (r"'b' has weight -1", dict(b=dict(weight=-1))),
    (r"'b' has weight 0\b", dict(b=dict(weight=0))),
    (r"'b' has both a weight and an upsampling", dict(b=dict(weight=1, upsampling=1))),
    (r"config.data.mixture\[1\]: unknown option 'wieght'", dict(b=dict(wieght=1))),
    (r"config.data.mixture\[1\].name='a' is the name of another", dict(b=dict(name="a"))),
    (r"no source 'z'; known: \('a', 'b'\)", dict(schedule=((0, dict(z=1)),))),
    (r"either source or mixture", dict(source="glyphs")),
    (
      r"'b' names captions, and config.data.captions",
      dict(b=dict(captions=("x",)), captions=("txt",)),
    ),
  ],
)
def test_wrong_options_are_errors(tmp_path, message, options):
  a, b = write(tmp_path)
  mixed = (dict(name="a", source=a), dict(name="b", source=b) | options.pop("b", {}))
  with pytest.raises((ValueError, TypeError), match=message):
    open_data(mixture=mixed, **options)


def test_wrong_starts_of_phases_are_errors():
  for start in ("soon", "5 miles", "5"):
    with pytest.raises(ValueError, match=rf"'{start}' is not a start"):
      MixtureSchedule(mixture(THREE, phases=((0, THREE), (start, THREE))), batch_size=8)
  with pytest.raises(ValueError, match=r"start at samples \[0, 80, 80\]"):
    MixtureSchedule(
      mixture(THREE, phases=((0, THREE), ("10 steps", THREE), ("80 samples", THREE))), batch_size=8
    )


def test_a_source_smaller_than_its_part_of_a_batch_is_named():
  sizes = dict(a=1000, b=1000, c=20)
  check_sizes(mixture(THREE, sizes=sizes), batch_size=80)
  with pytest.raises(ValueError, match="'c' has 20 samples, fewer than the 24 that a batch of 100"):
    check_sizes(mixture(THREE, sizes=sizes), batch_size=100)
  with pytest.raises(ValueError, match="7 samples, fewer than a batch of 8"):
    check_sizes(Numbers("a", 7), batch_size=8)


def test_a_batch_is_compared_with_the_phases_that_it_is_read_in():
  """Of two stages with batches of 64 and 16, the first reads 8 samples of `c`, not 64."""
  sizes = dict(a=1000, b=1000, c=20)
  phases = ((0, dict(a=7, c=1)), ("10 steps", dict(c=1)))
  mixed = mixture(THREE, sizes=sizes, phases=phases)
  check_sizes(mixed, batch_size=64, span=(0, 640))
  check_sizes(mixed, batch_size=16, lane_rows=64, span=(640, 800))
  for span in ((0, 641), (639, 700), (640, 700), None):
    with pytest.raises(ValueError, match="'c' has 20 samples, fewer than the 64 that a batch"):
      check_sizes(mixed, batch_size=64, span=span)


def test_phases_start_at_steps_of_the_first_stage():
  """With the second stage's batches, the phases would start at 0, 100 and 80."""
  phases = ((0, THREE), ("100 samples", THREE), ("10 steps", THREE))
  mixed = mixture(THREE, phases=phases)
  check_sizes(mixed, batch_size=8, lane_rows=32, span=(320, 400))
  with pytest.raises(ValueError, match=r"start at samples \[0, 100, 80\]"):
    check_sizes(mixed, batch_size=8)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_mixture_of_photos_resumes(data_root, tmp_path):
  """With a loss that has per-sample state, and weights that change."""
  c = load("photos")
  c.update(total_steps=40, batch_size=64, log_every=1, checkpoint_every=20, eval_every=0, evals={})
  for tower in (c.model.image, c.model.text):
    tower.update(width=32, depth=1)
  c.writer = dict(tensorboard=False)
  c.loss = dict(sogclr=dict(weight=1.0))
  del c.data.source
  c.data.update(
    order="block",
    mixture=tuple(
      dict(name=name, source=f"{data_root}/{name}/train/*.tar", weight=share)
      for name, share in SHARES.items()
    ),
    schedule=(("30 steps", dict(emoji=1.0)),),
  )
  train(plain(c), tmp_path / "whole")
  rows = [row for row in read_metrics(tmp_path / "whole") if "train/loss" in row]
  read = [[row[f"train/epoch_{name}"] for name in SHARES] for row in (rows[29], rows[39])]
  sizes = [len(open_source(f"{data_root}/{name}/train/*.tar")) for name in SHARES]
  np.testing.assert_allclose(np.multiply(read, sizes), [[960, 480, 480], [960, 480, 1120]], atol=2)
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "40")
  train(plain(c), tmp_path / "cut")
  again = [row for row in read_metrics(tmp_path / "cut") if "train/loss" in row]
  assert [row["train/loss"] for row in again] == [row["train/loss"] for row in rows]
