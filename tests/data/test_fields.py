"""Fields of a batch besides image and text: several texts, teachers, columns, views."""

from __future__ import annotations

import contextlib
import json
import re

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.small_fields import (
  OPTIONS,
  SAMPLES,
  boxes_of,
  captions_of,
  every_field,
  key_of,
  noise_of,
  vectors_of,
  write_dataset,
)
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store

from bigalign.data.fields import column_files
from bigalign.data.fields.base import Draws
from bigalign.data.loader import extra_fields
from bigalign.data.loader.training import batch_spec
from bigalign.data.samples.rejects import REASONS
from bigalign.data.sources.arrayrecord import make_example
from bigalign.data.sources.base import open_source
from bigalign.data.text.code_switch import read_dictionary
from bigalign.data.text.kinds import ABSENT, NEGATIVE, POSITIVE
from bigalign.inputs import open_data
from bigalign.options import plain

B, STEPS = 8, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Shards with captions, columns and sidecars of numbers, and the stores of two teachers."""
  return write_dataset(tmp_path_factory.mktemp("fields"))


def take(data: dict, count=STEPS, *, rows=range(B), start=0) -> list[dict[str, np.ndarray]]:
  inputs = open_data(data_options(**data))
  with contextlib.closing(
    inputs.batches(rejected_log="", batch_size=B, rows=rows, seed=3, start=start)
  ) as batches:
    return [next(batches) for _ in range(count)]


def joined(batches) -> dict[str, np.ndarray]:
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def samples_of(batches) -> list[int]:
  return joined(batches)["image_id"][:, 1].tolist()


def assert_equal(found, expected):
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def text_of(ids, mask) -> str:
  """What the byte tokenizer made of a caption, undone."""
  return bytes((ids[mask][:-1] - 3).tolist()).decode()


def test_the_batch_is_as_the_spec_says(folder):
  data = every_field(folder)
  spec = batch_spec(data_options(**data), batch_size=B)
  (batch,) = take(data, 1)
  assert {name: x.shape for name, x in batch.items()} == {k: x for k, (x, _) in spec.items()}
  stored = {"teacher_img", "teacher_txts"}  # in the dtype of their stores
  assert {k: x.dtype for k, x in batch.items() if k not in stored} == {
    k: np.dtype(x) for k, (_, x) in spec.items() if k not in stored
  }
  assert batch["teacher_txts"].shape == (B, 5, 8) and batch["boxes_mask"].shape == (B, 4)


def on_hosts(data: dict, hosts: int, start: int, stop: int) -> list[dict[str, np.ndarray]]:
  """The global batches from `start` to `stop`, whose rows several hosts read in turn."""
  rows = [np.arange(h, B, hosts) for h in range(hosts)]
  parts = [take(data, stop - start, rows=own, start=start * B) for own in rows]
  order = np.argsort(np.concatenate(rows))
  return [
    {name: np.concatenate([part[name] for part in step])[order] for name in step[0]}
    for step in zip(*parts)
  ]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_all_fields_are_equal_on_any_hosts_and_workers_and_after_a_resume(folder, hosts, workers):
  data = every_field(folder)
  whole = take(data)
  for start in (2,) if workers else range(STEPS):
    assert_equal(on_hosts(data | dict(workers=workers), hosts, start, STEPS), whole[start:])


def test_a_field_does_not_change_what_another_one_draws(folder):
  data = every_field(folder)
  whole = take(data)
  for left_out in ("texts", "teachers", "columns", "views"):
    others = take({k: x for k, x in data.items() if k not in (left_out,)})
    for a, b in zip(others, whole, strict=True):
      for name in a.keys() & b.keys():
        np.testing.assert_array_equal(a[name], b[name], err_msg=f"{name} without {left_out}")
  views = dict(data, views=dict(local=data["views"]["local"]))
  assert all(
    (a["view/local"] == b["view/local"]).all() for a, b in zip(take(views), whole, strict=True)
  )


class TestTexts:
  def test_one_text_is_the_text_of_today(self, folder):
    data = {k: x for k, x in every_field(folder).items() if k not in ("texts", "teachers")}
    for a, b in zip(take(data | dict(texts=dict(count=1))), take(data), strict=True):
      assert (a.pop("texts_kind") == np.full((B, 1), POSITIVE)).all()
      assert_equal([a], [b])

  def test_others_are_drawn_without_replacement_and_the_remainder_is_absent(self, folder):
    data = dict(every_field(folder), texts=dict(count=3))
    batches = take(data, 12)
    whole = joined(batches)
    seen = set()
    for r, i in enumerate(samples_of(batches)):
      first = text_of(whole["text"][r], whole["text_mask"][r])
      kinds = whole["texts_kind"][r]
      pairs = zip(whole["text_others"][r], whole["text_others_mask"][r])
      others = [text_of(*pair) for pair, kind in zip(pairs, kinds[1:]) if kind == POSITIVE]
      known = captions_of(i)
      assert first in known and kinds[0] == POSITIVE
      assert len({first, *others}) == 1 + len(others) == min(3, len(known))
      assert {*others} < {*known} and (kinds == ABSENT).sum() == 3 - min(3, len(known))
      seen |= {(i, *others)}
    assert len(seen) > 40, "the others are drawn anew in each epoch"

  def test_weights_choose_the_column_of_each_text(self):
    from bigalign.data.text.captions import choose_others

    texts = dict(a=("a0", "a1"), b=("b0", "b1", "b2"), c=("c0",))
    columns = (("a", 3.0), ("b", 1.0), ("c", 0.0))
    drawn = [
      choose_others(texts, columns, np.random.default_rng(s), first=0, count=1)[0]
      for s in range(400)
    ]
    share = np.mean(np.array(drawn) == 1)
    assert 0.69 < share < 0.81, "three of four, of the one that is left of a"
    every = choose_others(texts, columns, np.random.default_rng(0), first=0, count=9)
    assert sorted(every) == [1, 2, 3, 4, 5] and every[-1] == 5, "the fallback comes last"

  def test_swapped_words(self, folder):
    batches = take(every_field(folder))
    whole = joined(batches)
    negatives = whole["texts_kind"] == NEGATIVE
    assert (negatives == np.array([[False] * 3 + [True] * 2])).all()
    for r, i in enumerate(samples_of(batches)):
      pairs = zip(whole["text_others"][r], whole["text_others_mask"][r])
      texts = [text_of(whole["text"][r], whole["text_mask"][r]), *(text_of(*x) for x in pairs)]
      positives = (whole["texts_kind"][r] == POSITIVE).sum()
      for k in (0, 1):
        negative, of = texts[3 + k], texts[k % positives]
        assert sorted(negative.split()) == sorted(of.split()) and negative not in captions_of(i)

  def test_negatives_of_a_field(self, tmp_path):
    members = []
    for i in range(6):
      stored = dict(caption=f"text {i}", wrong=[f"wrong {i} {k}" for k in range(i % 3)])
      members += [(f"{i}.jpg", picture(i)), (f"{i}.json", json.dumps(stored).encode())]
    write_tar(tmp_path / "0.tar", members)
    batches = take(
      dict(
        **OPTIONS,
        source=f"{tmp_path}/0.tar",
        captions=("json.caption",),
        texts=dict(negatives=dict(count=2, field="json.wrong")),
      )
    )
    whole = joined(batches)
    for r, i in enumerate(samples_of(batches)):
      kinds = whole["texts_kind"][r].tolist()
      assert kinds == [POSITIVE, *[NEGATIVE] * (i % 3), *[ABSENT] * (2 - i % 3)]
      texts = {
        text_of(*pair) for pair in zip(whole["text_others"][r], whole["text_others_mask"][r])
      }
      assert {x for x in texts if x} == {f"wrong {i} {k}" for k in range(i % 3)}

  def test_stored_captions(self, folder):
    """As FLAME's facets: the rows of one sample are its captions."""
    data = {k: x for k, x in every_field(folder).items() if k not in ("teachers", "captions")}
    data |= dict(stores=dict(text=f"{folder}/a/text"), texts=dict(count=3))
    batches = take(data)
    whole = joined(batches)
    assert whole["text_others"].shape == (STEPS * B, 2, 3)
    for r, i in enumerate(samples_of(batches)):
      known = vectors_of(i, width=3, scale=1.0)
      rows = [whole["text"][r], *whole["text_others"][r]]
      places = [int(np.flatnonzero((known == row).all(1))[0]) for row in rows]
      present = (whole["texts_kind"][r] == POSITIVE).sum()
      assert len({*places[:present]}) == present == min(3, len(known))

  def test_errors(self, folder):
    data = every_field(folder)
    for texts, error in (
      (dict(count=0), "config.data.texts.count=0: at least 1"),
      (dict(negatives=dict(count=1)), "either a field or a rule"),
      (dict(negatives=dict(count=1, rule="sway")), "'sway'"),
    ):
      with pytest.raises(ValueError, match=re.escape(error)):
        data_options(**data | dict(texts=texts))
    wrong = dict(negatives=dict(count=1, field="json.wrong"))
    with pytest.raises(ValueError, match=r"field='json\.wrong': none of 24 samples .* has a text"):
      open_data(data_options(**data | dict(texts=wrong)))
    stored = data | dict(stores=dict(text=f"{folder}/a/text"), captions=None, teachers={})
    with pytest.raises(ValueError, match="negatives needs texts"):
      open_data(data_options(**stored))


