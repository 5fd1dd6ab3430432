"""Runs on samples of several images, whose embeddings are averaged: config.data.frames."""

from __future__ import annotations

import functools
import io
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_runs
from helpers.loss_oracles import cases2, oracles2
from helpers.small_models import SIGLIP, SIGLIP_LOSS, make_run
from helpers.small_shards import picture, write_tar
from PIL import Image

import bigalign
from bigalign import sharding, sphere, tree
from bigalign.api.embedding import embed_source
from bigalign.config import resolve_config
from bigalign.data.sources.base import open_source
from bigalign.data.stores.reader import Store
from bigalign.export import check
from bigalign.export import main as export
from bigalign.frozen.embed import embed
from bigalign.model import DualEncoder, mean_over_frames
from bigalign.plan import compile_step
from bigalign.projectors import PROJECTORS
from bigalign.report.main import report
from bigalign.run.metrics import read_metrics
from bigalign.towers.base import TowerOutput
from bigalign.train import train

SAMPLES, F = 40, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """One to five images of each sample."""
  members = []
  for i in range(SAMPLES):
    members += [(f"{i:03}.{k}.jpg", picture(9 * i + k)) for k in range(1 + i % 5)]
    members += [(f"{i:03}.cls", f"{i % 3}".encode()), (f"{i:03}.txt", f"{i}".encode())]
  folder = tmp_path_factory.mktemp("frames")
  (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
  return write_tar(folder / "0.tar", members)


def config(source, **changes):
  more = {"total_steps": 2, "checkpoint_every": 0, "data.source": source, "batch_size": 16}
  c = small_runs.config(dict(data=-1), **more).to_dict()
  data = {k: x for k, x in c["data"].items() if k != "augment"}
  c["data"] = {**data, "frames": dict(count=F)}
  c["evals"] = {
    "val": dict(type="retrieval", source=source, batch_size=16),
    "zero": dict(type="zeroshot", source=source, templates="name", batch_size=16),
  }
  return {**c, "ema": 0.0, **changes}


@pytest.mark.parametrize("case", cases2("frame_pool"))
@pytest.mark.parametrize("dtype,rtol", [("float64", 1e-9), ("float32", 1e-4)])
def test_the_embedding_of_frames(case, dtype, rtol):
  with jax.enable_x64():
    frames = jnp.asarray(oracles2().inputs(case)["frames"], dtype)
    pooled = mean_over_frames(frames.reshape(-1, frames.shape[-1]), frames.shape[1])
    oracles2().check(case, {"emb": sphere.unit(pooled)}, rtol=rtol, require=["emb"])


class Tower(nn.Module):
  """Two tokens of an image, and their maximum."""

  @nn.compact
  def __call__(self, image, train=False):
    halves = image.reshape(len(image), 2, -1)
    tokens = nn.Dense(4, name="tokens")(halves)
    return TowerOutput(tokens.max(1), tokens)


def test_projected_vectors_are_averaged():
  images = np.random.default_rng(0).integers(0, 256, (2, F, 4, 4, 3), np.uint8)
  projectors = [PROJECTORS["linear"](5, name=f"{side}_projector") for side in ("image", "text")]
  model = DualEncoder(Tower(), Tower(), *projectors, pixels="half")
  params = jax.jit(functools.partial(model.init, method="embed_image"))(
    jax.random.key(0), images[:, 0]
  )
  apply = jax.jit(lambda x: model.apply(params, x, False, method="_image"))
  projected, out = apply(images)
  each = [apply(images[:, k]) for k in range(F)]
  np.testing.assert_allclose(projected, np.mean([x for x, _ in each], 0), rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(out.pooled, np.mean([x.pooled for _, x in each], 0), rtol=1e-6)
  np.testing.assert_array_equal(out.tokens, np.concatenate([x.tokens for _, x in each], 1))
  jax.tree.map(np.testing.assert_array_equal, apply(images[:, :1]), each[0])


@pytest.mark.slow
def test_a_run_trains_and_is_evaluated_embedded_searched_and_planned(source, tmp_path):
  whole = config(source)
  train(whole, tmp_path / "whole")
  names = {name for row in read_metrics(tmp_path / "whole") for name in row}
  assert {"val/text_to_image_R@1", "val/zero-zeroshot-val-top1"} <= names
  assert "<img" in report(tmp_path / "whole").read_text()

  model = bigalign.load(tmp_path / "whole")
  apply = jax.jit(model.apply)
  pixels = model.preprocess([np.full((9, 9, 3), 7 * i, np.uint8) for i in range(2)])[:, 0]
  single, one = (apply(model.params, x)["zimg"] for x in (pixels, pixels[:, None]))
  np.testing.assert_array_equal(one, single, err_msg="one frame is the image")
  opened = open_source(source, frames=True)
  clips = [opened[i]["image"] for i in range(SAMPLES)]
  expected = model.embed_images(clips)
  assert model.preprocess(clips[:2]).shape[1] == F
  file, (first, *others) = io.BytesIO(), [Image.open(io.BytesIO(x)) for x in clips[2]]
  first.save(file, "webp", save_all=True, append_images=others, lossless=True)
  np.testing.assert_allclose(model.embed_images(file.getvalue())[0], expected[2], atol=2e-6)
  one = model.embed_images(clips[0][0])[0]
  np.testing.assert_allclose(one, expected[0], atol=2e-6, err_msg="an image is one frame")

  found = embed_source(model, opened, tmp_path / "search", dtype="float32", batch_size=16)
  np.testing.assert_allclose(found.read(np.arange(SAMPLES)), expected, atol=2e-6)
  tuned = {**whole, "model": dict(init=str(tmp_path / "whole"))}
  stores = embed(
    tuned, tmp_path / "stores", sides=("image",), dtype="float32", projected=True, batch_size=16
  )
  stored = Store(stores["image"])
  np.testing.assert_allclose(stored.read(np.arange(SAMPLES)), expected, atol=2e-6)
  assert stored.header["frames"] == F

  step = compile_step.trace_on(sharding.make_mesh(), resolve_config(whole), samples=SAMPLES)
  size = whole["data"]["image_size"]
  assert step.batch["image"].shape == (16, F, size, size, 3)


@pytest.mark.slow
def test_an_exported_model_takes_single_frames_and_averages_them_when_it_is_loaded(tmp_path):
  tokenizer = dict(name="byte", length=16)
  run = make_run(tmp_path, SIGLIP, SIGLIP_LOSS, tokenizer, frames=dict(count=2))
  out, difference = export.export(run, "hf", tmp_path / "folder")
  assert difference is None or difference < check.TOLERANCE
  trained, images = export.trained_model(run), export.sample_images()
  variables = {"params": tree.unflatten({k: x for k, x in trained.arrays.items() if "/" in k})}
  single = trained.data.stacked([trained.data.evaluation_view(x) for x in images])
  frames = trained.data.stacked(
    [trained.data.evaluation_view([x, y]) for x, y in itertools.pairwise(images)]
  )
  with jax.default_matmul_precision("highest"):
    embed = jax.jit(lambda x: trained.model.apply(variables, x, False, method="_image")[0])
    of_frames, raw = (np.asarray(embed(x)) for x in (frames, single))
  np.testing.assert_allclose(of_frames, (raw[:-1] + raw[1:]) / 2, rtol=1e-4, atol=1e-5)
  expected = of_frames / np.linalg.norm(of_frames, axis=-1, keepdims=True)
  loaded = bigalign.load(out)
  np.testing.assert_allclose(
    loaded.embed_images([*itertools.pairwise(images)]), expected, atol=1e-4
  )
