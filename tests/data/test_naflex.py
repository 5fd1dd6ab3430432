"""Batches of images as patches that keep their aspect: config.data.naflex."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
from helpers import loss_oracles
from helpers.batches import data_options
from helpers.small_fields import every_field, write_dataset
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store

from bigalign.data.image import naflex, transforms
from bigalign.data.image.naflex import NaflexOptions
from bigalign.data.loader import evaluation
from bigalign.data.loader.training import Plan, batch_spec
from bigalign.data.order.lengths import LengthSchedule
from bigalign.data.order.permutation import philox
from bigalign.data.sources.base import open_source
from bigalign.inputs import open_data
from bigalign.options import plain

B, SEED, COUNT = 16, 3, 40
SIZES = ((20, 40), (40, 20), (24, 24), (12, 60))
NAFLEX = dict(lengths=(4, 9, 16), tokens_per_batch=240, multiple=4, patch=4)
LARGEST, STEPS = 16, 7


def data_of(folder, **changes):
  data = dict(
    source=str(folder / "*.tar"),
    image_size=16,
    tokenizer=dict(name="byte", length=8),
    naflex=NAFLEX,
    augment=dict(crop="squash"),
  )
  return data_options(**{**data, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A shard of pictures of four aspects."""
  folder = tmp_path_factory.mktemp("naflex")
  members = []
  for i in range(COUNT):
    members += [(f"{i:03}.jpg", picture(i, size=SIZES[i % 4])), (f"{i:03}.txt", f"{i}".encode())]
  write_tar(folder / "0.tar", members)
  return folder


def take(data, count, *, hosts=1, host=0, step=0, start=0):
  """The rows of a host in some batches of a run, from a step and a position on."""
  inputs = open_data(data)
  schedule = data.length_schedule(LARGEST, SEED)
  rows = {size: np.arange(host, size, hosts) for size in {*schedule.sizes}}
  where = dict(batch_size=LARGEST, rows=rows, seed=SEED, step=step, start=start)
  stop = start + schedule.samples(step, step + count)
  with contextlib.closing(inputs.batches(rejected_log="", stop=stop, **where)) as batches:
    return list(batches)


def merged(parts):
  """One batch of the rows of all hosts, which take turns."""
  order = np.argsort(np.concatenate([np.arange(h, 1 << 10, len(parts))[: len(p["label"])]
                                     for h, p in enumerate(parts)]))  # fmt: skip
  return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


class TestSchedule:
  def test_it_is_a_function_of_seed_and_step(self):
    schedule = LengthSchedule(SEED, (4, 9, 16), (1.0, 2.0, 1.0), (20, 12, 8))
    steps = np.arange(1000)
    drawn = schedule.draw(steps)
    np.testing.assert_array_equal(drawn[300:310], schedule.draw(np.arange(300, 310)))
    assert [schedule.at(int(k))[0] for k in steps[:9]] == [(4, 9, 16)[i] for i in drawn[:9]]
    shares = np.bincount(drawn) / len(steps)
    np.testing.assert_allclose(shares, (0.25, 0.5, 0.25), atol=0.05)
    other = dataclasses.replace(schedule, seed=SEED + 1)
    assert (other.draw(steps) != drawn).any()

  def test_samples_are_those_of_the_batches(self):
    schedule = LengthSchedule(SEED, (4, 9), (1.0, 1.0), (20, 12))
    sizes = [schedule.at(k)[1] for k in range(50)]
    assert schedule.samples(7, 50) == sum(sizes[7:]) and schedule.mean_size == 16
    plan = Plan(schedule, 20, 7, 100, 100 + sum(sizes[7:]))
    assert len(plan) == 43
    assert [plan.start(k) for k in (0, 5, 42)] == [100 + sum(sizes[7 : 7 + k]) for k in (0, 5, 42)]
    assert len(Plan(schedule, 20, 7, 100, 99 + sum(sizes[7:]))) == 42, "the last is incomplete"
    endless = Plan(schedule, 20, 0, 0, None)
    assert endless.start(5000) == schedule.samples(0, 5000) and len(endless) > 1 << 60

  @pytest.mark.parametrize("case", loss_oracles.cases2("naflex"))
  def test_grids_and_batch_sizes(self, case):
    inputs = loss_oracles.oracles2().inputs(case)
    expected = {k: x for k, (x, _) in loss_oracles.oracles2().expected(case).items()}
    options = case["params"]
    lengths = inputs["lengths"].tolist()
    grids = [
      [naflex.grid(h, w, patch=options["patch"], most=n) for n in lengths]
      for h, w in inputs["sizes"].tolist()
    ]
    np.testing.assert_array_equal(grids, expected["grids"])
    sizes = [
      naflex.batch_size(options["tokens_per_batch"], n, 0, multiple=options["divisor"])
      for n in lengths
    ]
    np.testing.assert_array_equal(sizes, expected["batch_sizes"])


