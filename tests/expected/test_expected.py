"""The committed numbers equal what their formulas give."""

from __future__ import annotations

import json

import make_images
import make_losses
import make_texts
import make_towers
import numpy as np
from text_formulas import clip_ids, wordpiece_ids
from tower_formulas import outputs


def test_losses():
  cases, arrays = make_losses.make()
  committed = json.loads((make_losses.FOLDER / "oracles.json").read_text())["cases"]
  assert [case["id"] for case in cases] == [case["id"] for case in committed]
  with np.load(make_losses.FOLDER / "oracles.npz") as stored:
    assert stored.files == [*arrays]
    for key, x in arrays.items():
      np.testing.assert_allclose(stored[key], x, rtol=1e-9, atol=1e-12, err_msg=key)
  for case, other in zip(cases, committed, strict=True):
    for one, two in zip(case.get("steps", [case]), other.get("steps", [other]), strict=True):
      for name, x in one["expect"].items():
        np.testing.assert_allclose(two["expect"][name], x, rtol=1e-9, atol=1e-12, err_msg=name)


def test_towers():
  heads = dict(vision=make_towers.HEADS, text=make_towers.TEXT_HEADS)
  for name, tensors, config, io in make_towers.cases():
    with np.load(make_towers.FOLDER / name / "io.npz") as stored:
      for key, x in (io | outputs(tensors, config, io, heads)).items():
        np.testing.assert_allclose(stored[key], x, atol=1e-6, rtol=1e-6, err_msg=f"{name} {key}")


def test_images():
  with np.load(make_images.FOLDER / "io.npz") as stored:
    for i in range(len(make_images.SHAPES)):
      for name, x in make_images.every_output(stored[f"image_{i}"]).items():
        np.testing.assert_allclose(stored[f"out_{name}_{i}"], x, atol=1e-6, err_msg=name)


def test_texts():
  folder = make_texts.FOLDER / "tokenize"
  expected = json.loads((folder / "expected.json").read_text())
  merges, pieces = make_texts.merges(), make_texts.pieces()
  assert expected["texts"] == make_texts.TEXTS
  assert expected["clip77"] == [clip_ids(x, merges, 77) for x in expected["clean_lower"]]
  both = [wordpiece_ids(x, pieces, 24) for x in make_texts.TEXTS]
  assert [list(x) for x in zip(expected["minilm_ids"], expected["minilm_mask"], strict=True)] == [
    list(x) for x in both
  ]
