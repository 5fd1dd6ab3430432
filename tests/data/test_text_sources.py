"""Sources of texts alone: samples without images, on any number of hosts and workers."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.batches import data_options
from helpers.hosts import B, assert_equal_on_hosts, take
from helpers.small_fields import SAMPLES, captions_of, every_field, key_of, vectors_of
from helpers.small_fields import write_dataset as write_images
from helpers.small_shards import write_tar
from helpers.small_stores import write_store

from bigalign.data.loader.training import batch_spec
from bigalign.data.sources.arrayrecord import KEY, make_example
from bigalign.data.sources.base import open_source
from bigalign.frozen.embed import check_source
from bigalign.inputs import open_data


def write_texts(root):
  """Shards without images: captions and a number of each sample, and the store of a teacher."""
  members = []
  for i in range(SAMPLES):
    stored = dict(noise=i / 64, captions=captions_of(i), other=[f"other {i}"])
    members.append((f"{i:03d}.json", json.dumps(stored).encode()))
  write_tar(root / "0.tar", members)
  every = {key_of(i): vectors_of(i, width=3, scale=1.0) for i in range(SAMPLES)}
  write_store(root / "a", every)
  return root


def options(folder) -> dict:
  return dict(
    image_size=16,
    tokenizer=dict(name="byte", length=24),
    source=f"{folder}/0.tar",
    images=False,
    captions=("json.captions",),
    texts=dict(count=2, negatives=dict(count=1, rule="swap")),
    teachers=dict(a=dict(text=f"{folder}/a")),
    columns=dict(noise_prob="json.noise"),
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_texts(tmp_path_factory.mktemp("texts"))


def test_a_batch_of_texts_has_no_image_and_is_as_the_spec_says(folder):
  data = options(folder)
  (batch,) = take(data, 1)
  spec = batch_spec(data_options(**data), batch_size=B)
  assert {name: x.shape for name, x in batch.items()} == {k: x for k, (x, _) in spec.items()}
  assert "image" not in batch and not batch["rejects"].any()
  assert {"text", "text_others", "teacher_txts", "noise_prob"} < {*batch}


def test_texts_are_those_that_are_drawn_with_images(folder, tmp_path):
  write_images(tmp_path)
  data = {
    k: x for k, x in every_field(tmp_path).items() if k not in ("views", "teachers", "regions")
  }
  alone = {k: x for k, x in data.items() if k != "augment"} | dict(images=False)
  for a, b in zip(take(alone), take(data), strict=True):
    assert b.keys() - a.keys() == {"image"}
    for name, x in a.items():
      np.testing.assert_array_equal(x, b[name], err_msg=name)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_texts_are_equal_on_any_hosts_and_workers_and_after_a_resume(folder, hosts, workers):
  assert_equal_on_hosts(options(folder), hosts, workers)


@pytest.mark.parametrize("kind", ["tar", "csv", "jsonl", "parquet", "array_record"])
def test_each_format_gives_captions_without_images(tmp_path, kind):
  rows = [dict(caption=f"text {i}", other=f"other {i}") for i in range(3)]
  path = tmp_path / f"0.{kind}"
  if kind == "tar":
    write_tar(path, [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)])
  elif kind == "csv":
    path.write_text("caption,other\n" + "".join(",".join(row.values()) + "\n" for row in rows))
  elif kind == "jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif kind == "parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i, row in enumerate(rows):
      features = {name: [text.encode()] for name, text in row.items()}
      writer.write(make_example({KEY: [f"key {i}".encode()], **features}))
    writer.close()
  fields = tuple(f"json.{name}" if kind == "tar" else name for name in ("caption", "other"))
  source = open_source(str(path), captions=fields, images=False)
  records = [source[i] for i in range(3)]
  assert [x["captions"] for x in records] == [(row["caption"],) for row in rows]
  assert [x["texts"][fields[1]] for x in records] == [(row["other"],) for row in rows]
  assert {x["image"] for x in records} == {b""} and len({x["key"] for x in records}) == 3


def test_options_about_images_are_refused(folder):
  data = options(folder)
  for name, value in (
    ("augment", dict(flip=0.5)),
    ("views", dict(local=dict(count=2))),
    ("stores", dict(image=f"{folder}/a")),
    ("teachers", dict(a=dict(image=f"{folder}/a"))),
  ):
    with pytest.raises(ValueError, match=rf"config\.data\.{name}.* but config\.data\.images=False"):
      open_data(data_options(**data | {name: value}))
  inputs = open_data(data_options(**data))
  with pytest.raises(ValueError, match=re.escape("--towers=text")):
    check_source(inputs.source, inputs.options, ("image", "text"))