class TestBatches:
  def test_they_are_as_the_spec_says(self, folder):
    data = data_of(folder)
    schedule = data.length_schedule(LARGEST, SEED)
    assert schedule.sizes == (16, 12, 8)  # 240 tokens, of which 8 per pair are text
    batches = take(data, STEPS)
    for k, batch in enumerate(batches):
      length, size = schedule.at(k)
      spec = batch_spec(data.of_length(length), batch_size=size)
      assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (shape, np.dtype(kind)) for name, (shape, kind) in spec.items()
      }
    assert len({batch["image"].shape for batch in batches}) == 3
    positions = np.concatenate([batch["image_id"][:, 1] for batch in batches])
    assert len({*positions[:COUNT].tolist()}) == COUNT, "an epoch reads each sample once"

  @pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
  @pytest.mark.parametrize("hosts", [1, 2, 4])
  def test_they_are_equal_on_any_hosts_and_workers_and_after_a_resume(self, folder, hosts, workers):
    random = dict(scale=(0.4, 1.0), flip=0.5)
    whole = take(data_of(folder, augment=random), STEPS)
    begin = 3
    start = sum(len(batch["label"]) for batch in whole[:begin])
    data = data_of(folder, augment=random, workers=workers)
    parts = [
      take(data, STEPS - begin, hosts=hosts, host=h, step=begin, start=start) for h in range(hosts)
    ]
    for expected, *found in zip(whole[begin:], *parts, strict=True):
      joined = merged(found)
      assert joined.keys() == expected.keys()
      for name, x in expected.items():
        np.testing.assert_array_equal(joined[name], x, err_msg=name)

  @pytest.mark.parametrize(
    "hosts,workers", [(1, 0), (4, 0), pytest.param(2, 2, marks=pytest.mark.slow)]
  )
  def test_all_other_fields_stand_beside_patches(self, tmp_path, hosts, workers):
    """On any hosts and workers and after a resume. Regions are for squares."""
    given = every_field(write_dataset(tmp_path)) | dict(naflex=NAFLEX, workers=workers)
    with pytest.raises(
      ValueError, match=r"data\.regions is for squares .* not config\.data\.naflex"
    ):
      open_data(data_options(**given))
    del given["regions"]
    (tmp_path / "qa.jsonl").write_text(
      "".join(json.dumps(dict(q=f"q{i}", d=f"d{i}")) + "\n" for i in range(9))
    )
    given |= dict(text_pairs=dict(source=f"{tmp_path}/qa.jsonl", query="q", document="d"))
    data, begin = data_options(**given), 2
    whole = take(data_options(**given | dict(workers=0)), 5)
    for k, batch in enumerate(whole):
      length, size = data.length_schedule(LARGEST, SEED).at(k)
      spec = batch_spec(data.of_length(length), batch_size=size)
      assert {name: x.shape for name, x in batch.items()} == {k: x for k, (x, _) in spec.items()}
    assert {"text_others", "teacher_txts", "boxes", "view/local", "query"} < {*batch}
    start = sum(len(batch["label"]) for batch in whole[:begin])
    parts = [take(data, 3, hosts=hosts, host=h, step=begin, start=start) for h in range(hosts)]
    for expected, *found in zip(whole[begin:], *parts, strict=True):
      joined = merged(found)
      for name, x in expected.items():
        np.testing.assert_array_equal(joined[name], x, err_msg=name)

  def test_without_images_batches_have_one_size(self, folder, tmp_path):
    """Of texts alone, and of vectors in the images' place; evaluators still read patches."""
    rows = {f"0.tar/{i:03}": np.full(3, float(i)) for i in range(COUNT)}
    stores = dict(image=write_store(tmp_path / "image", rows))
    for changes in (dict(images=False), dict(stores=stores)):
      data = data_of(folder, augment={}, **changes)
      assert data.length_schedule(LARGEST, SEED) is None
      inputs = open_data(data)
      with contextlib.closing(
        inputs.batches(rejected_log="", batch_size=B, rows=range(B), seed=SEED)
      ) as batches:
        batch = next(batches)
      assert "image_mask" not in batch and len(batch["text"]) == B
      if "stores" in changes:
        np.testing.assert_array_equal(batch["image"][:, 0], batch["image_id"][:, 1])

  def test_patches_are_the_pictures_in_their_aspect(self, folder):
    data = data_of(folder)
    source = open_source(str(folder / "*.tar"))
    for batch in take(data, 3):
      most = batch["image"].shape[1]
      for row in range(len(batch["label"])):
        index = int(batch["image_id"][row, 1])
        height, width = SIZES[index % 4]
        rows, cols = batch["image_shapes"][row].tolist()
        assert batch["image_mask"][row].sum() == rows * cols <= most
        assert (rows, cols) == naflex.grid(height, width, patch=4, most=most)
        whole = data.decode(source[index]["image"])
        expected = data.of_length(most).evaluation_view(whole)
        np.testing.assert_array_equal(batch["image"][row], expected.pixels)
    shape = data.of_length(8).evaluation_view(np.zeros((30, 60, 3), np.uint8)).shapes
    assert shape.tolist() == [2, 4], "twice as wide as high"

  def test_evaluation_has_one_length_and_marks_what_is_missing(self, folder):
    data = data_of(folder, naflex=dict(NAFLEX, eval_length=9))
    source = open_source(str(folder / "*.tar"))
    with contextlib.closing(
      evaluation.eval_batches(source, data, batch_size=32, rows=np.arange(32))
    ) as batches:
      first, last = batches
    assert first["image"].shape == (32, 9, 48) and first["valid"].all()
    assert not last["valid"][8:].any()
    assert last["image_mask"][8:].sum(1).tolist() == [1] * 24, "a row without a patch has no mean"
    one = naflex.Patches(*(first[name][0] for name in naflex.FIELDS))
    height, width = SIZES[0]
    shown = data.shown(first, 0)
    assert shown.shape == (*data.naflex.fit(height, width), 3)
    assert (naflex.cut(shown, patch=4, most=9).pixels == one.pixels).all()