class TestCodeSwitch:
  def test_words_are_replaced_and_all_else_stays(self, folder, tmp_path):
    (tmp_path / "de.tsv").write_text("picture\tBild\nseen\tgesehen\nseen\terblickt\n")
    data = {k: x for k, x in every_field(folder).items() if k not in ("texts", "teachers")}
    data["tokenizer"] = dict(name="byte", length=40)
    plain_batches = take(data)
    switch = dict(code_switch=dict(dictionary=str(tmp_path / "de.tsv")))
    switched = take(data | switch)
    assert_equal(on_hosts(data | switch, 2, 1, STEPS), switched[1:])
    words = set()
    for a, b in zip(plain_batches, switched, strict=True):
      for name in a.keys() - {"text", "text_mask"}:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
      for r in range(B):
        was, now = (text_of(x["text"][r], x["text_mask"][r]).split() for x in (a, b))
        assert len(was) == len(now)
        words |= {(x, y) for x, y in zip(was, now)}
    changed = {pair for pair in words if pair[0] != pair[1]}
    assert changed == {("picture", "Bild"), ("seen", "gesehen"), ("seen", "erblickt")}
    assert {("picture", "picture"), ("seen", "seen")} < words, "half of them stay"

  def test_dictionaries(self, tmp_path):
    (tmp_path / "a.json").write_text('{"Dog": ["Hund"], "cat": ["Katze", "Katze"]}')
    assert read_dictionary(f"{tmp_path}/a.json") == dict(dog=("Hund",), cat=("Katze",))
    (tmp_path / "b.tsv").write_text("dog Hund\n")
    with pytest.raises(ValueError, match="line 1 is not 'word<TAB>translation': 'dog Hund'"):
      read_dictionary(f"{tmp_path}/b.tsv")
    (tmp_path / "c.json").write_text('["dog"]')
    with pytest.raises(ValueError, match="expected an object"):
      read_dictionary(f"{tmp_path}/c.json")

  def test_a_missing_dictionary_is_named_when_the_data_is_opened(self, folder, tmp_path):
    switch = dict(dictionary=f"{tmp_path}/none.tsv")
    with pytest.raises(FileNotFoundError, match=r"config\.data\.code_switch\.dictionary='.*none"):
      open_data(data_options(**every_field(folder) | dict(code_switch=switch)))


