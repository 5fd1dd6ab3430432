"""Every projector, and a step of its optimizer, against a few lines of numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marks import slow_unless
from scipy.special import erf

from bigalign import tree
from bigalign.model import DualEncoder
from bigalign.optim import make_optimizer
from bigalign.projectors import PROJECTORS
from bigalign.towers.base import TowerOutput

B, N, D, E = 5, 4, 6, 3
DRAWS = np.random.default_rng(0)
OUT = TowerOutput(
  DRAWS.normal(size=(B, D)),
  DRAWS.normal(size=(B, N, D)),
  np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool),
)


def gelu(x):
  return x * (1 + erf(x / np.sqrt(2))) / 2


def dense(p, name, x):
  return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def norm(p, name, x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}/scale"] + p[f"{name}/bias"]


def mean(x, mask):
  return (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def residual(p, x, at=""):
  x = norm(p, f"{at}ln", x)
  return dense(p, f"{at}skip", x) + dense(p, f"{at}fc2", gelu(dense(p, f"{at}fc1", x)))


def gated(p, out):
  x = norm(p, "ln", out.pooled)
  gate, value = (dense(p, name, x).clip(-1e3, 1e3) for name in ("gate", "value"))
  return dense(p, "out", gate.clip(0, 6) * value)


def tokens(p, out):
  first = dense(p, "fc1", mean(residual(p, out.tokens, "tokens/"), out.mask))
  return norm(p, "ln", first + dense(p, "fc2", gelu(first)))


def silu_gated(p, at, x):
  gate = dense(p, f"{at}/gate", x)
  return dense(p, f"{at}/fc2", gate / (1 + np.exp(-gate)) * dense(p, f"{at}/fc1", x))


def blocks(p, out):
  x = np.concatenate([out.pooled[:, None], out.tokens], 1)
  seen = np.concatenate([np.ones_like(out.mask[:, :1]), out.mask], 1)[:, None]
  y = norm(p, "block_0/ln1", x)
  one_head = {
    name: y @ p[f"block_0/attn/{name}/kernel"][:, 0] + p[f"block_0/attn/{name}/bias"][0]
    for name in ("query", "key", "value")
  }
  logits = one_head["query"] @ one_head["key"].transpose(0, 2, 1) / np.sqrt(D)
  weights = np.where(seen, np.exp(logits), 0)
  y = weights / weights.sum(-1, keepdims=True) @ one_head["value"]
  y = y @ p["block_0/attn/out/kernel"][0] + p["block_0/attn/out/bias"]
  x = x + y * p["block_0/scale_attn"]
  y = silu_gated(p, "block_0/mlp", norm(p, "block_0/ln2", x))
  x = dense(p, "out", norm(p, "ln", x + y * p["block_0/scale_mlp"]))
  return np.concatenate([x[:, 0], mean(x[:, 1:], out.mask)], -1)


# name: (options, the same in numpy, number of parameters at D = 6, E = 3)
CASES = dict(
  linear=(dict(bias=True), lambda p, out: dense(p, "out", out.pooled), 21),
  mlp=(
    dict(bias=True, hidden=7),
    lambda p, out: dense(p, "fc2", gelu(dense(p, "fc1", out.pooled))),
    49 + 24,
  ),
  mlp_norm=(
    dict(hidden=7),
    lambda p, out: norm(p, "ln", dense(p, "fc2", gelu(dense(p, "fc1", out.pooled)))),
    49 + 24 + 6,
  ),
  identity=({}, lambda p, out: out.pooled, 0),
  gated=({}, gated, 8 * D * (2 * D + E + 2) + 2 * D + E),
  residual=(dict(hidden=7), lambda p, out: residual(p, out.pooled), 21 + 49 + 24 + 12),
  patches_and_class=(
    {},
    lambda p, out: (
      residual(p, out.pooled, "class/") + mean(residual(p, out.tokens, "patches/"), out.mask)
    ),
    2 * (21 + 21 + 12 + 12),
  ),
  tokens=({}, tokens, 21 + 21 + 12 + 12 + 12 + 12 + 6),
  blocks=(
    dict(depth=1, heads=1),
    blocks,
    4 * 42 + 6 * 6 + 2 * (6 * 64 + 64) + 64 * 6 + 6 + 12 + 6 * 2,  # 64 hidden units
  ),
)
# E of projectors that take some widths only.
WIDTHS = dict(identity=D, blocks=4)


def test_every_projector_has_a_case():
  assert set(CASES) == set(PROJECTORS)


@pytest.mark.parametrize("name", slow_unless(CASES, {"linear", "mlp", "residual"}.__contains__))
def test_values_and_a_step_are_those_of_numpy(name):
  (options, ours, count), draws = CASES[name], np.random.default_rng(1)
  dim = WIDTHS.get(name, E)
  with jax.enable_x64(True):
    projector = (
      PROJECTORS[name](dim=dim, dtype=jnp.float64, **options)
      if count
      else (PROJECTORS[name](dim=dim))
    )
    made = projector.init(jax.random.key(0), OUT).get("params", {})
    params = {path: draws.normal(size=x.shape) for path, x in tree.flatten(made, "").items()}
    assert sum(x.size for x in params.values()) == count
    weights = draws.normal(size=(B, dim))

    def loss(flat):
      return jnp.sum(projector.apply({"params": tree.unflatten(flat)}, OUT) * weights)

    value, grads = jax.value_and_grad(loss)(params)
    expected = ours(params, OUT)
    # Inputs are float32, and terms of both signs cancel.
    size = np.abs(expected * weights).sum()
    np.testing.assert_allclose(value, (expected * weights).sum(), atol=1e-6 * size, rtol=0)
    if not count:
      return
    optimizer, _ = make_optimizer(
      params=params,
      total_steps=10,
      name="lion",
      lr=1e-2,
      schedule="constant",
      b1=0.9,
      b2=0.99,
      weight_decay=0.1,
      clip_norm=None,
      to_steps=lambda value, where, **_: int(value),
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
  for path, x in params.items():
    # Lion's first step is the sign of the gradient, here by differences of numpy's values.
    way = draws.normal(size=x.shape)
    ahead, behind = (
      (ours({**params, path: x + e * way}, OUT) * weights).sum() for e in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(
      (np.asarray(grads[path]) * way).sum(),
      (ahead - behind) / 2e-6,
      rtol=1e-4,
      atol=1e-6,
      err_msg=path,
    )
    decay = 0.1 * x * (x.ndim > 1 and not path.endswith("/bias"))  # biases of heads: [H, K]
    np.testing.assert_allclose(
      updates[path], -1e-2 * (np.sign(grads[path]) + decay), rtol=1e-5, atol=1e-9, err_msg=path
    )


@pytest.mark.slow
def test_dropout_is_of_training_and_keeps_the_mean():
  projector = PROJECTORS["residual"](dim=E, hidden=7, dropout=0.5, hidden_dropout=0.5)
  variables = projector.init(jax.random.key(0), OUT)
  calm = projector.apply(variables, OUT)
  np.testing.assert_array_equal(calm, projector.apply(variables, OUT, False))
  one, two = (
    projector.apply(variables, OUT, True, rngs={"dropout": jax.random.key(k)}) for k in (1, 2)
  )
  assert (np.asarray(one) != np.asarray(two)).all()


def test_projectors_of_tokens_refuse_stored_vectors():
  stored = TowerOutput(OUT.pooled, OUT.tokens[:, :0])
  for name in ("tokens", "patches_and_class", "blocks"):
    with pytest.raises(ValueError, match=r"reads tokens, and config\.data\.stores holds pooled"):
      PROJECTORS[name](dim=4).init(jax.random.key(0), stored)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_losses_get_float32_embeddings_whatever_a_projector_computes_in(name, dtype):
  options = {} if name == "identity" else {"dtype": dtype}
  model = DualEncoder(None, None, *[PROJECTORS[name](dim=D, **options)] * 2, pixels="half")
  rows = jnp.asarray(DRAWS.normal(size=(B, 1 + N, D)), jnp.float32)  # as an embedding store's
  feats, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), rows, rows)
  for field in ("zimg", "ztxt", "raw_img", "raw_txt"):
    assert feats[field].dtype == jnp.float32, field


@pytest.mark.parametrize(
  "name,options,message",
  [
    ("mlp", dict(hidden=0), "Mlp.hidden=0 must be at least 1"),
    ("residual", dict(hidden=-4), "Residual.hidden=-4 must be at least 1"),
    ("gated", dict(ratio=0), "Gated.ratio=0 must be at least 1"),
    ("residual", dict(dropout=1.5), "Residual.dropout=1.5 must be at least 0 and below 1"),
    ("residual", dict(hidden_dropout=1.0), "Residual.hidden_dropout=1.0 must be at least 0"),
    ("tokens", dict(dropout=-0.1), "Tokens.dropout=-0.1 must be at least 0"),
    ("linear", dict(dtype="bf16"), "Linear.dtype: unknown 'bf16'"),
    ("blocks", dict(drop_path=1.0), "Blocks.drop_path=1.0 must be at least 0 and below 1"),
  ],
)
def test_options_outside_their_bounds_are_refused(name, options, message):
  with pytest.raises(ValueError, match=f"projector {message}"):
    PROJECTORS[name](dim=E, **options)