class TestViews:
  def test_a_crop_keeps_the_aspect_of_its_box(self):
    """The aspect of a crop is drawn relative to that of the picture, and it is never bent."""
    options = NaflexOptions(lengths=(36,), patch=2)
    boxes = []

    def fit(height, width):
      boxes.append((height, width))
      return options.fit(height, width)

    image = np.zeros((60, 180, 3), np.uint8)
    for position in range(40):
      view = transforms.train_image(
        image, philox(0, position), size=fit, scale=(0.5, 1), ratio=(0.8, 1.25), shift=0.1
      )
      height, width = boxes[-1]
      assert view.shape == (*options.fit(height, width), 3)
      assert 3 * 0.75 < width / height < 3 * 1.3

  @pytest.mark.parametrize("crop", ["random_resized", "squash", "center"])
  def test_a_reduced_jpeg_has_twice_the_pixels_of_the_view(self, folder, crop):
    data = data_of(folder, augment=dict(crop=crop, scale=(0.5, 1.0)))
    for height, width in ((480, 640), (100, 1000), (2000, 1500)):
      factor = data.shrink(height, width)
      assert factor in (1, 2, 4, 8)
      side = min(height, width) if crop == "center" else (height * width) ** 0.5
      side *= 0.5**0.5 if crop == "random_resized" else 1
      assert factor == 1 or side / factor >= 2 * (data.naflex.length**0.5) * data.naflex.patch
    assert data.shrink(2000, 1500) == 8


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(naflex=dict(lengths=())), "lengths=\\(\\): one or more"),
    (dict(naflex=dict(lengths=(4, 4))), "lengths=\\(4, 4\\): one or more different"),
    (dict(naflex=dict(lengths=(4, 9), weights=(1.0,))), "one number above 0 for each of the 2"),
    (dict(naflex=dict(patch=0)), "naflex.patch=0: at least 1"),
    (dict(resize="shortest"), "resize='shortest' has no effect with config.data.naflex"),
    (dict(interpolation="bilinear"), "interpolation='bilinear' has no effect"),
  ],
)
def test_wrong_options_are_named(folder, changes, message):
  with pytest.raises(ValueError, match=message):
    data_of(folder, **changes)


def test_a_largest_batch_that_is_no_multiple_is_named(folder):
  with pytest.raises(ValueError, match=re.escape("config.batch_size=18, the most pairs")):
    data_of(folder).length_schedule(18, 0)


def test_stores_know_length_and_patch(folder):
  """Vectors depend on how many patches an image has, and not on the lengths of training."""
  data = data_of(folder)
  assert data.preprocessing() == dict(apply_exif=False, patches=16, patch_size=4)
  assert "naflex" not in data_of(folder, naflex=None).preprocessing()
  assert data_options(**plain(data)) == data
