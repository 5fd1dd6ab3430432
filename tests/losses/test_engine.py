"""Every loss, way to form the logits, number of devices and of microbatches: equal numbers."""

from __future__ import annotations

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import at, ids, unit
from helpers.marks import slow_unless

from bigalign import gradcache, losses, sharding
from bigalign.losses.engine import exchange, pairwise

B, E, M = 160, 16, 3
SIZES = {"image": 300, "text": 400, "embed": E}
# What a default is too large or does not fit for.
OPTIONS = {"albef_itc": {"queue_size": 2 * B}}

# Options that change the tile function, or the columns that are communicated.
VARIANTS = [
  ("albef_itc", {"positives": "ids"}),
  ("alignclip", {"separate_text": False}),
  ("clip", {"label_smoothing": 0.1, "b_init": -1.0}),
  ("clip", {"texts": "uniform"}),
  ("clip", {"texts": "sum_inside"}),
  ("clip", {"texts": "per_ordinal"}),
  ("clip", {"texts": "per_class_token"}),
  ("fastclip_v0", {"tau_gradient": "consistent"}),
  ("fastclip_v2", {"weighting": "rgcl"}),
  ("drrho", {"gamma": 0.5, "tau_learned": True, "w_distill": 0.5, "teacher_dims": (7, 9)}),
  ("drrho", {"texts": "set", "gamma": 0.5, "tau_learned": True, "w_distill": 0.5}),
  ("fastclip_v2", {"texts": "set"}),
  ("fastclip_v3", {"tau_gradient": "consistent", "gamma_schedule": "constant"}),
  ("focal_itc", {"detach_weight": True}),
  ("isogclr", {"variant": "released", "eta_schedule": "cosine"}),
  ("m2mix", {"m2_average": True, "decay": True, "t_learned": True}),
  ("m3co", {"soft_after": 0.0, "detach_targets": True}),
  ("m3mix", {"m2_average": True, "t_learned": True}),
  ("matryoshka", {"shared": False, "dims": (4, 16), "reduction": "mean"}),
  ("matryoshka", {"base": "sogclr", "dims": (4, 16)}),
  ("mobileclip_dr", {"second_text": True, "teacher_dims": (7, 9), "teacher_scales": (50.0, 80.0)}),
  ("mobileclip_dr", {"texts": "per_ordinal", "teacher_dims": (7, 9)}),
  ("sail", {"texts": "all"}),
  ("siglip", {"positives": "ids", "reduction": "mean_all"}),
  ("siglip", {"texts": "texts"}),
  ("siglip", {"texts": "images", "positives": "ids"}),
  ("siglip", {"texts": "per_class_token"}),
  ("siglip_distill", {"form": "signed"}),
  ("siglip_distill", {"texts": "pairs"}),
  ("softclip_m3co", {"detach_targets": True}),
  ("sogclr", {"variant": "released"}),
  ("unicl", {"texts": "uniform"}),
]


def small(way, mesh, rows=B):
  """Tiles of 7 columns and at least 8 segments: neither divides the columns of a device."""
  devices = mesh.size if mesh else 1
  return pairwise.Engine(way, tile_mb=7.5 * 4 * rows / devices / 1e6, budget_mb=rows * E / 1e6)


