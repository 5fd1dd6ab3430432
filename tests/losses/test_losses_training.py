"""Losses in the loop: what they remember is kept over kills and meshes; what is looked at now and
then; what stops a run."""

from __future__ import annotations

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import assert_same_bits, exact, run, tiny  # noqa: F401

from bigalign import losses, sharding
from bigalign import state as states
from bigalign.data.loader import training
from bigalign.losses.per_sample import tables
from bigalign.plan import loss_costs
from bigalign.run.metrics import read_metrics
from bigalign.step import train_step

STATEFUL = dict(
  isogclr=dict(tau_init=0.07), fastclip_v2=dict(gamma_over="4 steps"), albef_itc=dict(queue_size=64)
)


@pytest.mark.slow
def test_what_losses_remember_is_resumed(tiny, tmp_path):  # noqa: F811
  """To the bit on the same mesh; on another, equal to the rounding of float32."""
  tiny.loss = STATEFUL
  tiny.mesh = dict(data=4, fsdp=2)
  whole = run(tmp_path / "whole", tiny)
  for copy in ("same", "other"):
    shutil.copytree(tmp_path / "whole", tmp_path / copy)
    shutil.rmtree(tmp_path / copy / "checkpoints" / "8")
  assert_same_bits(whole, run(tmp_path / "same", tiny))
  assert exact(tmp_path / "whole") == exact(tmp_path / "same")
  tiny.mesh = dict(data=2, fsdp=1, tensor=4)
  other = run(tmp_path / "other", tiny)
  remembered = set()
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(whole.loss), jax.tree.leaves(other.loss), strict=True
  ):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
    a, b = (np.where(np.isfinite(x), x, 0) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    if np.unique(a).size > 2:
      remembered.add(jax.tree_util.keystr(path, simple=True, separator="/").split("/")[0])
  assert remembered == {*STATEFUL}


@pytest.mark.slow
def test_tables_are_spread_over_the_mesh_and_visited_by_id(tiny, tmp_path):  # noqa: F811
  tiny.loss = dict(sogclr={})
  tiny.total_steps, tiny.checkpoint_every = 2, 0
  tiny.mesh = dict(data=2, fsdp=2, tensor=2)
  state = run(tmp_path, tiny)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in jax.tree_util.tree_leaves_with_path(state.loss)
  }
  for name, x in arrays.items():
    assert x.sharding.shard_shape(x.shape)[0] * 8 == x.shape[0], name
  seen = np.isfinite(np.asarray(arrays["sogclr/img/log_u"])).sum()
  assert seen == 2 * 16, "as many images as two batches hold"


@pytest.mark.slow
def test_diagnostics_are_logged_now_and_then(tiny, tmp_path):  # noqa: F811
  tiny.loss = dict(clip={}, isogclr=dict(tau_init=0.07), clip_gap=dict(weight=0.1))
  tiny.total_steps, tiny.checkpoint_every, tiny.diagnose_every = 4, 0, 2
  run(tmp_path, tiny)
  rows = [r for r in read_metrics(tmp_path) if "train/hardest_negative/image" in r]
  assert [row["step"] for row in rows] == [2, 4]
  for row in rows:
    shares = [row[f"train/gradient_share/{name}"] for name in ("clip", "isogclr", "clip_gap")]
    assert min(shares) > 0
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-5)
    assert -1 <= row["train/hardest_negative/text"] <= 1
    assert 0 <= row["train/rank_1/image"] <= 1 and 0 <= row["train/saturation/text"] <= 1
    assert row["train/temperature/image/p5"] <= row["train/temperature/image/p95"]
    histogram = {k: x for k, x in row.items() if re.search(r"temperature/text/\d", k)}
    np.testing.assert_allclose(sum(histogram.values()), 1, rtol=1e-6)
    median, shares = row["train/temperature/text/p50"], 0.0
    for name in sorted(histogram, key=lambda k: float(k.split("-")[-1])):
      shares += histogram[name]
      if median * (1 + 1e-6) < float(name.split("-")[-1]):  # 0.005 is a bound of both
        break
    assert shares >= 0.5 and histogram[name] > 0, "the median lies in this bin"


