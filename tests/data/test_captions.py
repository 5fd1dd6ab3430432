"""Which captions come into a batch: by preference, by probability, one or two of each image."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.shipped import load
from helpers.small_shards import picture, write_tar

from bigalign.data.loader.training import batch_spec
from bigalign.data.samples.rejects import REASONS
from bigalign.data.text.captions import choose, columns
from bigalign.inputs import open_data
from bigalign.options import plain
from bigalign.run.metrics import read_metrics
from bigalign.train import train

TOKENIZER = dict(name="byte", length=24)
# Sample i has one alt text; the first 16 have two recaptions too.
RECAPTIONED = 16


@pytest.fixture
def shard(tmp_path) -> str:
  members = []
  for i in range(20):
    recaptions = [f"first {i}", f"other {i}"] if i < RECAPTIONED else []
    members += [
      (f"{i:03}.jpg", picture(i)),
      (f"{i:03}.txt", f"alt {i}".encode()),
      (f"{i:03}.json", json.dumps(dict(recaption=recaptions)).encode()),
    ]
  return write_tar(tmp_path / "0.tar", members)


def read(source, epochs=30, **options):
  """Batches of the 20 samples, in their order, as config.data says."""
  inputs = open_data(
    data_options(source=source, image_size=8, tokenizer=TOKENIZER, shuffle=False, **options)
  )
  with contextlib.closing(
    inputs.batches(rejected_log="", batch_size=20, rows=np.arange(20), seed=0, stop=20 * epochs)
  ) as batches:
    return list(batches)


def texts(batches, name="text"):
  """[epochs][20] captions."""
  return [[bytes((row[row > 2] - 3).tolist()).decode() for row in batch[name]] for batch in batches]


def kinds(found):
  """{first word: how often} of the captions of the samples with recaptions."""
  words = [text.split()[0] for epoch in found for text in epoch[:RECAPTIONED]]
  return {word: words.count(word) for word in {*words}}


def test_the_first_existing_field_is_preferred(shard):
  found = texts(read(shard, captions=("json.recaption", "txt")))
  assert {text for epoch in found for text in epoch[RECAPTIONED:]} == {
    f"alt {i}" for i in range(RECAPTIONED, 20)
  }
  assert kinds(found).keys() == {"first", "other"}


def test_fields_are_drawn_by_weight(shard):
  found = kinds(texts(read(shard, captions=(("txt", 1), ("json.recaption", 3)), epochs=60)))
  n = 60 * RECAPTIONED
  # Binomial; 5 standard deviations.
  for word, share in dict(alt=1 / 4, first=3 / 8, other=3 / 8).items():
    assert abs(found[word] - n * share) < 5 * np.sqrt(n * share * (1 - share))


def test_weight_zero_is_only_a_fallback(shard):
  found = texts(read(shard, captions=("txt", ("json.recaption", 0.1))))
  assert "alt" not in kinds(found)
  assert all(text.startswith("alt") for epoch in found for text in epoch[RECAPTIONED:])


def test_ids_of_texts_do_not_depend_on_the_weights(shard):
  ids = {}
  for batch in read(shard, captions=(("txt", 1), ("json.recaption", 1))):
    for text, (_, low) in zip(texts([batch])[0], batch["text_id"]):
      assert ids.setdefault(text, int(low)) == low
  assert len(ids) == len({*ids.values()}) == 20 + 2 * RECAPTIONED
  assert {i // 8 for i in ids.values()} == {*range(20)}


def test_two_captions_of_one_field_differ_if_there_are_two(shard):
  options = dict(captions=("json.recaption", "txt"), second_captions=("json.recaption", "txt"))
  batches = read(shard, **options)
  first, second = (np.ravel(texts(batches, name)).tolist() for name in ("text", "text_second"))
  pairs = list(zip(first, second))
  assert {f"{a.split()[0]} {b.split()[0]}" for a, b in pairs if a != b} == {
    "first other",
    "other first",
  }
  assert {a for a, b in pairs if a == b} == {f"alt {i}" for i in range(RECAPTIONED, 20)}
  spec = batch_spec(data_options(image_size=8, tokenizer=TOKENIZER, **options), batch_size=20)
  assert {name: (x.shape, x.dtype) for name, x in batches[0].items()} == {
    name: (shape, np.dtype(dtype)) for name, (shape, dtype) in spec.items()
  }
  # A second text changes nothing else.
  for one, two in zip(read(shard, captions=("json.recaption", "txt")), batches):
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_sample_without_a_second_caption_is_replaced(shard):
  batches = read(shard, captions=("txt",), second_captions=("json.recaption",), epochs=3)
  for batch in batches:
    for short, long in zip(texts([batch])[0], texts([batch], "text_second")[0]):
      assert short.split()[0] == "alt" and long.split()[1] == short.split()[1]
    assert (batch["rejects"].sum(1)[:RECAPTIONED] == 0).all()
    assert (batch["rejects"][RECAPTIONED:, REASONS.index("no_caption")] >= 1).all()


def test_the_choice_is_a_function_of_the_generator():
  given = {"a": ("x",), "b": (), "c": ("y", "z")}
  some = columns(("a", ("b", 5), ("c", 1)), "here")
  found = {choose(given, some, np.random.default_rng(i)) for i in range(20)}
  assert found == {1, 2}
  assert {choose(given, some, np.random.default_rng(i), but=1) for i in range(20)} == {2}
  assert choose({"a": ("x",)}, some, np.random.default_rng(0), but=0) == 0


def test_wrong_options_are_errors(shard):
  with pytest.raises(ValueError, match=r"config\.data\.captions: 'txt' has weight -1"):
    read(shard, captions=(("txt", -1),))
  with pytest.raises(ValueError, match="'txt' more than once"):
    read(shard, captions=("txt", ("txt", 1)))
  with pytest.raises(TypeError, match=r"config\.data\.captions='txt' .*such as \('txt',\)"):
    read(shard, captions="txt")
  with pytest.raises(
    ValueError, match=r"name the fields of the first captions in config\.data\.captions too"
  ):
    read(shard, second_captions=("txt",))
  with pytest.raises(ValueError, match="does not separate the captions of \\['txt', 'long'\\]"):
    read("glyphs", captions=("txt",), second_captions=("long",))
  with pytest.raises(ValueError, match=r"no caption field \['title', 'recaption'\].*txt"):
    read(shard, captions=("title",), second_captions=("recaption",))


def two_texts(source, fields, **changes):
  """configs/tiny.py with SAIL's loss."""
  c = load("tiny")
  c.update(total_steps=4, batch_size=16, log_every=1, checkpoint_every=0, ema=0.0)
  c.data.update(source=source, captions=fields, second_captions=fields)
  c.loss = dict(sail=dict(weight=1.0))
  c.evals = {}
  c.writer = dict(tensorboard=False)
  for tower in (c.model.image, c.model.text):
    tower.update(width=32, depth=1)
  return plain(c) | changes