def example(dtype, repeated=False):
  """Inputs of two linear towers, and all batch fields that a loss may read.

  Args:
    dtype: of the floating arrays.
    repeated: whether most images and texts are several times in the batch.
  """
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  def teacher():
    return unit(normal(B, E))

  batch = {
    "img": normal(B, 12),
    "txt": normal(B, 12),
    "second": normal(B, 12),
    "patches": normal(B, 6, 5),
    "words": normal(B, 4, 5),
    "mask": jnp.asarray(rng.random((B, 4)) < 0.7).at[:, 0].set(True),
    "teacher_img": teacher(),
    "teacher_txt": teacher(),
    "teacher_txt_second": teacher(),
    "label": jnp.asarray(rng.integers(-1, 5, B), jnp.int32),
    "noise_prob": jnp.asarray(rng.random(B), dtype),
    "image_id": ids(rng.permutation(SIZES["image"])[:B] // (4 if repeated else 1)),
    "text_id": ids(rng.permutation(SIZES["text"])[:B] // (4 if repeated else 1)),
  }
  towers = {
    "img": normal(12, E),
    "txt": normal(12, E),
    "patches": normal(5, E),
    "words": normal(5, E),
  }
  batch |= {
    "texts": normal(B, M, 12),
    "texts_kind": jnp.asarray(rng.integers(0, 3, (B, M)), jnp.int32).at[:, 0].set(1),
    "teacher_txts": unit(normal(B, M, E)),
    "teacher_img_stored": normal(B, E),
    "teacher_txt_stored": normal(B, E),
  }
  return towers, batch


def embed(params, batch, key, dropout=0.0):
  """All features that a model can provide, computed for each row alone."""
  images = batch["img"]
  if dropout:  # without it nothing is drawn, so that each copy of a model works for itself
    images = jnp.where(jax.random.bernoulli(key, 1 - dropout, images.shape), images, 0)
  raw = {
    "img": images @ params["img"],
    "txt": batch["txt"] @ params["txt"],
  }
  second, texts = (batch[k] @ params["txt"] for k in ("second", "texts"))
  query, document = (texts[:, k] for k in (1, 2))
  slow = {f"teacher_{k}": jax.lax.stop_gradient(unit(x[:, ::-1])) for k, x in raw.items()}
  return {
    **slow,
    **{f"raw_{k}": x for k, x in raw.items()},
    **{f"z{k}": unit(x) for k, x in raw.items()},
    "ztxt_second": unit(second),
    "ztxts": unit(texts),
    "zimgs": unit(jnp.stack([jnp.roll(raw["img"], k, axis=1) for k in range(2)], 1)),
    "zquery": unit(query),
    "zdocument": unit(document),
    "tokens_img": batch["patches"] @ params["patches"],
    "tokens_txt": batch["words"] @ params["words"],
    "mask_txt": batch["mask"],
  }


def step(name, options, dtype, way, mesh, microbatches, dropout=0.0):
  """(objective, metrics["loss"], state, gradients) of one loss."""
  towers, batch = example(dtype, repeated=options.get("positives") == "ids")
  loss = losses.make_loss({name: OPTIONS.get(name, {}) | options})
  own, state = loss.init(SIZES)
  own, state = jax.tree.map(
    lambda x: jnp.asarray(x, dtype) if x.dtype == jnp.float32 else x, (own, state)
  )
  params = {"towers": towers, "loss": own}

  def run(params, state, batch):
    def objective(params, feats):
      context = at(step=3, epochs=1.25, engine=small(way, mesh))
      value, (after, logs) = loss.apply(params["loss"], state, feats, batch, context)
      return value, (logs["loss"], after)

    (value, (logged, after)), grads = gradcache.value_and_grad(
      lambda params, batch, key: embed(params["towers"], batch, key, dropout),
      objective,
      params,
      batch,
      jax.random.key(1),
      microbatches=microbatches,
    )
    return value, logged, after, grads

  if mesh is None:
    return jax.jit(run)(params, state, batch)
  with jax.set_mesh(mesh):
    batch = {k: jax.device_put(x, sharding.batch_sharding(mesh)) for k, x in batch.items()}
    return sharding.block_on_cpu(jax.jit(run)(params, state, batch))


def grid():
  return sharding.make_mesh(data=4, fsdp=2)


@functools.cache
def truth(name, **options):
  """float64, dense, one device."""
  with jax.enable_x64(True):
    found = step(name, options, jnp.float64, "dense", None, 1)
    return jax.tree.map(np.asarray, found)


def same(found, expected, rtol=1e-5):
  """Asserts that each array is within rtol of its largest element.

  A gradient that should be zero is compared with the largest gradient.
  """
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected[3]))

  def one(path, a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    where = jax.tree_util.keystr(path)
    assert np.array_equal(np.isfinite(a), np.isfinite(b)), f"{where} is not finite"
    a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
    top = np.abs(b).max() if b.size else 0.0
    floor = largest * 1e-6 if where.startswith("[3]") else 1e-6
    # iSogCLR's momentum is a difference of exponents of a hundred, at tau = 0.01.
    close = 5e-5 if where.endswith("['m']") else rtol
    off = np.abs(a - b).max()
    assert off <= close * max(top, floor), f"{where}: {off} of {top}"

  jax.tree_util.tree_map_with_path(one, tuple(found), tuple(expected))


# Each loss in two ways, one of which streams columns (segment, ring), on eight devices in four
# microbatches; the losses take turns, so that each way meets a quarter of them or more. The rest of
# the matrix runs before a release: on one device a gather or a ring is a segment of all columns.
MESH = (8, 4)
ALONE = (1, 1)
TURNS = (
  {"dense": MESH, "ring": MESH},
  {"gather": MESH, "segment": MESH},
  {"dense": MESH, "segment": ALONE},
  {"gather": MESH, "ring": MESH},
)
# The losses of mixed pairs compile three to nine losses; one way shows what the mixing adds.
MIXED = ("m2mix", "m3co", "m3mix")


def _turns(name, turn):
  """The ways of a loss that run each time."""
  return dict([*turn.items()][:1]) if name in MIXED else turn


MATRIX = [
  pytest.param(
    name,
    way,
    devices,
    microbatches,
    marks=pytest.mark.slow
    if _turns(name, turn).get(way) == (devices, microbatches)
    else pytest.mark.long,
  )
  for name, turn in zip(sorted(losses.LOSSES), itertools.cycle(TURNS))
  for way in ("dense", "gather", "segment", "ring")
  for devices in (1, 8)
  for microbatches in (1, 4)
]


@pytest.mark.parametrize("name,way,devices,microbatches", MATRIX)
def test_equal_in_every_way(name, way, devices, microbatches):
  mesh = grid() if devices == 8 else None
  same(step(name, {}, jnp.float32, way, mesh, microbatches), truth(name))


# Segments and rings take turns over the variants; the rest runs before a release: a gather is one
# segment, and a dense matrix has no tiles that options could change.
@pytest.mark.parametrize(
  "name,options,way",
  [
    pytest.param(
      name,
      options,
      way,
      marks=pytest.mark.slow if way == turn and name != "m3mix" else pytest.mark.long,
      id=f"{name}-{options}-{way}",
    )
    for (name, options), turn in zip(VARIANTS, itertools.cycle(("segment", "ring")))
    for way in ("dense", "gather", "segment", "ring")
  ],
)
def test_options_are_equal_in_every_way(name, options, way):
  same(step(name, options, jnp.float32, way, grid(), 4), truth(name, **options))


@pytest.mark.parametrize("way", [pytest.param("gather", marks=pytest.mark.slow), "segment", "ring"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equal_over_the_mesh_in_microbatches(name, way):
  same(step(name, {}, jnp.float32, way, grid(), 4), truth(name))


def test_a_long_axis_is_summed_over_in_two_stages(monkeypatch):
  monkeypatch.setattr(exchange, "TWO_STEPS_FROM", 8)
  mesh = sharding.make_mesh(data=8)
  same(step("clip", {}, jnp.float32, "segment", mesh, 1), truth("clip"))


@pytest.mark.parametrize("devices", slow_unless([1, 8], (8).__eq__))
@pytest.mark.parametrize("way", ["gather", "segment", "ring"])
def test_uneven_rows_columns_and_tiles(way, devices):
  """13 rows and 11 columns: padding of devices, segments and last tiles has no effect."""
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(n, 5)), jnp.float32) for n in (13, 11))
  outputs = {
    f"{side}_{kind}": f"{side}_{kind}" for side in ("row", "col") for kind in ("lse", "sum", "max")
  }

  # Two columns in a tile of 11, or of the 2 to 16 of a block: the last one is padded.
  engine = pairwise.Engine(way, tile_mb=8.5 * 13 / devices / 1e6, budget_mb=1e-4)

  def tile(row, col, shared):
    return dict.fromkeys(outputs, shared["scale"] * engine.products(row["z"], col["z"]))

  def value(x, y, scale):
    found = engine.reduce(tile, {"z": x}, {"z": y}, {"scale": scale}, outputs=outputs)
    cubes = engine.total(
      lambda row, col, shared: {k: v**3 for k, v in [*tile(row, col, shared).items()][:1]},
      {"z": x},
      {"z": y},
      {"scale": scale},
    )
    return sum((v**2).sum() for v in found.values()) + cubes, found

  def wanted(x, y, scale):
    s = scale * x @ y.T
    found = {}
    for side, axis in (("row", 1), ("col", 0)):
      found[f"{side}_lse"] = jax.nn.logsumexp(s, axis)
      found[f"{side}_sum"] = s.sum(axis)
      found[f"{side}_max"] = jax.lax.stop_gradient(s.max(axis))
    return sum((v**2).sum() for v in found.values()) + (s**3).sum(), found

  grads = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  with jax.set_mesh(sharding.make_mesh(data=8)) if devices == 8 else contextlib.nullcontext():
    found = jax.jit(grads(value))(x, y, jnp.float32(0.5))
  expected = jax.jit(grads(wanted))(x, y, jnp.float32(0.5))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.slow
