"""Texts with boxes, which a decoder predicts: config.data.locations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.hosts import take
from helpers.small_shards import picture, write_tar

from bigalign.data.fields.locations import BEGINNINGS, Locations, spelled
from bigalign.data.samples.rejects import REASONS
from bigalign.data.text.tokenizers import make_tokenizer

BOX = [0.25, 0.5, 0.75, 1.0]
END = make_tokenizer("byte", length=4).eos


def write(folder, regions, **options):
  """config.data of a shard whose samples have these regions, one entry each; None for no field."""
  members = []
  for i, own in enumerate(regions):
    stored = {} if own is None else dict(regions=own)
    members += [
      (f"{i}.jpg", picture(i)),
      (f"{i}.txt", f"caption {i}".encode()),
      (f"{i}.json", json.dumps(stored).encode()),
    ]
  source = write_tar(folder / "0.tar", members)
  return dict(
    image_size=16,
    tokenizer=dict(name="byte", length=40),
    source=source,
    augment=dict(crop="squash"),
    locations=dict(field="json.regions", **options),
  )


def _texts(batch):
  """The texts of a batch, and what the loss counts of them; the end token is left out."""
  for ids, counted in zip(batch["task_text"], batch["task_counted"]):
    length = int(np.argmax(ids == END))
    assert counted[length] and not counted[length + 1 :].any()
    spelt = bytes((ids[:length] - 3).tolist()).decode()
    yield spelt, bytes((ids[:length][counted[:length]] - 3).tolist()).decode()


def test_each_text_begins_with_its_task_which_is_not_counted(tmp_path):
  region = [dict(box=BOX, phrase="a dog")]
  data = write(tmp_path, [region if i % 4 else [] for i in range(8)], grid=101)
  expected = (None, "ARef: a dog : 25 50 75 100", "GCap: 25 50 75 100 : a dog")
  seen = set()
  for batch in take(data, 12):
    for task, (text, counted) in zip(batch["task"], _texts(batch)):
      assert text.startswith(BEGINNINGS[task])
      assert counted == text.removeprefix(BEGINNINGS[task])
      if task:
        assert text == expected[task]
      else:
        assert text.startswith("Cap: caption ")
      seen.add(int(task))
  assert seen == {0, 1, 2}


def test_a_sample_without_regions_has_its_caption(tmp_path):
  data = write(tmp_path, [[]] * 8, shares=dict(cap=0.0))
  for batch in take(data, 2):
    assert not batch["task"].any()


def test_boxes_follow_the_mirror_of_the_view(tmp_path):
  region = [dict(box=[0.0, 0.0, 0.5, 0.5], phrase="a")]
  data = write(tmp_path, [region] * 8, shares=dict(cap=0.0, gcap=0.0), grid=11)
  data["augment"] = dict(crop="squash", flip=1.0)
  (batch,) = take(data, 1)
  assert {text for text, _ in _texts(batch)} == {"ARef: a : 5 0 10 5"}


def test_texts_depend_on_the_seed_and_the_position_alone(tmp_path):
  """Equal with workers, and with another field in the batch."""
  regions = [[dict(box=BOX, phrase=f"{i} {k}") for k in range(3)] for i in range(12)]
  data = write(tmp_path, regions)
  batches = take(data, 4)
  others = (data | dict(workers=2), data | dict(regions=dict(field="json.regions")))
  for other in others:
    for found, wanted in zip(take(other, 4), batches, strict=True):
      for name in ("task", "task_text", "task_counted"):
        np.testing.assert_array_equal(found[name], wanted[name])
  firsts = {int(batch["task"][0]) for batch in batches} | {
    text for batch in batches for text, _ in _texts(batch)
  }
  assert len(firsts) > 10


def test_a_sample_without_the_field_is_rejected(tmp_path):
  batches = take(write(tmp_path, [None, *[[]] * 11]), 2)
  rejects = sum(batch["rejects"].sum(0) for batch in batches)
  assert rejects[REASONS.index("no_column")] == rejects.sum() >= 1


class Joining:
  """Stands for a tokenizer that joins the colon of a beginning with the space after it."""

  length, adds_end = 8, True

  def encode_batch(self, texts):
    ids = np.zeros((len(texts), 8), np.int32)
    for row, text in zip(ids, texts):
      words = text.replace(": ", " :_ ").replace("p:", "p :").split()[:7]
      numbers = [sum(map(ord, word)) for word in words]
      row[: len(words) + 1] = [*numbers, 1]
    return ids, ids > 0


def test_a_token_that_the_beginning_shares_with_the_text_is_counted():
  field = Locations(data_options(**_small()).locations, None, Joining())
  batch = field.stack([(0, "Cap: a dog")])
  assert batch["task_counted"][0].tolist() == [False, True, True, True, True, False, False, False]


def _small(**options):
  given = dict(field="json.regions", **options)
  return dict(source="x", image_size=16, tokenizer=dict(name="byte", length=12), locations=given)


def test_numbers_of_a_box():
  assert spelled(np.array([0.0, 0.4996, 0.5, 1.0]), 1000) == "0 499 500 999"
  assert spelled(np.array([0.0, 0.4996, 0.5, 1.0]), 501) == "0 250 250 500"


@pytest.mark.parametrize(
  "bad", [dict(grid=1), dict(visible=0.0), dict(shares=dict(cap=0.0, aref=0.0, gcap=0.0))]
)
def test_options_out_of_range_are_named(bad):
  with pytest.raises(ValueError, match=f"config.data.locations.{next(iter(bad))}"):
    data_options(**_small(**bad))


def test_captions_that_are_changed_are_refused(tmp_path):
  words = tmp_path / "de.tsv"
  words.write_text("caption\tText\n")
  data = write(tmp_path, [[]] * 8) | dict(code_switch=dict(dictionary=str(words)))
  with pytest.raises(ValueError, match=r"config.data.locations .*code_switch"):
    take(data, 1)
