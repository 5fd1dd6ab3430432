"""Towers and the model: padding, scan, remat, patch dropout, names."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marks import slow_unless

from bigalign import sharding, tree
from bigalign.model import make_model, unit
from bigalign.projectors import PROJECTORS
from bigalign.towers import TOWERS, base, linear
from bigalign.towers.vit import sincos2d

SMALL = dict(width=32, depth=2, heads=4, dtype="float32")
KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(tower, params, *args, **kwargs):
  """tower.apply, compiled: an eager tower compiles each of its operations."""
  return tower.apply(params, *args, **kwargs)


def stack_layers(params):
  """Parameters of separate layers, "block_0/…", as those of a scanned tower, "blocks/…"."""
  out, layers = {}, {}
  for path, x in tree.flatten(params).items():
    found = re.fullmatch(r"(.*)block_(\d+)/(.*)", path)
    if found:
      layers.setdefault(f"{found[1]}blocks/{found[3]}", {})[int(found[2])] = x
    else:
      out[path] = x
  return tree.unflatten(
    out | {path: jnp.stack([x[i] for i in sorted(x)]) for path, x in layers.items()}
  )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_scan_and_remat_do_not_change_values(remat):
  """Outputs and gradients of separate layers, against scanned and rematerialised ones."""
  plain = TOWERS["vit"](patch=8, scan=False, **SMALL).build()
  other = TOWERS["vit"](patch=8, scan=True, remat=remat, **SMALL).build()
  params = jax.jit(plain.init)(KEY, IMAGE)["params"]

  def value(tower, p):
    return jnp.square(tower.apply({"params": p}, IMAGE).pooled).sum()

  a, da = jax.jit(jax.value_and_grad(lambda p: value(plain, p)))(params)
  b, db = jax.jit(jax.value_and_grad(lambda p: value(other, p)))(stack_layers(params))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-4), stack_layers(da), db
  )


@pytest.mark.parametrize(
  "causal,pool",
  slow_unless(
    itertools.product([False, True], ["eos", "mean", "map"]),
    [(False, "mean"), (True, "eos")].__contains__,
  ),
)
def test_padding_does_not_move_the_embedding(pool, causal):
  """Neither what stands in the padding nor how much of it there is."""
  tower = TOWERS["text"](vocab_size=50, length=16, pool=pool, causal=causal, **SMALL).build()
  ids = jax.random.randint(KEY, (3, 16), 1, 50)
  real = jnp.asarray([5, 9, 12])
  mask = jnp.arange(16)[None] < real[:, None]
  params = jax.jit(tower.init)(KEY, ids, mask)
  first = apply(tower, params, ids, mask).pooled
  scribbled = apply(tower, params, jnp.where(mask, ids, 7), mask).pooled
  shorter = apply(tower, params, ids[:, :12], mask[:, :12]).pooled
  np.testing.assert_allclose(first, scribbled, atol=1e-6)
  np.testing.assert_allclose(first, shorter, atol=1e-5)
  moved = apply(tower, params, ids.at[:, 2].add(1) % 50, mask).pooled
  assert np.abs(first - moved).max() > 1e-3  # the test sees what it should


def test_siglip_attends_to_padding():
  """mask_padding=False: what stands in the padding matters, as in the published SigLIP."""
  tower = TOWERS["text"](vocab_size=50, length=8, pool="last", mask_padding=False, **SMALL).build()
  ids = jnp.ones((1, 8), jnp.int32)
  mask = jnp.arange(8)[None] < 4
  params = jax.jit(tower.init)(KEY, ids, mask)
  moved = apply(tower, params, ids.at[:, 6].set(3), mask).pooled
  assert np.abs(apply(tower, params, ids, mask).pooled - moved).max() > 1e-4


def test_a_causal_text_does_not_see_ahead():
  tower = TOWERS["text"](vocab_size=50, length=8, causal=True, **SMALL).build()
  ids = jnp.arange(8)[None]
  params = jax.jit(tower.init)(KEY, ids)
  tokens = apply(tower, params, ids).tokens
  later = apply(tower, params, ids.at[:, 5:].set(1)).tokens
  np.testing.assert_allclose(tokens[:, :5], later[:, :5], atol=1e-6)
  assert np.abs(tokens[:, 5:] - later[:, 5:]).max() > 1e-3


@pytest.mark.slow
def test_patch_dropout_keeps_a_random_part_in_training_only():
  tower = TOWERS["vit"](patch=8, patch_dropout=0.75, **SMALL).build()
  params = jax.jit(tower.init)(KEY, IMAGE)
  keys = [{"patch_dropout": jax.random.key(i), "dropout": KEY} for i in (0, 1)]
  one, two = (apply(tower, params, IMAGE, train=True, rngs=k) for k in keys)
  assert one.tokens.shape == (2, 4, 32)
  assert np.abs(one.pooled - two.pooled).max() > 1e-4
  assert apply(tower, params, IMAGE).tokens.shape == (2, 16, 32)


@pytest.mark.parametrize(
  "pool,stem,positions",
  slow_unless(
    [("map", "patch", "learned"), ("cls", "conv", "sincos2d"), ("mean", "patch", "sincos2d")],
    ("cls", "conv", "sincos2d").__eq__,
  ),
)
def test_every_shape_of_vit(pool, stem, positions):
  """Registers are no patches; the pooled vector depends on the image."""
  tower = TOWERS["vit"](
    patch=8, pool=pool, stem=stem, positions=positions, registers=2, **{**SMALL, "depth": 1}
  ).build()
  params = jax.jit(tower.init)(KEY, IMAGE)
  out = apply(tower, params, IMAGE)
  assert out.pooled.shape == (2, 32) and out.tokens.shape == (2, 16, 32)
  assert np.abs(out.pooled - apply(tower, params, -IMAGE).pooled).max() > 1e-4


def test_class_token_and_patches_in_one_vector():
  options = dict(patch=8, registers=2, **{**SMALL, "depth": 1})
  one, other, both = (
    TOWERS["vit"](pool=pool, **options).build() for pool in ("cls", "mean", "cls+mean")
  )
  params = jax.jit(both.init)(KEY, IMAGE)
  other = TOWERS["vit"](pool="mean", class_token=True, **options).build()
  expected = [apply(tower, params, IMAGE).pooled for tower in (one, other)]
  np.testing.assert_array_equal(apply(both, params, IMAGE).pooled, np.concatenate(expected, 1))


def test_the_largest_value_of_the_patches_in_each_place():
  tower = TOWERS["vit"](pool="max", patch=8, **{**SMALL, "depth": 1}).build()
  out = apply(tower, jax.jit(tower.init)(KEY, IMAGE), IMAGE)
  np.testing.assert_array_equal(out.pooled, out.tokens.max(1))


def test_patches_equal_a_strided_convolution():
  """The kernel [p, p, 3, D] means what a convolution of stride p means."""
  from bigalign.towers.vit import PatchEmbed

  module = PatchEmbed(8, 16, jnp.float32)
  params = jax.jit(module.init)(KEY, IMAGE)
  kernel = params["params"]["kernel"]
  expected = jax.lax.conv_general_dilated(
    IMAGE, kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_allclose(module.apply(params, IMAGE), expected, atol=1e-5)


def test_sincos_positions_tell_rows_from_columns():
  table = sincos2d(4, 4, 32)
  assert table.shape == (16, 32)
  distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
  assert distances[np.triu_indices(16, 1)].min() > 0.1


def test_unit_norm_of_zero_is_zero_with_a_finite_gradient():
  x = jnp.zeros((1, 4)).at[0].set(0)
  assert np.isfinite(jax.grad(lambda v: unit(v).sum())(x)).all()
  np.testing.assert_allclose(np.linalg.norm(unit(IMAGE), axis=-1), 1, rtol=1e-6)


def test_every_path_is_explicit():
  """No Dense_0: a parameter's path is its address in checkpoints and outlives its class."""
  for scan in (True, False):
    model = make_model(
      image=dict(name="vit", patch=8, stem="conv", registers=1, pool="map", scan=scan, **SMALL),
      text=dict(name="text", vocab_size=9, length=8, pool="map", scan=scan, **SMALL),
      embed_dim=8,
      image_projector=dict(name="mlp"),
      text_projector=dict(name="linear"),
    )
    zeros = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3), jnp.uint8), zeros)
    paths = list(tree.flatten(shapes["params"]))
    automatic = [path for path in paths if re.search(r"[A-Z]\w*_\d+", path)]
    assert not automatic, automatic