def test_bfloat16_is_the_same_in_every_way_and_near_float32():
  towers, batch = example(jnp.float32)
  feats = embed(towers, batch, jax.random.key(0))
  loss = losses.make_loss({"clip": {}})
  params, state = loss.init(SIZES)

  def grads(way, dtype, mesh):
    def value(zimg, ztxt):
      context = at(engine=pairwise.Engine(way, dtype))
      return loss.apply(params, state, {"zimg": zimg, "ztxt": ztxt}, {}, context)[0]

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      return jax.jit(jax.value_and_grad(value, (0, 1)))(feats["zimg"], feats["ztxt"])

  exact, rounded = (grads("dense", dtype, None) for dtype in ("float32", "bfloat16"))
  for way in ("gather", "segment", "ring"):
    for a, b, c in zip(*map(jax.tree.leaves, (grads(way, "bfloat16", grid()), rounded, exact))):
      assert a.dtype == jnp.float32
      assert jnp.abs(a - b).max() < 4e-3 * jnp.abs(b).max()
      assert 0 < jnp.abs(a - c).max() < 2e-2 * jnp.abs(c).max()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "grid"])
def test_dropout_is_drawn_again_in_the_second_pass(mesh):
  """With microbatches and dropout: the gradient of the whole batch under the same masks."""
  mesh = mesh and grid()
  towers, batch = example(jnp.float32)
  loss = losses.make_loss({"clip": {}})
  own, _ = loss.init(SIZES)

  def whole(params):
    feats = []
    for i in range(4):
      part = {k: gradcache.split(x, 4)[i] for k, x in batch.items()}
      feats.append(embed(params["towers"], part, jax.random.fold_in(jax.random.key(1), i), 0.5))
    feats = {k: gradcache.merge(jnp.stack([f[k] for f in feats])) for k in feats[0]}
    return loss.apply(params["loss"], {"clip": {}}, feats, batch, at())[0]

  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    value, grads = jax.jit(jax.value_and_grad(whole))({"towers": towers, "loss": own})
  found = step("clip", {}, jnp.float32, "auto", mesh, 4, dropout=0.5)
  np.testing.assert_allclose(found[0], value, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[3], grads)
  other = step("clip", {}, jnp.float32, "auto", mesh, 1, dropout=0.5)
  assert abs(float(other[0]) - float(value)) > 1e-4, "another number of microbatches, other masks"


