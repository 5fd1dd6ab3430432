"""The record of a run, config.json."""

from __future__ import annotations

import json
import random

import pytest

from bigalign.run.provenance import read_config, write_config

META = {"config": {"lr": 1e-3, "model": {"dim": 32}}, "model": {}, "versions": {"jax": "0.10.2"}}


def test_a_changed_bit_of_the_record_is_found_and_the_file_named(tmp_path):
  write_config(tmp_path, META)
  path = tmp_path / "config.json"
  good, draw, refused = path.read_bytes(), random.Random(0), 0
  assert read_config(tmp_path) == META
  for _ in range(200):
    bit, data = draw.randrange(8 * len(good)), bytearray(good)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
      found = read_config(tmp_path)
    except ValueError as error:
      assert str(path) in str(error) and "copy checkpoints/STEP/meta/metadata" in str(error)
      refused += 1
    else:
      # The key of the checksum, or white space.
      assert {name: found[name] for name in META} == META
  assert refused > 150


def test_a_record_of_an_older_version_or_one_that_was_edited_on_purpose_is_read(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(META))
  assert read_config(tmp_path) == META
  for text in ("", "[]", "{}", '{"config": 3}', "[" * 100_000):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / "config.json")):
      read_config(tmp_path)
