"""Batches are equal, to the byte, on every number of hosts and workers and after every restart."""

from __future__ import annotations

import contextlib
import fractions
import hashlib

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.small_shards import picture, samples, write_tar

from bigalign.data.order import blocks, permutation
from bigalign.data.order.order import Order
from bigalign.data.sources.mixture import Mixture
from bigalign.inputs import open_data

B, STEPS = 24, 9
HOSTS = (1, 2, 4, 8)
# Workers are processes that take seconds to start: each number of them with one number of hosts,
# and with every one before a release.
SOME_WORKERS = {1: (3,), 2: (1,), 4: (2,), 8: (3,)}
ALL_WORKERS = dict.fromkeys(HOSTS, (1, 2, 3))
READING = dict(
  image_size=8,
  tokenizer=dict(name="byte", length=24),
  augment=dict(
    crop="random_resized",
    scale=(0.5, 1.0),
    flip=0.5,
    rand_augment={},
    grayscale=0.2,
    color_jitter=dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
  ),
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  """{name: options of open_data}: epochs of 70 positions end inside batches; 3 samples are bad."""
  root = tmp_path_factory.mktemp("shards")
  bad = [
    ("000040.jpg", picture(40)[:200]),
    ("000040.txt", b"cut"),
    ("000041.txt", b"alone"),
    ("000042.jpg", b"<html>"),
    ("000042.txt", b"a page"),
  ]
  a = write_tar(root / "a.tar", samples(0, 40) + bad)
  b = write_tar(root / "b.tar", samples(50, 27))
  mixture = (dict(name="a", source=a, weight=1.0), dict(name="b", source=b, weight=0.7))
  return dict(
    exact=dict(source=f"{a}::{b}"),
    block=dict(source=f"{a}::{b}", order="block"),
    mixture=dict(mixture=mixture, schedule=(("100 samples", dict(a=1.0, b=2.0)),)),
    mixed_blocks=dict(mixture=mixture, order="block"),
  )


def host_batches(options, *, host, hosts, workers=0, start=0, steps=STEPS):
  """What one host makes: its rows of `steps` global batches."""
  inputs = open_data(data_options(**READING, **options, workers=workers))
  own = B // hosts
  with contextlib.closing(
    inputs.batches(
      rejected_log="",
      batch_size=B,
      rows=np.arange(host * own, (host + 1) * own),
      seed=5,
      start=start,
      stop=start + steps * B,
    )
  ) as batches:
    return list(batches)


def digest(batch):
  """sha256 of a batch: pixels with their augmentations, tokens, ids, labels and reject counts."""
  return hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest()


def digests(options, *, hosts=1, **where):
  """[steps], of the global batches."""
  parts = [host_batches(options, host=host, hosts=hosts, **where) for host in range(hosts)]
  return [
    digest({k: np.concatenate([part[k] for part in step]) for k in step[0]}) for step in zip(*parts)
  ]


@pytest.mark.parametrize(
  "workers_of",
  [
    pytest.param(SOME_WORKERS, id="some", marks=pytest.mark.slow),
    pytest.param(ALL_WORKERS, id="all", marks=pytest.mark.long),
  ],
)
def test_every_number_of_hosts_and_workers_and_every_restart(
  settings, workers_of, name="mixed_blocks"
):
  """Without workers on every host, and with each number of them on one of the hosts."""
  wanted = host_batches(settings[name], host=0, hosts=1)
  every = [digest(batch) for batch in wanted]
  assert len({*every}) == STEPS
  for hosts in HOSTS:
    assert digests(settings[name], hosts=hosts) == every, hosts
    for workers in workers_of[hosts]:
      host = (0, hosts // 2, hosts - 1)[workers - 1]
      rows = slice(host * B // hosts, (host + 1) * B // hosts)
      own = [digest({k: x[rows] for k, x in batch.items()}) for batch in wanted]
      found = host_batches(settings[name], host=host, hosts=hosts, workers=workers)
      assert [digest(batch) for batch in found] == own, (hosts, host, workers)
  for step in range(1, STEPS):
    hosts = HOSTS[step % 4]
    found = digests(settings[name], hosts=hosts, start=step * B, steps=1)
    assert found == every[step : step + 1], step
  assert digests(settings[name], workers=2, start=4 * B, steps=3) == every[4:7]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "block", "mixture"])
def test_some_of_them_and_some_restarts(settings, name):
  """Three epochs and a change of weights lie behind the 216 positions."""
  wanted = digests(settings[name])
  assert digests(settings[name], hosts=4, steps=2) == wanted[:2]
  assert digests(settings[name], workers=2, steps=2) == wanted[:2]
  for step in (1, 4, 8):
    found = digests(settings[name], hosts=2, start=step * B, steps=1)
    assert found == wanted[step : step + 1], step


@pytest.mark.parametrize("name", ["exact", "block", "mixture", "mixed_blocks"])
def test_another_batch_size_goes_on_by_position(settings, name):
  """Rows of 24 and of 8 are the same rows, if the lanes stay those the run began with."""
  inputs = open_data(data_options(**READING, **settings[name]))

  def rows(batch, start, **more):
    with contextlib.closing(
      inputs.batches(
        rejected_log="",
        batch_size=batch,
        rows=np.arange(batch),
        seed=5,
        start=start,
        stop=STEPS * B,
        **more,
      )
    ) as batches:
      found = list(batches)
    return {k: np.concatenate([batch[k] for batch in found]) for k in found[0]}

  wanted = rows(B, 0)
  found = rows(8, 4 * B, lane_rows=B)
  assert all(np.array_equal(found[k], wanted[k][4 * B :]) for k in wanted)


class Counted:
  """A source that counts how often it is read."""

  fingerprint, block = "0", 1

  def __init__(self):
    self.reads = 0

  def __len__(self):
    return 10**6

  def __getitem__(self, i):
    self.reads += 1
    return dict(image=np.zeros((4, 4, 3), np.uint8), captions=("word",), key=str(i), label=-1)


@pytest.mark.parametrize("kind", ["exact", "block", "mixture"])
def test_step_a_million_costs_what_step_zero_costs(kind, monkeypatch):
  """Counted in reads of the source and in numbers that are hashed, which no clock disturbs."""
  source = Counted()
  whole = source
  if kind == "mixture":
    other = dict(a=1.0, b=3.0)
    whole = Mixture(dict(a=source, b=source), ((0, other), ("1000 steps", dict(a=1.0))))
  hashed = [0]
  mix = permutation._mix

  def counting(x):
    hashed[0] += x.size
    return mix(x)

  monkeypatch.setattr(permutation, "_mix", counting)

  def cost(start):
    source.reads, hashed[0] = 0, 0
    places = Order(whole, seed=0, lane_rows=B, kind="auto" if kind == "mixture" else kind)
    indices = places(np.arange(start, start + B))
    for i in indices.tolist():
      whole[i]
    return source.reads, hashed[0]

  (reads, hashes), (late_reads, late_hashes) = cost(0), cost(10**6 * B)
  assert late_reads == reads == B
  assert 0 < late_hashes <= 1.2 * hashes


def test_the_order_of_lanes_is_not_that_of_the_exact_shuffle(settings):
  """Else what is above would compare an order with itself."""
  assert digests(settings["exact"])[0] != digests(settings["block"])[0]
  places = np.arange(70)
  lanes = blocks.make_lanes(fractions.Fraction(B), block=4)
  assert not np.array_equal(
    blocks.block_index(places, size=70, seed=5, lanes=lanes),
    permutation.sample_index(places, size=70, seed=5),
  )