def test_hardest_negatives_and_saturation_by_hand():
  rng = np.random.default_rng(0)
  x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in rng.normal(size=(2, 12, 6)))
  y[:4] = x[:4]
  loss = losses.make_loss(dict(clip=dict(t_init=20.0)))
  params, state = loss.init({})
  feats = {"zimg": jnp.asarray(x, jnp.float32), "ztxt": jnp.asarray(y, jnp.float32)}
  from helpers.loss_oracles import AT

  from bigalign.losses.diagnostics import diagnose

  found = diagnose(loss, params, state, feats, {}, AT)
  s = x @ y.T
  others = np.where(np.eye(12, dtype=bool), -np.inf, s)
  p = np.exp(20 * s) / np.exp(20 * s).sum(1, keepdims=True)
  np.testing.assert_allclose(found["hardest_negative/image"], others.max(1).mean(), rtol=1e-5)
  np.testing.assert_allclose(found["hardest_negative/text"], others.max(0).mean(), rtol=1e-5)
  np.testing.assert_allclose(found["rank_1/image"], (np.diag(s) > others.max(1)).mean())
  np.testing.assert_allclose(found["saturation/image"], (np.diag(p) > 0.99).mean())


def test_an_id_out_of_range_stops_the_run(tiny, tmp_path, monkeypatch):  # noqa: F811
  tiny.loss = dict(sogclr={})
  words = training.words
  beyond = 1 << 40
  monkeypatch.setattr(training, "words", lambda ids: words(np.where(ids == ids.max(), beyond, ids)))
  with pytest.raises(ValueError, match=r"image_id: id 1099511627776 in row \d+ .*with ids 0 to"):
    run(tmp_path, tiny)


def test_only_a_loss_with_a_memory_bounds_the_ids(tiny, tmp_path, monkeypatch):  # noqa: F811
  """SigLIP compares ids and keeps nothing of them: any 64 bits will do."""
  tiny.loss, tiny.total_steps, tiny.checkpoint_every = dict(siglip=dict(positives="ids")), 1, 0
  words = training.words
  monkeypatch.setattr(training, "words", lambda ids: words(ids + (1 << 40)))
  assert int(run(tmp_path, tiny).step) == 1


def test_a_step_writes_what_it_remembers_in_place(tiny):  # noqa: F811
  """The whole step, compiled for 10^8 images: no second table, whatever a step decides."""
  tiny.loss = dict(isogclr={})
  grid = sharding.make_mesh(data=4, fsdp=2)
  program = states.make_program(**tiny.to_dict(), dataset_size=10**8, captions_per_image=1)
  abstract, placed = states.layout(program, grid)

  def array(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  state = jax.tree.map(array, abstract, placed)
  batch = {
    name: array(jax.ShapeDtypeStruct(*shape), sharding.batch_sharding(grid))
    for name, shape in program.spec.items()
  }
  with jax.set_mesh(grid):
    compiled = (
      jax.jit(
        functools.partial(train_step, program=program),
        donate_argnums=0,
        out_shardings=(placed, sharding.replicated_sharding(grid)),
      )
      .lower(state, batch, jax.ShapeDtypeStruct((2,), jnp.float32))
      .compile()
    )
  memory = compiled.memory_analysis()
  tables_of_a_device = 6 * 4 * 10**8 / 8  # u, tau and momentum, of images and texts
  assert memory.alias_size_in_bytes >= tables_of_a_device
  assert memory.temp_size_in_bytes < 0.1 * tables_of_a_device / 6


def test_a_state_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):  # noqa: F811
  """A table of NaNs, as a damaged disk could leave it: the first batch that reads it is named.

  Of iSogCLR's momentum, which moves the temperatures but not the loss of this step.
  """
  tiny.loss = dict(isogclr={})
  make = tables.make
  monkeypatch.setattr(tables, "make", lambda n, fill: make(n, fill if fill else float("nan")))
  with pytest.raises(FloatingPointError, match=r"step 1: state not finite.*remembers"):
    run(tmp_path, tiny)


def test_a_field_that_the_data_lacks_is_named_before_the_first_step(tiny, tmp_path):  # noqa: F811
  tiny.loss = dict(clip_distill={})
  with pytest.raises(ValueError, match=r"needs 'teacher'.*'teacher_img'"):
    run(tmp_path, tiny)
  tiny.loss, tiny.ema = dict(albef_itc=dict(queue_size=64)), 0.0
  with pytest.raises(ValueError, match=r"config\.ema"):
    run(tmp_path, tiny)
  assert not (tmp_path / "config.json").exists()


def test_the_need_of_a_loss_is_told_before_the_run():
  """SogCLR: a matrix for g, a matrix for the weights, whose columns bring their own scalars."""
  sizes = {"image": 10**9, "text": 10**9}
  loss = losses.make_loss(dict(sogclr={}, clip=dict(weight=0.5)))
  batch = loss_costs.fields(64, 16)
  text = losses.summary(loss, sizes, batch, batch)
  assert "1 sogclr + 0.5 clip" in text and "image_id" in text
  assert "remembers 8,000.5 MB over all devices" in text
  assert "forms 3 matrices, for which 18, 19, 17 numbers of each pair travel" in text