def losses(workdir):
  return [
    [row[f"train/{name}"] for name in ("loss", "short", "long")]
    for row in read_metrics(workdir)
    if "train/loss" in row
  ]


@pytest.mark.slow
def test_a_loss_of_two_texts_trains(shard, tmp_path):
  train(two_texts(shard, ("json.recaption", "txt")), tmp_path / "run")
  found = np.array(losses(tmp_path / "run"))
  assert found.shape == (4, 3) and (found[:, 1] != found[:, 2]).all()
  one = two_texts(shard, ("txt",))
  del one["data"]["second_captions"]
  with pytest.raises(ValueError, match=r"'ztxt_second'.*Set config\.data\.second_captions"):
    train(one, tmp_path / "one")


@pytest.mark.slow
def test_two_of_the_five_captions_of_a_photo(data_root, tmp_path):
  c = two_texts(f"{data_root}/flickr8k/train/*.tar", ("json.captions",), total_steps=20)
  train(c, tmp_path / "whole")
  train(c | dict(microbatches=2), tmp_path / "parts")
  found = np.array(losses(tmp_path / "whole"))
  np.testing.assert_allclose(np.array(losses(tmp_path / "parts"))[:5], found[:5], rtol=1e-5)
  assert len(found) == 20 and (found[-3:].mean(0) < 0.8 * found[:3].mean(0)).all()


def test_invalid_utf8_in_captions_is_counted_for_every_source(tmp_path):
  """Counts both captions if two are read; they are used, and their samples are not rejected."""
  wrong, image = b"caf\xe9", picture(0)
  write_tar(
    tmp_path / "0.tar",
    [
      (f"{i}.{kind}", data)
      for i in range(4)
      for kind, data in (
        ("jpg", image),
        ("txt", wrong if i < 2 else b"coffee"),
        ("alt", wrong if i < 1 else b"tea"),
      )
    ],
  )
  for i in range(4):
    (tmp_path / f"{i}.jpg").write_bytes(image)
  (tmp_path / "0.tsv").write_bytes(
    b"filepath\ttxt\talt\n"
    + b"".join(
      b"\t".join([b"%d.jpg" % i, wrong if i < 2 else b"coffee", wrong if i < 1 else b"tea"]) + b"\n"
      for i in range(4)
    )
  )
  for name in ("0.tar", "0.tsv"):
    inputs = open_data(
      data_options(
        source=f"{tmp_path}/{name}",
        image_size=8,
        tokenizer=TOKENIZER,
        captions=("txt",),
        second_captions=("alt",),
        shuffle=False,
      )
    )
    with contextlib.closing(
      inputs.batches(rejected_log="", batch_size=4, rows=np.arange(4), seed=0, stop=4)
    ) as batches:
      (batch,) = list(batches)
    assert batch["repaired"].tolist() == [2, 1, 0, 0] and not batch["rejects"].any()