@pytest.mark.parametrize(
  "way", slow_unless(["dense", "gather", "segment", "ring"], ["dense", "segment"].__contains__)
)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_saturated_logits_keep_their_digits(name, way):
  """At a scale of 100 and a loss below 1e-3, float32 is within 1e-6 of float64."""
  rng = np.random.default_rng(0)
  x = np.asarray(unit(rng.normal(size=(48, 64))))
  y = np.asarray(unit(x + 0.05 * rng.normal(size=x.shape)))
  loss = losses.make_loss({name: {}})

  def value(dtype, way, mesh):
    z = [jnp.asarray(v, dtype) for v in (x, y)]
    params = {name: {"t": jnp.asarray(np.log(100), dtype), "b": jnp.asarray(-60.0, dtype)}}

    def objective(x, y):
      context = at(engine=small(way, mesh, len(x)))
      return loss.apply(params, {name: {}}, {"zimg": x, "ztxt": y}, {}, context)[0]

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      if mesh:
        z = [jax.device_put(v, sharding.batch_sharding(mesh)) for v in z]
      return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(objective, (0, 1)))(*z))

  with jax.enable_x64(True):
    expected, wanted = value(jnp.float64, "dense", None)
  assert 0 < expected < 1e-3
  for mesh in (None, grid()):
    found, grads = value(jnp.float32, way, mesh)
    assert abs(found - expected) < 1e-6
    for a, b in zip(grads, wanted):
      assert np.abs(a - b).max() < 1e-6


OF_16_BITS = {
  ("bfloat16", "ring"): (),
  ("float16", "segment"): pytest.mark.slow,
  ("bfloat16", "dense"): pytest.mark.slow,
}


