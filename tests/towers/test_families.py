"""Towers of pretrained families: scanned, rematerialised, sharded, padded, in half precision."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_towers import apply, stack_layers

from bigalign import sharding, tree
from bigalign.towers import TOWERS

SIZE = dict(width=16, depth=2, heads=2, mlp_ratio=2.0)
KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
IDS = jax.random.randint(jax.random.key(2), (2, 8), 2, 20)
MASK = jnp.arange(8)[None] < jnp.asarray([[8], [5]])

FAMILIES = {
  "clip": (
    dict(
      name="vit",
      pool="cls",
      class_position=True,
      pre_norm=True,
      patch_bias=False,
      activation="quick_gelu",
      epsilon=1e-5,
    ),
    (IMAGE,),
  ),
  "dinov2": (
    dict(
      name="vit",
      pool="cls",
      class_position=True,
      registers=2,
      gated=True,
      activation="silu",
      layer_scale=0.1,
    ),
    (IMAGE,),
  ),
  "dinov3": (
    dict(
      name="vit",
      pool="cls",
      positions="rope",
      registers=1,
      biases="qvo",
      mlp_bias=False,
      layer_scale=0.1,
    ),
    (IMAGE,),
  ),
  "vit": (dict(name="vit", pool="pooler", class_position=True, epsilon=1e-12), (IMAGE,)),
  "naflex": (dict(name="naflex", grid=3), (IMAGE,)),
  "bert": (dict(name="bert", vocab_size=20, length=8, pool="pooler"), (IDS, MASK)),
  "mpnet": (
    dict(
      name="bert",
      vocab_size=20,
      length=8,
      types=0,
      pad=1,
      skip_padding=True,
      buckets=32,
      pool="mean",
      unit=True,
    ),
    (IDS, MASK),
  ),
}


def build(family, **options):
  given, inputs = FAMILIES[family]
  given = {**SIZE, "dtype": "float32", **given, **options}
  if given["name"] in ("vit", "naflex"):
    given["patch"] = 4
  return TOWERS[given.pop("name")](**given).build(), inputs


@pytest.mark.parametrize(
  "family",
  [
    pytest.param(x, marks=[] if x in ("dinov2", "dinov3", "mpnet") else [pytest.mark.slow])
    for x in FAMILIES
  ],
)
@pytest.mark.slow
def test_scan_and_remat_do_not_change_values(family):
  """Outputs and gradients, with what all blocks share: a rotation or a bias of attention."""
  plain, inputs = build(family, scan=False)
  other, _ = build(family, scan=True, remat="full")
  params = jax.jit(plain.init)(KEY, *inputs)["params"]
  paths = tree.flatten(params)
  assert not [path for path in paths if re.search(r"[A-Z]\w*_\d+", path)], "paths are explicit"

  def value(tower, p):
    return jnp.sin(tower.apply({"params": p}, *inputs).pooled * 3).sum()

  a, da = jax.jit(jax.value_and_grad(lambda p: value(plain, p)))(params)
  b, db = jax.jit(jax.value_and_grad(lambda p: value(other, p)))(stack_layers(params))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), stack_layers(da), db
  )
  # Every parameter matters but the key's bias, which softmax does not see, and unused types.
  still = [path for path, x in tree.flatten(da).items() if not np.abs(x).max()]
  assert all(re.search(r"key/bias$", path) for path in still), still


@pytest.mark.parametrize("family", ["dinov2", "mpnet"])
def test_towers_lie_on_a_mesh_by_the_rules(family):
  """Gated hidden units are split over the tensor axis too."""
  tower, inputs = build(family)
  shapes = tree.flatten(jax.eval_shape(tower.init, KEY, *inputs)["params"])
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  places = sharding.shardings(shapes, mesh)
  for path in ("encoder/blocks/mlp/fc1/kernel", "encoder/blocks/mlp/gate/kernel"):
    if path in shapes:
      assert "tensor" in jax.tree.leaves(tuple(places[path].spec)), path


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_near(family):
  tower, inputs = build(family)
  half, _ = build(family, dtype="bfloat16")
  params = jax.jit(tower.init)(KEY, *inputs)
  a, b = (np.asarray(apply(x, params, *inputs).pooled, np.float32) for x in (tower, half))
  assert np.abs(a - b).max() < 0.1 * np.abs(a).max()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_padding_does_not_move_the_embedding(family):
  tower, (ids, mask) = build(family)
  params = jax.jit(tower.init)(KEY, ids, mask)
  pad = tower.options.pad
  first = apply(tower, params, jnp.where(mask, ids, pad), mask)
  shorter = apply(tower, params, ids[1:, :5])
  np.testing.assert_allclose(first.pooled[1], shorter.pooled[0], atol=1e-5)
  unmasked = apply(tower, params, jnp.where(mask, ids, pad))  # the pad token is padding
  np.testing.assert_allclose(first.pooled, unmasked.pooled, atol=1e-6)


@pytest.mark.slow
def test_naflex_takes_pictures_of_any_aspect():
  """A picture is its patches; padding does not matter, the aspect does."""
  tower, _ = build("naflex")
  params = jax.jit(tower.init)(KEY, IMAGE)
  wide = IMAGE.reshape(2, 8, 32, 3)
  flat = wide.reshape(2, 2, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 48)
  shapes = jnp.asarray([[2, 8], [2, 8]])
  whole = apply(tower, params, wide).pooled
  np.testing.assert_allclose(whole, apply(tower, params, flat, None, shapes).pooled, atol=1e-5)
  padded = jnp.concatenate([flat, 9 * jnp.ones((2, 3, 48))], 1)
  mask = jnp.broadcast_to(jnp.arange(19)[None] < 16, (2, 19))
  np.testing.assert_allclose(whole, apply(tower, params, padded, mask, shapes).pooled, atol=1e-5)
  other = apply(tower, params, flat, None, shapes[:, ::-1]).pooled
  assert np.abs(whole - other).max() > 1e-4
  with pytest.raises(ValueError, match="rows and columns"):
    tower.apply(params, flat)


def test_rope_does_not_know_the_size_of_the_grid():
  """Centres lie in [-1, 1]: one set of parameters for all sizes."""
  tower, _ = build("dinov3")
  params = jax.jit(tower.init)(KEY, IMAGE)
  larger = jnp.repeat(jnp.repeat(IMAGE, 2, 1), 2, 2)
  assert apply(tower, params, larger).tokens.shape == (2, 64, 16)


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: TOWERS["vit"](class_token=False, pool="cls"), "class_token=False"),
    (lambda: TOWERS["vit"](positions="rope", patch_dropout=0.5), "not with positions='rope'"),
    (lambda: TOWERS["vit"](stem="conv", patch_bias=False), "a conv stem needs"),
    (lambda: TOWERS["bert"](vocab_size=9, length=4, pool="last"), "pool: unknown 'last'"),
    (lambda: TOWERS["bert"](vocab_size=9, length=4, dtype="half"), "text.dtype: unknown 'half'"),
    (lambda: TOWERS["naflex"](activation="relu"), "activation: unknown 'relu'"),
    (lambda: TOWERS["naflex"](dtype="bf16"), "image.dtype: unknown 'bf16'"),
    (lambda: TOWERS["text"](vocab_size=9, length=4, pool="first"), "known: .'argmax'"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
