"""Boxes that follow the views of images, and their phrases: config.data.regions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.hosts import take
from helpers.small_shards import picture, write_tar

from bigalign.data.fields.regions import of_view
from bigalign.data.image.transforms import Part, part_of_view, train_image
from bigalign.data.samples.rejects import REASONS

OPTIONS = dict(image_size=16, tokenizer=dict(name="byte", length=12))
BOX = [0.25, 0.5, 0.75, 1.0]


def write(folder, regions) -> dict:
  """config.data of a shard whose samples have these regions, one entry each; None for no field."""
  members = []
  for i, own in enumerate(regions):
    stored = {} if own is None else dict(regions=own)
    members += [
      (f"{i}.jpg", picture(i)),
      (f"{i}.txt", b"a"),
      (f"{i}.json", json.dumps(stored).encode()),
    ]
  source = write_tar(folder / "0.tar", members)
  return OPTIONS | dict(source=source, regions=dict(field="json.regions", count=2))


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", ["random_resized", "center", "squash"])
def test_a_box_shows_in_the_view_what_it_shows_in_the_image(crop, flip):
  """In an image whose colours are its coordinates."""
  height, width = 96, 160
  y, x = np.mgrid[:height, :width]
  image = np.stack([x, y, 0 * x], -1).astype(np.uint8)
  for seed in range(6):
    options = dict(crop=crop, scale=(0.2, 0.6), flip=flip)
    view = train_image(image, np.random.default_rng(seed), size=64, **options)
    part = part_of_view(height, width, np.random.default_rng(seed), **options)
    box = np.array([0.3, 0.35, 0.6, 0.8])
    (left, top, right, bottom), _ = of_view(box, part)
    if right - left < 0.2 or bottom - top < 0.2:
      continue
    middle = view[round(64 * (top + bottom) / 2), round(64 * (left + right) / 2)]
    inside = np.clip(box * [width, height, width, height], 0, 255)
    seen = max(inside[0], part.left), min(inside[2], part.left + part.box_width)
    rows = max(inside[1], part.top), min(inside[3], part.top + part.box_height)
    np.testing.assert_allclose(middle[:2], [sum(seen) / 2, sum(rows) / 2], atol=4)


def test_a_box_by_hand():
  part = Part(top=10, left=20, box_height=40, box_width=40, height=50, width=100, mirrored=False)
  box, share = of_view(np.array([0.1, 0.2, 0.4, 0.6]), part)  # 10, 10 to 40, 30
  np.testing.assert_allclose(box, [0, 0, 0.5, 0.5])
  assert share == pytest.approx(2 / 3)
  box, share = of_view(np.array([0.1, 0.2, 0.4, 0.6]), part._replace(mirrored=True))
  np.testing.assert_allclose(box, [0.5, 0, 1, 0.5])
  assert of_view(np.array([0.7, 0.0, 0.9, 0.1]), part)[1] == 0


def test_regions_of_a_batch(tmp_path):
  """Drawn without replacement; none is an empty list; the mask of a row says which there are."""
  regions = [[dict(box=BOX, phrase=f"{i} {k}") for k in range(i % 4)] for i in range(8)]
  data = write(tmp_path, regions) | dict(augment=dict(crop="squash"), shuffle=False)
  (batch,) = take(data, 1)
  found = batch["region_mask"].sum(1)
  assert sorted(found.tolist()) == [0, 0, 1, 1, 2, 2, 2, 2]
  np.testing.assert_array_equal(batch["region_boxes"][batch["region_mask"]], [BOX] * 10)
  assert not batch["region_boxes"][~batch["region_mask"]].any()
  for ids, mask, there in zip(
    *(batch[x] for x in ("region_phrases", "region_phrases_mask", "region_mask"))
  ):
    texts = [bytes((row[m][:-1] - 3).tolist()).decode() for row, m in zip(ids, mask)]
    assert [bool(text) for text in texts] == there.tolist()
    assert len({text for text in texts if text}) == there.sum()


def test_negatives_of_regions(tmp_path):
  """Without replacement, at most K, as many as there are; the rest of the batch is as without."""
  regions = [
    [
      dict(box=BOX, phrase=f"{i} {k}", negatives=[f"{i} {k} {n}" for n in range(k * 3)])
      for k in range(i % 4)
    ]
    for i in range(8)
  ]
  data = write(tmp_path, regions) | dict(augment=dict(crop="squash"), shuffle=False)
  (plain,) = take(data, 1)
  (batch,) = take(data | dict(regions=dict(field="json.regions", count=2, negatives=4)), 1)
  new = ("region_negatives", "region_negatives_mask", "region_negatives_count")
  assert batch.keys() - plain.keys() == {*new}
  for name, x in plain.items():
    np.testing.assert_array_equal(batch[name], x, err_msg=name)
  assert batch["region_negatives"].shape == (8, 2, 4, 12)

  def text(ids, mask):
    return bytes((ids[mask][:-1] - 3).tolist()).decode()

  seen = set()
  for row, m in np.ndindex(8, 2):
    phrase = text(*(batch[x][row, m] for x in ("region_phrases", "region_phrases_mask")))
    found = [text(*(batch[x][row, m, k] for x in new[:2])) for k in range(4)]
    count = batch[new[2]][row, m]
    assert count == (min(4, 3 * int(phrase[-1])) if phrase else 0)
    assert len({*found[:count]}) == count and not any(found[count:])
    assert all(one.rpartition(" ")[0] == phrase for one in found[:count])
    seen |= {one[-1] for one in found[:count]}
  assert not seen <= {*"0123"}  # a draw, not the first four of six


def test_a_region_that_the_view_hardly_shows_is_left_out(tmp_path):
  corner = dict(box=[0.0, 0.0, 0.05, 0.05], phrase="corner")
  data = write(tmp_path, [[corner, dict(box=BOX, phrase="middle")]] * 8)
  (batch,) = take(data | dict(augment=dict(crop="center")), 1)
  assert (batch["region_mask"].sum(1) == 1).all()  # pictures are wider than high


@pytest.mark.parametrize(
  "regions,reason",
  [
    (None, "no_column"),
    ("no list", "bad_metadata"),
    ([dict(box=BOX)], "bad_metadata"),
    ([dict(box=[0, 0, 1], phrase="a")], "bad_metadata"),
    ([dict(box=[0, 0, 200, 100], phrase="pixels")], "bad_metadata"),
    ([dict(box=[0.5, 0, 0.2, 1], phrase="turned")], "bad_metadata"),
    ([dict(box=BOX, phrase="")], "bad_metadata"),
  ],
)
def test_a_sample_without_sound_regions_is_rejected(regions, reason, tmp_path):
  data = write(tmp_path, [regions, *[[]] * 11])
  batches = take(data, 2)
  rejects = sum(batch["rejects"].sum(0) for batch in batches)
  assert rejects[REASONS.index(reason)] >= 1
  assert rejects.sum() == rejects[REASONS.index(reason)]


@pytest.mark.parametrize("negatives", ["a blue kite", [""], [3], None])
def test_negatives_that_are_no_texts_are_rejected_where_they_are_read(negatives, tmp_path):
  data = write(tmp_path, [[dict(box=BOX, phrase="a", negatives=negatives)], *[[]] * 11])
  assert not sum(batch["rejects"].sum() for batch in take(data, 2))
  data |= dict(regions=dict(field="json.regions", negatives=2))
  rejects = sum(batch["rejects"].sum(0) for batch in take(data, 2))
  assert rejects[REASONS.index("bad_metadata")] == rejects.sum() >= 1


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(augment=dict(rotate=5.0)), "do not follow config.data.augment.rotate=5.0"),
    (
      dict(augment=dict(crop="evaluation"), resize="shortest"),
      "do not follow config.data.augment.crop='evaluation'",
    ),
    (dict(frames=dict(count=2)), "not config.data.frames"),
  ],
)
def test_views_that_boxes_do_not_follow_are_refused(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    take(write(tmp_path, [[]] * 8) | changes, 1)


def test_options_out_of_range_are_named():
  for bad in (dict(count=0), dict(visible=0.0), dict(negatives=-1)):
    with pytest.raises(ValueError, match=f"config.data.regions.{next(iter(bad))}"):
      data_options(**OPTIONS, source="x", regions=dict(field="json.regions", **bad))