# A float16 ring or matrix and bfloat16 segments run before a release.
@pytest.mark.parametrize(
  "dtype,way",
  [
    pytest.param(dtype, way, marks=OF_16_BITS.get((dtype, way), pytest.mark.long))
    for dtype in ("bfloat16", "float16")
    for way in ("ring", "segment", "dense")
  ],
)
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_inputs_of_16_bits_are_taken_by_every_loss(name, dtype, way):
  """As from a projector that computes in bfloat16, or a store of float16; without computing."""
  towers, batch = example(jnp.float32)
  feats = embed(towers, batch, jax.random.key(0))
  loss = losses.make_loss({name: OPTIONS.get(name, {})})
  params, state = loss.init(SIZES)

  def narrow(x):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  feats, batch = jax.tree.map(narrow, (feats, batch))
  learned = {k: x for k, x in feats.items() if jnp.issubdtype(x.dtype, jnp.floating)}

  def value(params, learned):
    context = at(engine=small(way, None))
    return loss.apply(params, state, {**feats, **learned}, batch, context)

  (value, (after, logs)), (_, grads) = jax.eval_shape(
    jax.value_and_grad(value, (0, 1), has_aux=True), params, learned
  )
  assert value.dtype == logs["loss"].dtype == jnp.float32
  assert all(grads[k].dtype == dtype for k in learned)
  same_shapes = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
  assert all(jax.tree.leaves(same_shapes))


@pytest.mark.parametrize(
  "of_engine,dtype",
  slow_unless(
    itertools.product(["float32", "bfloat16"], ["float16", "bfloat16", "float64"]),
    [("float32", "bfloat16"), ("bfloat16", "float64")].__contains__,
  ),
)
def test_features_of_any_dtype_are_rounded_alike_in_every_way(dtype, of_engine):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, y = (jnp.asarray(unit(rng.normal(size=(12, 8))), dtype) for _ in range(2))

    def value(x, y, way):
      engine = pairwise.Engine(way, of_engine, tile_mb=3e-4, budget_mb=1e-4)

      def tile(row, col, shared):
        return {"lse": 20 * engine.products(row["z"], col["z"])}

      lse = engine.reduce(tile, {"z": x}, {"z": y}, outputs={"lse": "row_lse"})["lse"]
      return (lse - 20 * engine.paired(x, y)).mean()

    grads = jax.jit(jax.value_and_grad(value, (0, 1)), static_argnums=2)
    dense = grads(x, y, "dense")
    for way in ("segment", "ring"):
      for a, b in zip(jax.tree.leaves(grads(x, y, way)), jax.tree.leaves(dense), strict=True):
        assert a.dtype == b.dtype
        off = np.abs(np.asarray(a - b, np.float64)).max()
        close = {"float16": 1e-3, "bfloat16": 8e-3}.get(str(a.dtype), 1e-6)
        close = max(close, 4e-3 if of_engine == "bfloat16" else 0)  # products of cotangents
        assert off <= close * np.abs(np.asarray(b, np.float64)).max()


def test_the_budget_counts_what_is_communicated():
  """A column of 16 bfloat16 numbers in 512 rows, with its float32 gradient: 96 bytes."""
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    x = {"z": jnp.zeros((512, 16), dtype)}
    plan = pairwise.Engine("auto", "bfloat16", budget_mb=512 * 96 / 4e6)._plan(x, x)
    assert plan.segments == 4


@pytest.mark.parametrize(
  "options,message",
  [(dict(way="rings"), "rings"), (dict(dtype="bf16"), "bfloat16"), (dict(tile_mb=0), "tile_mb")],
)
def test_errors_of_the_engine(options, message):
  with pytest.raises(ValueError, match=message):
    pairwise.Engine(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_feature_that_is_not_finite_is_seen_in_the_loss(name):
  """Otherwise a step would log a loss that looks fine."""
  towers, batch = example(jnp.float32)
  loss = losses.make_loss({name: OPTIONS.get(name, {})})
  params, state = loss.init(SIZES)
  feats = {
    k: x.at[3].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    for k, x in embed(towers, batch, jax.random.key(0)).items()
  }
  _, (_, logs) = loss.apply(params, state, feats, {**batch, **feats}, at(step=3, epochs=1.25))
  assert not np.isfinite(logs["loss"])