def test_variants_have_the_published_sizes():
  """Parameters of the encoders in millions, from the papers' tables (Ti, S, B, L, So400m)."""
  published = {"Ti": 5.5, "S": 21.7, "B": 85.8, "L": 303.3, "So400m": 411.0}
  for name, millions in published.items():
    tower = TOWERS["vit"](variant=name, patch=16, pool="mean").build()
    shapes = jax.eval_shape(tower.init, KEY, jnp.zeros((1, 224, 224, 3)))
    count = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    assert abs(count - millions) / millions < 0.02, (name, count)
  assert set(base.VARIANTS) >= {"Ti", "S", "B", "L", "So400m", "H", "g", "G"}


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: TOWERS["vit"](pool="min"), "config.model.image.pool: unknown 'min'; known"),
    (lambda: TOWERS["vit"](variant="XL"), "variant: unknown 'XL'"),
    (lambda: TOWERS["vit"](width=30, heads=4), "does not divide into 4 heads"),
    (lambda: TOWERS["vit"](patch=12, stem="conv"), "power of 2"),
    (lambda: TOWERS["vit"](patch=7, **SMALL).build().init(KEY, IMAGE), "does not divide the image"),
    (lambda: TOWERS["text"](vocab_size=9, length=4, remat="some"), "known: .'attention', 'dots'"),
    (
      lambda: PROJECTORS["identity"](8).init(KEY, base.TowerOutput(jnp.ones((1, 4)), IMAGE)),
      "embed_dim is 8",
    ),
    (lambda: make_model(image=dict(name="vitt"), text={}, embed_dim=1), "Did you mean 'vit'"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.optimized
def test_gradients_of_bfloat16_kernels_are_summed_in_float32():
  """Of every kernel of a block: the sum over the batch, and so over the mesh, is not rounded."""
  block = base.Block(heads=2, hidden=32, dtype=jnp.bfloat16)
  x = jax.random.normal(jax.random.key(0), (8, 6, 16), jnp.bfloat16)
  params = block.init(jax.random.key(1), x, None, True)

  def value(params):
    return jnp.sum(block.apply(params, x, None, True)[0].astype(jnp.float32) ** 2)

  grads = tree.flatten(jax.grad(value)(params)["params"])
  kernels = {path: g for path, g in grads.items() if path.endswith("kernel")}
  assert len(kernels) == 6
  for path, g in kernels.items():
    assert g.dtype == jnp.float32, path
    assert np.any(np.asarray(g) != np.asarray(g.astype(jnp.bfloat16), np.float32)), path
  exact = base.Block(heads=2, hidden=32, dtype=jnp.float32)
  wanted = tree.flatten(
    jax.grad(lambda p: jnp.sum(exact.apply(p, x.astype(jnp.float32), None, True)[0] ** 2))(params)[
      "params"
    ]
  )
  for path, g in kernels.items():
    error = np.linalg.norm(g - wanted[path]) / np.linalg.norm(wanted[path])
    assert error < 0.05, (path, error)


@pytest.mark.slow
@pytest.mark.parametrize(
  "tower, projector, kernels",
  [
    (("vit", dict(patch=8, pool="map", gated=True)), "mlp", 16),
    (("vit", dict(patch=8, pool="pooler", stem="conv")), "linear", 9),
    (("bert", dict(vocab_size=4, length=8, pool="pooler")), "gated", 10),
  ],
)
def test_no_kernel_of_a_product_has_a_rounded_gradient(tower, projector, kernels):
  """In towers and projectors of bfloat16; those of convolutions have."""
  name, options = tower
  dtype = dict(dtype="bfloat16")
  tower = TOWERS[name](width=16, depth=1, heads=2, scan=False, **options, **dtype).build()
  projector = PROJECTORS[projector](dim=8, **dtype)
  x = (
    jax.random.uniform(jax.random.key(0), (8, 16, 16, 3))
    if name == "vit"
    else jax.random.randint(jax.random.key(0), (8, 6), 1, 4)
  )

  @jax.jit
  def grads(x):
    params = [tower.init(jax.random.key(1), x)]
    params.append(projector.init(jax.random.key(2), tower.apply(params[0], x)))

    def value(params):
      z = projector.apply(params[1], tower.apply(params[0], x))
      return jnp.sum(z.astype(jnp.float32) ** 2)

    return jax.grad(value)(params)

  found = {
    path: g
    for part in grads(x)
    for path, g in tree.flatten(part["params"]).items()
    if path.endswith("kernel") and "conv_" not in path
  }
  assert len(found) == kernels
  for path, g in found.items():
    assert g.dtype == jnp.float32, path
    assert np.any(np.asarray(g) != np.asarray(g.astype(jnp.bfloat16), np.float32)), path


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("parts", [1, 8])
def test_a_token_counts_as_often_as_it_comes(stored, parts):
  """4,096 times the same one: in bfloat16 a sum of ones stays at 256."""
  ids = jnp.zeros((64, 64), jnp.int32).at[0, 0].set(2)
  table = jnp.ones((3, 4), stored)

  def value(table, ids):
    return linear.lookup(table, ids, jnp.bfloat16).astype(jnp.float32).sum()

  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:parts])):
    found = jax.jit(jax.grad(value))(table, ids)
  np.testing.assert_array_equal(found, jax.grad(value)(table, ids))
  assert found.dtype == stored
  # bfloat16 has no 4,095; its own sum on each device ends at 4,096.
  wanted = np.float32([4095, 0, 1]).astype(stored)
  np.testing.assert_array_equal(found, np.repeat(wanted[:, None], 4, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, options",
  [
    ("text", dict(pool="mean")),
    ("bert", {}),
    ("bert", dict(skip_padding=True, buckets=8)),
  ],
)
def test_tables_of_bfloat16_towers_learn_what_those_of_float32_do(name, options):
  """Of tokens, types and places in texts of one token, where every sum is a long one."""
  options = dict(vocab_size=3, width=16, depth=1, heads=2, length=64, scan=False) | options
  ids = jnp.full((64, 64), 2, jnp.int32)
  types = dict(types=jnp.zeros_like(ids)) if name == "bert" else {}
  weights = jax.random.normal(jax.random.key(2), (16,))

  def grads(dtype, params=None):
    tower = TOWERS[name](**options, dtype=dtype).build()
    params = params or tower.init(jax.random.key(0), ids)
    return params, tree.flatten(
      jax.grad(lambda p: (tower.apply(p, ids, **types).pooled.astype(jnp.float32) @ weights).sum())(
        params
      )["params"]
    )

  params, wanted = grads("float32")
  _, found = grads("bfloat16", params)
  for path in ("embedding", "positions", "types", "relative"):
    if path in wanted:
      error = np.linalg.norm(found[path] - wanted[path]) / np.linalg.norm(wanted[path])
      assert error < 0.05, (path, error)
