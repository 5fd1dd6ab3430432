"""ALBEF: contrast with the averaged model and its queues, over several steps."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import at, both_precisions, cases, floats, ids, make, oracles
from helpers.marks import slow_unless

from bigalign import losses, sharding
from bigalign.losses.engine import pairwise
from bigalign.losses.per_sample import tables


def one_step(loss, params, state, feats, batch, context):
  """Gradients of features and temperature, the new state and the metrics."""
  params = loss.constrain(params, params)  # as after the update before
  return of_apply(loss.apply, params, state, feats, batch, context)


@functools.partial(jax.jit, static_argnums=0)
def of_apply(apply, params, state, feats, batch, context):
  def value(params, learned):
    return apply(params, state, {**feats, **learned}, batch, context)

  learned = {k: feats[k] for k in ("zimg", "ztxt")}
  (_, (state, metrics)), (d_params, d_feats) = jax.value_and_grad(value, (0, 1), has_aux=True)(
    params, learned
  )
  return {**d_params, **d_feats}, state, metrics


@both_precisions
@pytest.mark.parametrize("case", cases("albef_itc"))
def test_albef_itc(case, precision):
  rtol = 1e-9 if precision == "float64" else 1e-4
  first = floats(oracles().inputs(case, step=0), precision)
  by_id = "ids" in first
  size = len(first["queue_img"])
  state = {"img": first["queue_img"], "txt": first["queue_txt"], "next": jnp.zeros((), jnp.int32)}
  if by_id:
    state["ids"] = ids(first["queue_ids"])  # an empty place is -100 there
  options = dict(queue_size=size, alpha=1.0)  # and epochs=alpha: a ramp through the case's alphas
  loss = make("albef_itc", options | (dict(positives="ids") if by_id else {}))
  for k, step in enumerate(case["steps"]):
    inputs = floats(oracles().inputs(case, step=k), precision)
    context = at(step=k)._replace(epochs=jnp.asarray(case["params"]["alphas"][k], precision))
    feats = dict(
      zimg=inputs["img"],
      ztxt=inputs["txt"],
      teacher_img=inputs["t_img"],
      teacher_txt=inputs["t_txt"],
    )
    batch = {"image_id": ids(inputs["ids"])} if by_id else {}
    params = {"temperature": jnp.asarray(case["params"]["temps"][k], precision)}
    grads, state, metrics = one_step(loss, params, state, feats, batch, context)
    got = dict(
      loss=metrics["loss"],
      i2t=metrics["i2t"],
      t2i=metrics["t2i"],
      d_temp=grads["temperature"],
      d_img=grads["zimg"],
      d_txt=grads["ztxt"],
      queue_ptr=state["next"],
      state_queue_img=state["img"],
      state_queue_txt=state["txt"],
    )
    wanted = (*step["expect"], *step["arrays"])
    oracles().check(case, got, step=k, rtol=rtol, require=wanted)


def some(size=16, width=8, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  names = ("zimg", "ztxt", "teacher_img", "teacher_txt")
  z = rng.normal(size=(4, size, width))
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  return {name: jnp.asarray(x, dtype) for name, x in zip(names, z)}


def several(loss, dtype, engine, steps=3):
  """Gradients and losses of some steps, and the last state, in float64."""
  params, state = jax.tree.map(
    lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, loss.init({"embed": 8})
  )
  found = []
  for k in range(steps):
    batch = {"image_id": ids(np.arange(12) // 3 + 3 * k)}
    grads, state, metrics = one_step(
      loss,
      params,
      state,
      some(size=12, seed=k, dtype=dtype),
      batch,
      at(epochs=k / 2, engine=engine),
    )
    found.append({**grads, "loss": metrics["loss"]})
  return jax.tree.map(lambda x: np.asarray(x, np.float64), (found, state))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["segment", "ring"])
def test_steps_over_the_mesh_are_the_same(way):
  # Neither 12 anchors nor 12 + 24 keys divide over eight devices.
  options = dict(queue_size=24, positives="ids", local_keys=6)
  with jax.enable_x64(True):
    expected = several(make("albef_itc", options), "float64", pairwise.Engine("dense"))
  with jax.set_mesh(sharding.make_mesh(data=4, fsdp=2)):
    engine = pairwise.Engine(way, tile_mb=1.5e-4)
    found = several(make("albef_itc", options), "float32", engine)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3)),
    found,
    expected,
  )


def test_the_queue_holds_the_newest_keys_in_the_places_of_the_oldest():
  loss = make("albef_itc", dict(queue_size=32))
  params, state = loss.init({"embed": 8})
  np.testing.assert_allclose(jnp.linalg.norm(state["img"], axis=1), 1, rtol=1e-6)
  assert not np.allclose(state["img"], state["txt"])
  for k in range(3):
    _, state, _ = one_step(loss, params, state, some(seed=k), {}, at())
  for side in ("img", "txt"):
    expected = [some(seed=k)[f"teacher_{side}"] for k in (2, 1)]
    np.testing.assert_array_equal(state[side], np.concatenate(expected))
  assert state["next"] == 16


@functools.partial(jax.jit, static_argnums=0)
def after_one_step(apply, *args):
  """The next state alone, for which the compiler drops the loss."""
  return apply(*args)[1][0]


@pytest.mark.parametrize(
  "devices,way",
  slow_unless(
    itertools.product([1, 8], ["dense", "segment", "ring"]),
    [(1, "dense"), (8, "segment")].__contains__,
  ),
)
def test_a_batch_that_passes_the_end_of_the_queue_goes_on_at_its_start(way, devices):
  """As after a stage with another batch size: 16, 32 and 32 keys in a queue of 64."""
  loss = make("albef_itc", dict(queue_size=64, positives="ids"))
  params, state = loss.init({"embed": 8})
  mesh = sharding.make_mesh(data=4, fsdp=2) if devices == 8 else None
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    for k, size in enumerate((16, 32, 32)):
      batch = {"image_id": ids(np.arange(size) + 100 * k)}
      feats, context = some(size=size, seed=k), at(engine=pairwise.Engine(way))
      state = after_one_step(loss.apply, params, state, feats, batch, context)
  assert state["next"] == 16
  for side in ("img", "txt"):
    second, third = (some(size=32, seed=k)[f"teacher_{side}"] for k in (1, 2))
    np.testing.assert_array_equal(state[side], np.concatenate([third[16:], second, third[:16]]))
  expected = np.concatenate([np.arange(216, 232), np.arange(100, 132), np.arange(200, 216)])
  np.testing.assert_array_equal(state["ids"], ids(expected))


# Each way with each dtype and with each mesh; the other pairs of a dtype and a mesh run before a
# release.
@pytest.mark.parametrize(
  "way,dtype,mesh",
  [
    pytest.param(
      way,
      dtype,
      mesh,
      marks=pytest.mark.long
      if (i + j + k) % 2
      else ()
      if (way, dtype) == ("gather", "float32")
      else pytest.mark.slow,
    )
    for i, way in enumerate(("dense", "gather", "segment", "ring"))
    for j, dtype in enumerate(("float32", "bfloat16"))
    for k, mesh in enumerate((dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2)))
  ],
  ids=str,
)
def test_no_device_holds_the_whole_queue(way, dtype, mesh):
  """The largest array of features in the compiled step is a part of the queue, or the batch."""
  size, length, width = 128, 8192, 24
  loss = make("albef_itc", dict(queue_size=length, positives="ids"))
  mesh = sharding.make_mesh(**mesh)

  def shape(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  params, state = jax.eval_shape(lambda: loss.init({"embed": width}))
  state = jax.tree.map(lambda x: shape(x, tables.state_sharding(x, mesh)), state)
  rows, names = sharding.batch_sharding(mesh), ("zimg", "ztxt", "teacher_img", "teacher_txt")
  feats = {name: shape(jax.ShapeDtypeStruct((size, width), jnp.float32), rows) for name in names}
  batch = {"image_id": shape(jax.ShapeDtypeStruct((size, 2), jnp.uint32), rows)}

  def step(params, feats, state, batch):
    value, (after, _) = loss.apply(
      params, state, feats, batch, at(engine=pairwise.Engine(way, dtype))
    )
    return value, after

  kept = ((None, jax.tree.map(lambda x: x.sharding, state)), (None, None))
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(step, (0, 1), has_aux=True), out_shardings=kept)
    text = step.lower(params, feats, state, batch).compile().as_text()
  arrays = [[int(n) for n in dims.split(",")] for dims in re.findall(r"\w\[([\d,]+)\]", text)]
  largest = max(math.prod(dims) // width for dims in arrays if width in dims)
  # The compiler lays a dense matrix out over the batch axes only.
  assert largest <= length // (4 if way == "dense" else 8), largest


@pytest.mark.slow
def test_workers_see_their_own_keys_only():
  """The mean of the halves of a batch, each with the queue."""
  local, alone = (make("albef_itc", dict(queue_size=32, local_keys=n)) for n in (8, None))
  params, state = local.init({"embed": 8})
  feats, context = some(), at(epochs=1.0)
  _, _, metrics = one_step(local, params, state, feats, {}, context)
  halves = [
    one_step(alone, params, state, {k: x[s] for k, x in feats.items()}, {}, context)[2]["loss"]
    for s in (slice(0, 8), slice(8, 16))
  ]
  np.testing.assert_allclose(metrics["loss"], np.mean(halves), rtol=1e-6)
  _, _, metrics = one_step(alone, params, state, feats, {}, context)
  assert metrics["loss"] > np.mean(halves)  # more negatives


def test_the_truth_gives_way_to_the_average_within_the_first_epoch():
  loss = make("albef_itc", dict(queue_size=32, alpha=0.4))
  params, state = loss.init({"embed": 8})
  shares = [
    float(one_step(loss, params, state, some(), {}, at(epochs=e))[2]["alpha"])
    for e in (0, 0.25, 1, 7)
  ]
  np.testing.assert_allclose(shares, [0, 0.1, 0.4, 0.4], rtol=1e-6)


def test_the_temperature_stays_in_its_bounds():
  loss = make("albef_itc", {})
  for given, kept in ((0.7, 0.5), (1e-5, 0.001), (0.02, 0.02)):
    params = {"temperature": jnp.asarray(given)}
    clamped = loss.constrain(params, params)
    np.testing.assert_allclose(clamped["temperature"], kept, rtol=1e-6)


def test_errors_name_the_option():
  loss = make("albef_itc", dict(queue_size=40))
  params, state = loss.init({"embed": 8})
  with pytest.raises(
    ValueError, match=r"queue_size=40 is not a multiple of the batch size 16; try 48"
  ):
    one_step(loss, params, state, some(), {}, at())
  for options, message in (
    (dict(positives="id"), "positives.*'id'.*'ids'"),
    (dict(queue_size=0), "queue_size=0"),
    (dict(local_keys=0), "local_keys=0"),
    (dict(temperature_init=14.0), "temperature_init=14"),
  ):
    with pytest.raises(ValueError, match=r"config\.loss\.albef_itc\." + message):
      make("albef_itc", options)
  losses.check_needs(loss, {"zimg", "ztxt"}, ema=True)
  with pytest.raises(ValueError, match=r"config\.ema is 0"):
    losses.check_needs(loss, {"zimg", "ztxt"})
