"""Runs whose images are patches in their own aspect: config.data.naflex."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_runs
from helpers.small_shards import picture, write_tar

import bigalign
from bigalign import sharding
from bigalign.api.embedding import embed_source
from bigalign.config import resolve_config
from bigalign.data.image.naflex import Patches
from bigalign.data.sources.base import open_source
from bigalign.data.stores.reader import Store
from bigalign.evaluate import open_run
from bigalign.frozen.embed import embed
from bigalign.inputs import open_data, staged_batches
from bigalign.plan import compile_step
from bigalign.program import check_stages, make_programs
from bigalign.report.main import report
from bigalign.run.metrics import read_metrics
from bigalign.stages import split
from bigalign.train import train

SIZES = ((20, 40), (40, 20), (24, 24))
TOWER = dict(name="naflex", patch=8, grid=3, width=16, depth=1, heads=2, dtype="float32")
NAFLEX = dict(lengths=(4, 9), tokens_per_batch=900, patch=8)
STEPS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  members = []
  for i in range(48):
    members += [(f"{i:03}.jpg", picture(i, size=SIZES[i % 3])), (f"{i:03}.txt", f"{i}".encode())]
  return write_tar(tmp_path_factory.mktemp("naflex") / "0.tar", members)


def config(source, **changes):
  more = {"total_steps": STEPS, "checkpoint_every": 2, "data.source": source, "batch_size": 32}
  c = small_runs.config(dict(data=-1), **more).to_dict()
  data = {k: x for k, x in c["data"].items() if k != "augment"}
  c["model"] = {**c["model"], "image": TOWER}
  c["data"] = {**data, "image_size": 16, "naflex": NAFLEX}
  c["evals"] = dict(val=dict(type="retrieval", source=source, batch_size=16))
  return {**c, "ema": 0.0, **changes}


@pytest.mark.slow
def test_the_embedding_does_not_depend_on_padding(source):
  options = resolve_config(config(source))
  model, data = options.model.build(), options.data
  images = [
    np.asarray(x) for x in np.random.default_rng(0).integers(0, 256, (3, 20, 40, 3), np.uint8)
  ]
  views = data.stacked([data.evaluation_view(x) for x in images])
  params = jax.jit(model.init)(jax.random.key(0), views, jnp.zeros((3, 4), jnp.int32))
  embed = jax.jit(lambda x: model.apply(params, x, method="embed_image"))
  noise = np.random.default_rng(1).integers(0, 256, (3, 7, 192), np.uint8)
  padded = Patches(
    np.concatenate([views.pixels, noise], 1),
    np.concatenate([views.mask, np.zeros((3, 7), bool)], 1),
    views.shapes,
  )
  np.testing.assert_allclose(embed(padded), embed(views), atol=2e-6)
  assert np.abs(embed(views._replace(shapes=views.shapes[:, ::-1])) - embed(views)).max() > 1e-4


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_lengths_and_batch_sizes_go_on_after_a_stop_on_other_hosts(source, hosts):
  options = resolve_config(config(source))
  inputs, stages = open_data(options.data), split(options, dataset_size=48)

  def sequence(hosts, step, start):
    rows = [{n: np.arange(0, n, hosts) for n in stages[0].batch_sizes}]
    batches = staged_batches(
      stages, inputs, rows=rows, step=step, start=start, seed=options.seed, rejected_log=""
    )
    with contextlib.closing(batches):
      return [(x["image"].shape[1], size, x["image_id"].tolist()) for _, size, x in batches]

  whole = sequence(1, 0, 0)
  assert len(whole) == STEPS and len({(n, size) for n, size, _ in whole}) == 2
  start = sum(size for _, size, _ in whole[:2])
  for (n, size, ids), (m, other, own) in zip(whole[2:], sequence(hosts, 2, start), strict=True):
    assert (n, size) == (m, other) and own == ids[::hosts]


@pytest.mark.slow
def test_a_run_trains_stops_goes_on_and_is_opened(source, tmp_path):
  whole = config(source)
  train(whole, tmp_path / "whole")
  rows = [row for row in read_metrics(tmp_path / "whole") if "train/loss" in row]
  schedule = split(resolve_config(whole), dataset_size=48)[0].schedule
  drawn = [schedule.at(k) for k in range(STEPS)]
  assert [(row["train/patches"], row["train/batch_size"]) for row in rows] == drawn
  assert [row["train/samples_seen"] for row in rows] == np.cumsum([b for _, b in drawn]).tolist()
  assert len({row["perf/flops_per_step"] for row in rows}) == 2

  train({**whole, "total_steps": 2}, tmp_path / "stopped")
  train(whole, tmp_path / "stopped", allow_config_change=True)
  a, b = (open_run(tmp_path / name) for name in ("whole", "stopped"))
  assert a.meta["samples_seen"] == b.meta["samples_seen"]
  model = bigalign.load(tmp_path / "whole")
  images = [np.full((h, w, 3), 9, np.uint8) for h, w in SIZES]
  assert model.preprocess(images).pixels.shape == (3, 9, 192)
  assert model.embed_images(images).shape == (3, model.embed_dim)
  assert "<img" in report(tmp_path / "whole").read_text()

  photos = open_source(source)
  expected = model.embed_images([photos[i]["image"] for i in range(len(photos))])
  found = embed_source(model, photos, tmp_path / "search", dtype="float32", batch_size=16)
  np.testing.assert_allclose(found.read(np.arange(len(photos))), expected, atol=2e-6)
  tuned = {**whole, "model": dict(init=str(tmp_path / "whole"))}
  options = dict(sides=("image",), dtype="float32", projected=True, batch_size=16)
  stored = Store(embed(tuned, tmp_path / "stores", **options)["image"])
  np.testing.assert_allclose(stored.read(np.arange(len(photos))), expected, atol=2e-6)
  assert (stored.header["patches"], stored.header["patch_size"]) == (9, 8)

  step = compile_step.trace_on(sharding.make_mesh(), resolve_config(whole), samples=48)
  figures = compile_step.sizes(step)
  assert figures["batch_size"] == 8 and step.batch["image"].shape == (8, 9, 192)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(model=dict(image=dict(name="vit", patch=8, width=16, depth=1, heads=2))), "it needs"),
    (dict(data=dict(naflex=dict(NAFLEX, patch=16))), "makes patches of 16 pixels"),
    (dict(stages=(dict(until="50%", batch_size=16),)), "config.stages count samples"),
    (dict(loss=dict(sparc=dict(weight=1.0))), "reads the tokens of images without a mask"),
  ],
)
def test_what_does_not_fit_is_named(source, changes, message):
  c = config(source)
  for name, value in changes.items():
    c[name] = {**c[name], **value} if name in ("model", "data") else value
  with pytest.raises(ValueError, match=message):
    make_programs(resolve_config(c), dataset_size=48)


def test_a_batch_that_does_not_divide_over_the_mesh_is_named(source):
  options = resolve_config(config(source, microbatches=3))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with pytest.raises(ValueError, match="microbatches=3 does not divide") as error:
    check_stages(split(options, dataset_size=48), mesh)
  assert "multiple" in error.value.__notes__[0]
