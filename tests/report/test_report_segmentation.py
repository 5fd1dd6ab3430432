"""The pictures of segmentation that a report makes of a run."""

from __future__ import annotations

import io

import jax
import numpy as np
import pytest
from einops import rearrange
from helpers import made_runs
from helpers.small_shards import write_tar
from PIL import Image

from bigalign.evaluate import open_run
from bigalign.report import main

NAMES = ["sky", "sea", "red kites", "a dog", "snow", "many people", "moon", "car"]


def png(array) -> bytes:
  file = io.BytesIO()
  Image.fromarray(array).save(file, "png")
  return file.getvalue()


@pytest.fixture
def run(tmp_path):
  """A run with random parameters, and with the labels of one evaluator on this machine."""
  rng = np.random.default_rng(0)
  members = []
  for i in range(3):
    members.append((f"{i}.jpg", png(rng.integers(0, 256, (32, 32, 3), np.uint8))))
    members.append((f"{i}.seg.png", png(rng.integers(0, 8, (32, 32), np.uint8))))
  (tmp_path / "classes.txt").write_text("\n".join(NAMES))
  of_both = dict(type="segmentation", classnames=f"{tmp_path}/classes.txt", templates=["a {c}"])
  evals = dict(
    here=of_both | dict(source=write_tar(tmp_path / "val.tar", members), batch_size=8),
    away=of_both | dict(source=str(tmp_path / "away.tar")),
  )
  c = made_runs.small(evals=evals)
  c["model"]["image"]["pool"] = "mean"
  return open_run(made_runs.write(tmp_path / "run", c, made_runs.random_params(c)))


@pytest.mark.slow
def test_a_report_shows_what_the_evaluator_finds(run, caplog):
  """With the classes that have the largest cosines; data that is elsewhere is left out."""
  shown = main.segmented(run)
  assert [*shown] == ["here"] and "no images of config.evals.away" in caplog.text
  found = shown["here"]
  assert found.names == NAMES and found.images.shape == (3, 32, 32, 3)
  assert {*np.unique(found.labels)} == {*range(8)} and len(np.unique(found.found)) > 1
  with jax.set_mesh(run.mesh):
    patches = np.asarray(run.embed["embed_patches"](run.params, found.images))
    ids, mask = run.config.data.make_tokenizer().encode_batch([f"a {name}" for name in NAMES])
    texts = np.asarray(run.embed["embed_text"](run.params, ids, mask))
  cosines = rearrange(patches @ texts.T, "b (h w) k -> b h w k", h=round(patches.shape[1] ** 0.5))
  wanted = jax.image.resize(cosines, (3, 32, 32, len(NAMES)), "bilinear").argmax(-1)
  assert (np.asarray(wanted) == found.found).mean() > 0.999  # but for ties
