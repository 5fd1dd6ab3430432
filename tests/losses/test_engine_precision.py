"""Products of float32 logits on TPUs: their passes, and what those cost in accuracy."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import at, unit

from bigalign import losses
from bigalign.losses.engine import pairwise

N, E = 256, 128
PASSES = {"HIGHEST": 6, "HIGH": 3, "DEFAULT": 1}


def pairs():
  """Unit vectors with a common part, as in a trained model: cosines of 0.35 and 0.1 +- 0.06."""
  rng = np.random.default_rng(0)
  common, own, *noise = (unit(rng.normal(size=(n, E))) for n in (1, N, N, N))
  x, y = (
    unit(np.sqrt(0.1) * common + np.sqrt(0.25) * own + np.sqrt(0.65) * part) for part in noise
  )
  return np.asarray(x, np.float64), np.asarray(y, np.float64)


def objective(name, dtype, precision, x, y):
  """The loss at a scale of 100."""
  params = {name: {"t": jnp.asarray(np.log(100.0), dtype), "b": jnp.asarray(-30.0, dtype)}}
  engine = pairwise.Engine("gather", precision=precision)
  return losses.make_loss({name: {}}).apply(
    params, {name: {}}, {"zimg": x, "ztxt": y}, {}, at(engine=engine)
  )[0]


def in_passes(x, y, *, precision):
  """x @ y as a TPU multiplies float32 numbers: products of their bfloat16 parts, in float32."""
  count = PASSES[precision.name]

  def parts(z):
    found = []
    for _ in range({1: 1, 3: 2, 6: 3}[count]):
      found.append(z.astype(jnp.bfloat16).astype(jnp.float32))
      z = z - found[-1]
    return found

  left, right = parts(x), parts(y)
  return sum(
    jnp.matmul(left[i], right[j])
    for i in reversed(range(len(left)))
    for j in reversed(range(len(left) - i))
  )


@functools.cache
def results(name, precision):
  """(loss, gradients): in float64, or with the passes of a TPU."""
  x, y = pairs()
  dtype = jnp.float64 if precision == "float64" else jnp.float32
  with jax.enable_x64(precision == "float64"):
    args = (jnp.asarray(z, dtype) for z in (x, y))
    of = "highest" if precision == "float64" else precision
    found = jax.jit(jax.value_and_grad(functools.partial(objective, name, dtype, of), (0, 1)))(
      *args
    )
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(
  "name,precision,of_loss,of_gradients",
  [
    ("clip", "high", 2e-6, 4e-3),
    ("siglip", "high", 2e-6, 4e-3),
    ("siglip", "highest", 1e-6, 1e-5),
  ],
)
def test_errors_of_the_passes(monkeypatch, name, precision, of_loss, of_gradients):
  """Of the loss relative to it, of gradients relative to their norms; 2^-9 rounds to bfloat16."""
  monkeypatch.setattr(
    pairwise,
    "PRECISIONS",
    {
      name: tuple(functools.partial(in_passes, precision=f.keywords["precision"]) for f in pair)
      for name, pair in pairwise.PRECISIONS.items()
    },
  )
  value, grads = results(name, precision)
  exact, wanted = results(name, "float64")
  assert 0 < abs(value - exact) <= of_loss * exact
  for a, b in zip(grads, wanted, strict=True):
    assert np.linalg.norm(a - b) <= of_gradients * np.linalg.norm(b)


def products(name, way, precision, platform):
  """{precision: number of products} of a loss and its gradients, as the compiler gets them."""
  z = jax.ShapeDtypeStruct((64, 16), jnp.float32)
  engine = pairwise.Engine(way, precision=precision)
  loss = losses.make_loss({name: {}})
  params, state = loss.init({"image": 64, "text": 64, "embed": 16})

  def value(x, y):
    return loss.apply(params, state, {"zimg": x, "ztxt": y}, {}, at(engine=engine))[0]

  traced = jax.jit(jax.value_and_grad(value, (0, 1))).trace(z, z)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  return collections.Counter(re.findall(r"dot_general.*precision = \[(\w+), \w+\]", text))


@pytest.mark.parametrize("name,way,forward", [("clip", "gather", 2), ("siglip", "gather", 1)])
def test_passes_of_a_tpu(name, way, forward):
  """A sum has its value with its gradient; what is kept needs no second forward product."""
  assert products(name, way, "high", "tpu") == {"HIGH": forward, "DEFAULT": 2}
  assert products(name, way, "highest", "tpu") == {"HIGHEST": forward + 2}
  for platform in ("cpu", "cuda"):
    assert products(name, way, "high", platform) == {"HIGHEST": forward + 2}


def test_products_on_cpus_are_those_of_plain_differentiation():
  x, y = (jnp.asarray(z, jnp.float32) for z in pairs())
  weight = jnp.sin(jnp.arange(N, dtype=jnp.float32))

  def value(product, x, y):
    return (jnp.tanh(product(x, y)) * weight[None]).sum()

  def plain(x, y):
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)

  found, expected = (
    jax.jit(jax.value_and_grad(functools.partial(value, f), (0, 1)))(x, y)
    for f in (pairwise.Engine().products, plain)
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype,count", [("float32", 4), ("bfloat16", 2)])
def test_a_product_is_not_differentiated_for_fixed_features(dtype, count):
  """In float32 each of the two products is written for TPUs and for others."""
  x, products = jax.ShapeDtypeStruct((8, 4), jnp.float32), pairwise.Engine(dtype=dtype).products
  jaxpr = jax.make_jaxpr(jax.grad(lambda x, y: products(x, y).sum()))(x, x)
  assert str(jaxpr).count("dot_general") == count
