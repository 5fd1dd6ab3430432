"""One sample never ends a run: whatever reading, decoding or tokenising it raises is a reject."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import subprocess

import numpy as np
import pytest
from helpers.batches import eval_batches, train_batches
from helpers.small_shards import picture, write_tar
from PIL import Image

from bigalign.data.image.decode import decode
from bigalign.data.loader import options as data_options
from bigalign.data.samples import members
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import DETAIL, REASONS, Rejected, rejection
from bigalign.data.sources.base import open_source, read
from bigalign.data.tar import stats

OPTIONS = dict(
  batch_size=8, rows=np.arange(8), image_size=16, tokenizer=dict(name="byte", length=24)
)
DEEP = b"[" * 100_000 + b"]" * 100_000


def trained(source, *, stop=64, **options):
  with contextlib.closing(
    train_batches(source, seed=0, stop=stop, **{**OPTIONS, **options})
  ) as batches:
    return list(batches)


def evaluated(source, **options):
  with contextlib.closing(eval_batches(source, **{**OPTIONS, **options})) as batches:
    return list(batches)


def counts(batches):
  total = sum(batch["rejects"].sum(0) for batch in batches)
  return {reason: int(n) for reason, n in zip(REASONS, total) if n}


def test_deeply_nested_json_is_bad_metadata(tmp_path):
  good = json.dumps(dict(caption="a")).encode()
  write_tar(
    tmp_path / "0.tar",
    [
      member
      for i in range(8)
      for member in ((f"{i}.jpg", picture(i)), (f"{i}.json", DEEP if i == 3 else good))
    ],
  )
  (tmp_path / "t.jsonl").write_bytes(
    b"".join(
      (DEEP if i == 3 else json.dumps(dict(filepath=f"{i}.jpg", title="a")).encode()) + b"\n"
      for i in range(8)
    )
  )
  for i in range(8):
    (tmp_path / f"{i}.jpg").write_bytes(picture(i))
  tar = open_source(f"{tmp_path}/0.tar", captions=("json.caption",))
  for source in (tar, open_source(f"{tmp_path}/t.jsonl")):
    assert counts(evaluated(source)) == dict(bad_metadata=1)
    assert counts(trained(source)).keys() == {"bad_metadata"}


@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path, kind):
  caption = '"half \\ud83d a pair, \\ud83d\\ude00 a whole one"'
  if kind == "tar":
    write_tar(
      tmp_path / "0.tar", [("0.jpg", picture()), ("0.json", b'{"c": %s}' % caption.encode())]
    )
    source = open_source(f"{tmp_path}/0.tar", captions=("json.c",))
  else:
    (tmp_path / "0.jpg").write_bytes(picture())
    (tmp_path / "t.jsonl").write_text(f'{{"filepath": "0.jpg", "title": {caption}}}\n')
    source = open_source(f"{tmp_path}/t.jsonl")
  assert source[0]["captions"] == ("half \ufffd a pair, \U0001f600 a whole one",)
  batches = trained(source, stop=16)
  assert not counts(batches) and all(batch["repaired"].all() for batch in batches)


def test_the_id_of_a_key_with_half_a_pair_is_defined():
  assert sample_id("t.jsonl/\ud83d.jpg") != sample_id("t.jsonl/\ud83e.jpg")


def test_deeply_nested_captions_are_read():
  value = "deep"
  for _ in range(5000):
    value = [value, []]
  assert members.strings(value) == ("deep",)
  assert members.strings(["a", (b"b", [" "]), np.array(["c"], object), 3, None]) == ("a", "b", "c")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_to_decode_an_image(monkeypatch):
  def started(*args, **kwargs):
    raise AssertionError("a program was started")

  monkeypatch.setattr(subprocess, "Popen", started)
  with pytest.raises(Rejected, match=r"undecodable: .*not a JPEG, PNG, "):
    decode(EPS)


@pytest.mark.parametrize("format", members.FORMATS)
def test_every_stated_format_is_decoded(format):
  file = io.BytesIO()
  Image.open(io.BytesIO(picture(1, kind="png"))).save(file, format)
  assert decode(file.getvalue()).shape == (20, 24, 3)


def test_every_extension_is_one_of_a_stated_format():
  Image.init()
  known = {Image.EXTENSION[f".{extension}"] for extension in members.IMAGES}
  assert known == set(members.FORMATS)


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "SGI", "DDS"])
def test_other_formats_are_refused(kind):
  file = io.BytesIO()
  Image.open(io.BytesIO(picture(1, size=(32, 32), kind="png"))).save(file, kind)
  with pytest.raises(Rejected, match="undecodable"):
    decode(file.getvalue())


class Broken:
  """Numbered images; sample 3 raises an error when it is read."""

  fingerprint = "00"

  def __init__(self, error, image=None):
    self.error, self.image = error, image

  def __len__(self):
    return 16

  def __getitem__(self, i):
    if i == 3 and self.error:
      raise self.error
    image = self.image if i == 3 and self.image is not None else np.full((20, 24, 3), i, np.uint8)
    return dict(image=image, captions=(f"number {i}",), key=f"number {i}", label=-1)


@pytest.mark.parametrize(
  "error", [RecursionError("too deep"), KeyError("x"), TypeError("no"), ValueError("v" * 10_000)]
)
def test_any_error_of_reading_a_sample_rejects_it(error, caplog):
  source = Broken(error)
  assert counts(evaluated(source)) == dict(failed=1)
  with caplog.at_level(logging.WARNING):
    batches = trained(source)
  assert counts(batches).keys() == {"failed"}
  assert 3 not in np.concatenate([batch["image_id"][:, 1] for batch in batches])
  (line,) = {record.getMessage() for record in caplog.records}
  assert f"failed: {type(error).__name__}" in line and "test_one_sample.py:" in line
  assert "sample 3 of" in line and len(line) < 2 * DETAIL


@pytest.mark.parametrize(
  "error",
  [OSError(5, "Input/output error"), MemoryError(), ValueError("PERMISSION_DENIED: no access")],
)
def test_errors_of_the_disk_and_of_stores_are_raised(error):
  with pytest.raises(type(error)):
    read(Broken(error), 3)


def test_an_error_in_augmentation_rejects_the_sample(monkeypatch):
  whole = data_options.train_image

  def view(image, rng, **options):
    if image.shape[0] == 5:
      raise ZeroDivisionError("an augmentation")
    return whole(image, rng, **options)

  odd = np.zeros((5, 5, 3), np.uint8)
  expected = trained(Broken(RuntimeError()))
  monkeypatch.setattr(
    data_options.DataOptions,
    "training_view",
    lambda self, image, rng: view(image, rng, size=self.image_size),
  )
  found = trained(Broken(None, odd))
  assert counts(found) == counts(expected)
  for a, b in zip(found, expected):
    assert all(np.array_equal(a[name], b[name]) for name in a)


class Picky:
  """The byte tokenizer, which refuses the number 3."""

  def __init__(self, inner):
    self._inner = inner

  def encode_batch(self, texts):
    if "number 3" in texts:
      raise TypeError("TextInputSequence must be str")
    return self._inner.encode_batch(texts)


def test_a_text_that_the_tokenizer_refuses_rejects_its_sample(monkeypatch):
  expected = trained(Broken(RuntimeError())), evaluated(Broken(RuntimeError()))
  make = data_options.DataOptions.make_tokenizer
  monkeypatch.setattr(data_options.DataOptions, "make_tokenizer", lambda self: Picky(make(self)))
  found = trained(Broken(None)), evaluated(Broken(None))
  for some, others in zip(found, expected):
    assert counts(some) == counts(others)
    for a, b in zip(some, others):
      assert all(np.array_equal(a[name], b[name]) for name in a)


def test_details_are_cut():
  error = Rejected("bad_metadata", "x" * 10_000)
  assert len(str(error)) < DETAIL + 50 and "10000 characters" in str(error)
  assert rejection(error) is error


def test_statistics_leave_out_integers_that_no_float_holds():
  fields = {"json": json.dumps(dict(a=10**400, b=-(10**400), c=3, d=10**300)).encode()}
  row = stats._row(fields, ())
  assert row["json.c"] == 3 and row["json.d"] == 10**300
  assert "json.a" not in row and "json.b" not in row


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_everything_bad_at_once_is_counted_and_the_rest_is_read(tmp_path, workers):
  whole = picture(0, size=(200, 300))
  line = io.BytesIO()
  Image.new("L", (1, 100_000)).save(line, "png")
  good, caption = picture(0), b'{"c": "a caption"}'
  bad = [
    (EPS, caption, b"1", "undecodable"),
    (b"", caption, b"1", "empty"),
    (b"<html>", caption, b"1", "undecodable"),
    (whole[: len(whole) // 2], caption, b"1", "truncated"),
    (good, DEEP, b"1", "bad_metadata"),
    (good, b"{", b"1", "bad_metadata"),
    (good, b"[]", b"1", "bad_metadata"),
    (good, b'{"c": " "}', b"1", "no_caption"),
    (good, b'{"c": 3}', b"1", "no_caption"),
    (None, caption, b"1", "no_image"),
    (good, b'{"c": "half \\ud83d"}', b"1", None),
    (good, b'{"c": "caf\xe9"}', b"1", "bad_metadata"),
    (good, caption, b"cat", None),
    (good, caption, b"20240101123456", None),
    (good, caption, b"inf", None),
    (line.getvalue(), caption, b"1", None),
  ]
  members_of = []
  for i in range(4 * len(bad)):
    image, text, label, _ = bad[i] if i < len(bad) else (good, caption, b"1", None)
    members_of += [(f"{i:03d}.cls", label), (f"{i:03d}.json", text)]
    members_of += [] if image is None else [(f"{i:03d}.jpg", image)]
  write_tar(tmp_path / "0.tar", members_of)
  source = open_source(f"{tmp_path}/0.tar", captions=("json.c",))
  expected = collections.Counter(reason for *_, reason in bad if reason)
  tolerant = dict(workers=workers, rejects=dict(stop=0.5))
  # In evaluation an image without captions stays valid.
  assert counts(evaluated(source, workers=workers)) == {
    reason: n for reason, n in expected.items() if reason != "no_caption"
  }
  batches = trained(source, stop=192, order="exact", **tolerant)
  assert counts(batches).keys() == expected.keys()
  read_ids = set(np.concatenate([batch["image_id"][:, 1] for batch in batches]).tolist())
  usable = {i for i in range(4 * len(bad)) if i >= len(bad) or bad[i][3] is None}
  assert read_ids == usable