class TestTeachers:
  def test_vectors_are_those_of_the_image_and_of_the_caption_that_was_drawn(self, folder):
    data = {k: x for k, x in every_field(folder).items() if k != "texts"}
    batches = take(data)
    whole = joined(batches)
    for r, i in enumerate(samples_of(batches)):
      text = text_of(whole["text"][r], whole["text_mask"][r])
      rows = [vectors_of(i, width=3, scale=1.0), vectors_of(i, width=5, scale=-2.0)]
      expected = np.concatenate([x[captions_of(i).index(text)] for x in rows])
      np.testing.assert_array_equal(whole["teacher_txt"][r], expected)
      np.testing.assert_array_equal(
        whole["teacher_img"][r], np.concatenate([x[0] + 0.5 for x in rows])
      )

  def test_each_of_several_texts_has_its_vector(self, folder):
    batches = take(dict(every_field(folder), texts=dict(count=3)))
    whole = joined(batches)
    for r, i in enumerate(samples_of(batches)):
      ids = [whole["text"][r], *whole["text_others"][r]]
      masks = [whole["text_mask"][r], *whole["text_others_mask"][r]]
      for m in np.flatnonzero(whole["texts_kind"][r] == POSITIVE):
        place = captions_of(i).index(text_of(ids[m], masks[m]))
        expected = vectors_of(i, width=3, scale=1.0)[place]
        np.testing.assert_array_equal(whole["teacher_txts"][r, m, :3], expected)

  def test_a_sample_without_a_row_is_rejected(self, folder, tmp_path):
    whole = {key_of(i): vectors_of(i, width=3, scale=1.0) for i in range(SAMPLES)}
    image = write_store(tmp_path / "i", {k: x[0] for k, x in whole.items() if k != key_of(5)})
    whole[key_of(7)] = whole[key_of(7)][:1]  # one row for four captions
    text = write_store(tmp_path / "t", whole)
    data = every_field(folder) | dict(teachers=dict(a=dict(image=image, text=text)))
    batches = take(data, 12)
    assert not {5, 7} & {*samples_of(batches)}
    rejects = joined(batches)["rejects"].sum(0)
    assert rejects[REASONS.index("no_vector")] == rejects.sum() > 0
    assert_equal(on_hosts(data, 2, 1, 12), batches[1:])

  def test_the_vector_of_a_second_caption_is_its_own(self, folder):
    data = {k: x for k, x in every_field(folder).items() if k not in ("texts", "views")}
    data["teachers"] = {
      name: x | dict(second=x["text"]) for name, x in every_field(folder)["teachers"].items()
    }
    with pytest.raises(ValueError, match=r"no sample has one; set config\.data\.second_captions"):
      open_data(data_options(**data))
    data["second_captions"] = ("json.captions",)
    batches = take(data)
    whole = joined(batches)
    other = 0
    for r, i in enumerate(samples_of(batches)):
      first, second = (text_of(whole[x][r], whole[f"{x}_mask"][r]) for x in ("text", "text_second"))
      rows = [vectors_of(i, width=3, scale=1.0), vectors_of(i, width=5, scale=-2.0)]
      for name, text in (("teacher_txt", first), ("teacher_txt_second", second)):
        expected = np.concatenate([x[captions_of(i).index(text)] for x in rows])
        np.testing.assert_array_equal(whole[name][r], expected)
      other += first != second
    assert other > STEPS * B / 2
    assert_equal(on_hosts(data, 2, 1, STEPS), batches[1:])

  def test_errors(self, folder, tmp_path):
    data = every_field(folder)

    def opened(**changes):
      return open_data(data_options(**data | changes))

    with pytest.raises(ValueError, match="all teachers need stores of the same sides"):
      opened(teachers=dict(a=dict(image=f"{folder}/a/image"), b=dict(text=f"{folder}/b/text")))
    with pytest.raises(ValueError, match=r"teachers.a names no store"):
      opened(teachers=dict(a=dict(width=3)))
    with pytest.raises(ValueError, match=r"rows of shape \(3,\), expected \(4,\)"):
      opened(teachers=dict(a=dict(image=f"{folder}/a/image", width=4)))
    with pytest.raises(FileNotFoundError, match="to plan without it, give its width"):
      opened(teachers=dict(a=dict(image=f"{tmp_path}/none")))
    with pytest.raises(ValueError, match=r"captions come from \['json.captions', 'txt'\]"):
      opened(
        captions=(("json.captions", 1), ("txt", 1)), teachers=dict(a=dict(text=f"{folder}/a/text"))
      )

  def test_a_width_suffices_for_a_plan(self, tmp_path):
    data = data_options(
      **OPTIONS, source="x", teachers=dict(a=dict(image=f"{tmp_path}/none", width=7))
    )
    assert batch_spec(data, batch_size=4)["teacher_img"][0] == (4, 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_vectors_in_bfloat16_come_out_of_workers(folder, tmp_path, workers):
  whole = {key_of(i): vectors_of(i, width=3, scale=1.0)[0] for i in range(SAMPLES)}
  store = write_store(tmp_path / "a", whole, dtype="bfloat16")
  data = every_field(folder) | dict(texts=None, teachers=dict(a=dict(image=store)), workers=workers)
  batches = take(data, 6)  # more than the slots of shared memory
  found = joined(batches)["teacher_img"]
  assert found.dtype.name == "bfloat16"
  wanted = np.stack([whole[key_of(i)] for i in samples_of(batches)]).astype(found.dtype)
  np.testing.assert_array_equal(found, wanted)


class TestColumns:
  def test_values(self, folder):
    batches = take(every_field(folder))
    whole = joined(batches)
    for r, i in enumerate(samples_of(batches)):
      assert whole["noise_prob"][r] == noise_of(i)
      boxes, mask = whole["boxes"][r], whole["boxes_mask"][r]
      np.testing.assert_array_equal(boxes[mask], boxes_of(i))
      assert not boxes[~mask].any() and mask.sum() == i % 3

  @pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "array_record", "sidecar", "npy"])
  def test_sources(self, kind, tmp_path):
    """A number of each kind of source; of a sidecar too."""
    from bigalign.shards import index

    field = dict(sidecar="scores.jsonl:noise", npy="npy").get(kind, "noise")
    for i in range(6):
      (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    rows = [dict(filepath=f"{i}.jpg", title=f"text {i}", noise=noise_of(i)) for i in range(6)]
    options: dict = dict(captions=("title",))
    if kind == "parquet":
      import pyarrow
      from pyarrow import parquet

      images = [picture(i) for i in range(6)]
      table = pyarrow.table(
        dict(image=images, title=[r["title"] for r in rows], noise=[r["noise"] for r in rows])
      )
      parquet.write_table(table, tmp_path / "0.parquet")
      source = f"{tmp_path}/0.parquet"
    elif kind == "csv":
      lines = [
        "filepath,title,noise",
        *(f"{r['filepath']},{r['title']},{r['noise']}" for r in rows),
      ]
      (tmp_path / "0.csv").write_text("\n".join(lines) + "\n")
      source = f"{tmp_path}/0.csv"
    elif kind == "jsonl":
      (tmp_path / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
      source = f"{tmp_path}/0.jsonl"
    elif kind == "array_record":
      from array_record.python.array_record_module import ArrayRecordWriter

      writer = ArrayRecordWriter(f"{tmp_path}/0.array_record", "group_size:1")
      for i, row in enumerate(rows):
        noise = [float(row["noise"])]
        writer.write(
          make_example(dict(image=[picture(i)], title=[row["title"].encode()], noise=noise))
        )
      writer.close()
      source = f"{tmp_path}/0.array_record"
    else:
      import io

      members = []
      for i in range(6):
        array = io.BytesIO()
        np.save(array, np.float32(noise_of(i)))
        members += [(f"{i}.jpg", picture(i)), (f"{i}.txt", f"text {i}".encode())]
        members += [(f"{i}.npy", array.getvalue())] if kind == "npy" else []
      path = write_tar(tmp_path / "0.tar", members)
      lines = [json.dumps(dict(key=str(i), noise=noise_of(i))) + "\n" for i in range(6)]
      (tmp_path / "0.scores.jsonl").write_text("".join(lines))
      source, options = f"{tmp_path}/0.tar", {}
      len(open_source(source))  # indexes the shard
      if kind == "sidecar":
        assert index.main([path, "--workers=1", f"--sidecars={field}"]) == 0
    data = data_options(**OPTIONS, **options, source=source, columns=dict(noise_prob=field))
    inputs = open_data(data)
    with contextlib.closing(
      inputs.batches(rejected_log="", batch_size=6, rows=np.arange(6), seed=0)
    ) as batches:
      batch = next(batches)
    assert batch["noise_prob"].tolist() == [noise_of(i) for i in batch["image_id"][:, 1]]

  def test_columns_of_the_stats(self, tmp_path):
    """Of two shards: of the header of the image, and a number that only some samples have."""
    from bigalign.shards import index

    for shard in range(2):
      members = []
      for i in range(4):
        stored = json.dumps({} if (shard, i) == (1, 2) else dict(score=4 * shard + i)).encode()
        members += [(f"{i}.jpg", picture(i)), (f"{i}.json", stored), (f"{i}.txt", b"a" * (i + 1))]
      write_tar(tmp_path / f"{shard}.tar", members)
    source = f"{tmp_path}/{{0..1}}.tar"
    columns = {
      name: dict(field=f"stats:{field}", dtype="int32")
      for name, field in dict(width="width", characters="length.txt", score="json.score").items()
    }
    data = OPTIONS | dict(source=source, columns=columns)
    with pytest.raises(FileNotFoundError, match="bigalign index --stats"):
      open_data(data_options(**data))
    assert index.main([source, "--workers=1", "--stats", "--captions=txt"]) == 0
    batches = take(data, 8)
    found, samples = joined(batches), samples_of(batches)
    assert found["score"].tolist() == samples and 6 not in samples
    assert found["characters"].tolist() == [i % 4 + 1 for i in samples]
    widths = np.concatenate([*open_source(source).columns()])["width"]
    assert found["width"].tolist() == widths[samples].tolist() and widths.all()
    with pytest.raises(ValueError, match=r"8 have no value.*stats:wdith"):
      open_data(data_options(**data | dict(columns=dict(w="stats:wdith"))))

  def test_a_sample_without_a_value_is_rejected_or_has_the_default(self, tmp_path):
    members = []
    for i in range(8):
      stored = {} if i == 3 else dict(score="high" if i == 4 else i)
      members += [(f"{i}.jpg", picture(i)), (f"{i}.json", json.dumps(stored).encode())]
      members += [(f"{i}.txt", f"text {i}".encode())]
    write_tar(tmp_path / "0.tar", members)
    data = dict(**OPTIONS, source=f"{tmp_path}/0.tar")
    batches = take(data | dict(columns=dict(score="json.score")), 12)
    rejects = dict(zip(REASONS, joined(batches)["rejects"].sum(0)))
    assert not {3, 4} & {*samples_of(batches)}
    assert rejects["no_column"] > 0 and rejects["bad_metadata"] > 0
    assert rejects["no_column"] + rejects["bad_metadata"] == sum(rejects.values())
    batches = take(data | dict(columns=dict(score=dict(field="json.score", default=-1.0))), 12)
    scores = dict(zip(samples_of(batches), joined(batches)["score"]))
    assert scores[3] == -1 and 4 not in scores

  def test_a_file_of_numbers(self, folder):
    source = open_source(f"{folder}/0.tar", captions=("json.captions",))
    numbers = np.arange(SAMPLES, dtype=np.float32)
    numbers[2] = np.nan
    column_files.write(f"{folder}/score", source, np.split(numbers, 4), made_by=dict(what="a test"))
    data = {k: x for k, x in every_field(folder).items() if k in ("source", "captions")}
    data |= OPTIONS | dict(columns=dict(score=dict(file=f"{folder}/score")))
    batches = take(data, 6)
    assert joined(batches)["score"].tolist() == samples_of(batches) and 2 not in samples_of(batches)
    write_tar(folder / "other.tar", [("0.jpg", picture(0)), ("0.json", b'{"captions": "a"}')])
    with pytest.raises(ValueError, match="was made of samples with the fingerprint"):
      open_data(data_options(**data | dict(source=f"{folder}/other.tar")))
    with pytest.raises(ValueError, match="20 numbers for 24 samples"):
      column_files.write(f"{folder}/short", source, [numbers[:20]], made_by={})

  def test_errors(self, folder):
    data = every_field(folder)
    for columns, error in (
      (dict(noise="json.nose"), "24 have no value, and 0 have one"),
      (dict(noise=dict(field="json.noise", dtype="int32")), "cannot be int32"),
      (dict(noise=dict(field="json.noise", shape=(2,))), r"the shape is \(\), expected \(2,\)"),
      (dict(text="json.noise"), "'text' cannot be the name of a column"),
      (dict(image_mask="json.noise"), "'image_mask' cannot be the name of a column"),
      (dict(noise=dict(field="json.noise", dtype="float64")), "dtype='float64'; known"),
      (dict(noise={}), "either a field or a file"),
    ):
      with pytest.raises(ValueError, match=error):
        open_data(data_options(**data | dict(columns=columns)))


class TestViews:
  def test_crops_have_their_sizes_and_differ(self, folder):
    (batch,) = take(every_field(folder), 1)
    local = batch["view/local"]
    assert batch["view/wide"].shape == (B, 1, 16, 16, 3) and local.shape == (B, 3, 8, 8, 3)
    assert all((local[:, 0] != local[:, k]).any((1, 2, 3)).all() for k in (1, 2))

  def test_a_large_jpeg_is_decoded_large_enough_for_the_smallest_crop(self):
    data = data_options(
      **OPTIONS, source="x", views=dict(local=dict(count=8, size=96, scale=(0.05, 0.4)))
    )
    from bigalign.data.loader.training import _shrink

    assert _shrink(data_options(**OPTIONS, source="x"), 1024, 1024) == 8
    assert _shrink(data, 1024, 1024) == 1

  def test_errors(self, folder):
    data = every_field(folder)
    for view, error in (
      (dict(count=0), "count=0"),
      (dict(crop="evaluation"), "crop='evaluation' is for config.data.augment"),
    ):
      with pytest.raises(ValueError, match=error):
        open_data(data_options(**data | dict(views=dict(local=view))))
    with pytest.raises(TypeError, match="unknown option 'sise'"):
      data_options(**data | dict(views=dict(local=dict(sise=96))))


def test_options_come_back_from_their_plain_values(folder):
  data = data_options(**every_field(folder))
  assert data_options(**plain(data)) == data
  assert extra_fields.spec(data_options(**plain(data))) == extra_fields.spec(data)


def test_named_draws_differ_by_name_seed_and_position():
  draws = [
    Draws(seed, position).of(name).random()
    for seed in (0, 1)
    for position in (0, 1)
    for name in ("view/a", "view/b")
  ]
  assert len({*draws}) == 8 and draws[0] == Draws(0, 0).of("view/a").random()
