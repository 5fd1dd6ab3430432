"""A small run that the tests of the Python API share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import bigalign


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
  """A run of two steps with a sigmoid loss and averages."""
  folder = tmp_path_factory.mktemp("runs") / "small"
  written = bigalign.train(
    "tiny",
    {"model.image.depth": 1, "model.text.depth": 1, "evals": {}, "writer.tensorboard": False},
    workdir=folder,
    total_steps=2,
    batch_size=16,
    checkpoint_every=1,
    model__image__width=32,
    model__text__width=32,
  )
  assert written == str(folder)
  return folder


@pytest.fixture(scope="session")
def pictures():
  """Images of several sizes: portrait, landscape and square."""
  rng = np.random.default_rng(0)
  sizes = ((40, 31), (31, 40), (64, 64), (20, 90), (33, 37))
  return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in sizes]
